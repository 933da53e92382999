"""From the keys of MODEL.CBBL to grids and loss."""

from typing import List, Optional

import torch
from cbbl_d2.architectures import check_has_classes
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.distribution import exponential_grid
from cbbl_d2.errors import ConfigError

from .localization_loss import LocalizationLoss
from .refinement import Refinement


def build_grid(cfg, head: str = "") -> torch.Tensor:
    """
    Args:
        head: "" for a Fast R-CNN box head; "RPN", "RETINANET" or "FCOS", whose grid is one-sided.

    Returns:
        Tensor: shape ``(G,)``, see :func:`cbbl_d2.distribution.exponential_grid`.

    Raises:
        ConfigError: a key of ``MODEL.CBBL`` has an impossible value, or there are no classes.
    """
    _check(cfg)
    node, keys = cfg.MODEL.CBBL, "MODEL.CBBL."
    if head:
        node, keys = node[head], f"{keys}{head}."
    return _grid(keys, node.ALPHA, node.BETA, node.NUM_INTERVALS, one_sided=head == "FCOS")


def build_cascade_grids(cfg) -> List[torch.Tensor]:
    """As :func:`build_grid`, one for each stage of a Cascade R-CNN."""
    _check(cfg)
    c = cfg.MODEL.CBBL
    num_stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    settings = [
        c.CASCADE[key] or [c[key]] * num_stages for key in ("ALPHA", "BETA", "NUM_INTERVALS")
    ]
    where = "MODEL.CBBL.CASCADE." if any(c.CASCADE.values()) else "MODEL.CBBL."
    return [_grid(where, *values) for values in zip(*settings)]


def build_localization_loss(cfg) -> LocalizationLoss:
    """Of keys that :func:`build_grid` has checked."""
    c = cfg.MODEL.CBBL
    return LocalizationLoss(
        label=c.LABEL,
        uncertainty=c.UNCERTAINTY,
        uncertainty_weight=c.UNCERTAINTY_WEIGHT,
        giou_weight=c.GIOU_WEIGHT,
    )


def build_refinement(cfg) -> Optional[Refinement]:
    """Of keys that :func:`build_grid` has checked; None: off."""
    c = cfg.MODEL.CBBL.REFINEMENT
    return Refinement(gamma=c.GAMMA, rho=c.RHO) if c.GAMMA > 0 else None


def _check(cfg) -> None:
    check_cbbl_config(cfg)
    check_has_classes(cfg)


def _grid(keys: str, alpha: float, beta: float, num_intervals: int, **kwargs) -> torch.Tensor:
    try:
        return exponential_grid(alpha, beta, num_intervals, **kwargs)
    except ValueError as e:  # each value is possible, but not all together
        raise ConfigError(f"{keys}{{ALPHA,BETA,NUM_INTERVALS}}: {e}") from e
