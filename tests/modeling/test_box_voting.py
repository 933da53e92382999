import math

import pytest
import torch
from cbbl_d2.distribution import exponential_grid
from cbbl_d2.modeling import (
    CBBLBox2BoxTransform,
    CBBLBox2BoxTransformLinear,
    CBBLFastRCNNOutputLayers,
)
from cbbl_d2.modeling.box_voting import variance_voting
from cbbl_d2.modeling.uncertainty import std_in_pixels
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.structures import Boxes, Instances

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def vote(boxes, classes, candidates, candidate_classes, scores, variances, sigma=0.05):
    return variance_voting(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(candidates).reshape(-1, 4),
        torch.tensor(candidate_classes, dtype=torch.int64),
        torch.tensor(scores),
        torch.tensor(variances).reshape(-1, 4),
        sigma,
    )


def test_by_hand():
    # IoU 8 / 12 with the second candidate; the third is of another class, the fourth elsewhere.
    candidates = [[0.0, 0, 10, 1], [2.0, 0, 12, 1], [1.0, 0, 11, 1], [50.0, 50, 60, 51]]
    variances = [[1.0] * 4, [4.0, 1.0, 1.0, 1.0], [0.01] * 4, [0.01] * 4]
    voted = vote(candidates[:1], [0], candidates, [0, 0, 1, 0], [0.8, 0.4, 0.9, 0.9], variances)
    w = 0.4 * math.exp(-((1 / 3) ** 2) / 0.05)
    x1 = 2 * (w / 4) / (0.8 + w / 4)
    x2 = (10 * 0.8 + 12 * w) / (0.8 + w)
    assert torch.allclose(voted, torch.tensor([[x1, 0.0, x2, 1.0]]))


def test_a_small_sigma_leaves_the_boxes_alone_and_a_large_one_takes_the_mean():
    candidates = [[0.0, 0, 10, 10], [1.0, 1, 11, 11]]
    arguments = (candidates[:1], [0], candidates, [0, 0], [0.5, 0.5], [[1.0] * 4] * 2)
    assert torch.allclose(vote(*arguments, sigma=1e-4), torch.tensor(candidates[:1]))
    assert torch.allclose(vote(*arguments, sigma=1e6), torch.tensor([[0.5, 0.5, 10.5, 10.5]]))


def test_nothing_to_vote_on():
    assert vote([], [], [], [], [], []).shape == (0, 4)
    # A box without area overlaps nothing, not even itself.
    flat = [[3.0, 3, 3, 9]]
    assert torch.equal(vote(flat, [0], flat, [0], [0.9], [[1.0] * 4]), torch.tensor(flat))


@pytest.mark.parametrize("broken", ("box", "score", "variance"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_candidate_that_is_not_finite_has_no_say(broken, value):
    candidates = [[0.0, 0, 10, 10], [1.0, 1, 11, 11], [2.0, 2, 12, 12]]
    scores, variances = [0.5, 0.4, 0.3], [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    expected = vote(candidates[:2], [0, 0], candidates[:2], [0, 0], scores[:2], variances[:2])
    if broken == "score":
        scores[2] = value
    else:
        {"box": candidates, "variance": variances}[broken][2][1] = value
    found = vote(candidates[:2], [0, 0], candidates, [0, 0, 0], scores, variances)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, torch.tensor(candidates[:2]))


def test_variances_of_the_sides_of_fcos_are_those_of_sampled_boxes():
    grid = exponential_grid(8.0, 0.25, 16, one_sided=True)
    transform = CBBLBox2BoxTransformLinear(grid)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, grid.numel(), generator=generator)
    points = torch.tensor([[10.0, 20, 18, 28], [0.0, 0, 16, 16], [5.0, 5, 9, 9]])
    p = logits.softmax(dim=-1).reshape(12, -1)
    num = 40000
    offsets = grid[torch.multinomial(p, num, replacement=True, generator=generator)]
    offsets = offsets.reshape(3, 4, num).permute(2, 0, 1).reshape(-1, 4)
    sampled = Box2BoxTransformLinear().apply_deltas(offsets, points.repeat(num, 1))
    expected = sampled.reshape(num, 3, 4).var(dim=0)
    assert torch.allclose(transform.side_variances(logits.flatten(1), points), expected, rtol=0.05)


def test_variances_of_the_sides_are_those_of_sampled_boxes():
    grid = exponential_grid(1.0, 1.0, 8)
    transform = CBBLBox2BoxTransform(WEIGHTS, grid)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, grid.numel(), generator=generator)
    boxes = torch.tensor([[10.0, 20, 18, 50], [0.0, 0, 100, 10], [5.0, 5, 25, 25]])
    variances = transform.side_variances(logits.flatten(1), boxes)
    assert variances.shape == (3, 4)

    num = 40000
    p = logits.softmax(dim=-1).reshape(12, -1)
    points = torch.multinomial(p, num, replacement=True, generator=generator)  # (12, num)
    offsets = grid[points].reshape(3, 4, num).permute(2, 0, 1).reshape(-1, 4)
    sampled = Box2BoxTransform(WEIGHTS).apply_deltas(offsets, boxes.repeat(num, 1))
    expected = sampled.reshape(num, 3, 4).var(dim=0)
    # To first order in the offsets of the size, and up to the sampling error.
    assert torch.allclose(variances, expected, rtol=0.1)


def predictor(voting_sigma, agnostic=True, num_classes=2):
    torch.manual_seed(0)
    return CBBLFastRCNNOutputLayers(
        ShapeSpec(channels=4),
        box2box_transform=CBBLBox2BoxTransform(WEIGHTS, exponential_grid(5.0, 1.0, 5)),
        num_classes=num_classes,
        cls_agnostic_bbox_reg=agnostic,
        test_score_thresh=0.05,
        voting_sigma=voting_sigma,
    )


def proposals(boxes, image_size=(100, 100)):
    p = Instances(image_size)
    p.proposal_boxes = Boxes(torch.as_tensor(boxes))
    return p


def random_image(num=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * 30 + 20
    boxes = torch.cat((low, low + 15), dim=1)
    scores = torch.randn(num, 3, generator=generator) * 2
    logits = torch.randn(num, 4 * 6, generator=generator) * 2
    return proposals(boxes), scores, logits


def test_voting_moves_boxes_and_nothing_else():
    image, scores, logits = random_image()
    (plain,), (kept,) = predictor(0.0).inference((scores, logits), [image])
    (voted,), (kept_too,) = predictor(0.05).inference((scores, logits), [image])
    assert len(plain) > 3 and torch.equal(kept, kept_too)
    for field in ("scores", "pred_classes"):
        assert torch.equal(plain.get(field), voted.get(field))
    # Of the same number of pixels, relative to the box as it is now.
    std = [std_in_pixels(x.pred_boxes_std, x.pred_boxes.tensor) for x in (plain, voted)]
    assert torch.allclose(*std, rtol=1e-5)
    moved = (plain.pred_boxes.tensor - voted.pred_boxes.tensor).abs()
    assert moved.max() > 0.1  # pixels
    assert moved.max() < 15  # within the boxes that overlap


def test_boxes_that_agree_do_not_move():
    # Two times the same proposal and logits: the mean of equal boxes is the box.
    boxes = torch.tensor([[10.0, 10, 30, 30]] * 2)
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    scores = torch.tensor([[3.0, 0, 0], [2.0, 0, 0]])
    (plain,), _ = predictor(0.0).inference((scores, logits), [proposals(boxes)])
    (voted,), _ = predictor(0.05).inference((scores, logits), [proposals(boxes)])
    assert torch.allclose(plain.pred_boxes.tensor, voted.pred_boxes.tensor, atol=1e-4)


def test_the_surer_candidate_pulls():
    boxes = torch.tensor([[10.0, 10, 30, 30], [12.0, 10, 32, 30]])
    sure, unsure = torch.zeros(4, 6), torch.zeros(4, 6)
    sure[:, 2:4] = 10.0  # all weight on the points next to zero
    scores = torch.tensor([[3.0, 0, 0], [3.0, 0, 0]])
    for logits in ((sure, unsure), (unsure, sure)):
        stacked = torch.stack(logits).flatten(1)
        (voted,), _ = predictor(0.2).inference((scores, stacked), [proposals(boxes)])
        x1 = voted.pred_boxes.tensor[0, 0].item()
        surer = 10.0 if logits[0] is sure else 12.0
        assert abs(x1 - surer) < 0.2


@pytest.mark.parametrize("sigma", (0.0, 0.05))
def test_class_specific_equals_agnostic_where_all_classes_agree(sigma):
    image, scores, logits = random_image()
    (one,), _ = predictor(sigma).inference((scores, logits), [image])
    (each,), _ = predictor(sigma, agnostic=False).inference((scores, logits.repeat(1, 2)), [image])
    for field in ("scores", "pred_classes", "pred_boxes_std"):
        assert torch.allclose(one.get(field), each.get(field))
    assert torch.allclose(one.pred_boxes.tensor, each.pred_boxes.tensor)


@pytest.mark.parametrize("sigma", (0.0, 0.05))
@pytest.mark.parametrize("agnostic", (True, False))
def test_no_proposals_no_detections_and_nan(sigma, agnostic):
    layers = predictor(sigma, agnostic)
    width = layers.bbox_pred.out_features
    (empty,), _ = layers.inference(
        (torch.zeros(0, 3), torch.zeros(0, width)), [proposals(torch.zeros(0, 4))]
    )
    assert empty.pred_boxes_std.shape == (0, 4)

    # The broken region is left out, and the others keep their own uncertainty.
    image, scores, logits = random_image()
    logits = logits.repeat(1, width // 24)
    broken = logits.clone()
    broken[0] = float("nan")
    scores[0] = torch.tensor([-9.0, -9.0, 9.0])
    (expected,), _ = layers.inference((scores, logits), [image])
    (actual,), _ = layers.inference((scores, broken), [image])
    assert torch.isfinite(actual.pred_boxes.tensor).all() and len(actual) > 3
    assert torch.allclose(actual.pred_boxes_std, expected.pred_boxes_std)
    assert torch.allclose(actual.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_std_is_relative_to_the_size_of_the_box():
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(1))
    scores = torch.tensor([[3.0, 0, 0]])
    stds = []
    for scale in (1.0, 3.0):
        image = proposals(torch.tensor([[10.0, 10, 20, 18]]) * scale, (100, 100))
        (result,), _ = predictor(0.0).inference((scores, logits), [image])
        stds.append(result.pred_boxes_std)
    assert torch.allclose(*stds, rtol=1e-3)
