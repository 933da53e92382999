import math

import pytest
import torch
from cbbl_d2.distribution import (
    all_finite,
    entropy,
    expectation,
    exponential_grid,
    gaussian_logits,
    one_hot,
    two_hot,
    variance,
)


def dense(left, right_weight, num_points):
    """The code as a distribution, built by a loop: shape (N, B)."""
    code = torch.zeros(len(left), num_points)
    for row, (index, weight) in enumerate(zip(left.tolist(), right_weight.tolist())):
        code[row, index] += 1 - weight
        code[row, index + 1] += weight
    return code


@pytest.mark.parametrize("beta", (0.0, 0.1, 1.0, 3.0))
@pytest.mark.parametrize("one_sided", (False, True))
def test_expectation_inverts_two_hot(beta, one_sided):
    torch.manual_seed(0)
    alpha = 5.0
    for n in range(2, 65):
        grid = exponential_grid(alpha, beta, n, one_sided)
        offsets = torch.cat((torch.empty(200).uniform_(grid[0].item(), alpha), grid))
        left, right_weight = two_hot(offsets, grid)
        assert left.dtype == torch.int64
        assert ((left >= 0) & (left <= n - 1)).all()
        assert ((right_weight >= 0) & (right_weight <= 1)).all()
        decoded = expectation(dense(left, right_weight, n + 1).log(), grid)
        assert (decoded - offsets).abs().max() < 1e-5 * alpha


def test_two_hot_equals_a_slow_search():
    torch.manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 7)
    offsets = torch.randn(500) * 4  # many outside
    left, right_weight = two_hot(offsets, grid)
    points = grid.double().tolist()
    for t, index, weight in zip(offsets.double().tolist(), left.tolist(), right_weight.tolist()):
        t = min(max(t, points[0]), points[-1])
        assert points[index] <= t <= points[index + 1]
        expected = (t - points[index]) / (points[index + 1] - points[index])
        assert weight == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),  # the sum is not
        ([1.0, math.nan], False),
        ([math.inf, 1.0], False),
        ([math.inf, -math.inf], False),
    ],
)
def test_all_finite(values, finite):
    assert all_finite(torch.tensor(values)) is finite


def test_two_hot_by_hand():
    grid = torch.tensor([-5.0, -3, -1, 1, 3, 5])  # n = 5, uniform
    left, right_weight = two_hot(torch.tensor([[0.0, 0.5], [-5.0, 5.0], [99.0, -99.0]]), grid)
    code = dense(left.flatten(), right_weight.flatten(), 6).view(3, 2, 6)
    assert code[0, 0].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert code[0, 1].tolist() == [0, 0, 0.25, 0.75, 0, 0]
    assert code[1, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert code[1, 1].tolist() == [0, 0, 0, 0, 0, 1]
    assert code[2, 0].tolist() == [0, 0, 0, 0, 0, 1]  # outside: the nearer end
    assert code[2, 1].tolist() == [1, 0, 0, 0, 0, 0]


def test_one_hot_is_the_nearest_point():
    torch.manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 8)
    offsets = torch.empty(300).uniform_(-6, 6)
    left, right_weight = one_hot(offsets, grid)
    nearest = (offsets[:, None] - grid).abs().argmin(dim=1)
    assert torch.equal(left + right_weight.long(), nearest)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_offsets_that_are_not_finite_raise_with_the_value(bad):
    offsets = torch.tensor([[0.0, bad], [1.0, 2.0]])
    with pytest.raises(ValueError, match=f"1 of 4 offsets.*{bad}"):
        two_hot(offsets, exponential_grid(5.0, 1.0, 5))


def test_empty():
    grid = exponential_grid(5.0, 1.0, 5)
    left, right_weight = two_hot(torch.zeros(0, 4), grid)
    assert left.shape == right_weight.shape == (0, 4)
    assert expectation(torch.zeros(0, 4, 6), grid).shape == (0, 4)


def test_moments_equal_a_float64_sum():
    torch.manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 9)
    logits = torch.randn(50, 4, 10) * 3
    weights = logits.double().exp()
    p = weights / weights.sum(-1, keepdim=True)
    mean = sum(p[..., i] * grid[i].double() for i in range(10))
    var = sum(p[..., i] * grid[i].double() ** 2 for i in range(10)) - mean**2
    ent = -sum(p[..., i] * p[..., i].log() for i in range(10))
    assert torch.allclose(expectation(logits, grid).double(), mean, atol=1e-5)
    assert torch.allclose(variance(logits, grid).double(), var, atol=1e-4)
    assert torch.allclose(entropy(logits).double(), ent, atol=1e-5)
    assert torch.allclose(entropy(torch.zeros(3, 10)), torch.full((3,), math.log(10)))
    assert variance(torch.tensor([0.0] * 9 + [200.0]), grid) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_decoding_stays_float32_in_half_precision(dtype):
    torch.manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 16)
    logits = torch.randn(1000, 17).to(dtype)
    exact = expectation(logits.double(), grid)
    with torch.autocast("cpu", dtype=dtype):
        decoded = expectation(logits, grid)
        assert variance(logits, grid).dtype == entropy(logits).dtype == torch.float32
    assert decoded.dtype == torch.float32
    assert (decoded - exact).abs().max() < 1e-5


def test_gaussian_logits_decode_to_zero_with_the_asked_width():
    for n in (5, 16, 40):
        grid = exponential_grid(5.0, 0.5, n)
        logits = gaussian_logits(grid, 1.5)
        assert expectation(logits, grid).abs() < 1e-6
    # On a fine grid the distribution is the Gaussian itself (truncated at 5, 3.3 widths).
    assert variance(logits, grid).sqrt() == pytest.approx(1.5, rel=0.03)
    with pytest.raises(ValueError, match="-1"):
        gaussian_logits(grid, -1)
