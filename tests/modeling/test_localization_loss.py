import math

import pytest
import torch
from cbbl_d2.distribution import cbbl_loss, exponential_grid, two_hot
from cbbl_d2.modeling import CBBLBox2BoxTransform, CBBLBox2BoxTransformLinear, LocalizationLoss
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from fvcore.nn import giou_loss

DELTA = CBBLBox2BoxTransform((10.0, 10.0, 5.0, 5.0), exponential_grid(5.0, 1.0, 5))
LINEAR = CBBLBox2BoxTransformLinear(exponential_grid(8.0, 0.25, 9, one_sided=True))
both = pytest.mark.parametrize("transform", (DELTA, LINEAR), ids=("delta", "linear"))


def pairs(transform, num=30, seed=0):
    """Source boxes of 8 px and target boxes that contain their centers; logits."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * 80
    source = torch.cat((low, low + 8), dim=1)
    reach = torch.rand(num, 4, generator=generator) * 20 + 1
    target = (low + 4).repeat(1, 2) + reach * torch.tensor([-1, -1, 1, 1])
    logits = torch.randn(num, 4 * transform.num_points, generator=generator) * 2
    return logits, source, target


def call(loss, *args, **kwargs):
    with EventStorage() as storage:
        return loss(*args, **kwargs), {k: v[0] for k, v in storage.latest().items()}


@both
@pytest.mark.parametrize("label", ("two_hot", "one_hot"))
@pytest.mark.parametrize("uncertainty", ("entropy_gap", "entropy"))
def test_terms_are_those_of_the_distribution_package_and_giou(transform, label, uncertainty):
    loss = LocalizationLoss(
        label=label, uncertainty=uncertainty, uncertainty_weight=0.3, giou_weight=2.5
    )
    logits, source, target = pairs(transform)
    terms, _ = call(loss, transform, logits, source, target)
    ce, um = cbbl_loss(
        logits.view(30, 4, -1),
        transform.get_deltas(source, target),
        transform.grid,
        label=label,
        uncertainty=uncertainty,
    )
    giou = giou_loss(transform.apply_deltas(logits, source), target, reduction="sum")
    assert torch.allclose(terms, torch.stack((ce, 0.3 * um, 2.5 * giou)), rtol=1e-5)
    named = loss.named(terms, "loss_box_reg", "loss_box")
    assert list(named) == ["loss_box_reg", "loss_box_uncertainty", "loss_box_giou"]
    assert torch.equal(torch.stack(list(named.values())), terms)


@both
def test_terms_that_are_not_asked_for_do_not_exist(transform):
    terms = {}
    for uncertainty, giou, names in (
        ("none", 0.0, ["a"]),
        ("none", 1.0, ["a", "b_giou"]),
        ("entropy", 0.0, ["a", "b_uncertainty"]),
    ):
        loss = LocalizationLoss(uncertainty=uncertainty, giou_weight=giou)
        terms, _ = call(loss, transform, *pairs(transform))
        assert list(loss.named(terms, "a", "b")) == names and len(terms) == len(names)


@both
def test_gradient_of_the_cross_entropy_is_p_minus_its_label(transform):
    logits, source, target = pairs(transform)
    logits.requires_grad_()
    terms, _ = call(LocalizationLoss(), transform, logits, source, target)
    (gradient,) = torch.autograd.grad(terms[0], logits)
    left, right_weight = two_hot(transform.get_deltas(source, target), transform.grid)
    label = torch.zeros(30, 4, transform.num_points)
    label.scatter_(-1, left[..., None], 1 - right_weight[..., None])
    label.scatter_add_(-1, left[..., None] + 1, right_weight[..., None])
    p = logits.detach().view(30, 4, -1).softmax(-1)
    assert torch.allclose(gradient.view_as(p), p - label, atol=1e-6)


@both
def test_giou_moves_the_decoded_boxes_towards_their_targets(transform):
    logits, source, target = pairs(transform)
    logits.requires_grad_()
    loss = LocalizationLoss(uncertainty="none", giou_weight=1.0)
    before, _ = call(loss, transform, logits, source, target)
    (gradient,) = torch.autograd.grad(before[1], logits)
    assert torch.isfinite(gradient).all() and (gradient.abs().amax(dim=1) > 0).all()
    with torch.no_grad():
        after, _ = call(loss, transform, logits - gradient, source, target)
    assert after[1] < before[1]


@both
def test_targets_that_are_not_finite_are_left_out_and_counted(transform, caplog):
    loss = LocalizationLoss(giou_weight=1.0)
    logits, source, target = pairs(transform)
    logits.requires_grad_()
    expected, scalars = call(loss, transform, logits[3:], source[3:], target[3:], prefix="x")
    assert "x/nonfinite_targets" not in scalars
    broken = target.clone()
    broken[0, 2] = math.nan
    broken[1, 0] = -math.inf
    broken[2] = math.inf
    terms, scalars = call(loss, transform, logits, source, broken, prefix="x")
    assert torch.equal(terms, expected)
    assert scalars["x/nonfinite_targets"] == 3
    (gradient,) = torch.autograd.grad(terms.sum(), logits)
    assert (gradient[:3] == 0).all() and torch.isfinite(gradient).all()


@both
@pytest.mark.parametrize("how", ("empty", "all broken"))
def test_without_boxes_zeros_with_a_live_gradient(transform, how):
    logits, source, target = pairs(transform, 0 if how == "empty" else 5)
    logits.requires_grad_()
    terms, scalars = call(
        LocalizationLoss(giou_weight=1.0), transform, logits, source, target * math.nan
    )
    assert terms.tolist() == [0, 0, 0]
    terms.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert set(scalars) == (set() if how == "empty" else {"cbbl/nonfinite_targets"})


@both
def test_what_is_clipped_is_logged(transform):
    logits, source, target = pairs(transform)
    offsets = transform.get_deltas(source, target)
    grid = transform.grid
    outside = ((offsets < grid[0]) | (offsets > grid[-1])).float().mean().item()
    _, scalars = call(LocalizationLoss(), transform, logits, source, target)
    assert scalars["cbbl/clipped_fraction"] == pytest.approx(outside)
    # All sides a hundred times as far away as the grid reaches.
    far = torch.tensor([-1, -1, 1, 1]) * 100.0 * grid[-1] * 8
    _, scalars = call(LocalizationLoss(), transform, logits, source, source + far)
    assert scalars["cbbl/clipped_fraction"] == (1.0 if transform is LINEAR else 0.5)


@both
def test_dense_takes_the_foreground_of_every_level_and_image(transform):
    generator = torch.Generator().manual_seed(0)
    sizes, num_images = (7, 4, 2), 3
    anchors, logits = [], []
    for size in sizes:
        _, source, _ = pairs(transform, size, seed=size)
        anchors.append(Boxes(source))
        logits.append(torch.randn(num_images, size, 4 * transform.num_points, generator=generator))
    targets = [
        torch.cat([pairs(transform, size, seed=10 * size + i)[2] for size in sizes])
        for i in range(num_images)
    ]
    foreground = torch.rand(num_images, sum(sizes), generator=generator) < 0.4
    foreground[1] = False  # an image without objects

    loss = LocalizationLoss(giou_weight=0.5)
    terms, scalars = call(
        loss.dense, transform, logits, anchors, targets, foreground, prefix="rpn/cbbl"
    )
    assert "rpn/cbbl/clipped_fraction" in scalars
    every_logit, every_anchor = torch.cat(logits, dim=1), Boxes.cat(anchors).tensor
    expected = torch.zeros(3)
    for i, a in foreground.nonzero().tolist():
        one, _ = call(
            loss, transform, every_logit[i, [a]], every_anchor[[a]], targets[i][[a]], prefix="x"
        )
        expected += one
    assert foreground.sum() > 5
    assert torch.allclose(terms, expected, rtol=1e-5)


@both
def test_unknown_options_are_named(transform):
    with pytest.raises(ValueError, match="label must be one of two_hot, one_hot; got 'soft'"):
        call(LocalizationLoss(label="soft"), transform, *pairs(transform))
    with pytest.raises(ValueError, match="uncertainty must be one of .*; got 'gap'"):
        call(LocalizationLoss(uncertainty="gap"), transform, *pairs(transform))
