import glob
import os

import detectron2
import pytest
import torch
import yaml
from cbbl_d2 import add_cbbl_config
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.engine import load_config
from cbbl_d2.errors import ConfigError
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs")
NAMES = sorted(
    os.path.relpath(path, CONFIGS)[: -len(".yaml")]
    for path in glob.glob(os.path.join(CONFIGS, "**", "*.yaml"), recursive=True)
)
ZOO = os.path.join(os.path.dirname(detectron2.__file__), "model_zoo", "configs")


def load(name):
    cfg = load_config(os.path.join(CONFIGS, f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def flatten(cfg, prefix=""):
    """{"MODEL.CBBL.ALPHA": 5.0, ...}"""
    flat = {}
    for key, value in cfg.items():
        nested = isinstance(value, dict)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def set_key(cfg, key, value):
    *nodes, last = key.split(".")
    for node in nodes:
        cfg = cfg[node]
    cfg[last] = value


def get_key(cfg, key):
    for node in key.split("."):
        cfg = cfg[node]
    return cfg


def differences(a, b):
    """Keys of ``a`` whose values differ in ``b``."""
    b = flatten(b)
    return {key for key, value in flatten(a).items() if value != b[key]}


def one_image(size, num_classes, num_objects=3, num_keypoints=17):
    """Boxes with masks that fill them and keypoints on their diagonal."""
    generator = torch.Generator().manual_seed(0)
    instances = Instances((size, size))
    low = torch.rand(num_objects, 2, generator=generator) * (size - 30)
    high = low + 10 + torch.rand(num_objects, 2, generator=generator) * 15
    instances.gt_boxes = Boxes(torch.cat((low, high), dim=1))
    instances.gt_classes = torch.arange(num_objects) % num_classes
    corners = torch.cat((low, high), dim=1)[:, [0, 1, 2, 1, 2, 3, 0, 3]]
    instances.gt_masks = PolygonMasks([[polygon.double().numpy()] for polygon in corners])
    diagonal = torch.linspace(0.1, 0.9, num_keypoints)[None, :, None]
    points = low[:, None] + (high - low)[:, None] * diagonal
    instances.gt_keypoints = Keypoints(
        torch.cat((points, torch.full((*points.shape[:2], 1), 2.0)), dim=2)
    )
    return {"image": torch.rand(3, size, size, generator=generator) * 255, "instances": instances}


def localization_layers(cfg, model):
    """[(layer, number of outputs per coordinate)] of all parts that regress boxes."""
    c = cfg.MODEL.CBBL
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture != "GeneralizedRCNN":
        node = c.FCOS if "FCOS" in architecture else c.RETINANET
        return [(model.head.bbox_pred, node.NUM_INTERVALS + 1 if "CBBL" in architecture else 1)]
    is_cbbl = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "CBBLRPN"
    rpn_head = model.proposal_generator.rpn_head
    layers = [(rpn_head.anchor_deltas, c.RPN.NUM_INTERVALS + 1 if is_cbbl else 1)]
    predictors = model.roi_heads.box_predictor
    if not isinstance(predictors, torch.nn.ModuleList):
        predictors = [predictors]
    num_points = c.NUM_INTERVALS + 1 if "CBBL" in cfg.MODEL.ROI_HEADS.NAME else 1
    return layers + [(predictor.bbox_pred, num_points) for predictor in predictors]


def num_classes_of(cfg):
    architecture = cfg.MODEL.META_ARCHITECTURE
    if "FCOS" in architecture:
        return cfg.MODEL.FCOS.NUM_CLASSES
    return cfg.MODEL["RETINANET" if "RetinaNet" in architecture else "ROI_HEADS"].NUM_CLASSES


@pytest.mark.parametrize("name", NAMES)
def test_config_builds_and_takes_a_training_step(name):
    cfg = load(name)
    # Less than most configs have, so that each takes a second.
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for module_name, buffer in model.named_buffers():
        if module_name.endswith("conv3.norm.weight"):  # keep an untrained frozen ResNet finite
            buffer.fill_(0.1)
    image = one_image(
        64, num_classes_of(cfg), num_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    )
    with EventStorage():
        losses = model([image])
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert ("loss_mask" in losses) == cfg.MODEL.MASK_ON
    assert ("loss_keypoint" in losses) == cfg.MODEL.KEYPOINT_ON
    sum(losses.values()).backward()

    agnostic = cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG
    for layer, num_points in localization_layers(cfg, model):
        # The weights to start from are to know nothing of what is compared later.
        learns = name != "SmallShapes/pretrain" or not isinstance(layer, torch.nn.Linear)
        assert torch.isfinite(layer.weight.grad).all()
        assert (layer.weight.grad.abs().max() > 0) == learns
        if isinstance(layer, torch.nn.Linear):
            num_boxes = 1 if agnostic else cfg.MODEL.ROI_HEADS.NUM_CLASSES
        elif "FCOS" in cfg.MODEL.META_ARCHITECTURE:
            num_boxes = 1
        else:
            sizes, ratios = (
                cfg.MODEL.ANCHOR_GENERATOR.SIZES,
                cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            )
            num_boxes = len(sizes[0]) * len(ratios[0])
        assert layer.weight.shape[0] == num_boxes * 4 * num_points


# ------------------------------------------------------------------------------------------------
# How the files relate to each other
# ------------------------------------------------------------------------------------------------


def test_each_config_stays_inside_and_writes_to_a_folder_of_its_own():
    outputs = set()
    for name in NAMES:
        path = os.path.join(CONFIGS, f"{name}.yaml")
        with open(path) as f:
            base = yaml.safe_load(f).get("_BASE_")
        if base is not None:
            found = os.path.relpath(os.path.join(os.path.dirname(path), base), CONFIGS)
            assert found[: -len(".yaml")] in NAMES, name
        if os.path.basename(name).startswith("Base-"):
            assert load(name).OUTPUT_DIR == "./output", name
        else:
            outputs.add(load(name).OUTPUT_DIR)
    assert len(outputs) == sum(not os.path.basename(name).startswith("Base-") for name in NAMES)


# What may differ between C-BBL and another way to localize
LOCALISATION = {
    "MODEL.META_ARCHITECTURE",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
    "MODEL.FCOS.BBOX_REG_LOSS_WEIGHT",
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE",
    "SOLVER.ANCHOR_DELTAS_LR_FACTOR",  # a distribution in an RPN needs more
}


def twins():
    """[(C-BBL config, the same detector that localizes in another way)]"""
    pairs = []
    for name in NAMES:
        folder, _, file = name.rpartition("/")
        for method in ("smooth_l1", "l2", "giou", "dfl"):
            if "ablations" not in folder and (file == method or file.startswith(f"{method}_")):
                pairs.append((f"{folder}/cbbl{file[len(method) :]}", name))
    rpn = [name for name in NAMES if os.path.basename(name).startswith("cbbl_rpn")]
    for name in rpn:
        stock = name.replace("cbbl_rpn_only", "smooth_l1").replace("cbbl_rpn", "smooth_l1")
        pairs.append((name, stock))
    return pairs


@pytest.mark.parametrize("cbbl, twin", twins())
def test_twins_differ_in_localization_alone(cbbl, twin):
    a, b = load(cbbl), load(twin)
    changed = differences(a, b) - {"OUTPUT_DIR"}
    changed = {key for key in changed if not key.startswith("MODEL.CBBL.")} | {
        "MODEL.CBBL" for key in changed if key.startswith("MODEL.CBBL.")
    }
    assert changed and changed <= LOCALISATION | {"MODEL.CBBL"}
    for registry, key in (
        (META_ARCH_REGISTRY, "MODEL.META_ARCHITECTURE"),
        (PROPOSAL_GENERATOR_REGISTRY, "MODEL.PROPOSAL_GENERATOR.NAME"),
        (ROI_HEADS_REGISTRY, "MODEL.ROI_HEADS.NAME"),
    ):
        # the stock class is the one that C-BBL is made of
        assert issubclass(registry.get(get_key(a, key)), registry.get(get_key(b, key)))


def test_detectors_have_twins():
    with_twin = {cbbl for cbbl, _ in twins()}
    for folder in ("SmallShapes", "COCO-Detection", "VisDrone", "TinyPerson", "AI-TOD", "BCCD"):
        detectors = {
            name
            for name in NAMES
            if name.startswith(f"{folder}/cbbl") and not name.endswith("_paper")
        }
        assert detectors and detectors <= with_twin


ABLATIONS = [name for name in NAMES if "/ablations/" in name]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_one_key(name):
    base = load(f"{name.partition('/ablations/')[0]}/cbbl")
    changed = differences(base, load(name)) - {"OUTPUT_DIR"}
    assert len(changed) == 1, changed


PAPER = [name for name in NAMES if name.endswith("_paper")]


@pytest.mark.parametrize("name", PAPER)
def test_paper_setting_differs_from_the_default_in_the_loss_alone(name):
    changed = differences(load(name.removesuffix("_paper")), load(name)) - {"OUTPUT_DIR"}
    assert changed and all(
        key.startswith("MODEL.CBBL.") or key == "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT"
        for key in changed
    )


def test_ablations_differ_from_each_other():
    assert ABLATIONS
    values = []
    for name in ABLATIONS:
        cfg = load(name)
        cfg.OUTPUT_DIR = ""
        values.append(cfg.dump())
    assert len(set(values)) == len(values)


# ------------------------------------------------------------------------------------------------
# What Detectron2 calls these detectors
# ------------------------------------------------------------------------------------------------

BOX_HEAD = {
    "MODEL.ROI_HEADS.NAME",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
}


@pytest.mark.parametrize(
    "ours, stock, changed",
    [
        ("Base-CBBL-RCNN-FPN", "Base-RCNN-FPN", BOX_HEAD),
        ("COCO-Detection/cbbl_faster_rcnn_R_50_FPN_1x", None, BOX_HEAD),
        ("COCO-Detection/cbbl_faster_rcnn_R_50_C4_1x", None, BOX_HEAD),
        (
            "COCO-Detection/cbbl_cascade_rcnn_R_50_FPN_1x",
            "Misc/cascade_mask_rcnn_R_50_FPN_1x",
            # stock Cascade R-CNN is class-agnostic itself
            BOX_HEAD - {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"} | {"MODEL.MASK_ON"},
        ),
        ("COCO-InstanceSegmentation/cbbl_mask_rcnn_R_50_FPN_1x", None, BOX_HEAD),
        (
            "COCO-Keypoints/cbbl_keypoint_rcnn_R_50_FPN_1x",
            None,
            BOX_HEAD | {"MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA"},  # without effect in C-BBL
        ),
        ("Base-CBBL-RetinaNet", "Base-RetinaNet", {"MODEL.META_ARCHITECTURE"}),
        ("COCO-Detection/cbbl_retinanet_R_50_FPN_1x", None, {"MODEL.META_ARCHITECTURE"}),
        ("COCO-Detection/smooth_l1_retinanet_R_50_FPN_1x", None, set()),
    ],
)
def test_the_detector_is_that_of_detectron2(ours, stock, changed):
    cfg = get_cfg()
    stock = stock or ours.replace("cbbl_", "").replace("smooth_l1_", "")
    # Detectron2 computes the sizes of RetinaNet's anchors in the file: its own file is trusted.
    cfg.merge_from_file(os.path.join(ZOO, f"{stock}.yaml"), allow_unsafe=True)
    mine = load(ours)
    cfg.MODEL.DEVICE = mine.MODEL.DEVICE
    if "retinanet" in stock.lower():  # rounded to 0.01 pixels
        sizes = mine.MODEL.ANCHOR_GENERATOR.SIZES
        for got, expected in zip(sizes, cfg.MODEL.ANCHOR_GENERATOR.SIZES, strict=True):
            assert got == pytest.approx(expected, abs=0.006)
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = sizes
    assert differences(cfg, mine) - {"OUTPUT_DIR"} == changed


def test_fcos_is_that_of_detectron2():
    """Detectron2 has it as a Lazy config only: compare what is built."""
    lazy = LazyConfig.load(os.path.join(ZOO, "COCO-Detection", "fcos_R_50_FPN_1x.py"))
    cfg = load("COCO-Detection/giou_fcos_R_50_FPN_1x")
    assert cfg.MODEL.WEIGHTS == lazy.train.init_checkpoint
    assert cfg.SOLVER.BASE_LR == lazy.optimizer.lr
    assert cfg.SOLVER.MAX_ITER == lazy.train.max_iter
    assert cfg.SOLVER.IMS_PER_BATCH == lazy.dataloader.train.total_batch_size
    assert cfg.MODEL.FCOS.NORM == lazy.model.head.norm
    cfg.MODEL.FCOS.NORM = lazy.model.head.norm = ""  # Detectron2 v0.6 cannot build its own "GN"
    mine, stock = build_model(cfg), instantiate(lazy.model)

    def description(model):
        plain = (bool, int, float, str)
        return {
            # The weight is this project's own, and 1 is what Detectron2 does.
            "box_reg_loss_weight": 1.0,
            **{key: value for key, value in vars(model).items() if isinstance(value, plain)},
            "parameters": [(k, v.shape, v.requires_grad) for k, v in model.named_parameters()],
            "bias": model.head.cls_score.bias.tolist(),  # from the prior probability
            "levels": (list(model.head_in_features), model.backbone.top_block.in_feature),
            "sizes": [boxes.tolist() for boxes in model.anchor_generator.cell_anchors],
            "pixels": (model.pixel_mean.tolist(), model.pixel_std.tolist()),
        }

    assert "test_nms_thresh" in description(stock)
    assert description(mine) == description(stock)


# ------------------------------------------------------------------------------------------------
# The keys
# ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("ALPHA", 0.0, "> 0"),
        ("ALPHA", float("nan"), "> 0"),
        ("BETA", -1.0, ">= 0"),
        ("NUM_INTERVALS", 1, "from 2 to 10000"),
        ("LABEL", "three_hot", "'two_hot', 'one_hot'"),
        ("UNCERTAINTY", "gap", "'entropy_gap', 'entropy', 'none'"),
        ("UNCERTAINTY_WEIGHT", -0.1, ">= 0"),
        ("GIOU_WEIGHT", float("inf"), ">= 0"),
        ("INIT_STD", -1.0, ">= 0"),
        ("VOTING_SIGMA", -0.1, ">= 0"),
        ("STD_SCALE", (1.0, 1.0), "four numbers > 0"),
        ("STD_SCALE", (1.0, 1.0, 0.0, 1.0), "four numbers > 0"),
        ("REFINEMENT.GAMMA", -0.1, ">= 0"),
        ("REFINEMENT.GAMMA", True, ">= 0"),
        ("REFINEMENT.RHO", 0.0, "> 0"),
        ("REFINEMENT.RHO", float("inf"), "> 0"),
        *(
            (f"{node}.{key}", value, allowed)
            for node in ("RPN", "RETINANET", "FCOS")
            for key, value, allowed in (
                ("ALPHA", -2.0, "> 0"),
                ("BETA", float("nan"), ">= 0"),
                ("NUM_INTERVALS", 0, "from 2 to 10000"),
            )
        ),
        *((f"{node}.INIT_STD", -1.0, ">= 0") for node in ("RPN", "RETINANET")),
        ("RETINANET.BBOX_REG_LOSS_WEIGHT", -1.0, ">= 0"),
        ("FCOS.BBOX_REG_LOSS_WEIGHT", float("nan"), ">= 0"),
        ("CASCADE.ALPHA", (5.0, 5.0), "3 values, one for each stage of MODEL.ROI_BOX_CASCADE_HEAD"),
        ("CASCADE.BETA", (1.0, 1.0, -1.0), ">= 0"),
        ("CASCADE.NUM_INTERVALS", (5, 5, 5, 5), "3 values"),
        ("CASCADE.NUM_INTERVALS", 5, "3 values"),
    ],
)
def test_impossible_values_are_named_when_the_model_is_built(tiny_cfg, key, value, allowed):
    set_key(tiny_cfg, f"MODEL.CBBL.{key}", value)
    with pytest.raises(ConfigError) as error:
        build_model(tiny_cfg)
    message = str(error.value)
    assert message.startswith(f"MODEL.CBBL.{key} = {value!r}: must be ")
    assert allowed in message and "\n" not in message


DETECTORS = {  # the keys that choose the detector that reads a node
    "": {},
    "CASCADE": {"MODEL.ROI_HEADS.NAME": "CBBLCascadeROIHeads"},
    "REFINEMENT": {"MODEL.CBBL.REFINEMENT.GAMMA": 0.1},
    "RPN": {"MODEL.PROPOSAL_GENERATOR.NAME": "CBBLRPN"},
    "RETINANET": {
        "MODEL.META_ARCHITECTURE": "CBBLRetinaNet",
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.IN_FEATURES": ["p4", "p5"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32]],
    },
    "FCOS": {
        "MODEL.META_ARCHITECTURE": "CBBLFCOS",
        "MODEL.FCOS.NUM_CONVS": 1,
        "MODEL.FCOS.IN_FEATURES": ["p3", "p4"],
        "MODEL.FCOS.NUM_CLASSES": 5,
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.0,
    },
}
DETECTORS["stock FCOS"] = {**DETECTORS["FCOS"], "MODEL.META_ARCHITECTURE": "ConfigurableFCOS"}


@pytest.fixture
def detector(tiny_cfg):
    """``detector(node)``: the config of a small detector that reads MODEL.CBBL.{node}."""

    def make(node):
        cfg = tiny_cfg.clone()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.FPN.OUT_CHANNELS = 32
        cfg.MODEL.RPN.CONV_DIMS = [32]
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        for key, value in DETECTORS[node].items():
            set_key(cfg, key, value)
        return cfg

    return make


@pytest.mark.parametrize("key", ["ALPHA", "BETA", "RPN.BETA", "RETINANET.BETA", "FCOS.BETA"])
def test_values_that_are_impossible_together(detector, key):
    node = key.rpartition(".")[0]
    cfg = detector(node)
    set_key(cfg, f"MODEL.CBBL.{key}", 1e5)  # the inner points collide at zero
    with pytest.raises(ConfigError, match="ALPHA,BETA,NUM_INTERVALS") as error:
        build_model(cfg)
    assert f"MODEL.CBBL.{node}" in str(error.value) and "1" in str(error.value)


def test_config_without_the_keys():
    with pytest.raises(ConfigError, match="add_cbbl_config"):
        check_cbbl_config(get_cfg())


LOSS = {
    "LABEL": "one_hot",
    "UNCERTAINTY": "entropy",
    "UNCERTAINTY_WEIGHT": 0.7,
    "GIOU_WEIGHT": 1.0,
}
ONE_SIDED = {"ALPHA": 4.0, "BETA": 0.5, "NUM_INTERVALS": 8}
GRID = {**ONE_SIDED, "INIT_STD": 0.7}
CHANGES = {
    "": {**LOSS, **GRID, "VOTING_SIGMA": 0.2, "STD_SCALE": (1.5, 1.5, 1.2, 1.2)},
    "CASCADE": {
        "ALPHA": (5.0, 5.0, 4.0),
        "BETA": (1.0, 1.0, 0.5),
        "NUM_INTERVALS": (5, 5, 6),
    },
    "REFINEMENT": {"GAMMA": 0.2, "RHO": 0.7},
    "RPN": GRID,
    "RETINANET": {**GRID, "BBOX_REG_LOSS_WEIGHT": 0.7},
    "FCOS": {**ONE_SIDED, "BBOX_REG_LOSS_WEIGHT": 0.7},
}
FCOS_CHANGES = {
    "NUM_CLASSES": 6,
    "IN_FEATURES": ["p2", "p3"],
    "NUM_CONVS": 2,
    "NORM": "",
    "PRIOR_PROB": 0.1,
    "CENTER_SAMPLING_RADIUS": 0.8,
    "FOCAL_LOSS_ALPHA": 0.5,
    "FOCAL_LOSS_GAMMA": 1.0,
    "SCORE_THRESH_TEST": 0.9,
    "TOPK_CANDIDATES_TEST": 5,
    "NMS_THRESH_TEST": 0.1,
}
EVERY_KEY = [
    *(
        (node, f"MODEL.CBBL.{node}{'.' if node else ''}{key}", value)
        for node, changes in CHANGES.items()
        for key, value in changes.items()
    ),
    # The loss has one definition for all detectors.
    *(
        (node, f"MODEL.CBBL.{key}", value)
        for node in ("RPN", "RETINANET", "FCOS")
        for key, value in {**LOSS, "REFINEMENT.GAMMA": 0.1}.items()
    ),
    *(("FCOS", f"MODEL.FCOS.{key}", value) for key, value in FCOS_CHANGES.items()),
    ("stock FCOS", "MODEL.FCOS.BBOX_REG_LOSS_WEIGHT", 0.7),
]


def behavior(cfg):
    """Losses and detections of an untrained model; the same for the same config."""
    torch.manual_seed(0)
    model = build_model(cfg)
    image = one_image(64, 5)
    with EventStorage():
        torch.manual_seed(1)  # the sampling of proposals
        losses = model.train()([image])
    with torch.no_grad():
        (result,) = model.eval()([image])
    result = result["instances"]
    return (
        {name: loss.item() for name, loss in losses.items()},
        result.pred_boxes.tensor.tolist(),
        result.scores.tolist(),
        result.pred_boxes_std.tolist() if result.has("pred_boxes_std") else [],
    )


@pytest.mark.parametrize("node", DETECTORS)
def test_every_key_is_read(detector, node):
    """A key that is declared and not read would be a lie."""
    cfg = detector(node)
    before = behavior(cfg)
    assert behavior(cfg) == before
    for reader, key, value in EVERY_KEY:
        if reader == node:
            changed = cfg.clone()
            assert get_key(changed, key) != value
            set_key(changed, key, value)
            assert behavior(changed) != before, key


def test_no_key_is_left_out_of_the_test_above(tiny_cfg):
    declared = {
        *flatten(tiny_cfg.MODEL.CBBL, "MODEL.CBBL."),
        *flatten(tiny_cfg.MODEL.FCOS, "MODEL.FCOS."),
    }
    assert {key for _, key, _ in EVERY_KEY} == declared


def test_adding_the_keys_leaves_detectron2_s_defaults_alone():
    cfg = get_cfg()
    add_cbbl_config(cfg)
    assert "CBBL" not in get_cfg().MODEL and "FCOS" not in get_cfg().MODEL
