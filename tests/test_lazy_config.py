"""The Lazy configs: each builds, trains, and describes the model of the YAML config beside it."""

import glob
import os

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.engine import load_config
from cbbl_d2.modeling import CBBLROIHeads, Refinement
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs")
NAMES = sorted(
    os.path.relpath(path, CONFIGS)
    for path in glob.glob(os.path.join(CONFIGS, "*", "*.py"))
    if os.path.basename(os.path.dirname(path)) != "common"
)
SIZE = 64


def load(name):
    return LazyConfig.load(os.path.join(CONFIGS, name))


def one_image(seed, num_classes, num_keypoints):
    """With boxes, masks and keypoints: a model takes what it needs."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(3, 2, generator=generator) * (SIZE - 30)
    high = low + 10 + torch.rand(3, 2, generator=generator) * 15
    boxes = torch.cat((low, high), dim=1)
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(3) % num_classes
    instances.gt_masks = PolygonMasks(
        [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes.tolist()]
    )
    if num_keypoints:
        centers = (low + high) / 2
        points = torch.cat((centers, torch.full((3, 1), 2.0)), dim=1)
        instances.gt_keypoints = Keypoints(points[:, None].repeat(1, num_keypoints, 1))
    return {"image": torch.rand(3, SIZE, SIZE, generator=generator) * 255, "instances": instances}


def losses_of(model, lazy):
    num_classes = instantiate(OmegaConf.select(lazy, "model.roi_heads.num_classes"))
    num_keypoints = OmegaConf.select(lazy, "model.roi_heads.keypoint_head.num_keypoints")
    inputs = [one_image(i, num_classes or lazy.model.num_classes, num_keypoints) for i in (0, 1)]
    torch.manual_seed(0)  # of the sampling of anchors and proposals
    with EventStorage():
        return model(inputs)


def box_layers(model):
    """The last layers of all that localizes."""
    names = ("bbox_pred", "anchor_deltas")
    return [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]


def test_every_kind_of_detector_has_one():
    folders = {os.path.dirname(name) for name in NAMES}
    assert folders == {
        "COCO-Detection",
        "COCO-InstanceSegmentation",
        "COCO-Keypoints",
        "SmallShapes",
    }
    assert len(NAMES) >= 15


def twin_of(name):
    """The model of the YAML config."""
    cfg = load_config(os.path.join(CONFIGS, name.replace(".py", ".yaml")))
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_builds_trains_and_is_the_model_of_its_yaml_twin(name):
    lazy = load(name)
    is_small = name.startswith("SmallShapes")
    if not is_small and "roi_heads" in lazy.model:  # less to do; no layer depends on it
        lazy.model.roi_heads.batch_size_per_image = 16
        lazy.model.proposal_generator.pre_nms_topk = (100, 100)
    torch.manual_seed(0)
    model = instantiate(lazy.model).train()
    twin = twin_of(name).train()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("conv3.norm.weight"):  # keep an untrained frozen ResNet finite
            buffer.fill_(0.1)
    parameters, others = ({k: p for k, p in m.named_parameters()} for m in (model, twin))
    assert {k: (p.shape, p.requires_grad) for k, p in parameters.items()} == {
        k: (p.shape, p.requires_grad) for k, p in others.items()
    }
    twin.load_state_dict(model.state_dict())
    for buffer in ("pixel_mean", "pixel_std"):  # in Detectron2's checkpoints they are not
        assert torch.equal(getattr(model, buffer), getattr(twin, buffer))

    losses = losses_of(model, lazy)
    if is_small:
        others = losses_of(twin, lazy)
        assert losses.keys() == others.keys()
        for key, loss in losses.items():
            # Not to the last digit: torch optimizes the scripted focal loss after its first call.
            torch.testing.assert_close(loss, others[key], rtol=1e-5, atol=1e-6)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    layers = box_layers(model)
    assert layers
    for layer in layers:
        assert torch.isfinite(layer.weight.grad).all() and layer.weight.grad.abs().max() > 0

    before = [layer.weight.clone() for layer in layers]
    lazy.optimizer.params.model = model
    instantiate(lazy.optimizer).step()
    for layer, weight in zip(layers, before):
        assert not torch.equal(layer.weight, weight)


@pytest.mark.parametrize("name", ("cbbl", "cbbl_cascade_rcnn", "cbbl_rpn", "cbbl_fcos"))
def test_a_refinement_is_an_argument(name):
    lazy = load(f"SmallShapes/{name}.py")
    parts = [lazy.model]
    if "roi_heads" in lazy.model:
        parts = [lazy.model.roi_heads]
        if parts[0]._target_ is StandardROIHeads:
            parts[0]._target_ = CBBLROIHeads
    if name == "cbbl_rpn":
        parts.append(lazy.model.proposal_generator)
    for part in parts:
        part.refinement = L(Refinement)(gamma=0.1, rho=0.7)
    torch.manual_seed(0)
    model = instantiate(lazy.model).train()
    cfg = load_config(os.path.join(CONFIGS, "SmallShapes", f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CBBL.REFINEMENT.GAMMA, cfg.MODEL.CBBL.REFINEMENT.RHO = 0.1, 0.7
    twin = build_model(cfg).train()
    twin.load_state_dict(model.state_dict())
    losses, others = losses_of(model, lazy), losses_of(twin, lazy)
    assert losses.keys() == others.keys() and any("refine" in loss for loss in losses)
    for loss, value in losses.items():
        torch.testing.assert_close(value, others[loss], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if "SmallShapes" in name])
def test_detects_what_its_yaml_twin_detects(name):
    model = instantiate(load(name).model).eval()
    twin = twin_of(name).eval()
    twin.load_state_dict(model.state_dict())
    for detector in (model, twin):  # untrained, they are sure of nothing
        predictors = getattr(getattr(detector, "roi_heads", detector), "box_predictor", detector)
        for part in predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]:
            part.test_score_thresh /= 1000
    image = {"image": one_image(0, 5, 0)["image"]}
    with torch.no_grad():
        (found,), (expected,) = model([image]), twin([image])
    found, expected = found["instances"], expected["instances"]
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.get_fields().keys() == expected.get_fields().keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_of_the_training_are_those_of_its_yaml_twin(name):
    lazy = load(name)
    cfg = load_config(os.path.join(CONFIGS, name.replace(".py", ".yaml")))
    train, test = lazy.dataloader.train, lazy.dataloader.test
    assert lazy.train.output_dir == f"{cfg.OUTPUT_DIR}_lazy"
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.seed == cfg.SEED
    assert lazy.train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert lazy.train.clip_gradients.enabled == cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    assert lazy.train.clip_gradients.clip_value == cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR
    assert lazy.optimizer.weight_decay == cfg.SOLVER.WEIGHT_DECAY
    assert train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert train.num_workers == cfg.DATALOADER.NUM_WORKERS
    assert (train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (test.dataset.names,) == cfg.DATASETS.TEST
    assert train.mapper.use_instance_mask == cfg.MODEL.MASK_ON
    assert train.mapper.get("use_keypoint", False) == cfg.MODEL.KEYPOINT_ON
    assert tuple(train.mapper.augmentations[0].short_edge_length) == cfg.INPUT.MIN_SIZE_TRAIN
    assert test.mapper.augmentations[0].short_edge_length == cfg.INPUT.MIN_SIZE_TEST
    assert test.mapper.image_format == train.mapper.image_format == cfg.INPUT.FORMAT
    evaluator = lazy.dataloader.evaluator
    assert evaluator.dataset_name == test.dataset.names
    assert ("segm" in evaluator.expected_tasks) == cfg.MODEL.MASK_ON
    assert ("keypoints" in evaluator.expected_tasks) == cfg.MODEL.KEYPOINT_ON
    assert list(evaluator.get("kpt_oks_sigmas", [])) == list(cfg.TEST.KEYPOINT_OKS_SIGMAS)


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_is_that_of_its_yaml_twin(name):
    cfg = load_config(os.path.join(CONFIGS, name.replace(".py", ".yaml")))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = build_lr_scheduler(cfg, optimizer)._multiplier
    multiplier = instantiate(load(name).lr_multiplier)
    for where in (0.0, 0.005, 0.02, 0.05, 0.5, 0.8, 0.95, 0.999):
        assert multiplier(where) == pytest.approx(expected(where))


def test_loading_one_leaves_the_next_alone():
    load("SmallShapes/cbbl.py").model.roi_heads.num_classes = 7
    assert load("SmallShapes/cbbl.py").model.roi_heads.num_classes == 5
    assert "localization_loss" not in load("SmallShapes/smooth_l1.py").model.roi_heads.box_predictor
