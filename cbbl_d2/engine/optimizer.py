"""The choice of the optimizer, which Detectron2's config lacks, and what a resumed one does."""

from collections.abc import Sequence
from typing import Any

import torch
from cbbl_d2.errors import ConfigError
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch.optim.lr_scheduler import LRScheduler


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """
    ``SOLVER.OPTIMIZER`` with Detectron2's keys for learning rate, weight decay and clipping.

    Raises:
        ConfigError: an unknown optimizer, or a factor for a layer that the model lacks.
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        optimizer = solver.build_optimizer(cfg, model)
    elif cfg.SOLVER.OPTIMIZER == "AdamW":
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(
            params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )
    else:
        raise ConfigError(f"SOLVER.OPTIMIZER = {cfg.SOLVER.OPTIMIZER!r}: must be SGD or AdamW")
    for layer in ("bbox_pred", "anchor_deltas"):
        scale_lr(optimizer, model, layer, cfg.SOLVER[f"{layer.upper()}_LR_FACTOR"])
    return optimizer


def scale_lr(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, layer: str, factor: float
) -> None:
    """
    Multiply the learning rate of all layers of one name by ``factor``. They become parameter groups
    of their own at the end; with a factor of 1 nothing changes.

    Args:
        layer: "bbox_pred", of box heads and dense heads, or "anchor_deltas", of an RPN: the names
            that Detectron2 has for what predicts offsets, or distributions in their place.

    Raises:
        ConfigError: the model has no such layer.
    """
    if factor == 1:
        return
    layers = [m for name, m in model.named_modules() if name.split(".")[-1] == layer]
    ids = {id(p) for m in layers for p in m.parameters()}
    if not ids:
        raise ConfigError(
            f"SOLVER.{layer.upper()}_LR_FACTOR = {factor}: must be 1 for a model without a layer "
            f"that is named {layer}"
        )
    for group in list(optimizer.param_groups):
        scaled = [p for p in group["params"] if id(p) in ids]
        if scaled:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group({**group, "params": scaled, "lr": factor * group["lr"]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def follow_config(
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    groups: Sequence[dict[str, Any]],
    base_lrs: Sequence[float],
) -> str:
    """
    Make what a resumed optimizer does that of the config again: its checkpoint brings the learning
    rates and the weight decay of the earlier one. Of the schedule it brings the iteration and the
    base rates, not the length.

    Args:
        optimizer, scheduler: as loaded.
        groups: parameter groups of the optimizer before it was loaded.
        base_lrs: of the scheduler before it was loaded.

    Returns:
        what has changed, for a log line; "" if nothing.
    """
    changed = []
    if list(scheduler.base_lrs) != list(base_lrs):
        changed.append(f"SOLVER.BASE_LR {_range(base_lrs)} instead of {_range(scheduler.base_lrs)}")
        scheduler.base_lrs = list(base_lrs)
    old = [group["lr"] for group in optimizer.param_groups]
    new = scheduler.get_lr()
    if old != new:
        changed.append(f"a learning rate of {_range(new)} instead of {_range(old)}")
        for group, base_lr, lr in zip(optimizer.param_groups, base_lrs, new):
            group["initial_lr"], group["lr"] = base_lr, lr
    for key in ("weight_decay", "momentum", "nesterov"):
        old = [group.get(key) for group in optimizer.param_groups]
        new = [group.get(key) for group in groups]
        if old != new:
            changed.append(f"SOLVER.{key.upper()} {_range(new)} instead of {_range(old)}")
            for group, value in zip(optimizer.param_groups, new):
                group[key] = value
    return ", ".join(changed)


def _range(values: Sequence[float]) -> str:
    """Of the groups: "0 to 0.0001"."""
    different = sorted(set(values))
    return " to ".join(f"{value:g}" for value in dict.fromkeys((different[0], different[-1])))
