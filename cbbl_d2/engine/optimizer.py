"""The choice of the optimizer, which Detectron2's config lacks, and what a resumed one does."""

from collections.abc import Sequence
from typing import Any

import torch
from cbbl_d2.errors import ConfigError
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch.optim.lr_scheduler import LRScheduler

# Name that Detectron2 gives the layer of offsets, or of distributions in their place, in box heads
# and dense heads, and in an RPN -> the key below SOLVER that multiplies its learning rate.
LR_FACTORS = {"bbox_pred": "BBOX_PRED_LR_FACTOR", "anchor_deltas": "ANCHOR_DELTAS_LR_FACTOR"}


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
    for layer, key in LR_FACTORS.items():
        scale_lr(optimizer, model, layer, cfg.SOLVER[key], f"SOLVER.{key}")
    return optimizer


def scale_lr(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, layer: str, factor: float, key: str
) -> None:
    """
    Multiply the learning rate of all layers of one name by ``factor``. They become parameter groups
    of their own at the end; with a factor of 1 nothing changes.

    Args:
        layer: one of ``LR_FACTORS``.
        key: of the config, where ``factor`` comes from.

    Raises:
        ConfigError: ``factor`` is not above 0, or the optimizer trains no such layer.
    """
    if not factor > 0:
        raise ConfigError(f"{key} = {factor}: must be a number > 0")
    if factor == 1:
        return
    layers = [m for name, m in model.named_modules() if name.split(".")[-1] == layer]
    ids = {id(p) for m in layers for p in m.parameters() if p.requires_grad}
    if not ids:
        raise ConfigError(
            f"{key} = {factor}: must be 1 where no layer that is named {layer} is trained"
        )
    for group in list(optimizer.param_groups):
        scaled = [p for p in group["params"] if id(p) in ids]
        if scaled:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group({**group, "params": scaled, "lr": factor * group["lr"]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def can_resume(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> bool:
    """
    Whether the state of an optimizer, as it stands in a checkpoint, is of the same kind, for the
    same parameters in the same groups. Of these the shapes are compared: names are not saved.
    """
    new, old = optimizer.param_groups, saved["param_groups"]
    if any(("betas" in a) != ("betas" in b) for a, b in zip(new, old)):
        return False
    if [len(group["params"]) for group in new] != [len(group["params"]) for group in old]:
        return False
    parameters = [p for group in new for p in group["params"]]
    indices = [index for group in old for index in group["params"]]
    moments = [
        (p, saved["state"].get(index, {}).get(name))
        for p, index in zip(parameters, indices)
        for name in ("exp_avg", "momentum_buffer")
    ]
    return all(moment is None or moment.shape == p.shape for p, moment in moments)


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
        several = len({*base_lrs, *scheduler.base_lrs}) > 2
        what = "SOLVER.BASE_LR times the factors of layers" if several else "SOLVER.BASE_LR"
        changed.append(f"{what} {_distinct(base_lrs)} instead of {_distinct(scheduler.base_lrs)}")
        scheduler.base_lrs = list(base_lrs)
    old = [group["lr"] for group in optimizer.param_groups]
    new = scheduler.get_lr()
    if old != new:
        changed.append(f"a learning rate of {_distinct(new)} instead of {_distinct(old)}")
        for group, base_lr, lr in zip(optimizer.param_groups, base_lrs, new):
            group["initial_lr"], group["lr"] = base_lr, lr
    for key in ("weight_decay", "momentum", "nesterov"):
        old = [group.get(key) for group in optimizer.param_groups]
        new = [group.get(key) for group in groups]
        if old != new:
            changed.append(f"SOLVER.{key.upper()} {_distinct(new)} instead of {_distinct(old)}")
            for group, value in zip(optimizer.param_groups, new):
                group[key] = value
    return ", ".join(changed)


def _distinct(values: Sequence[float]) -> str:
    """Of the groups: "0, 0.0001"."""
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
