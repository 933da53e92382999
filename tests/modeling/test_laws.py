"""What the method promises of a head, whatever its logits."""

import pytest
import torch
from cbbl_d2.distribution import exponential_grid, two_hot
from cbbl_d2.modeling import (
    CBBLBox2BoxTransform,
    CBBLBox2BoxTransformLinear,
    CBBLFastRCNNOutputLayers,
)
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
NUM_REGIONS, NUM_CLASSES = 64, 3


def random_boxes(number, generator, size=200.0):
    corners = torch.rand(number, 2, generator=generator, dtype=torch.float64) * size
    sides = 4 + torch.rand(number, 2, generator=generator, dtype=torch.float64) * 40
    return torch.cat((corners, corners + sides), dim=1)


def shifted(boxes, generator):
    """Other boxes nearby, as a proposal is to its object."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = torch.rand(boxes.shape, generator=generator, dtype=torch.float64) - 0.5
    return boxes + 0.3 * noise * sides


def mirrored(boxes, width=300.0):
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    return torch.stack((width - x1, y0, width - x0, y1), dim=1)


@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize("num_intervals", [5, 10])
@pytest.mark.parametrize("scale", [1 / 16, 0.5, 8.0])
def test_a_smaller_object_has_the_same_loss_and_gradient(class_agnostic, num_intervals, scale):
    """
    The paper's claim, on the head with its transform: the loss knows the size of an object only
    through the offsets, which have none. (Powers of two: no rounding.)
    """
    generator = torch.Generator().manual_seed(0)
    head = CBBLFastRCNNOutputLayers(
        ShapeSpec(channels=8, height=1, width=1),
        box2box_transform=CBBLBox2BoxTransform(WEIGHTS, exponential_grid(5, 1, num_intervals)),
        num_classes=NUM_CLASSES,
        cls_agnostic_bbox_reg=class_agnostic,
    )
    proposals = random_boxes(NUM_REGIONS, generator)
    targets = shifted(proposals, generator)
    width = (1 if class_agnostic else NUM_CLASSES) * 4 * (num_intervals + 1)
    logits = torch.randn(NUM_REGIONS, width, generator=generator)
    classes = torch.randint(0, NUM_CLASSES + 1, (NUM_REGIONS,), generator=generator)

    def loss_and_gradient(factor):
        x = logits.clone().requires_grad_()
        with EventStorage(0):
            loss = head.box_reg_loss(
                (proposals * factor).float(), (targets * factor).float(), x, classes
            ).sum()
        loss.backward()
        return loss.item(), x.grad

    loss, gradient = loss_and_gradient(1.0)
    scaled_loss, scaled_gradient = loss_and_gradient(scale)
    assert loss > 1 and scaled_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(scaled_gradient, gradient, rtol=1e-5, atol=1e-8)
    # And what the size does to IoU shows that the boxes really differ.
    assert not torch.allclose(proposals * scale, proposals)


def dense_label(offsets, grid):
    left, right_weight = two_hot(offsets, grid)
    label = torch.zeros(*offsets.shape, grid.numel())
    label.scatter_(-1, left[..., None], (1 - right_weight)[..., None])
    return label.scatter_add_(-1, left[..., None] + 1, right_weight[..., None])


@pytest.mark.parametrize("num_intervals", [5, 10, 16])
def test_a_mirrored_object_has_the_mirrored_label(num_intervals):
    """The label of dx is reversed; dy, dw and dh keep theirs."""
    generator = torch.Generator().manual_seed(1)
    grid = exponential_grid(5, 1, num_intervals)
    transform = CBBLBox2BoxTransform(WEIGHTS, grid)
    proposals = random_boxes(NUM_REGIONS, generator)
    targets = shifted(proposals, generator)
    label = dense_label(transform.get_deltas(proposals, targets).float(), grid)
    seen = dense_label(transform.get_deltas(mirrored(proposals), mirrored(targets)).float(), grid)
    torch.testing.assert_close(seen[:, 0], label[:, 0].flip(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[:, 1:], label[:, 1:], rtol=0, atol=1e-5)
    assert (label[:, 0] - label[:, 0].flip(-1)).abs().max() > 0.1


def test_a_mirrored_object_swaps_left_and_right_in_fcos():
    generator = torch.Generator().manual_seed(2)
    grid = exponential_grid(8, 0.25, 16, one_sided=True)
    transform = CBBLBox2BoxTransformLinear(grid)
    targets = random_boxes(NUM_REGIONS, generator)
    centers = (targets[:, :2] + targets[:, 2:]) / 2 + torch.randn(
        NUM_REGIONS, 2, generator=generator, dtype=torch.float64
    )
    points = torch.cat((centers - 4, centers + 4), dim=1)  # "anchors" as large as a stride of 8
    label = dense_label(transform.get_deltas(points, targets).float(), grid)
    seen = dense_label(transform.get_deltas(mirrored(points), mirrored(targets)).float(), grid)
    left, top, right, bottom = range(4)
    torch.testing.assert_close(seen[:, [right, left]], label[:, [left, right]], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[:, [top, bottom]], label[:, [top, bottom]], rtol=0, atol=1e-5)
    assert (label[:, left] - label[:, right]).abs().max() > 0.1
