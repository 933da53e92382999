"""The config keys of C-BBL, their meaning and their check."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    ProposalNetwork,
)
from detectron2.utils.registry import Registry

from .distribution import LABELS, UNCERTAINTIES
from .distribution.grid import MAX_INTERVALS
from .errors import ConfigError
from .value_checks import Check, check_values, each, integer, is_number, number, one_of


def add_cbbl_config(cfg: CN) -> None:
    """
    Add the keys of this project to a Detectron2 config, in place. The defaults of the grids of the
    box head and of the RPN are the paper's.

    How strongly the localization loss counts as a whole is said by Detectron2's own keys where it
    has them: ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT`` and ``MODEL.RPN.BBOX_REG_LOSS_WEIGHT``.
    ``MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG`` chooses between ``4 * (n + 1)`` and
    ``K * 4 * (n + 1)`` outputs of the box head.
    """
    _C = cfg

    # ---------------------------------------------------------------------------- #
    # C-BBL: localization as classification over a grid of offsets
    # ---------------------------------------------------------------------------- #
    _C.MODEL.CBBL = CN()

    # -- The loss, in every C-BBL part of the model

    # Target distribution of an offset. Options: "two_hot" (its two neighbors on the grid,
    # weighted such that the expectation is the offset), "one_hot" (the nearest point).
    _C.MODEL.CBBL.LABEL = "two_hot"

    # Uncertainty loss. Options: "entropy_gap", |H(p*) - H(p)| (first version of the paper);
    # "entropy", H(p) (second version, "UM"); "none".
    _C.MODEL.CBBL.UNCERTAINTY = "entropy_gap"

    # Its weight relative to the cross entropy (lambda), >= 0. BBOX_REG_LOSS_WEIGHT multiplies
    # both, so that changing it keeps their balance.
    _C.MODEL.CBBL.UNCERTAINTY_WEIGHT = 0.1

    # Weight of a GIoU loss on the decoded boxes relative to the cross entropy, >= 0. 0: no such
    # loss (the paper). Generalized Focal Loss, which has one, weighs it 2 / (0.25 / 4) = 32.
    _C.MODEL.CBBL.GIOU_WEIGHT = 0.0

    # Refinement in training (second version of the paper, "UR"): the localization loss once more,
    # on feature maps moved to where the boxes are less certain, see docs/method.md. For every
    # detector, in each of its parts that localizes by C-BBL. Inference stays as it is.
    _C.MODEL.CBBL.REFINEMENT = CN()
    # Weight of that loss relative to the localization loss (gamma), >= 0. 0: no refinement; the
    # paper's best: 0.1.
    _C.MODEL.CBBL.REFINEMENT.GAMMA = 0.0
    # How far each level of an image's feature pyramid is moved, L2 norm (rho), > 0.
    _C.MODEL.CBBL.REFINEMENT.RHO = 0.5

    # -- The grid of a Fast R-CNN box head (CBBLROIHeads, CBBLRes5ROIHeads, CBBLCascadeROIHeads)

    # Half-width of the grid (alpha in the paper), > 0. The unit is that of the offsets AFTER the
    # weights of the box transform, MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS: with weights of 10, an
    # alpha of 5 covers shifts of half the proposal's width. Offsets outside the grid are clamped
    # to its ends; the share of them is logged as `cbbl/clipped_fraction`.
    _C.MODEL.CBBL.ALPHA = 5.0

    # How strongly the points crowd around zero offset (beta), >= 0. 0 is the uniform grid.
    _C.MODEL.CBBL.BETA = 1.0

    # Number of intervals (n), 2 to 10000: the head has n + 1 logits per coordinate. With an odd n
    # no point lies at zero: a perfect proposal then has the code (.5, .5), whose entropy is log 2.
    # That is fine for "entropy_gap" and at odds with "entropy" above.
    _C.MODEL.CBBL.NUM_INTERVALS = 5

    # Standard deviation of the distribution that an untrained head predicts, around zero offset
    # and in the unit of ALPHA, >= 0. 0 starts with the uniform distribution (the paper).
    _C.MODEL.CBBL.INIT_STD = 0.0

    # Variance voting at inference (Softer-NMS, arXiv 1809.08545): each side of a detection becomes
    # the mean of the boxes that overlap it, the surer ones weighing more. sigma in
    # exp(-(1 - IoU)^2 / sigma), >= 0; 0: no voting (the paper). 0.05 was measured to suit
    # Faster R-CNN. For every detector whose boxes are C-BBL's.
    _C.MODEL.CBBL.VOTING_SIGMA = 0.0

    # Calibration of the standard deviations that detections carry, `pred_boxes_std`: what those of
    # the sides x1, y1, x2, y2 are multiplied by, four numbers > 0, as tools/calibration.py prints.
    # For every detector whose boxes are C-BBL's.
    _C.MODEL.CBBL.STD_SCALE = (1.0, 1.0, 1.0, 1.0)

    # CBBLCascadeROIHeads: one value for each stage, or () for the value above in every stage. The
    # unit is that of the stage's own MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS.
    _C.MODEL.CBBL.CASCADE = CN()
    _C.MODEL.CBBL.CASCADE.ALPHA = ()
    _C.MODEL.CBBL.CASCADE.BETA = ()
    _C.MODEL.CBBL.CASCADE.NUM_INTERVALS = ()

    # -- The grid of CBBLRPN (MODEL.PROPOSAL_GENERATOR.NAME), on offsets after
    #    MODEL.RPN.BBOX_REG_WEIGHTS
    _C.MODEL.CBBL.RPN = CN()
    _C.MODEL.CBBL.RPN.ALPHA = 2.0
    _C.MODEL.CBBL.RPN.BETA = 1.0
    _C.MODEL.CBBL.RPN.NUM_INTERVALS = 10
    _C.MODEL.CBBL.RPN.INIT_STD = 0.0

    # -- The grid of CBBLRetinaNet (MODEL.META_ARCHITECTURE), on offsets after
    #    MODEL.RETINANET.BBOX_REG_WEIGHTS. Its anchors are matched like those of an RPN.
    _C.MODEL.CBBL.RETINANET = CN()
    _C.MODEL.CBBL.RETINANET.ALPHA = 2.0
    _C.MODEL.CBBL.RETINANET.BETA = 1.0
    _C.MODEL.CBBL.RETINANET.NUM_INTERVALS = 10
    _C.MODEL.CBBL.RETINANET.INIT_STD = 0.0
    # Weight of the whole localization loss, for which Detectron2's RetinaNet has no key. For each
    # positive anchor the cross entropy starts at 4 * log(n + 1), here 9.6, many times what
    # Smooth-L1 starts at: with weight 1 it drowns the classification loss.
    _C.MODEL.CBBL.RETINANET.BBOX_REG_LOSS_WEIGHT = 0.25

    # -- The one-sided grid [0, ALPHA] of CBBLFCOS (MODEL.META_ARCHITECTURE), on the distances to
    #    the four sides in strides. A level is given the objects whose largest distance is up to 8
    #    strides; on the last level it is unbounded and clamped to ALPHA.
    _C.MODEL.CBBL.FCOS = CN()
    _C.MODEL.CBBL.FCOS.ALPHA = 8.0
    # Milder than elsewhere: with 1, half of the points would lie below half a stride.
    _C.MODEL.CBBL.FCOS.BETA = 0.25
    _C.MODEL.CBBL.FCOS.NUM_INTERVALS = 16
    _C.MODEL.CBBL.FCOS.BBOX_REG_LOSS_WEIGHT = 0.25  # see RETINANET

    # ---------------------------------------------------------------------------- #
    # Box heads, whatever they localize by
    # ---------------------------------------------------------------------------- #
    # How often a box head is applied at inference, >= 1, each time to the boxes of the time before.
    # For CBBLROIHeads and, with Detectron2's own regression, IteratedROIHeads.
    _C.MODEL.ROI_BOX_HEAD.ITERATIONS_TEST = 1

    # ---------------------------------------------------------------------------- #
    # FCOS, which Detectron2 has without a YAML config (MODEL.META_ARCHITECTURE: ConfigurableFCOS,
    # or CBBLFCOS). Meaning and defaults are those of its class and of its Lazy config.
    # ---------------------------------------------------------------------------- #
    _C.MODEL.FCOS = CN()
    _C.MODEL.FCOS.NUM_CLASSES = 80
    _C.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    _C.MODEL.FCOS.NUM_CONVS = 4
    # Normalization of these convolutions; see detectron2.layers.get_norm
    _C.MODEL.FCOS.NORM = "GN"
    _C.MODEL.FCOS.PRIOR_PROB = 0.01
    # An object's points are those within this many strides of its center.
    _C.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    _C.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    _C.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Weight of the GIoU loss of ConfigurableFCOS; Detectron2's class has none. Of CBBLFCOS it is
    # MODEL.CBBL.FCOS.BBOX_REG_LOSS_WEIGHT.
    _C.MODEL.FCOS.BBOX_REG_LOSS_WEIGHT = 1.0
    # On sqrt(class score * centerness)
    _C.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    _C.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    _C.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # ---------------------------------------------------------------------------- #
    # A classification network of torchvision under Detectron2's FPN: MODEL.BACKBONE.NAME
    # build_torchvision_fpn_backbone, build_retinanet_torchvision_fpn_backbone (P6 and P7 from the
    # network, as RetinaNet has them) or build_torchvision_fpn_p5_backbone (from P5, as FCOS).
    #
    # Detectron2's own keys say the rest. MODEL.FPN.IN_FEATURES: the levels, of "c1" (stride 2, for
    # objects under 8 px) to "c5"; MODEL.BACKBONE.FREEZE_AT: what leads to the feature map of this
    # number is not trained; MODEL.WEIGHTS: "torchvision://NETWORK", torchvision's own download of
    # its best ImageNet weights ("torchvision://NETWORK/IMAGENET1K_V1" names others), or a file with
    # torchvision's weights, or a checkpoint.
    # ---------------------------------------------------------------------------- #
    _C.MODEL.TORCHVISION = CN()
    # Name of torchvision's model function: "mobilenet_v2", "mobilenet_v3_large", "resnet18",
    # "resnet50", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf" ...
    _C.MODEL.TORCHVISION.NETWORK = "mobilenet_v2"
    # What becomes of its BatchNorm. Options: "FrozenBN" (the pretrained statistics stay, as for
    # Detectron2's ResNets), "BN" (live), "SyncBN" (live, over all processes).
    _C.MODEL.TORCHVISION.NORM = "FrozenBN"

    # ---------------------------------------------------------------------------- #
    # Solver
    # ---------------------------------------------------------------------------- #
    # Options: "SGD" (Detectron2's own), "AdamW" (converges faster from scratch).
    _C.SOLVER.OPTIMIZER = "SGD"
    # The learning rate of the layers that predict offsets, or C-BBL's distributions over them, is
    # SOLVER.BASE_LR times this, > 0: of `bbox_pred` in box heads, RetinaNet and FCOS, and of
    # `anchor_deltas` in an RPN. For any detector, stock or C-BBL.
    _C.SOLVER.BBOX_PRED_LR_FACTOR = 1.0
    _C.SOLVER.ANCHOR_DELTAS_LR_FACTOR = 1.0

    # Every how many iterations to log mean and variance of the localization gradient by object
    # size, as `gradients/{head}/{size}/...`, see cbbl_d2/engine/gradient_stats.py; for any
    # detector, stock or C-BBL. 0: never. Detectron2 logs every 20 iterations.
    _C.SOLVER.GRADIENT_STATS_PERIOD = 0

    # With several processes: how many minutes one waits for the others before all of them end in an
    # error, >= 1. Must be longer than the first one takes to compute the AP of a data set: the
    # others wait for it. (On GPUs PyTorch's 30 minutes hold where Detectron2 gathers objects.)
    _C.SOLVER.PROCESS_TIMEOUT = 60

    # The training ends after this many evaluations (TEST.EVAL_PERIOD) in a row that were not better
    # than the best one before, by TEST.BEST_METRIC. 0: it never ends early.
    _C.SOLVER.EARLY_STOPPING = 0

    # ---------------------------------------------------------------------------- #
    # Evaluation
    # ---------------------------------------------------------------------------- #
    # What tells which model is the best one, for model_best.pth and SOLVER.EARLY_STOPPING: a name
    # in metrics.json, "bbox/AP", "bbox/APvs", "segm/AP", "val/total_loss" ... The highest value is
    # the best, of a loss the lowest. With several data sets that of the first one counts, unless
    # the name begins with another one's.
    _C.TEST.BEST_METRIC = "bbox/AP"

    # Whether each evaluation measures the losses on DATASETS.TEST, too, as `val/total_loss`,
    # `val/loss_cls` ..., see cbbl_d2/engine/validation_loss.py.
    _C.TEST.LOSS = False

    # ---------------------------------------------------------------------------- #
    # Data sets in COCO format that a user brings
    # ---------------------------------------------------------------------------- #
    # List of [name, annotation JSON, image folder]; each name can then stand in DATASETS.TRAIN and
    # DATASETS.TEST. Relative paths start at the working directory.
    _C.DATASETS.COCO_FORMAT = []

    # ---------------------------------------------------------------------------- #
    # Augmentation for small objects in training, see cbbl_d2/data/small_object_augmentation.py
    # ---------------------------------------------------------------------------- #
    _C.INPUT.SMALL_OBJECTS = CN()

    # What is small: the square root of the box's area, in pixels of the image file, > 0.
    _C.INPUT.SMALL_OBJECTS.MAX_SIZE = 32.0

    # How many copies of small objects are pasted into each image at most, at places without a box,
    # >= 0. 0: none. For boxes alone, without masks and keypoints.
    _C.INPUT.SMALL_OBJECTS.COPY_PASTE = 0

    # With INPUT.CROP.ENABLED: whether the window is laid such that it holds a small object, chosen
    # at random, as a whole. In images without one it lies anywhere, as Detectron2 does.
    _C.INPUT.SMALL_OBJECTS.KEEP_IN_CROP = False

    # Scale jitter (minimum, maximum), instead of INPUT.MIN_SIZE_TRAIN: the image is resized to fit
    # into JITTER_SIZE times a random factor between them, then cropped or padded to JITTER_SIZE,
    # (height, width) in pixels. (): none.
    _C.INPUT.SMALL_OBJECTS.SCALE_JITTER = ()
    _C.INPUT.SMALL_OBJECTS.JITTER_SIZE = ()


def check_cbbl_config(cfg: CN) -> None:
    """
    Called when a model is built.

    Raises:
        ConfigError: if a key is missing, has an impossible value or does not suit the others; names
            key, value and what is allowed.
    """
    if "CBBL" not in cfg.MODEL:
        raise ConfigError(
            "this config has no MODEL.CBBL: call cbbl_d2.add_cbbl_config(cfg) before merging files"
        )
    check_values(cfg, {**_VALUES, **_cascade_values(cfg)})
    _check_boxes(cfg)
    _check_iterations(cfg)
    _check_refinement(cfg)
    node = cfg.INPUT.SMALL_OBJECTS
    if len(node.SCALE_JITTER) > 0 and len(node.JITTER_SIZE) == 0:
        raise ConfigError(f"INPUT.SMALL_OBJECTS.JITTER_SIZE = (): must be {_JITTER_SIZE}")
    if node.KEEP_IN_CROP and not cfg.INPUT.CROP.ENABLED:
        raise ConfigError(
            "INPUT.SMALL_OBJECTS.KEEP_IN_CROP = True: needs INPUT.CROP.ENABLED True, and "
            "INPUT.CROP.TYPE and SIZE for the window"
        )
    for key in ("MASK_ON", "KEYPOINT_ON"):
        if node.COPY_PASTE and cfg.MODEL[key]:
            raise ConfigError(
                f"INPUT.SMALL_OBJECTS.COPY_PASTE = {node.COPY_PASTE}: copies have boxes only: set "
                f"it to 0, or MODEL.{key} False"
            )


def stock_boxes(cfg: CN) -> str:
    """The key and value that make the boxes of the detections, if these are not C-BBL's, or ""."""
    key, name, part = _detector(cfg)
    return "" if getattr(part, "has_distributions", False) else f"{key} {name}"


def _check_boxes(cfg: CN) -> None:
    node, stock = cfg.MODEL.CBBL, stock_boxes(cfg)
    for key, value, without, what in (
        ("VOTING_SIGMA", node.VOTING_SIGMA, 0, "vote"),
        ("STD_SCALE", tuple(node.STD_SCALE), (1, 1, 1, 1), "have deviations to scale"),
    ):
        if stock and value != without:
            raise ConfigError(
                f"MODEL.CBBL.{key} = {value}: must be {without} for {stock}: only detectors whose "
                f"boxes are C-BBL's {what}"
            )


def _check_iterations(cfg: CN) -> None:
    iterations, (key, name, part) = cfg.MODEL.ROI_BOX_HEAD.ITERATIONS_TEST, _detector(cfg)
    if iterations > 1 and not getattr(part, "can_iterate", False):
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.ITERATIONS_TEST = {iterations}: must be 1 for {key} {name}: only "
            "the MODEL.ROI_HEADS.NAME CBBLROIHeads and IteratedROIHeads, which is Detectron2's "
            "StandardROIHeads, apply their box head again"
        )


def _detector(cfg: CN) -> tuple[str, str, type]:
    """The key, the name and the class of what makes the detections."""
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = _registered(META_ARCH_REGISTRY, name)
    if not issubclass(architecture, GeneralizedRCNN):
        return "MODEL.META_ARCHITECTURE", name, architecture
    name = cfg.MODEL.ROI_HEADS.NAME
    return "MODEL.ROI_HEADS.NAME", name, _registered(ROI_HEADS_REGISTRY, name)


def _check_refinement(cfg: CN) -> None:
    gamma, model = cfg.MODEL.CBBL.REFINEMENT.GAMMA, cfg.MODEL
    names = {"MODEL.META_ARCHITECTURE": model.META_ARCHITECTURE}
    parts = [_registered(META_ARCH_REGISTRY, model.META_ARCHITECTURE)]
    if issubclass(parts[0], (GeneralizedRCNN, ProposalNetwork)):
        names["MODEL.PROPOSAL_GENERATOR.NAME"] = model.PROPOSAL_GENERATOR.NAME
        parts.append(_registered(PROPOSAL_GENERATOR_REGISTRY, model.PROPOSAL_GENERATOR.NAME))
    if issubclass(parts[0], GeneralizedRCNN):
        names["MODEL.ROI_HEADS.NAME"] = model.ROI_HEADS.NAME
        parts.append(_registered(ROI_HEADS_REGISTRY, model.ROI_HEADS.NAME))
    if gamma > 0 and not any(getattr(part, "can_refine", False) for part in parts):
        raise ConfigError(
            f"MODEL.CBBL.REFINEMENT.GAMMA = {gamma}: must be 0 for "
            f"{', '.join(map(' '.join, names.items()))}: nothing in them localizes by C-BBL"
        )


def _registered(registry: Registry, name: str) -> type:
    part = registry.get(name) if name in registry else None
    return part if isinstance(part, type) else object


def _cascade_values(cfg: CN) -> dict[str, Check]:
    num_stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    return {
        f"MODEL.CBBL.CASCADE.{key}": (
            lambda v, one=_GRID[key]: each(one)[0](v) and len(v) in (0, num_stages),
            f"() or {num_stages} values, one for each stage of MODEL.ROI_BOX_CASCADE_HEAD.IOUS, "
            f"each {_GRID[key][1]}",
        )
        for key in cfg.MODEL.CBBL.CASCADE
    }


def _is_pair_or_empty(check: Check) -> Callable[[Any], bool]:
    ok, _ = each(check)
    return lambda v: ok(v) and len(v) in (0, 2)


_POSITIVE = number(0, above=True)
_WEIGHT = number(0)
_GRID = {
    "ALPHA": _POSITIVE,
    "BETA": number(0, note=" (0: uniform grid)"),
    "NUM_INTERVALS": integer(2, MAX_INTERVALS),
    "INIT_STD": (
        lambda v: is_number(v) and (v == 0 or v >= 1e-6),
        "a number >= 0 (0: uniform; else at least 1e-6)",
    ),
    "BBOX_REG_LOSS_WEIGHT": _WEIGHT,
}
_JITTER_SIZE = "(height, width) in pixels, with SCALE_JITTER"
_VALUES = {
    "SOLVER.BBOX_PRED_LR_FACTOR": _POSITIVE,
    "SOLVER.ANCHOR_DELTAS_LR_FACTOR": _POSITIVE,
    "SOLVER.GRADIENT_STATS_PERIOD": integer(0, note=" (0: off)"),
    "SOLVER.PROCESS_TIMEOUT": integer(1, 10**6, note=" (minutes)"),
    "SOLVER.EARLY_STOPPING": integer(0, note=" (evaluations; 0: off)"),
    "TEST.BEST_METRIC": (
        lambda v: isinstance(v, str) and "/" in v,
        "the name of a number that an evaluation writes to metrics.json, such as 'bbox/AP'",
    ),
    "TEST.LOSS": (lambda v: isinstance(v, bool), "True or False"),
    "MODEL.CBBL.LABEL": one_of(*LABELS),
    "MODEL.CBBL.UNCERTAINTY": one_of(*UNCERTAINTIES),
    "MODEL.CBBL.UNCERTAINTY_WEIGHT": _WEIGHT,
    "MODEL.CBBL.GIOU_WEIGHT": _WEIGHT,
    "MODEL.CBBL.VOTING_SIGMA": _WEIGHT,
    "MODEL.ROI_BOX_HEAD.ITERATIONS_TEST": integer(1, 100),
    "MODEL.CBBL.STD_SCALE": (
        lambda v: each(_POSITIVE)[0](v) and len(v) == 4,
        "four numbers > 0, for x1, y1, x2, y2",
    ),
    "MODEL.CBBL.REFINEMENT.GAMMA": _WEIGHT,
    "MODEL.CBBL.REFINEMENT.RHO": _POSITIVE,
    "MODEL.FCOS.BBOX_REG_LOSS_WEIGHT": _WEIGHT,
    **{
        f"MODEL.CBBL.{node}{key}": check
        for node in ("", "RPN.", "RETINANET.", "FCOS.")
        for key, check in _GRID.items()
    },
    "INPUT.SMALL_OBJECTS.MAX_SIZE": _POSITIVE,
    "INPUT.SMALL_OBJECTS.COPY_PASTE": integer(0, note=" (0: off)"),
    "INPUT.SMALL_OBJECTS.KEEP_IN_CROP": (lambda v: isinstance(v, bool), "True or False"),
    "INPUT.SMALL_OBJECTS.SCALE_JITTER": (
        lambda v: _is_pair_or_empty(_POSITIVE)(v) and list(v) == sorted(v),
        "() or (minimum, maximum), two numbers > 0, such as (0.5, 2.0)",
    ),
    "INPUT.SMALL_OBJECTS.JITTER_SIZE": (_is_pair_or_empty(integer(1)), _JITTER_SIZE),
}
