#!/usr/bin/env python
"""
Train or evaluate by a Lazy config, in the manner of Detectron2's own tools/lazyconfig_train_net.py.
Overrides are key=value:

    python tools/lazyconfig_train_net.py --config-file configs/SmallShapes/cbbl.py
    python tools/lazyconfig_train_net.py --config-file configs/SmallShapes/cbbl.py --resume
    python tools/lazyconfig_train_net.py --config-file configs/SmallShapes/cbbl.py --eval-only \\
        train.init_checkpoint=output/small_shapes_cbbl_lazy/model_final.pth

What it lacks of train_net.py: docs/training.md, "Lazy configs".
"""

import argparse
from typing import Any

import torch
from cbbl_d2.devices import device_kind, usable_device
from cbbl_d2.engine import CBBLCheckpointer, launch, one_line_errors, start_log
from cbbl_d2.engine.optimizer import LR_FACTORS, scale_lr
from cbbl_d2.errors import UserError
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_writers,
    hooks,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from omegaconf import DictConfig


def build_model(cfg: DictConfig) -> torch.nn.Module:
    """On its device; with several processes, parallel."""
    model = instantiate(cfg.model).to(cfg.train.device)
    # torch takes no GPU ids for a model on the CPU.
    on_cpu = {"device_ids": None} if device_kind(cfg.train.device) == "cpu" else {}
    return create_ddp_model(model, **cfg.train.get("ddp", {}), **on_cpu)


def build_optimizer(cfg: DictConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    model = getattr(model, "module", model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    for layer, key in LR_FACTORS.items():
        key = key.lower()
        scale_lr(optimizer, model, layer, cfg.train.get(key, 1.0), f"train.{key}")
    # Detectron2 clips gradients by its YAML keys alone.
    clipping = get_cfg()
    for key, value in cfg.train.get("clip_gradients", {}).items():
        clipping.SOLVER.CLIP_GRADIENTS[key.upper()] = value
    return maybe_add_gradient_clipping(clipping, optimizer)


def do_test(cfg: DictConfig, model: torch.nn.Module) -> dict[str, Any]:
    """
    Evaluate on ``dataloader.test``.

    Returns:
        the numbers of ``dataloader.evaluator``; empty without one.
    """
    if cfg.dataloader.get("evaluator") is None:
        return {}
    loader = instantiate(cfg.dataloader.test)  # first: it makes data sets that are not there yet
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def do_train(cfg: DictConfig, resume: bool) -> None:
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = CBBLCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    save = write = None
    if comm.is_main_process():
        save = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        write = hooks.PeriodicWriter(writers, period=cfg.train.log_period)
    schedule = hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))
    test = hooks.EvalHook(cfg.train.eval_period, lambda: do_test(cfg, model))
    trainer.register_hooks([hooks.IterationTimer(), schedule, save, test, write])
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    # A checkpoint has the iteration that was finished.
    resumed = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def do_evaluate(cfg: DictConfig, resume: bool) -> dict[str, Any]:
    """``train.init_checkpoint``, or with ``resume`` the last checkpoint in ``train.output_dir``."""
    model = build_model(cfg)
    checkpointer = CBBLCheckpointer(model, cfg.train.output_dir, require_all=True)
    if not (cfg.train.init_checkpoint or (resume and checkpointer.has_checkpoint())):
        raise UserError("--eval-only needs weights: add train.init_checkpoint=path/to/model.pth")
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return do_test(cfg, model)


def main(args: argparse.Namespace) -> None:
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    is_asked_for = any(word.startswith("train.device=") for word in args.opts)
    cfg.train.device = usable_device(cfg.train.device, "train.device", fall_back=not is_asked_for)
    if cfg.train.amp.enabled and not args.eval_only and device_kind(cfg.train.device) != "cuda":
        raise UserError(
            "train.amp.enabled=true: Detectron2's mixed precision training needs a CUDA GPU: set "
            "train.amp.enabled=false"
        )
    start_log(cfg, args, cfg.train.output_dir, cfg.train.device)
    (do_evaluate if args.eval_only else do_train)(cfg, args.resume)


if __name__ == "__main__":
    one_line_errors(launch)(main, default_argument_parser().parse_args())
