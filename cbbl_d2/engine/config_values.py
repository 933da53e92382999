"""What Detectron2's keys can be: it looks at a value where it is used, if at all."""

import math
from collections.abc import Callable
from typing import Any

import torch
from cbbl_d2.errors import ConfigError
from cbbl_d2.messages import short
from detectron2.config import CfgNode

__all__ = ["check_values"]


def _number(low: float, high: float = math.inf, above: bool = False) -> tuple[Callable, str]:
    """From ``low`` on, or with ``above`` anything over it."""

    def ok(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (
            is_number and math.isfinite(value) and (low < value if above else low <= value <= high)
        )

    words = f"a number {'>' if above else '>='} {low:g}"
    return ok, words if high == math.inf else f"a number from {low:g} to {high:g}"


def _integer(low: int, high: int = 2**31 - 1) -> tuple[Callable, str]:
    return lambda v: type(v) is int and low <= v <= high, f"an integer from {low} to {high}"


def _each(one: tuple[Callable, str], least: int = 0) -> tuple[Callable, str]:
    ok, words = one
    return (
        lambda v: isinstance(v, (tuple, list)) and len(v) >= least and all(map(ok, v)),
        f"a list of {'one or more' if least else 'any number'}, each {words}",
    )


def _one_of(*options: Any) -> tuple[Callable, str]:
    return lambda v: v in options, f"one of {', '.join(map(repr, options))}"


def _is_device(value: Any) -> bool:
    try:
        return torch.device(value).type in ("cpu", "cuda", "mps", "xpu")
    except (RuntimeError, TypeError):
        return False


_WEIGHT = _number(0)
_TRANSFORM = _each(_number(0, above=True), 4)
_NORM = _one_of("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "LN")

_ANY = {
    "MODEL.DEVICE": (_is_device, "a device such as cuda, cuda:1 or cpu"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _TRANSFORM,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _TRANSFORM,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _TRANSFORM,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _each(_TRANSFORM, 1),
    "MODEL.RESNETS.DEPTH": _one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": _NORM,
    "MODEL.FPN.NORM": _NORM,
    "MODEL.FPN.FUSE_TYPE": _one_of("sum", "avg"),
    "MODEL.ROI_BOX_HEAD.NORM": _NORM,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _one_of(
        "ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated"
    ),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _integer(1),
    "MODEL.PIXEL_STD": _each(_number(0, above=True), 1),
    "INPUT.FORMAT": _one_of("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MIN_SIZE_TEST": _integer(0),
    "INPUT.MAX_SIZE_TEST": _integer(1),
    "DATALOADER.NUM_WORKERS": _integer(0, 4096),
    "TEST.DETECTIONS_PER_IMAGE": _integer(-1),
    "SEED": _integer(-(2**31), 2**31 - 1),
}
_TRAINING = {
    "SOLVER.MAX_ITER": _integer(1),
    "SOLVER.CHECKPOINT_PERIOD": _integer(1),
    "TEST.EVAL_PERIOD": _integer(0),
    "SOLVER.BASE_LR": _number(0, above=True),
    "SOLVER.WEIGHT_DECAY": _WEIGHT,
    "SOLVER.WEIGHT_DECAY_NORM": _WEIGHT,
    "SOLVER.BIAS_LR_FACTOR": _WEIGHT,
    "SOLVER.MOMENTUM": _number(0, 1),
    "SOLVER.GAMMA": _number(0, above=True),
    "SOLVER.WARMUP_ITERS": _integer(0),
    "SOLVER.WARMUP_FACTOR": _number(0, 1),
    "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
    "SOLVER.STEPS": _each(_integer(0)),
    "SOLVER.OPTIMIZER": _one_of("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": _one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _number(0, above=True),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (
        lambda v: isinstance(v, (int, float)) and v > 0,
        "a number > 0 (inf: the largest element)",
    ),
    "DATALOADER.SAMPLER_TRAIN": _one_of(
        "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"
    ),
    "INPUT.MIN_SIZE_TRAIN": (
        lambda v: _each(_integer(0), 1)[0]([v] if type(v) is int else v),
        "one or more integers >= 0 (0: not resized)",
    ),
    "INPUT.MAX_SIZE_TRAIN": _integer(1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": _one_of("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": _one_of("polygon", "bitmask"),
    "MODEL.RPN.LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _WEIGHT,
    "MODEL.RPN.SMOOTH_L1_BETA": _WEIGHT,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _WEIGHT,
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _integer(1),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _integer(1),
    "MODEL.RPN.POSITIVE_FRACTION": _number(0, 1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _number(0, 1),
}


def check_values(cfg: CfgNode, eval_only: bool = False) -> None:
    """
    Args:
        eval_only: do not check what only training reads.

    Raises:
        ConfigError: a key of Detectron2 has a value that fails late, or is taken without a word
            and does harm, such as a negative weight of a loss.
    """
    for key, (ok, allowed) in (_ANY if eval_only else {**_ANY, **_TRAINING}).items():
        *nodes, last = key.split(".")
        node = cfg
        for name in nodes:
            node = node.get(name, {})
        if last in node and not ok(node[last]):
            raise ConfigError(f"{key} = {short(node[last])}: must be {allowed}")
