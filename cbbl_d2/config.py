"""The config keys of C-BBL, their meaning and their check."""

import math

from detectron2.config import CfgNode as CN

from .distribution import LABELS, UNCERTAINTIES
from .errors import ConfigError


def add_cbbl_config(cfg: CN) -> None:
    """
    Add the keys of this project to a Detectron2 config, in place. The defaults of the grid are the
    paper's for a Fast R-CNN head.

    Two keys of Detectron2 itself matter as much:
    ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT`` weighs the whole localisation loss, and
    ``MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG`` chooses between ``4 * (n + 1)`` and
    ``K * 4 * (n + 1)`` outputs.
    """
    _C = cfg

    # ---------------------------------------------------------------------------- #
    # C-BBL: localisation as classification over a grid of offsets
    # ---------------------------------------------------------------------------- #
    _C.MODEL.CBBL = CN()

    # Half-width of the grid (alpha in the paper), > 0. The unit is that of the offsets AFTER the
    # weights of the box transform, MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS: with weights of 10, an
    # alpha of 5 covers shifts of half the proposal's width. Offsets outside the grid are clamped
    # to its ends; the share of them is logged as `cbbl/clipped_fraction`.
    _C.MODEL.CBBL.ALPHA = 5.0

    # How strongly the points crowd around zero offset (beta), >= 0. 0 is the uniform grid.
    _C.MODEL.CBBL.BETA = 1.0

    # Number of intervals (n), >= 2: the head has n + 1 logits per coordinate. With an odd n no
    # point lies at zero: a perfect proposal then has the code (.5, .5), whose entropy is log 2.
    # That is fine for "entropy_gap" and at odds with "entropy" below.
    _C.MODEL.CBBL.NUM_INTERVALS = 5

    # Target distribution of an offset. Options: "two_hot" (its two neighbours on the grid,
    # weighted such that the expectation is the offset), "one_hot" (the nearest point).
    _C.MODEL.CBBL.LABEL = "two_hot"

    # Uncertainty loss. Options: "entropy_gap", |H(p*) - H(p)| (first version of the paper);
    # "entropy", H(p) (second version, "UM"); "none".
    _C.MODEL.CBBL.UNCERTAINTY = "entropy_gap"

    # Its weight relative to the cross entropy (lambda), >= 0. BBOX_REG_LOSS_WEIGHT multiplies
    # both, so that changing it keeps their balance.
    _C.MODEL.CBBL.UNCERTAINTY_WEIGHT = 0.1

    # Standard deviation of the distribution that an untrained head predicts, around zero offset
    # and in the unit of ALPHA, >= 0. 0 starts with the uniform distribution (the paper).
    _C.MODEL.CBBL.INIT_STD = 0.0

    # ---------------------------------------------------------------------------- #
    # Solver
    # ---------------------------------------------------------------------------- #
    # Options: "SGD" (Detectron2's own), "AdamW" (converges faster from scratch).
    _C.SOLVER.OPTIMIZER = "SGD"

    # ---------------------------------------------------------------------------- #
    # Data sets in COCO format that a user brings
    # ---------------------------------------------------------------------------- #
    # List of [name, annotation JSON, image folder]; each name can then stand in DATASETS.TRAIN and
    # DATASETS.TEST. Relative paths start at the working directory.
    _C.DATASETS.COCO_FORMAT = []


def check_cbbl_config(cfg: CN) -> None:
    """
    Called when a model is built.

    Raises:
        ConfigError: if a key is missing or has an impossible value; names key, value and what is
            allowed.
    """
    if "CBBL" not in cfg.MODEL:
        raise ConfigError(
            "this config has no MODEL.CBBL: call cbbl_d2.add_cbbl_config(cfg) before merging files"
        )
    c = cfg.MODEL.CBBL

    def require(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"MODEL.CBBL.{key} = {c[key]!r}: must be {allowed}")

    def is_number(key: str) -> bool:
        value = c[key]
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        )

    require("ALPHA", is_number("ALPHA") and c.ALPHA > 0, "a number > 0")
    require("BETA", is_number("BETA") and c.BETA >= 0, "a number >= 0 (0: uniform grid)")
    require(
        "NUM_INTERVALS",
        isinstance(c.NUM_INTERVALS, int) and c.NUM_INTERVALS >= 2,
        "an integer >= 2",
    )
    require("LABEL", c.LABEL in LABELS, f"one of {', '.join(LABELS)}")
    require("UNCERTAINTY", c.UNCERTAINTY in UNCERTAINTIES, f"one of {', '.join(UNCERTAINTIES)}")
    require(
        "UNCERTAINTY_WEIGHT",
        is_number("UNCERTAINTY_WEIGHT") and c.UNCERTAINTY_WEIGHT >= 0,
        "a number >= 0",
    )
    require("INIT_STD", is_number("INIT_STD") and c.INIT_STD >= 0, "a number >= 0 (0: uniform)")
