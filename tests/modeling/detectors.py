"""Every detector that C-BBL changes, small enough for tests, and the stock one it is made of."""

import copy
import dataclasses
import functools
import os

import torch
from cbbl_d2.engine import load_config
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

CONFIG = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "SmallShapes", "cbbl.yaml")
NUM_CLASSES = 5
NUM_KEYPOINTS = 3

# A narrow ResNet-50: R-18 must be 64 channels wide, which takes several times as long.
_SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.CONV_DIMS": [32],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
    "INPUT.MIN_SIZE_TEST": 96,
}
_DENSE = {
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
}
# Different settings of the loss in different detectors, so that the laws hold for all of them.
_GIOU = {"MODEL.CBBL.GIOU_WEIGHT": 0.3}
_CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CBBLCascadeROIHeads",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
}


@dataclasses.dataclass
class Detector:
    """
    Attributes:
        options: what differs from Faster R-CNN.
        stock: with these in addition it is Detectron2's own.
        new_layers: the modules that C-BBL replaces.
        same_losses: those that the stock detector has in common with it, given equal weights.
        prefixes: of the names in the event storage.
    """

    options: dict
    stock: dict
    new_layers: tuple
    same_losses: tuple
    prefixes: tuple = ("cbbl",)


_BOX_HEAD = {
    "stock": {"MODEL.ROI_HEADS.NAME": "StandardROIHeads"},
    "new_layers": ("roi_heads.box_predictor.bbox_pred",),
}
_CASCADE_HEAD = {
    "stock": {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads"},
    "new_layers": tuple(f"roi_heads.box_predictor.{k}.bbox_pred" for k in range(3)),
    "same_losses": ("loss_rpn_cls", "loss_rpn_loc", "loss_cls_stage0"),
    "prefixes": tuple(f"stage{k}/cbbl" for k in range(3)),
}
_RPN_LAYER = "proposal_generator.rpn_head.anchor_deltas"
_RCNN_LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls")

DETECTORS = {
    "faster": Detector({}, same_losses=_RCNN_LOSSES, **_BOX_HEAD),
    "faster_class_specific": Detector(
        {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False, **_GIOU},
        same_losses=_RCNN_LOSSES,
        **_BOX_HEAD,
    ),
    "cascade": Detector(_CASCADE, **_CASCADE_HEAD),
    "cascade_grids": Detector(
        {
            **_CASCADE,
            **_GIOU,
            "MODEL.CBBL.CASCADE.ALPHA": (5.0, 4.0, 3.0),
            "MODEL.CBBL.CASCADE.BETA": (1.0, 0.5, 0.0),
            "MODEL.CBBL.CASCADE.NUM_INTERVALS": (4, 5, 7),
        },
        **_CASCADE_HEAD,
    ),
    "rpn": Detector(
        {
            "MODEL.PROPOSAL_GENERATOR.NAME": "CBBLRPN",
            "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
            "MODEL.CBBL.UNCERTAINTY": "entropy",
        },
        stock={"MODEL.PROPOSAL_GENERATOR.NAME": "RPN"},
        new_layers=(_RPN_LAYER,),
        same_losses=("loss_rpn_cls",),
        prefixes=("rpn/cbbl",),
    ),
    "rpn_and_faster": Detector(
        {"MODEL.PROPOSAL_GENERATOR.NAME": "CBBLRPN", **_GIOU},
        stock={**_BOX_HEAD["stock"], "MODEL.PROPOSAL_GENERATOR.NAME": "RPN"},
        new_layers=(_RPN_LAYER, *_BOX_HEAD["new_layers"]),
        same_losses=("loss_rpn_cls",),
        prefixes=("rpn/cbbl", "cbbl"),
    ),
    "retinanet": Detector(
        {
            **_DENSE,
            "MODEL.META_ARCHITECTURE": "CBBLRetinaNet",
            "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
            "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
            "MODEL.RETINANET.NUM_CONVS": 1,
            "MODEL.CBBL.RETINANET.BBOX_REG_LOSS_WEIGHT": 0.7,
        },
        stock={"MODEL.META_ARCHITECTURE": "RetinaNet"},
        new_layers=("head.bbox_pred",),
        same_losses=("loss_cls",),
    ),
    "fcos": Detector(
        {
            **_DENSE,
            **_GIOU,
            "MODEL.META_ARCHITECTURE": "CBBLFCOS",
            "MODEL.BACKBONE.NAME": "build_resnet_fpn_p5_backbone",
            "MODEL.FPN.OUT_CHANNELS": 64,  # GN has 32 groups and needs more than one value in each
            "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
            "MODEL.FCOS.NUM_CONVS": 1,
            "MODEL.CBBL.FCOS.BBOX_REG_LOSS_WEIGHT": 0.7,
        },
        stock={"MODEL.META_ARCHITECTURE": "ConfigurableFCOS"},
        new_layers=("head.bbox_pred",),
        same_losses=("loss_fcos_cls", "loss_fcos_ctr"),
    ),
    "mask": Detector(
        {
            "MODEL.MASK_ON": True,
            "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
            "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
            "MODEL.CBBL.UNCERTAINTY": "none",
        },
        same_losses=(*_RCNN_LOSSES, "loss_mask"),
        **_BOX_HEAD,
    ),
    "keypoint": Detector(
        {
            "MODEL.KEYPOINT_ON": True,
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": NUM_KEYPOINTS,
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
            "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 4,
            "MODEL.CBBL.LABEL": "one_hot",
        },
        same_losses=(*_RCNN_LOSSES, "loss_keypoint"),
        **_BOX_HEAD,
    ),
    "res5": Detector(
        {
            "MODEL.BACKBONE.NAME": "build_resnet_backbone",
            "MODEL.RESNETS.OUT_FEATURES": ["res4"],
            "MODEL.RPN.IN_FEATURES": ["res4"],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
            "MODEL.ROI_HEADS.NAME": "CBBLRes5ROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        },
        stock={"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"},
        new_layers=("roi_heads.box_predictor.bbox_pred",),
        same_losses=_RCNN_LOSSES,
    ),
}


def config(name: str, stock: bool = False, **options) -> CfgNode:
    """
    Args:
        options: keys of the config with "__" for the dots.
    """
    detector = DETECTORS[name]
    cfg = load_config(CONFIG)
    extra = {key.replace("__", "."): value for key, value in options.items()}
    for key, value in {
        **_SMALL,
        **detector.options,
        **(detector.stock if stock else {}),
        **extra,
    }.items():
        cfg.merge_from_list([key, value])
    return cfg


def build(name: str, stock: bool = False, **options) -> torch.nn.Module:
    """A model in training mode that the caller may change; the same weights every time."""
    hashable = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items())
    return copy.deepcopy(_built(name, stock, hashable))


@functools.cache
def _built(name, stock, options):
    torch.manual_seed(0)
    model = build_model(config(name, stock, **dict(options)))
    _calibrate(model)
    return model.train()


def _calibrate(model: torch.nn.Module) -> None:
    """Statistics of the batch norms as after training: without them, features would explode."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        features = model.train().backbone(torch.randn(2, 3, 96, 96))
        if hasattr(getattr(model, "roi_heads", None), "res5"):
            model.roi_heads.res5(features["res4"])
    for norm in norms:
        norm.momentum = 0.1


def localization_layers(name: str, model: torch.nn.Module) -> list:
    return [model.get_submodule(x) for x in DETECTORS[name].new_layers]


def set_score_threshold(model: torch.nn.Module, threshold: float) -> None:
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = threshold


def image(num_objects: int, height: int = 96, width: int = 96, seed: int = 0) -> dict:
    """Noise with boxes of 10 to 25 px, their masks and keypoints."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num_objects, 2, generator=generator) * (min(height, width) - 30)
    high = low + 10 + torch.rand(num_objects, 2, generator=generator) * 15
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat((low, high), dim=1))
    instances.gt_classes = torch.arange(num_objects) % NUM_CLASSES
    masks = torch.zeros(num_objects, height, width, dtype=torch.bool)
    keypoints = torch.full((num_objects, NUM_KEYPOINTS, 3), 2.0)  # 2: visible
    for i in range(num_objects):
        x0, y0, x1, y1 = instances.gt_boxes.tensor[i].int().tolist()
        masks[i, y0:y1, x0:x1] = True
        keypoints[i, :, :2] = low[i] + (high[i] - low[i]) * torch.rand(
            NUM_KEYPOINTS, 2, generator=generator
        )
    instances.gt_masks = BitMasks(masks)
    instances.gt_keypoints = Keypoints(keypoints)
    pixels = torch.rand(3, height, width, generator=generator) * 255
    return {"image": pixels, "instances": instances}


def batch(*num_objects: int) -> list:
    """One image for each number, of different sizes."""
    return [image(num, 96, 96 - 16 * i, seed=i) for i, num in enumerate(num_objects)]
