import glob
import os

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from cbbl_d2 import add_cbbl_config
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.engine import load_config
from cbbl_d2.errors import ConfigError

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs")
NAMES = sorted(
    os.path.relpath(path, CONFIGS)
    for path in glob.glob(os.path.join(CONFIGS, "**", "*.yaml"), recursive=True)
)


def differences(a, b, prefix=""):
    """Keys whose values differ."""
    found = set()
    for key in a:
        if isinstance(a[key], dict):
            found |= differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            found.add(prefix + key)
    return found


def one_image(size, num_classes, num_objects=3):
    generator = torch.Generator().manual_seed(0)
    instances = Instances((size, size))
    low = torch.rand(num_objects, 2, generator=generator) * (size - 30)
    high = low + 10 + torch.rand(num_objects, 2, generator=generator) * 15
    instances.gt_boxes = Boxes(torch.cat((low, high), dim=1))
    instances.gt_classes = torch.arange(num_objects) % num_classes
    return {"image": torch.rand(3, size, size, generator=generator) * 255, "instances": instances}


def test_configs_are_found():
    assert "Base-CBBL-RCNN-FPN.yaml" in NAMES and len(NAMES) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_takes_a_training_step(name):
    cfg = load_config(os.path.join(CONFIGS, name))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for module_name, buffer in model.named_buffers():
        if module_name.endswith("conv3.norm.weight"):  # keep an untrained frozen ResNet finite
            buffer.fill_(0.1)
    inputs = [one_image(64, cfg.MODEL.ROI_HEADS.NUM_CLASSES) for _ in range(2)]
    with EventStorage():
        losses = model(inputs)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    weight = model.roi_heads.box_predictor.bbox_pred.weight
    assert torch.isfinite(weight.grad).all() and weight.grad.abs().max() > 0
    outputs = (
        4 if "CBBL" not in cfg.MODEL.ROI_HEADS.NAME else 4 * (cfg.MODEL.CBBL.NUM_INTERVALS + 1)
    )
    assert weight.shape[0] == outputs  # class-agnostic


@pytest.mark.parametrize("num_objects", (0, 3))
@pytest.mark.parametrize("agnostic", (True, False))
def test_images_without_objects_and_empty_predictions(tiny_cfg, num_objects, agnostic):
    tiny_cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    tiny_cfg.MODEL.DEVICE = "cpu"
    model = build_model(tiny_cfg).train()
    inputs = [one_image(96, 5, num_objects), one_image(96, 5, 0)]
    with EventStorage():
        losses = model(inputs)
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert torch.isfinite(model.roi_heads.box_predictor.bbox_pred.weight.grad).all()
    model.eval()
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    with torch.no_grad():
        (result,) = model(inputs[:1])
    assert len(result["instances"]) == 0


@pytest.mark.parametrize("folder, cbbl", [("SmallShapes", "cbbl"), ("COCO-Detection", None)])
def test_twins_differ_in_the_localisation_head_alone(folder, cbbl):
    allowed = {
        "MODEL.ROI_HEADS.NAME",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
        "OUTPUT_DIR",
    }
    if folder == "SmallShapes":
        base, twins = "cbbl", ("smooth_l1", "giou")
    else:
        base, twins = "cbbl_faster_rcnn_R_50_FPN_1x", ("smooth_l1_faster_rcnn_R_50_FPN_1x",)
    base = load_config(os.path.join(CONFIGS, folder, f"{base}.yaml"))
    for twin in twins:
        other = load_config(os.path.join(CONFIGS, folder, f"{twin}.yaml"))
        changed = differences(base, other)
        assert {"MODEL.ROI_HEADS.NAME", "OUTPUT_DIR"} <= changed <= allowed


def test_the_detector_is_that_of_detectron2():
    zoo = os.path.join(os.path.dirname(detectron2.__file__), "model_zoo", "configs")
    stock = get_cfg()
    stock.merge_from_file(os.path.join(zoo, "Base-RCNN-FPN.yaml"))
    changed = differences(stock, load_config(os.path.join(CONFIGS, "Base-CBBL-RCNN-FPN.yaml")))
    assert changed - {"MODEL.DEVICE"} == {
        "MODEL.ROI_HEADS.NAME",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
    }


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("ALPHA", 0.0, "> 0"),
        ("ALPHA", float("nan"), "> 0"),
        ("BETA", -1.0, ">= 0"),
        ("NUM_INTERVALS", 1, ">= 2"),
        ("LABEL", "three_hot", "two_hot, one_hot"),
        ("UNCERTAINTY", "gap", "entropy_gap, entropy, none"),
        ("UNCERTAINTY_WEIGHT", -0.1, ">= 0"),
        ("INIT_STD", -1.0, ">= 0"),
        ("BETA", 1e5, "BETA"),
    ],
)
def test_impossible_values_are_named_when_the_model_is_built(tiny_cfg, key, value, allowed):
    tiny_cfg.MODEL.CBBL[key] = value
    with pytest.raises(ConfigError) as error:
        build_model(tiny_cfg)
    message = str(error.value)
    assert "MODEL.CBBL." in message and key in message
    assert allowed in message and str(value) in message and "\n" not in message


def test_config_without_the_keys():
    with pytest.raises(ConfigError, match="add_cbbl_config"):
        check_cbbl_config(get_cfg())


def test_every_key_is_read(tiny_cfg):
    """A key that is declared and not read would be a lie."""
    predictor = build_model(tiny_cfg).roi_heads.box_predictor
    before = (predictor.box2box_transform.grid.tolist(), predictor.bbox_pred.bias.tolist())
    changes = {
        "ALPHA": 4.0,
        "BETA": 0.5,
        "NUM_INTERVALS": 8,
        "INIT_STD": 0.7,
        "LABEL": "one_hot",
        "UNCERTAINTY": "entropy",
        "UNCERTAINTY_WEIGHT": 0.7,
    }
    assert set(changes) == set(tiny_cfg.MODEL.CBBL)
    for key, value in changes.items():
        cfg = tiny_cfg.clone()
        assert cfg.MODEL.CBBL[key] != value
        cfg.MODEL.CBBL[key] = value
        other = build_model(cfg).roi_heads.box_predictor
        if key in ("ALPHA", "BETA", "NUM_INTERVALS", "INIT_STD"):
            after = (other.box2box_transform.grid.tolist(), other.bbox_pred.bias.tolist())
            assert after != before, key
        else:
            assert getattr(other, key.lower()) == value


def test_adding_the_keys_leaves_detectron2_s_defaults_alone():
    cfg = get_cfg()
    add_cbbl_config(cfg)
    assert "CBBL" not in get_cfg().MODEL
