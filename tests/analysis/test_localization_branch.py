import itertools

import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.analysis.localization_branch import (  # noqa: E402
    LocalizationBranch,
    Regions,
    foreground_regions,
    iou_by_size,
    train_branch,
)
from cbbl_d2.distribution import exponential_grid  # noqa: E402
from cbbl_d2.engine.validation_loss import build_annotated_loader  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.modeling.box_regression import Box2BoxTransform  # noqa: E402
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead  # noqa: E402
from detectron2.structures import Boxes, pairwise_iou  # noqa: E402

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
TRANSFORM = Box2BoxTransform(WEIGHTS)
GRIDS = {"smooth_l1": None, "cbbl": exponential_grid(3.5, 1.0, 5)}


@pytest.fixture
def box_head():
    torch.manual_seed(0)
    return FastRCNNConvFCHead(ShapeSpec(channels=4, height=1, width=1), conv_dims=[], fc_dims=[32])


def regions_of(number):
    """Their features are the offsets that lead to the objects."""
    torch.manual_seed(number)
    corners, sizes = torch.rand(number, 2) * 100, torch.rand(number, 2) * 40 + 5
    proposals = torch.cat((corners, corners + sizes), dim=1)
    offsets = (torch.rand(number, 4) - 0.5) * 4
    targets = TRANSFORM.apply_deltas(offsets, proposals)
    return Regions(offsets[..., None, None].half(), proposals, targets, Boxes(targets).area())


@pytest.mark.parametrize("kind", GRIDS)
def test_a_branch_learns_to_localize_and_leaves_the_detector_as_it_is(box_head, kind):
    before = {k: v.clone() for k, v in box_head.state_dict().items()}
    train, val = regions_of(3000), regions_of(500)
    branch = LocalizationBranch(box_head, WEIGHTS, GRIDS[kind])
    start = branch.predict(val)
    # The last layer starts near zero: boxes are the proposals.
    assert pairwise_iou(Boxes(start), Boxes(val.proposals)).diagonal().min() > 0.97
    train_branch(branch, train, 400, seed=1)
    assert iou_by_size(start, val)["IoU"] < 65
    assert iou_by_size(branch.predict(val), val)["IoU"] > 80
    assert all(torch.equal(v, before[k]) for k, v in box_head.state_dict().items())


@pytest.mark.parametrize("kind", GRIDS)
def test_only_the_seed_makes_a_difference(box_head, kind):
    regions, trained = regions_of(600), []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        branch = LocalizationBranch(box_head, WEIGHTS, GRIDS[kind])
        train_branch(branch, regions, 3, seed)
        trained.append(branch.predict(regions))
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_smooth_l1_loss_is_that_of_the_box_head(box_head):
    regions = regions_of(64)
    branch = LocalizationBranch(box_head, WEIGHTS, smooth_l1_beta=0.5)
    difference = (branch(regions.features) - regions.features[..., 0, 0].float()).abs()
    loss = torch.where(difference < 0.5, difference**2, difference - 0.25).sum() / 64
    assert float(branch.losses(regions).detach()) == pytest.approx(float(loss.detach()), rel=1e-3)


def test_iou_by_size():
    targets = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 20, 20]])
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 20, 16]])
    sizes = torch.tensor([7.0, 6.0, 16.0])  # in the image, which may be of another size
    values = iou_by_size(boxes, Regions(torch.zeros(3), boxes, targets, sizes))
    assert list(values) == ["IoU", "IoU >= 0.75", "0-8 px", "16-32 px"]
    assert list(values.values()) == pytest.approx([230 / 3, 200 / 3, 75, 80], rel=1e-5)


@pytest.mark.parametrize(
    "head", [{"fc_dims": [16]}, {"conv_dims": [8]}, {"conv_dims": [8], "fc_dims": [16, 8]}]
)
@pytest.mark.parametrize("norm", ["", "BN"])
def test_heads_of_any_layers(head, norm):
    shape = ShapeSpec(channels=4, height=3, width=3)
    head = FastRCNNConvFCHead(shape, conv_norm=norm, **{"conv_dims": [], "fc_dims": [], **head})
    branch = LocalizationBranch(head, WEIGHTS, GRIDS["cbbl"])
    regions = regions_of(600)._replace(features=torch.randn(600, 4, 3, 3))
    assert branch.predict(regions).shape == (600, 4)
    train_branch(branch, regions, 2, seed=1)
    # No region depends on the others, and statistics stay.
    one = regions.pick(torch.tensor([5]))
    torch.testing.assert_close(branch.predict(one), branch.predict(regions)[5:6])
    for name, value in head.named_buffers():
        assert torch.equal(value, branch.box_head.get_buffer(name))


@pytest.fixture
def model(tiny_cfg):
    torch.manual_seed(0)
    # Or an untrained network has few proposals that match.
    tiny_cfg.MODEL.RPN.NMS_THRESH, tiny_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1.0, 1000
    return build_model(tiny_cfg).eval()


NAME = "small_shapes_mini_train"


def matched_by_hand(cfg, model):
    """Of each image the proposals that overlap an object by half or more."""
    for (image,) in build_annotated_loader(cfg, NAME):
        with torch.no_grad():
            images = model.preprocess_image([image])
            (proposals,), _ = model.proposal_generator(images, model.backbone(images.tensor))
        overlaps = pairwise_iou(image["instances"].gt_boxes, proposals.proposal_boxes)
        yield proposals.proposal_boxes.tensor[overlaps.max(dim=0).values >= 0.5]


def test_regions_are_the_proposals_that_match_an_object(tiny_cfg, model):
    model.roi_heads.batch_size_per_image = 10**4
    regions = foreground_regions(tiny_cfg, model, NAME)
    assert regions.features.dtype == torch.float16
    assert len({len(x) for x in regions}) == 1 and len(regions.sizes) > 20
    overlaps = pairwise_iou(Boxes(regions.proposals), Boxes(regions.targets)).diagonal()
    assert overlaps.min() >= 0.5
    expected = torch.cat(list(matched_by_hand(tiny_cfg, model)))
    assert torch.equal(expected.sum(1).sort().values, regions.proposals.sum(1).sort().values)
    # An image is 160 px wide, the input 96.
    areas = Boxes(regions.targets).area().sqrt()
    torch.testing.assert_close(regions.sizes, areas * 160 / 96)


def test_of_an_image_as_many_as_in_training(tiny_cfg, model):
    model.roi_heads.batch_size_per_image, model.roi_heads.positive_fraction = 10, 0.25
    counts = [min(len(x), 3) for x in matched_by_hand(tiny_cfg, model)]
    regions = foreground_regions(tiny_cfg, model, NAME)
    assert len(regions.targets) == sum(counts) and max(counts) == 3


def test_features_that_are_not_finite(tiny_cfg, model, error_of):
    with torch.no_grad():
        next(iter(model.backbone.parameters())).fill_(1e30)
    said = error_of(foreground_regions, tiny_cfg, model, NAME)
    assert NAME in said and ("not finite" in said or "no proposal" in said)


def test_fewer_images_spread_over_the_data_set(tiny_cfg):
    every = [image["image_id"] for (image,) in build_annotated_loader(tiny_cfg, NAME)]
    for limit in (1, 5, len(every) - 1, len(every), 10**6):
        some = [image["image_id"] for (image,) in build_annotated_loader(tiny_cfg, NAME, limit)]
        assert len(some) == min(limit, len(every)) and set(some) <= set(every)
        places = [every.index(x) for x in some] + [len(every)]
        steps = [b - a for a, b in itertools.pairwise(places)]
        assert max(steps) - min(steps) <= 1
