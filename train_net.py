#!/usr/bin/env python
"""
Train or evaluate a detector with a C-BBL head, as Detectron2's own tools/train_net.py does.

    python train_net.py --config-file configs/SmallShapes/cbbl.yaml
    python train_net.py --config-file configs/SmallShapes/cbbl.yaml --resume
    python train_net.py --config-file configs/SmallShapes/cbbl.yaml --eval-only \
        MODEL.WEIGHTS output/small_shapes_cbbl/model_best.pth

A Lazy config, a file that ends in .py, is for tools/lazyconfig_train_net.py.
"""

import argparse
import logging
import os
from datetime import timedelta

from cbbl_d2.config import check_cbbl_config
from cbbl_d2.data.coco_format import register_from_config
from cbbl_d2.data.dataset_checks import check_datasets, describe_classes, set_num_classes
from cbbl_d2.engine import (
    CBBLTrainer,
    check_engine_config,
    check_model_config,
    claimed,
    config_restored,
    evaluate_weights,
    launch,
    load_config,
    one_line_errors,
    start_log,
)
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation import check_keypoint_sigmas
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from fvcore.common.config import CfgNode


def load_and_check(args: argparse.Namespace) -> CfgNode:
    """Finds what is wrong with the config and its data sets before anything is written."""
    if not args.config_file and not args.opts:
        raise UserError("give --config-file, for example configs/SmallShapes/cbbl.yaml")
    cfg = load_config(args.config_file, args.opts)
    register_from_config(cfg)
    check_cbbl_config(cfg)
    check_model_config(cfg)
    check_engine_config(cfg, max(1, args.num_gpus * args.num_machines), args.eval_only)
    check_keypoint_sigmas(cfg)
    has_checkpoint = os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if args.eval_only and not cfg.MODEL.WEIGHTS and not (args.resume and has_checkpoint):
        raise UserError(
            "--eval-only needs weights: add MODEL.WEIGHTS path/to/model_best.pth, or --resume for "
            f"the last checkpoint in OUTPUT_DIR, {cfg.OUTPUT_DIR}"
        )
    set_num_classes(cfg, args.eval_only)
    check_datasets(cfg, args.eval_only)
    cfg.freeze()
    return cfg


def setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    # An evaluation leaves the log and the config of the training as they are.
    log_dir = os.path.join(cfg.OUTPUT_DIR, "inference") if args.eval_only else cfg.OUTPUT_DIR
    log_cfg = cfg.clone()
    log_cfg.defrost()
    log_cfg.OUTPUT_DIR = log_dir
    start_log(log_cfg, args, log_dir, cfg.MODEL.DEVICE)
    classes = describe_classes(cfg)
    if classes:
        logging.getLogger("cbbl_d2").info(classes)


def main(args: argparse.Namespace):
    cfg = load_and_check(args)
    if args.eval_only:
        setup(cfg, args)
        return evaluate(cfg, args.resume)
    with claimed(cfg.OUTPUT_DIR):
        with config_restored(cfg.OUTPUT_DIR):
            setup(cfg, args)
            trainer = CBBLTrainer(cfg)
            trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def evaluate(cfg: CfgNode, resume: bool):
    """Evaluate ``MODEL.WEIGHTS``, or the last checkpoint in ``OUTPUT_DIR`` with ``resume``."""

    def test(model):
        results = CBBLTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(CBBLTrainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    model = CBBLTrainer.build_model(cfg)
    return evaluate_weights(
        model, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, resume, test, cfg.DATASETS.TEST
    )


@one_line_errors
def run(args: argparse.Namespace) -> None:
    options = {}
    if args.num_gpus * args.num_machines > 1:
        cfg = load_and_check(args)  # what is wrong is said before any process is started
        options["timeout"] = timedelta(minutes=cfg.SOLVER.PROCESS_TIMEOUT)
    launch(main, args, **options)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    print("Command Line Args:", args)
    run(args)
