#!/usr/bin/env python
"""
Train or evaluate a detector with a C-BBL head, as Detectron2's own tools/train_net.py does.

    python train_net.py --config-file configs/SmallShapes/cbbl.yaml
    python train_net.py --config-file configs/SmallShapes/cbbl.yaml --resume
    python train_net.py --config-file configs/SmallShapes/cbbl.yaml --eval-only \
        MODEL.WEIGHTS output/small_shapes_cbbl/model_best.pth
"""

import argparse
import logging
import os
import sys

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter
from detectron2.utils.logger import setup_logger
from fvcore.common.config import CfgNode

from cbbl_d2.data.coco_format import register_from_config
from cbbl_d2.data.dataset_checks import check_datasets
from cbbl_d2.engine import CBBLCheckpointer, CBBLTrainer, load_config, one_line_errors
from cbbl_d2.errors import UserError


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    register_from_config(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="cbbl_d2")
    if not torch.cuda.is_available():
        logging.getLogger("cbbl_d2").info("No GPU found: running on the CPU.")
    return cfg


@one_line_errors
def main(args: argparse.Namespace):
    cfg = setup(args)
    check_datasets(cfg, eval_only=args.eval_only)
    if args.eval_only:
        return evaluate(cfg, args.resume)
    trainer = CBBLTrainer(cfg, resume=args.resume)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def evaluate(cfg: CfgNode, resume: bool):
    """Evaluate ``MODEL.WEIGHTS``, or the last checkpoint in ``OUTPUT_DIR`` with ``resume``."""
    model = CBBLTrainer.build_model(cfg)
    checkpointer = CBBLCheckpointer(model, cfg.OUTPUT_DIR, require_all=True)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise UserError(
            "--eval-only needs weights: add MODEL.WEIGHTS path/to/model_best.pth, or --resume for "
            f"the last checkpoint in OUTPUT_DIR, {cfg.OUTPUT_DIR}"
        )
    extra = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = CBBLTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
        # The same file, keys and iteration as an evaluation during training.
        with EventStorage(extra.get("iteration", 0)) as storage:
            storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
            writer = JSONWriter(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
            writer.write()
            writer.close()
    return results


@one_line_errors
def run(args: argparse.Namespace) -> None:
    num_gpus = torch.cuda.device_count()
    if args.num_gpus > max(num_gpus, 1):
        raise UserError(
            f"--num-gpus {args.num_gpus}: this machine has {num_gpus} GPUs that torch can use; "
            + (f"use --num-gpus {num_gpus}" if num_gpus else "leave it out to run on the CPU")
        )
    # What is wrong with the config is said once, before any process is started.
    load_config(args.config_file, args.opts)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except torch.multiprocessing.ProcessExitedException as e:
        sys.exit(e.exit_code)  # the process has said why


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    print("Command Line Args:", args)
    run(args)
