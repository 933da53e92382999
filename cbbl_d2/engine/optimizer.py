"""The choice of the optimizer, which Detectron2's config lacks."""

import torch
from cbbl_d2.errors import ConfigError
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """
    ``SOLVER.OPTIMIZER`` with Detectron2's keys for learning rate, weight decay and clipping.

    Raises:
        ConfigError: an unknown optimizer.
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return solver.build_optimizer(cfg, model)
    if cfg.SOLVER.OPTIMIZER == "AdamW":
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )
    raise ConfigError(f"SOLVER.OPTIMIZER = {cfg.SOLVER.OPTIMIZER!r}: must be SGD or AdamW")
