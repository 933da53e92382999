import pytest
import torch
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.distribution import exponential_grid
from cbbl_d2.errors import ConfigError
from cbbl_d2.modeling import CBBLFastRCNNOutputLayers
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes

from .detectors import NUM_CLASSES, batch, build, config, set_score_threshold

CASCADE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


@pytest.mark.parametrize("name", ("faster", "faster_class_specific", "mask", "keypoint", "res5"))
def test_the_box_predictor_is_that_of_cbbl(name):
    predictor = build(name).roi_heads.box_predictor
    assert isinstance(predictor, CBBLFastRCNNOutputLayers)
    assert torch.equal(predictor.box2box_transform.grid, exponential_grid(5.0, 1.0, 5))
    num_boxes = NUM_CLASSES if name == "faster_class_specific" else 1
    assert predictor.bbox_pred.out_features == num_boxes * 4 * 6
    assert predictor.bbox_pred.in_features == predictor.cls_score.in_features
    assert predictor.num_classes == NUM_CLASSES


@pytest.mark.parametrize(
    "name, settings",
    [
        ("cascade", [(5.0, 1.0, 5)] * 3),
        ("cascade_grids", [(5.0, 1.0, 4), (4.0, 0.5, 5), (3.0, 0.0, 7)]),
    ],
)
def test_each_stage_of_a_cascade_has_its_own_grid_and_weights(name, settings):
    predictors = build(name).roi_heads.box_predictor
    assert len(predictors) == 3
    for predictor, setting, weights in zip(predictors, settings, CASCADE_WEIGHTS):
        transform = predictor.box2box_transform
        assert torch.equal(transform.grid, exponential_grid(*setting))
        assert transform.weights == weights
        assert predictor.bbox_pred.out_features == 4 * (setting[-1] + 1)


def test_each_stage_of_a_cascade_starts_from_the_boxes_of_the_one_before(decoded):
    model = build("cascade_grids").eval()
    torch.manual_seed(0)
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.05)
    set_score_threshold(model, 0.0)
    with torch.no_grad():
        (result,) = model(batch(0))
    # Once a stage, and the last one again for the result.
    assert len(decoded) == 4
    sources, boxes = zip(*decoded)
    for before, after in zip(boxes[:2], sources[1:]):
        clipped = Boxes(before.clone())
        clipped.clip((96, 96))
        assert torch.equal(clipped.tensor, after)
        assert not torch.allclose(before, sources[0], atol=0.1)
    last = Boxes(boxes[-1].clone())
    last.clip((96, 96))
    found = result["instances"].pred_boxes.tensor
    distance = (found[:, None] - last.tensor[None]).abs().amax(dim=2).amin(dim=1)
    assert len(found) > 10 and distance.max() < 1e-4


@pytest.mark.parametrize("name", ("faster", "faster_class_specific", "cascade_grids", "mask"))
def test_test_time_augmentation(name):
    cfg = config(name)
    cfg.TEST.AUG.MIN_SIZES = (64, 96)
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    model = build(name).eval()
    set_score_threshold(model, 0.0)
    image = (torch.rand(3, 80, 100) * 255).byte()
    with torch.no_grad():
        (result,) = GeneralizedRCNNWithTTA(cfg, model)(
            [{"image": image, "height": 80, "width": 100}]
        )
    instances = result["instances"]
    assert instances.image_size == (80, 100) and len(instances) == 10
    boxes = instances.pred_boxes.tensor
    assert torch.isfinite(boxes).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([100, 80, 100, 80])).all()
    assert instances.has("pred_masks") == (name == "mask")


@pytest.mark.parametrize("name", ("cascade", "cascade_grids"))
def test_cascade_finds_what_the_base_class_finds(name):
    model = build(name).eval()
    set_score_threshold(model, 0.0)
    heads = model.roi_heads
    images = model.preprocess_image(batch(0, 0))
    with torch.no_grad():
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        detections = heads._forward_box(features, proposals)
        expected = CascadeROIHeads._forward_box(heads, features, proposals)
    for one, other in zip(detections, expected):
        assert len(one) == len(other) > 10
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_classes, other.pred_classes)


@pytest.mark.parametrize("name", ("rpn", "retinanet", "fcos"))
def test_detectors_without_distributions_refuse_what_needs_them(name):
    for key, value, message in (
        ("VOTING_SIGMA", 0.05, "VOTING_SIGMA = 0.05: must be 0 for MODEL"),
        (
            "STD_SCALE",
            (1.0, 1.0, 1.0, 1.2),
            r"STD_SCALE = \(1.0, 1.0, 1.0, 1.2\): must be \(1, 1, 1",
        ),
    ):
        cfg = config(name, stock=name != "rpn")
        check_cbbl_config(cfg)
        cfg.MODEL.CBBL[key] = value
        with pytest.raises(ConfigError, match=message):
            check_cbbl_config(cfg)


def test_voting_reaches_the_predictor():
    cfg = config("faster")
    cfg.MODEL.CBBL.VOTING_SIGMA = 0.05
    assert build_model(cfg).roi_heads.box_predictor.voting_sigma == 0.05
