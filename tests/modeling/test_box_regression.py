import copy

import pytest
import torch
from cbbl_d2.distribution import exponential_grid, two_hot
from cbbl_d2.modeling import CBBLBox2BoxTransform, CBBLBox2BoxTransformLinear
from cbbl_d2.modeling.output_layer import distribution_layer
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(num, seed=0, mean=200.0, std=40.0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * mean
    return torch.cat((low, low + 4 + torch.rand(num, 2, generator=generator) * std), dim=1)


def code_logits(offsets, grid):
    """Logits whose softmax is the two-hot code: (R, 4) -> (R, 4 * B)."""
    left, right_weight = two_hot(offsets, grid)
    code = torch.zeros(*offsets.shape, len(grid))
    code.scatter_(-1, left[..., None], 1 - right_weight[..., None])
    code.scatter_add_(-1, left[..., None] + 1, right_weight[..., None])
    return code.log().flatten(1)


@pytest.mark.parametrize("num_intervals", (2, 5, 16))
@pytest.mark.parametrize("num_classes", (1, 3))
def test_decoding_inverts_encoding(num_intervals, num_classes):
    transform = CBBLBox2BoxTransform(WEIGHTS, exponential_grid(8.0, 0.5, num_intervals))
    proposals = random_boxes(200)
    noise = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    targets = Box2BoxTransform(WEIGHTS).apply_deltas(noise, proposals)
    offsets = transform.get_deltas(proposals, targets)
    logits = code_logits(offsets, transform.grid).repeat(1, num_classes)
    decoded = transform.apply_deltas(logits, proposals)
    assert decoded.shape == (200, num_classes * 4)
    assert torch.allclose(decoded, targets.repeat(1, num_classes), atol=1e-3)


def test_offsets_are_those_of_detectron2():
    transform = CBBLBox2BoxTransform(WEIGHTS, exponential_grid(5.0, 1.0, 5))
    a, b = random_boxes(50), random_boxes(50, seed=1)
    assert torch.equal(transform.get_deltas(a, b), Box2BoxTransform(WEIGHTS).get_deltas(a, b))


def test_uniform_logits_decode_to_the_proposals():
    for n in (2, 5, 10, 33):
        transform = CBBLBox2BoxTransform(WEIGHTS, exponential_grid(5.0, 1.0, n))
        boxes = random_boxes(50)
        assert torch.allclose(transform.apply_deltas(torch.zeros(50, 4 * (n + 1)), boxes), boxes)


def test_coordinates_do_not_mix():
    # Only the logits of dx of the second class are moved.
    grid = exponential_grid(5.0, 1.0, 4)
    transform = CBBLBox2BoxTransform(WEIGHTS, grid)
    logits = torch.zeros(1, 2, 4, 5)
    logits[0, 1, 0, 4] = 100.0
    box = torch.tensor([[10.0, 20, 30, 60]])
    decoded = transform.apply_deltas(logits.flatten(1), box)
    assert torch.allclose(decoded[:, :4], box)
    # dx = alpha / weight = .5 of the width of 20
    assert torch.allclose(decoded[:, 4:], box + torch.tensor([10.0, 0, 10, 0]), atol=1e-4)


def test_zero_regions_and_wrong_width():
    transform = CBBLBox2BoxTransform(WEIGHTS, exponential_grid(5.0, 1.0, 5))
    assert transform.apply_deltas(torch.zeros(0, 24), torch.zeros(0, 4)).shape == (0, 4)
    assert transform.apply_deltas(torch.zeros(0, 48), torch.zeros(0, 4)).shape == (0, 8)
    with pytest.raises(ValueError, match="width 4 .*6 points.* 24"):
        transform.apply_deltas(torch.zeros(3, 4), torch.zeros(3, 4))


def test_half_precision_logits_decode_in_float32():
    transform = CBBLBox2BoxTransform(WEIGHTS, exponential_grid(5.0, 1.0, 5))
    logits, boxes = torch.randn(20, 24).bfloat16(), random_boxes(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = transform.apply_deltas(logits, boxes)
    assert decoded.dtype == torch.float32
    assert torch.allclose(decoded, transform.apply_deltas(logits.float(), boxes))


# -- distances -------------------------------------------------------------------------------------


def points_in_boxes(num=200, stride=8.0, reach=7.9):
    """Squares of a stride around points, and boxes that reach up to so many strides from them."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(num, 2, generator=generator) * 300
    squares = torch.cat((points - stride / 2, points + stride / 2), dim=1)
    distances = torch.rand(num, 4, generator=generator) * reach * stride
    return squares, points.repeat(1, 2) + distances * torch.tensor([-1, -1, 1, 1])


@pytest.mark.parametrize("num_intervals", (2, 5, 16))
def test_linear_decoding_inverts_encoding(num_intervals):
    transform = CBBLBox2BoxTransformLinear(
        exponential_grid(8.0, 0.25, num_intervals, one_sided=True)
    )
    squares, targets = points_in_boxes()
    offsets = transform.get_deltas(squares, targets)
    assert torch.equal(offsets, Box2BoxTransformLinear().get_deltas(squares, targets))
    decoded = transform.apply_deltas(code_logits(offsets, transform.grid), squares)
    assert torch.allclose(decoded, targets, rtol=0, atol=1e-3)


def test_linear_sides_do_not_mix():
    transform = CBBLBox2BoxTransformLinear(exponential_grid(8.0, 0.25, 16, one_sided=True))
    squares, _ = points_in_boxes(1)
    even = transform.apply_deltas(torch.zeros(1, 4 * 17), squares)
    for side in range(4):  # left, top, right, bottom
        logits = torch.zeros(1, 4, 17)
        logits[0, side, -1] = 100.0  # 8 strides of 8 px
        moved = transform.apply_deltas(logits.flatten(1), squares) - even
        assert (moved[0].abs() > 1e-3).tolist() == [i == side for i in range(4)]
        point = squares.unflatten(1, (2, 2)).mean(1)[0, side % 2]
        assert (even + moved)[0, side].item() == pytest.approx(
            point.item() + (-64 if side < 2 else 64), abs=1e-3
        )


def test_a_grid_of_distances_starts_at_zero():
    with pytest.raises(ValueError, match="one-sided grid.* from -5"):
        CBBLBox2BoxTransformLinear(exponential_grid(5.0, 1.0, 5))


def test_the_grid_is_that_of_the_layer():
    """It moves with the model, and a copy of the model has its own."""
    transform = CBBLBox2BoxTransform((1.0, 1.0, 1.0, 1.0), exponential_grid(2, 1, 4))
    before = transform.grid
    layer = distribution_layer(torch.nn.Linear(3, 4), transform, weight_std=0.01)
    assert torch.equal(transform.grid, before) and transform.grid is layer.grid
    holder = torch.nn.Module()
    holder.layer, holder.transform = layer, transform
    again = copy.deepcopy(holder)
    again.layer.grid.mul_(2)
    assert torch.equal(again.transform.grid, 2 * before) and torch.equal(transform.grid, before)
    # In half precision the grid is rounded, but what is computed with it stays float32.
    holder.double()
    assert transform.grid.dtype == torch.float64
    assert transform.decode_offsets(torch.zeros(1, 20)).dtype == torch.float32


@pytest.mark.parametrize("kind", ("deltas", "distances"))
def test_coordinates_are_what_each_grid_point_decodes_to(kind):
    if kind == "deltas":
        transform = CBBLBox2BoxTransform(WEIGHTS, exponential_grid(8.0, 0.5, 5))
        base, boxes = Box2BoxTransform(WEIGHTS), random_boxes(20)
    else:
        transform = CBBLBox2BoxTransformLinear(exponential_grid(8.0, 0.5, 5, one_sided=True))
        corners = random_boxes(20)[:, :2]
        base, boxes = Box2BoxTransformLinear(), torch.cat((corners, corners + 16), dim=1)
    found = transform.coordinates(boxes)
    assert found.shape == (20, 4, 6)
    for k, point in enumerate(transform.grid.tolist()):
        x1, y1, x2, y2 = base.apply_deltas(torch.full((20, 4), point), boxes).unbind(dim=1)
        sides = {"left": x1, "top": y1, "right": x2, "bottom": y2}
        sizes = {"width": x2 - x1, "height": y2 - y1}
        centers = {"center x": (x1 + x2) / 2, "center y": (y1 + y2) / 2}
        for i, name in enumerate(transform.coordinate_names):
            expected = {**sides, **sizes, **centers}[name]
            assert torch.allclose(found[:, i, k], expected, rtol=1e-4, atol=1e-3)
