"""Detectron2's own scaling of a config to the number of processes, which this project keeps."""

import logging
import os

from cbbl_d2.engine import CBBLTrainer
from cbbl_d2.engine.config_checks import check_engine_config
from cbbl_d2.engine.hooks import ResumeState


def test_a_config_for_more_processes_is_scaled_and_the_log_says_so(tiny_cfg, caplog, monkeypatch):
    """Written for 4 processes and trained by one: the same number of images, a quarter each."""
    tiny_cfg.merge_from_list(["SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.IMS_PER_BATCH", 8])
    tiny_cfg.merge_from_list(["SOLVER.BASE_LR", 0.02, "SOLVER.MAX_ITER", 100])
    tiny_cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 10, "TEST.EVAL_PERIOD", 20])
    tiny_cfg.merge_from_list(["SOLVER.WARMUP_ITERS", 0])
    check_engine_config(tiny_cfg, num_processes=1)
    os.makedirs(tiny_cfg.OUTPUT_DIR)
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)  # to caplog
    with caplog.at_level(logging.INFO):
        trainer = CBBLTrainer(tiny_cfg)
    assert len(next(iter(trainer.data_loader))) == 2
    assert trainer.optimizer.param_groups[0]["lr"] == 0.005
    assert trainer.max_iter == trainer.cfg.SOLVER.MAX_ITER == 400
    (resume,) = [h for h in trainer._hooks if isinstance(h, ResumeState)]
    assert resume._checkpoint_period == 40 and trainer.cfg.TEST.EVAL_PERIOD == 80
    (line,) = {r.getMessage() for r in caplog.records if "Auto-scaling" in r.getMessage()}
    assert "batch_size=2, learning_rate=0.005, max_iter=400" in line


def test_without_the_key_nothing_is_scaled(tiny_cfg):
    assert tiny_cfg.SOLVER.REFERENCE_WORLD_SIZE == 0
    os.makedirs(tiny_cfg.OUTPUT_DIR)
    trainer = CBBLTrainer(tiny_cfg)
    assert trainer.cfg.SOLVER.BASE_LR == tiny_cfg.SOLVER.BASE_LR
    assert trainer.max_iter == tiny_cfg.SOLVER.MAX_ITER
