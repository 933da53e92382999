import math

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
    return Regions(offsets[..., None, None].half(), proposals, targets)


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
    values = iou_by_size(boxes, Regions(torch.zeros(3), boxes, targets))
    assert list(values) == ["IoU", "IoU >= 0.75", "0-8 px", "16-32 px"]
    assert list(values.values()) == pytest.approx([230 / 3, 200 / 3, 75, 80], rel=1e-5)


@pytest.fixture
def model(tiny_cfg):
    torch.manual_seed(0)
    tiny_cfg.MODEL.RPN.NMS_THRESH = 1.0
    return build_model(tiny_cfg).eval()


def test_regions_are_the_proposals_that_match_an_object(tiny_cfg, model):
    name = "small_shapes_mini_train"
    regions = foreground_regions(tiny_cfg, model, name)
    assert len(regions.features) == len(regions.proposals) == len(regions.targets) > 0
    assert regions.features.dtype == torch.float16
    overlaps = pairwise_iou(Boxes(regions.proposals), Boxes(regions.targets)).diagonal()
    assert overlaps.min() >= 0.5

    count = 0  # for each image, by hand
    for (image,) in build_annotated_loader(tiny_cfg, name):
        image = {**image, "image": image["image"]}
        with torch.no_grad():
            images = model.preprocess_image([image])
            proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
        overlaps = pairwise_iou(image["instances"].gt_boxes, proposals[0].proposal_boxes)
        count += int((overlaps.max(dim=0).values >= 0.5).sum())
    assert count == len(regions.targets)


def test_fewer_images_spread_over_the_data_set(tiny_cfg):
    name = "small_shapes_mini_train"
    every = [image["image_id"] for (image,) in build_annotated_loader(tiny_cfg, name)]
    for limit in (1, 5, 10, len(every), 10**6):
        some = [image["image_id"] for (image,) in build_annotated_loader(tiny_cfg, name, limit)]
        assert len(some) <= limit and some == every[:: math.ceil(len(every) / limit)]
