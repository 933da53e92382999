"""What Detectron2's keys can be: it looks at a value where it is used, if at all."""

from cbbl_d2.value_checks import each, integer, number, one_of

__all__ = ["ALWAYS", "IN_TRAINING"]

_WEIGHT = number(0)
_TRANSFORM = each(number(0, above=True), 4)
_NORM = one_of("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "LN")

ALWAYS = {
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _TRANSFORM,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _TRANSFORM,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _TRANSFORM,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": each(_TRANSFORM, 1),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": _NORM,
    "MODEL.FPN.NORM": _NORM,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.ROI_BOX_HEAD.NORM": _NORM,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": one_of(
        "ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated"
    ),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": integer(1),
    "MODEL.PIXEL_STD": each(number(0, above=True), 1),
    "INPUT.FORMAT": one_of("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MIN_SIZE_TEST": integer(0),
    "INPUT.MAX_SIZE_TEST": integer(1),
    "DATALOADER.NUM_WORKERS": integer(0, 4096),
    "TEST.DETECTIONS_PER_IMAGE": integer(-1),
    "SEED": integer(-(2**31), 2**31 - 1),
}
# What only training reads.
IN_TRAINING = {
    "SOLVER.MAX_ITER": integer(1),
    "SOLVER.CHECKPOINT_PERIOD": integer(1),
    "TEST.EVAL_PERIOD": integer(0),
    "SOLVER.BASE_LR": number(0, above=True),
    "SOLVER.WEIGHT_DECAY": _WEIGHT,
    "SOLVER.WEIGHT_DECAY_NORM": _WEIGHT,
    "SOLVER.BIAS_LR_FACTOR": _WEIGHT,
    "SOLVER.MOMENTUM": number(0, 1),
    "SOLVER.GAMMA": number(0, above=True),
    "SOLVER.WARMUP_ITERS": integer(0),
    "SOLVER.WARMUP_FACTOR": number(0, 1),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.STEPS": each(integer(0)),
    "SOLVER.OPTIMIZER": one_of("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": number(0, above=True),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (
        lambda v: isinstance(v, (int, float)) and v > 0,
        "a number > 0 (inf: the largest element)",
    ),
    "DATALOADER.SAMPLER_TRAIN": one_of(
        "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"
    ),
    "INPUT.MIN_SIZE_TRAIN": (
        lambda v: each(integer(0), 1)[0]([v] if type(v) is int else v),
        "one or more integers >= 0 (0: not resized)",
    ),
    "INPUT.MAX_SIZE_TRAIN": integer(1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "MODEL.RPN.LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _WEIGHT,
    "MODEL.RPN.SMOOTH_L1_BETA": _WEIGHT,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _WEIGHT,
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _WEIGHT,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": integer(1),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": integer(1),
    "MODEL.RPN.POSITIVE_FRACTION": number(0, 1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": number(0, 1),
}
