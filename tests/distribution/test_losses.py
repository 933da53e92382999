import math

import pytest
import torch
from cbbl_d2.distribution import UNCERTAINTIES, cbbl_loss, entropy, exponential_grid, two_hot


def slow_reference(logits, offsets, grid, label):
    """Cross entropy and label, coordinate by coordinate in float64, from the formulas."""
    num_points = len(grid)
    points = grid.double().tolist()
    losses, labels = [], []
    for row, t in zip(logits.double().reshape(-1, num_points), offsets.double().flatten().tolist()):
        t = min(max(t, points[0]), points[-1])
        target = [0.0] * num_points
        for i in range(num_points - 1):
            low, high = points[i], points[i + 1]
            if low <= t <= high:
                target = [0.0] * num_points
                target[i], target[i + 1] = (high - t) / (high - low), (t - low) / (high - low)
        if label == "one_hot":
            nearest = min(range(num_points), key=lambda i: abs(points[i] - t))
            target = [float(i == nearest) for i in range(num_points)]
        log_p = (row - row.exp().sum().log()).tolist()
        losses.append(-sum(a * b for a, b in zip(target, log_p) if a > 0))
        labels.append(target)
    shape = offsets.shape
    return torch.tensor(losses).view(shape), torch.tensor(labels).view(*shape, num_points)


@pytest.mark.parametrize("label", ("two_hot", "one_hot"))
def test_cross_entropy_equals_a_slow_reference(label):
    torch.manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 5)
    logits, offsets = torch.randn(60, 4, 6) * 3, torch.randn(60, 4) * 3
    expected, _ = slow_reference(logits, offsets, grid, label)
    for reduction, reduce in (("none", lambda x: x), ("sum", torch.sum), ("mean", torch.mean)):
        loss, _ = cbbl_loss(logits, offsets, grid, reduction=reduction, label=label)
        assert torch.allclose(loss.double(), reduce(expected).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", ("two_hot", "one_hot"))
@pytest.mark.parametrize("num_intervals, beta", ((2, 1.0), (5, 1.0), (16, 0.0), (40, 0.5)))
def test_gradient_is_p_minus_label(label, num_intervals, beta):
    torch.manual_seed(num_intervals)
    num_points = num_intervals + 1
    grid = exponential_grid(5.0, beta, num_intervals)
    logits = (torch.randn(2500, 4, num_points) * 3).requires_grad_()  # 10,000 coordinates
    offsets = torch.randn(2500, 4) * 3
    cbbl_loss(logits, offsets, grid, label=label)[0].backward()
    if label == "two_hot":
        left, right_weight = two_hot(offsets, grid)
        target = torch.zeros_like(logits).scatter_(-1, left[..., None], 1 - right_weight[..., None])
        target.scatter_(-1, left[..., None] + 1, right_weight[..., None])
    else:
        nearest = (offsets.clamp(-5, 5)[..., None] - grid).abs().argmin(-1, keepdim=True)
        target = torch.zeros_like(logits).scatter_(-1, nearest, 1.0)
    expected = logits.detach().softmax(-1) - target
    assert (logits.grad - expected).abs().max() < 1e-6
    assert logits.grad.abs().max() <= 1


def test_uncertainty_by_hand():
    grid = torch.tensor([-5.0, -3, -1, 1, 3, 5])
    logits, offsets = torch.zeros(1, 6), torch.zeros(1)  # H(p) = log 6, H(p*) = log 2
    assert cbbl_loss(logits, offsets, grid, uncertainty="entropy")[1].item() == pytest.approx(
        math.log(6)
    )
    assert cbbl_loss(logits, offsets, grid, uncertainty="entropy_gap")[1].item() == pytest.approx(
        math.log(3)
    )
    assert cbbl_loss(logits, offsets, grid, uncertainty="none")[1].item() == 0
    # Surer than its label: the gap counts in both directions.
    sure = torch.tensor([[0.0, 0, 100, 0, 0, 0]])
    assert cbbl_loss(sure, offsets, grid)[1].item() == pytest.approx(math.log(2))


def test_entropy_loss_equals_entropy_and_its_gradient_is_autograd_s():
    torch.manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 6).double()
    logits = torch.randn(5, 4, 7, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(5, 4, dtype=torch.float64)
    for mode in ("entropy", "entropy_gap"):
        assert torch.autograd.gradcheck(
            lambda x, mode=mode: cbbl_loss(x, offsets, grid, uncertainty=mode), (logits,)
        )
    loss = cbbl_loss(logits, offsets, grid, uncertainty="entropy")[1]
    assert torch.allclose(loss, entropy(logits).sum())


@pytest.mark.parametrize("uncertainty", UNCERTAINTIES)
@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
def test_empty_input_gives_zero_with_a_live_gradient(uncertainty, reduction):
    logits = torch.zeros(0, 4, 6, requires_grad=True)
    losses = cbbl_loss(
        logits,
        torch.zeros(0, 4),
        exponential_grid(5.0, 1.0, 5),
        uncertainty=uncertainty,
        reduction=reduction,
    )
    total = sum(loss.sum() for loss in losses)
    assert total == 0
    total.backward()
    assert logits.grad.shape == logits.shape


def test_extreme_logits_keep_loss_and_gradient_finite():
    grid = exponential_grid(5.0, 1.0, 5)
    logits = torch.tensor([[1e4, -1e4, 0, 0, 0, 0], [-1e4, 1e4, 3, 1, 0, -5]], requires_grad=True)
    ce, gap = cbbl_loss(logits, torch.tensor([5.0, -1.0]), grid)
    assert torch.isfinite(ce) and torch.isfinite(gap)
    (ce + gap).backward()
    assert torch.isfinite(logits.grad).all()


def test_nan_logits_are_not_hidden():
    logits = torch.full((1, 4, 6), math.nan)
    assert cbbl_loss(logits, torch.zeros(1, 4), exponential_grid(5.0, 1.0, 5))[0].isnan()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_computes_in_float32(dtype):
    torch.manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 5)
    logits, offsets = torch.randn(100, 4, 6).to(dtype), torch.randn(100, 4)
    with torch.autocast("cpu", dtype=dtype):
        losses = cbbl_loss(logits, offsets, grid)
    for loss, exact in zip(losses, cbbl_loss(logits.double(), offsets, grid)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"uncertainty": "gap"}, "uncertainty must be one of .*'gap'"),
        ({"reduction": "avg"}, "reduction must be one of .*'avg'"),
        ({"label": "three_hot"}, "label must be one of .*'three_hot'"),
        ({"offsets": torch.zeros(3, 3)}, r"\(3, 4, 6\).*\(3, 3\).*6 points"),
        ({"grid": torch.arange(5.0)}, r"\(3, 4, 6\).*5 points"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {
        "logits": torch.zeros(3, 4, 6),
        "offsets": torch.zeros(3, 4),
        "grid": exponential_grid(5.0, 1.0, 5),
    }
    with pytest.raises(ValueError, match=message):
        cbbl_loss(**{**good, **arguments})


@pytest.mark.parametrize("kind", ["entropy_gap", "entropy"])
def test_a_span_beyond_the_largest_float(kind):
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0], [-3e38, 3e38, 3e38, -3e38]], requires_grad=True)
    grid = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    losses = cbbl_loss(logits, torch.tensor([0.5, 1.5]), grid, uncertainty=kind, reduction="none")
    assert all(loss.isfinite().all() for loss in losses)
    (losses[0] / 1e38 + losses[1]).sum().backward()
    assert logits.grad.isfinite().all()
    assert entropy(logits).isfinite().all()
