import math

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.dataset_report.anchor_fit import (  # noqa: E402
    AnchorLevels,
    best_overlaps,
    fit_anchors,
    largest_offset,
    regression_targets,
)
from cbbl_d2.dataset_report.object_table import ObjectTable  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling.box_regression import Box2BoxTransform  # noqa: E402
from detectron2.modeling.matcher import Matcher  # noqa: E402
from detectron2.modeling.proposal_generator import build_proposal_generator  # noqa: E402
from detectron2.structures import Boxes, Instances, pairwise_iou  # noqa: E402

RATIOS = [0.5, 1.0, 2.0]


def levels(sizes=((8,), (16,), (32,)), strides=(4, 8, 16), ratios=RATIOS, **kwargs):
    return AnchorLevels([list(x) for x in sizes], [ratios] * len(strides), strides, **kwargs)


def objects_of(boxes, shapes, images=None, classes=None):
    boxes = np.asarray(boxes, dtype=float)
    zeros = np.zeros(len(boxes), dtype=int)
    return ObjectTable(
        boxes=boxes,
        classes=zeros if classes is None else np.asarray(classes),
        images=zeros if images is None else np.asarray(images),
        shapes=np.asarray(shapes, dtype=float),
    )


def squares(sizes, shape=(512, 512), classes=None):
    """Squares with their center where all strides have an anchor."""
    sizes = np.asarray(sizes, dtype=float)[:, None]
    return objects_of(
        np.hstack([256 - sizes / 2] * 2 + [256 + sizes / 2] * 2), [shape], None, classes
    )


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("shapes", [[(96, 160)], [(75, 131), (90, 33)]])
def test_best_overlap_is_that_of_all_anchors(offset, shapes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, len(shapes), 200)
    limits = np.array(shapes, dtype=float)[images][:, ::-1]
    corners = rng.uniform(0, 1, (2, 200, 2)) * limits
    boxes = np.hstack([corners.min(axis=0), corners.max(axis=0)])
    objects, anchors = objects_of(boxes, shapes, images), levels(offset=offset)
    found = best_overlaps(objects, anchors)
    for i, shape in enumerate(shapes):
        mask = images == i
        ious = pairwise_iou(
            Boxes(torch.tensor(boxes[mask])), Boxes(anchors.anchors(shape).tensor.double())
        )
        np.testing.assert_allclose(found[mask], ious.max(dim=1).values.numpy(), atol=1e-6)


def test_anchors_are_scaled_to_the_objects():
    objects = squares([size * 2**0.5 for size in (32, 64, 128)])
    fitted = fit_anchors(objects, levels(((32,), (64,), (128,))))
    assert fitted.sizes == [[45], [91], [181]]
    assert best_overlaps(objects, fitted).min() > 0.97
    assert list(fitted.strides) == [4, 8, 16]
    # 45 and 91, too, would fit 91 px, and so would 8 times as large anchors: the least change.
    sizes = fit_anchors(squares([90.5]), levels(((32,), (64,), (128,)))).sizes
    assert sizes in ([[23], [45], [91]], [[45], [91], [181]])


def test_three_sizes_a_level_keep_their_ratios():
    sizes = [[8 * 2**i * 2 ** (j / 3) for j in range(3)] for i in range(3)]
    fitted = fit_anchors(squares([60, 120, 240]), levels(sizes))
    for level, before in zip(fitted.sizes, sizes):
        factors = np.array(level) / np.array(before)
        assert np.ptp(factors) < 0.01 * factors.mean()
    assert [len(level) for level in fitted.sizes] == [3, 3, 3]


def test_anchors_that_fit_are_kept():
    anchors = levels()
    assert fit_anchors(squares([8, 16, 32]), anchors) is anchors


def test_aspect_ratios_of_the_objects():
    rng = np.random.default_rng(1)
    height = np.exp(rng.uniform(np.log(30), np.log(60), 500))
    ratio = np.exp(rng.uniform(np.log(2), np.log(8), 500))  # height / width
    half = np.stack([height / ratio, height], axis=1) / 2
    objects = objects_of(np.hstack([256 - half, 256 + half]), [(512, 512)])
    anchors = levels()
    fitted = fit_anchors(objects, anchors)
    (ratios,) = {tuple(x) for x in fitted.aspect_ratios}
    assert ratios == pytest.approx((2 * 4**0.1, 4, 8 / 4**0.1), rel=0.1)
    assert best_overlaps(objects, fitted).mean() > best_overlaps(objects, anchors).mean() + 0.1


def test_a_rare_class_is_not_given_up():
    """Without it, thousands of the others would pull all anchors to their size."""
    anchors = levels(((16,), (32,), (64,)))
    sizes = np.r_[np.full(5000, 88.0), np.full(20, 16.0)]
    objects = squares(sizes, classes=(sizes < 20).astype(int))
    overlaps = best_overlaps(objects, fit_anchors(objects, anchors))
    assert overlaps[-20:].min() >= 0.5 and overlaps[:5000].min() > 0.5


def test_no_anchor_is_smaller_than_the_distance_of_anchors():
    fitted = fit_anchors(squares([2, 2, 3]), levels())
    assert min(map(min, fitted.sizes)) >= 4


@pytest.mark.parametrize("iou", [0.5, 0.6, 0.7])
@pytest.mark.parametrize("weights", [(10, 10, 5, 5), (1, 1, 1, 1), (1, 3, 40, 2)])
def test_largest_offset_bounds_every_pair_and_is_reached(iou, weights):
    rng = np.random.default_rng(2)
    boxes = torch.tensor([[0.0, 0.0, 100.0, 100.0]], dtype=torch.float64)
    centers = torch.tensor(rng.uniform(0, 100, (200_000, 2)))
    sizes = torch.tensor(np.exp(rng.uniform(np.log(30), np.log(300), (200_000, 2))))
    proposals = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)
    # The two extreme ones, along x and y: at one end of the box, and in its middle.
    end = torch.tensor([[0, 0, 100 * iou, 100], [0, 0, 100, 100 * iou]])
    middle = torch.tensor(
        [[50 - 50 / iou, 0, 50 + 50 / iou, 100], [0, 50 - 50 / iou, 100, 50 + 50 / iou]]
    )
    proposals = torch.cat([proposals, end.double(), middle.double()])
    proposals = proposals[pairwise_iou(Boxes(boxes), Boxes(proposals))[0] >= iou - 1e-9]
    assert len(proposals) > 300
    offsets = Box2BoxTransform(weights).get_deltas(proposals, boxes.expand(len(proposals), 4))
    assert offsets.abs().max().item() == pytest.approx(largest_offset(iou, weights), rel=1e-6)


def test_largest_offset_of_the_default_head():
    assert largest_offset(0.5, (10, 10, 5, 5)) == pytest.approx(5)  # MODEL.CBBL.ALPHA
    assert largest_offset(0.5, (1, 1, 1, 1)) == pytest.approx(math.log(2))


def test_targets_are_those_that_an_rpn_learns(tiny_cfg):
    cfg = tiny_cfg
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.MODEL.RPN.POSITIVE_FRACTION = 10**6, 1.0
    strides = [4, 8, 16, 32, 64]
    rpn = build_proposal_generator(
        cfg, {f"p{i + 2}": ShapeSpec(channels=8, stride=s) for i, s in enumerate(strides)}
    )
    anchors = AnchorLevels(
        cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS * 5, strides
    )
    boxes = torch.tensor([[10.0, 12, 40, 30], [70, 70, 78, 75], [0, 90, 33, 127]])
    objects = objects_of(boxes.numpy(), [(128, 160)])
    matcher = Matcher(cfg.MODEL.RPN.IOU_THRESHOLDS, cfg.MODEL.RPN.IOU_LABELS, True)
    found = regression_targets(objects, anchors, matcher, cfg.MODEL.RPN.BBOX_REG_WEIGHTS)

    grid = [anchors.anchors((128, 160))]
    labels, matched = rpn.label_and_sample_anchors(
        grid, [Instances((128, 160), gt_boxes=Boxes(boxes))]
    )
    positive = labels[0] == 1
    expected = rpn.box2box_transform.get_deltas(grid[0].tensor[positive], matched[0][positive])
    assert len(expected) >= 3
    assert found.tolist() == expected.tolist()


def test_targets_of_a_few_images_only():
    boxes = [[10, 10, 26, 26]] * 8
    objects = objects_of(boxes, [(64, 64)] * 8, images=range(8))
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    everything = regression_targets(objects, levels(), matcher, (1, 1, 1, 1))
    half = regression_targets(objects, levels(), matcher, (1, 1, 1, 1), num_images=4)
    assert len(everything) == 2 * len(half) > 0
    doubled = regression_targets(objects, levels(), matcher, (2, 2, 2, 2))
    np.testing.assert_allclose(doubled, 2 * everything)
