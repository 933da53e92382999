"""Detectron2's DefaultTrainer with COCO evaluation by size and with exact resuming."""

import logging
import os
from typing import Any, Dict

from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from cbbl_d2.data.broken_images import NameBrokenImage
from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation import build_coco_evaluator
from cbbl_d2.files import remove_unfinished

from .checkpoint import BestModelCheckpointer, CBBLCheckpointer
from .hooks import BestCheckpointer, ResumeState
from .optimizer import build_optimizer
from .rng import preserve_rng

logger = logging.getLogger(__name__)


class CBBLTrainer(DefaultTrainer):
    """
    What it adds to ``DefaultTrainer``:

    * AP, AP50, AP75, APs, APm, APl and APvs (very small objects) on ``cfg.DATASETS.TEST``;
    * the model of the best AP as ``model_best.pth``;
    * checkpoints that are never half written, and that hold all that a resumed run needs, on
      Detectron2 v0.6, which leaves out the optimizer, as on main.
    """

    def build_hooks(self):
        # DefaultTrainer names the class of its checkpointer in the middle of __init__; this is
        # the first method called after that.
        self.checkpointer = CBBLCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        ret = super().build_hooks()
        ret.insert(0, ResumeState(self._trainer.data_loader))
        if not comm.is_main_process():
            return ret
        if len(self.cfg.DATASETS.TEST) > 0:
            after_eval = 1 + next(i for i, h in enumerate(ret) if isinstance(h, hooks.EvalHook))
            ret.insert(after_eval, self._build_best_checkpointer())
        # Detectron2 writes the checkpoint of an iteration before its evaluation. A run that dies
        # in the evaluation would be resumed after it, and its result be lost. (The last evaluation
        # comes after the last checkpoint all the same, and is done again on resume.)
        periodic = next(h for h in ret if isinstance(h, hooks.PeriodicCheckpointer))
        ret.remove(periodic)
        ret.insert(-1, periodic)  # the writers stay last
        remove_unfinished(self.cfg.OUTPUT_DIR)
        return ret

    def _build_best_checkpointer(self):
        metric = "bbox/AP"
        if len(self.cfg.DATASETS.TEST) > 1:
            metric = f"{self.cfg.DATASETS.TEST[0]}/{metric}"
        checkpointer = BestModelCheckpointer(self.model, self.cfg.OUTPUT_DIR)
        return BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, checkpointer, metric)

    def resume_or_load(self, resume: bool = True) -> None:
        if resume and not self.checkpointer.has_checkpoint():
            logger.warning(
                f"--resume: no checkpoint in {self.cfg.OUTPUT_DIR}, training starts from the "
                "beginning"
            )
        super().resume_or_load(resume)

    def train(self):
        if self.start_iter < self.max_iter:
            return super().train()
        # Resumed after its last iteration; its evaluation may not have been finished.
        logger.info(
            f"All {self.max_iter} iterations are done: evaluating. To train on, raise "
            "SOLVER.MAX_ITER"
        )
        self.iter = self.max_iter
        with EventStorage(self.max_iter) as self.storage:
            self.after_train()

    def state_dict(self) -> Dict[str, Any]:
        ret = super().state_dict()
        if "_trainer" not in ret:  # Detectron2 v0.6 forgets the optimizer
            ret["_trainer"] = self._trainer.state_dict()
        return ret

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if "_trainer" not in state_dict:
            raise UserError(
                f"{self.cfg.OUTPUT_DIR}: its checkpoints were written by another program and lack "
                "the state of the optimizer: they cannot be resumed. Give one as MODEL.WEIGHTS and "
                "another OUTPUT_DIR, without --resume"
            )
        super().load_state_dict(state_dict)
        if "load_state_dict" not in DefaultTrainer.__dict__:  # v0.6
            self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return ResumableTrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = NameBrokenImage(DatasetMapper(cfg, is_train=False))
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_coco_evaluator(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        # Training goes on with the numbers it would have drawn without the evaluation.
        with preserve_rng():
            return super().test(cfg, model, evaluators)
