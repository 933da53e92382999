"""A box head that is applied to its own boxes at inference."""

import pytest
import torch
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.errors import ConfigError
from cbbl_d2.modeling import IteratedROIHeads
from cbbl_d2.modeling.uncertainty import std_in_pixels
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from .detectors import DETECTORS, batch, build, config, set_score_threshold

HEADS = {"cbbl": {}, "regression": {"MODEL__ROI_HEADS__NAME": "IteratedROIHeads"}}
NAMES = ("faster", "faster_class_specific", "mask", "keypoint")


def model_with(iterations, name="faster", head="cbbl", **options):
    options = {**HEADS[head], "MODEL__ROI_BOX_HEAD__ITERATIONS_TEST": iterations, **options}
    model = build(name, **options).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # an untrained head would leave the proposals where they are
        for parameter in model.roi_heads.box_predictor.bbox_pred.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    set_score_threshold(model, 0.0)
    return model


def regions_of(model, boxes, features, image_size):
    """Boxes, for each class or for all, and class scores of some regions, by the layers alone."""
    heads = model.roi_heads
    proposals = Instances(image_size, proposal_boxes=Boxes(boxes))
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [Boxes(boxes)])
    predictions = heads.box_predictor(heads.box_head(pooled))
    (decoded,) = heads.box_predictor.predict_boxes(predictions, [proposals])
    return decoded, predictions[0]


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_the_proposals_of_the_last_time_are_the_boxes_of_the_time_before(name, head, monkeypatch):
    iterations = 3
    model = model_with(iterations, name, head)
    inputs = batch(3, 2)
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    seen = []
    original = model.roi_heads.box_predictor.inference
    monkeypatch.setattr(
        model.roi_heads.box_predictor,
        "inference",
        lambda predictions, regions: seen.append(regions) or original(predictions, regions),
    )
    model.roi_heads(images, features, proposals, None)

    (last,) = seen
    for i, (before, after) in enumerate(zip(proposals, last)):
        maps = {key: value[i : i + 1] for key, value in features.items()}
        boxes = before.proposal_boxes.tensor
        for _ in range(iterations - 1):
            decoded, scores = regions_of(model, boxes, maps, before.image_size)
            best = scores[:, :-1].argmax(dim=1)
            decoded = decoded.reshape(len(boxes), -1, 4)
            boxes = [d[k if len(d) > 1 else 0] for d, k in zip(decoded, best.tolist())]
            boxes = Boxes(torch.stack(boxes))
            boxes.clip(before.image_size)
            boxes = boxes[boxes.nonempty()].tensor
        torch.testing.assert_close(after.proposal_boxes.tensor, boxes, rtol=1e-4, atol=1e-2)
        assert not torch.allclose(boxes[:5], before.proposal_boxes.tensor[:5], atol=1)
        assert after.has("objectness_logits")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_once_is_detectron2s_own(name):
    stock = build(name, stock=True).eval()
    set_score_threshold(stock, 0.0)
    once = build(name, **HEADS["regression"]).eval()
    once.load_state_dict(stock.state_dict())
    set_score_threshold(once, 0.0)
    for a, b in zip(stock(batch(3, 2)), once(batch(3, 2))):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and len(a) > 0
        assert torch.equal(a.scores, b.scores)


def test_training_is_as_before():
    losses = []
    for iterations in (1, 4):
        model = model_with(iterations).train()
        torch.manual_seed(0)
        with EventStorage():
            losses.append(model(batch(3, 2)))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_proposals_that_end_outside_the_image_are_dropped(head):
    model = model_with(2, head=head)
    (image,) = model.preprocess_image(batch(3)).tensor
    features = model.backbone(image[None])
    size = tuple(image.shape[-2:])
    maps = [features[f] for f in model.roi_heads.box_in_features]
    for boxes in (torch.tensor([[-60.0, 5, -40, 25], [5, 5, 25, 25]]), torch.zeros(0, 4)):
        proposals = Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=boxes[:, 0])
        model.roi_heads.box_predictor.bbox_pred.weight.zero_()
        model.roi_heads.box_predictor.bbox_pred.bias.zero_()  # no offset
        (moved,) = model.roi_heads._move(maps, [proposals])
        torch.testing.assert_close(moved.proposal_boxes.tensor, boxes[1:], rtol=0, atol=1e-4)
        assert torch.equal(moved.objectness_logits, boxes[1:, 0])
        results = model.roi_heads._forward_box(features, [proposals])
        assert len(results) == 1


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_boxes_that_are_not_finite_are_left_out(head):
    model = model_with(2, head=head)
    model.roi_heads.box_predictor.bbox_pred.bias[0] = float("nan")
    for result in model(batch(3, 2)):
        assert len(result["instances"]) == 0


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_an_image_that_loses_all_proposals_beside_one_that_does_not(head):
    model = model_with(2, head=head)
    images = model.preprocess_image(batch(3, 3))
    features = model.backbone(images.tensor)
    model.roi_heads.box_predictor.bbox_pred.weight.zero_()
    model.roi_heads.box_predictor.bbox_pred.bias.zero_()
    outside, inside = torch.tensor([[-60.0, 5, -40, 25]]), torch.tensor([[5.0, 5, 25, 25]])
    proposals = [
        Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=boxes[:, 0])
        for size, boxes in zip(images.image_sizes, (outside, inside))
    ]
    first, second = model.roi_heads._forward_box(features, proposals)
    assert len(first) == 0 and len(second) > 0


@torch.no_grad()
def test_votes_and_deviations_are_those_of_the_last_time():
    plain, voting = (model_with(2, MODEL__CBBL__VOTING_SIGMA=sigma) for sigma in (0.0, 0.5))
    for a, b in zip(plain(batch(3, 2)), voting(batch(3, 2))):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.scores, b.scores) and len(a) > 1
        std = [std_in_pixels(x.pred_boxes_std, x.pred_boxes.tensor) for x in (a, b)]
        assert torch.allclose(*std, rtol=1e-5)
        assert not torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_a_config_is_checked_when_the_model_is_built():
    with pytest.raises(ConfigError, match="ITERATIONS_TEST = 0: must be"):
        build("faster", **HEADS["regression"], MODEL__ROI_BOX_HEAD__ITERATIONS_TEST=0)
    with pytest.raises(ValueError, match="box_iterations must be 1 or more; got 0"):
        IteratedROIHeads(
            box_iterations=0, num_classes=1, batch_size_per_image=1, positive_fraction=0.5
        )


@pytest.mark.parametrize("name", [n for n in DETECTORS if n not in (*NAMES, "rpn_and_faster")])
def test_others_say_that_they_cannot(name):
    cfg = config(name, MODEL__ROI_BOX_HEAD__ITERATIONS_TEST=2)
    with pytest.raises(ConfigError, match="ITERATIONS_TEST = 2: must be 1 for .* IteratedROIHeads"):
        check_cbbl_config(cfg)


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "PanopticFPN"])
@pytest.mark.parametrize("head", HEADS)
def test_these_can(head, architecture):
    options = {**HEADS[head], "MODEL__META_ARCHITECTURE": architecture}
    check_cbbl_config(config("faster", **options, MODEL__ROI_BOX_HEAD__ITERATIONS_TEST=2))
