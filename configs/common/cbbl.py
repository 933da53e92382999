"""
What C-BBL changes in Detectron2's Lazy configs, in place. The values are those of the YAML configs.

Each of Detectron2's models keeps its parts and their settings, but for those that localize.
"""

from cbbl_d2.distribution import exponential_grid
from cbbl_d2.modeling import (
    CBBLFCOS,
    CBBLRPN,
    CBBLBox2BoxTransform,
    CBBLBox2BoxTransformLinear,
    CBBLCascadeROIHeads,
    CBBLFastRCNNOutputLayers,
    CBBLRetinaNet,
    LocalizationLoss,
)
from cbbl_d2.modeling.fcos import dense_head_norm
from detectron2.config import LazyCall as L

from .parts import box_parts

# The grids cover the offsets after the weights of the box transform; that of FCOS the distances to
# the sides of a box in strides. The meaning of each value: cbbl_d2/config.py.
_BOX_GRID = dict(alpha=5.0, beta=1.0, num_intervals=5)
_ANCHOR_GRID = dict(alpha=2.0, beta=1.0, num_intervals=10)
_FCOS_GRID = dict(alpha=8.0, beta=0.25, num_intervals=16, one_sided=True)

_LOSS = dict(label="two_hot", uncertainty="entropy_gap", uncertainty_weight=0.1, giou_weight=0.0)

# Of the whole localization loss. The cross entropy starts at 4 * log(n + 1) for each foreground
# box, many times what Smooth-L1 or GIoU start at: with weight 1 it drowns the classification loss.
_TWO_STAGE_LOSS_WEIGHT = 0.5
_DENSE_LOSS_WEIGHT = 0.25


def cbbl_box_head(model) -> None:
    """The box head of Faster, Mask, Keypoint and Cascade R-CNN, the latter's in each stage."""
    if "box_predictors" in model.roi_heads:
        model.roi_heads._target_ = CBBLCascadeROIHeads
    for predictor in box_parts(model.roi_heads, "box_predictor"):
        _localize_by_cbbl(predictor, CBBLFastRCNNOutputLayers, _BOX_GRID)
        predictor.cls_agnostic_bbox_reg = True
        predictor.loss_weight = {"loss_box_reg": _TWO_STAGE_LOSS_WEIGHT}


def cbbl_rpn(model) -> None:
    """The region proposal network of any of them."""
    _localize_by_cbbl(model.proposal_generator, CBBLRPN, _ANCHOR_GRID)
    model.proposal_generator.loss_weight = {"loss_rpn_loc": _TWO_STAGE_LOSS_WEIGHT}


def cbbl_retinanet(model) -> None:
    _localize_by_cbbl(model, CBBLRetinaNet, _ANCHOR_GRID)
    model.box_reg_loss_weight = _DENSE_LOSS_WEIGHT


def cbbl_fcos(model) -> None:
    model.box2box_transform = L(CBBLBox2BoxTransformLinear)()
    _localize_by_cbbl(model, CBBLFCOS, _FCOS_GRID)
    model.box_reg_loss_weight = _DENSE_LOSS_WEIGHT
    # Detectron2 v0.6 has no FCOS with "GN" as it stands in its own config.
    model.head.norm = L(dense_head_norm)(name="GN")


def _localize_by_cbbl(part, target, grid) -> None:
    """``part``: the description of what holds a box transform and computes a localization loss."""
    part._target_ = target
    if "weights" in part.box2box_transform:
        part.box2box_transform._target_ = CBBLBox2BoxTransform
    part.box2box_transform.grid = L(exponential_grid)(**grid)
    part.localization_loss = L(LocalizationLoss)(**_LOSS)
    for stock in ("box_reg_loss_type", "smooth_l1_beta"):  # without effect from here on
        part.pop(stock, None)
