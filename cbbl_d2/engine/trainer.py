"""Detectron2's DefaultTrainer with COCO evaluation by size and with exact resuming."""

import functools
import logging
import os
from typing import Any, Dict

from cbbl_d2.architectures import check_has_classes
from cbbl_d2.compat import default_trainer_parts, load_optimizer, with_optimizer
from cbbl_d2.data.broken_images import NameBrokenImage
from cbbl_d2.data.class_names import save_class_names
from cbbl_d2.data.dataset_checks import check_proposals, with_num_classes
from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.errors import ConfigError, Stopped, UserError
from cbbl_d2.evaluation import build_coco_evaluator
from cbbl_d2.files import remove_unfinished
from cbbl_d2.modeling import CBBLGeneralizedRCNNWithTTA
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, hooks
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage

from .checkpoint import BestModelCheckpointer, CBBLCheckpointer
from .divergence import explain_divergence, is_finite, user_errors_in_one_line
from .gradient_stats import GradientStats
from .hooks import (
    BestCheckpointer,
    EarlyStopping,
    ResumeState,
    TrainingPrinter,
    WriteEvaluations,
)
from .optimizer import build_optimizer, can_resume, follow_config
from .rng import preserve_rng
from .stop import StopOnRequest, StopRequest
from .validation_loss import validation_losses

logger = logging.getLogger(__name__)


class _StoppedEarly(BaseException):
    """Leaves the loop of a training; not an error, which Detectron2 would log."""


class CBBLTrainer(DefaultTrainer):
    """
    What it adds to ``DefaultTrainer``:

    * a number of classes of 0 becomes that of the data;
    * AP, AP50, AP75, APs, APm, APl and APvs (very small objects) on ``cfg.DATASETS.TEST``;
    * the model of the best AP, or of another metric, as ``model_best.pth``, and an end of the
      training when it does not become better (``cfg.SOLVER.EARLY_STOPPING``);
    * the losses on ``cfg.DATASETS.TEST`` (``cfg.TEST.LOSS``);
    * with ``cfg.TEST.AUG.ENABLED``, one more evaluation after training, with test-time
      augmentation;
    * several processes on the CPU, where ``launch`` can start them;
    * Ctrl-C and SIGTERM end a training with a checkpoint;
    * a training that has diverged ends in one line that names the losses and the images;
    * checkpoints that are never half written, and that hold all that a resumed run needs, on
      Detectron2 v0.6, which leaves out the optimizer, as on main.
    """

    def __init__(self, cfg):
        with default_trainer_parts(CBBLCheckpointer, cfg.MODEL.DEVICE):
            super().__init__(with_num_classes(cfg))

    @classmethod
    def build_model(cls, cfg):
        """
        Raises:
            ConfigError: the keys of ``MODEL`` do not go together.
        """
        check_has_classes(cfg)
        try:
            return super().build_model(cfg)
        except UserError:
            raise
        except Exception as e:  # Detectron2 raises whatever comes first
            raise ConfigError(
                f"MODEL: cannot be built from these keys ({type(e).__name__}: "
                f"{' '.join(str(e).split())}): compare them with a config that works"
            ) from e

    def build_hooks(self):
        ret, test_sets = super().build_hooks(), self.cfg.DATASETS.TEST
        if self.cfg.SOLVER.GRADIENT_STATS_PERIOD > 0:  # in all processes; done before evaluation
            ret.insert(0, GradientStats(self.cfg.SOLVER.GRADIENT_STATS_PERIOD))
        after_eval = 1 + next(i for i, h in enumerate(ret) if isinstance(h, hooks.EvalHook))
        # In these all processes take part.
        resume_state = ResumeState(self._trainer.data_loader, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        self._stop = StopRequest()
        self._stop_hook = StopOnRequest(self._stop, resume_state)
        added = [resume_state, self._stop_hook]
        best = self._build_best_checkpointer() if test_sets and comm.is_main_process() else None
        self._early_stopping = None
        if self.cfg.TEST.AUG.ENABLED and test_sets:
            test = functools.partial(self.test_with_TTA, self.cfg, self.model)
            added.insert(0, hooks.EvalHook(0, test))
        if self.cfg.SOLVER.EARLY_STOPPING > 0:
            self._early_stopping = EarlyStopping(
                self.cfg.SOLVER.EARLY_STOPPING, self.cfg.TEST.EVAL_PERIOD, best
            )
            added.insert(0, self._early_stopping)
        ret[after_eval:after_eval] = added
        for hook in ret:
            if isinstance(hook, hooks.EvalHook):
                hook._func = self._stop.at_once(hook._func)
        if not comm.is_main_process():
            return ret
        if best is not None:
            ret.insert(after_eval, best)
        # Detectron2 writes the checkpoint of an iteration before its evaluation. A run that dies
        # in the evaluation would be resumed after it, and its result be lost. (The last evaluation
        # comes after the last checkpoint all the same, and is done again on resume.)
        periodic = next(h for h in ret if isinstance(h, hooks.PeriodicCheckpointer))
        ret.remove(periodic)
        ret.insert(-1, periodic)  # the writers stay last
        ret.append(WriteEvaluations(self.cfg.TEST.EVAL_PERIOD, ret[-1]))
        remove_unfinished(self.cfg.OUTPUT_DIR)
        save_class_names(self.cfg)
        return ret

    def build_writers(self):
        return [
            TrainingPrinter(self.max_iter) if type(writer) is CommonMetricPrinter else writer
            for writer in super().build_writers()
        ]

    def _build_best_checkpointer(self) -> BestCheckpointer:
        node, test_sets = self.cfg.TEST, self.cfg.DATASETS.TEST
        metric = node.BEST_METRIC
        if len(test_sets) > 1 and not metric.startswith(tuple(f"{name}/" for name in test_sets)):
            metric = f"{test_sets[0]}/{metric}"
        # A model without boxes, such as an RPN alone, trains on without the default one.
        must_exist = self.cfg.SOLVER.EARLY_STOPPING > 0 or node.BEST_METRIC != "bbox/AP"
        checkpointer = BestModelCheckpointer(self.model, self.cfg.OUTPUT_DIR)
        return BestCheckpointer(node.EVAL_PERIOD, checkpointer, metric, must_exist)

    def resume_or_load(self, resume: bool = True) -> None:
        found = comm.all_gather(self.checkpointer.has_checkpoint())
        if resume and len(set(found)) > 1:
            raise UserError(
                f"--resume: process {found.index(True)} finds a checkpoint in OUTPUT_DIR, "
                f"{self.cfg.OUTPUT_DIR}, and process {found.index(False)} does not: all machines "
                "must share this folder"
            )
        if resume and not found[0]:
            logger.warning(
                f"--resume: no checkpoint in {self.cfg.OUTPUT_DIR}, training starts from the "
                "beginning"
            )
        super().resume_or_load(resume)
        if self._has_stopped_early:
            self.max_iter = self.start_iter
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        if frozen and not self.cfg.MODEL.WEIGHTS and not (resume and found[0]):
            logger.warning(
                "MODEL.WEIGHTS is empty, and a part of the model is frozen at random numbers: set "
                "MODEL.BACKBONE.FREEZE_AT 0 and a norm of the backbone that learns, such as BN"
            )

    @property
    def _has_stopped_early(self) -> bool:
        return self._early_stopping is not None and self._early_stopping.has_stopped

    def after_step(self):
        super().after_step()
        if self._has_stopped_early:
            raise _StoppedEarly

    def after_train(self):
        # Diverged in the last iteration: Detectron2 would evaluate and keep that model.
        is_bad = not is_finite(self.model)
        # Its last iteration was evaluated: not again, but for what comes at the end alone.
        is_evaluated = self._has_stopped_early and self.iter < self.max_iter
        if is_evaluated:
            self.iter = self.max_iter
        if is_bad or is_evaluated:
            self._hooks = [
                h
                for h in self._hooks
                if not isinstance(h, (hooks.EvalHook, BestCheckpointer))
                or not (is_bad or isinstance(h, BestCheckpointer) or h._period > 0)
            ]
        super().after_train()

    def train(self):
        if self.start_iter < self.max_iter:
            with user_errors_in_one_line(), self._stop:
                try:
                    return super().train()
                except _StoppedEarly:
                    return None
                except Stopped:
                    if self._stop.raised and self.iter < self.max_iter:
                        self._stop_hook.stop(self._stop.number)
                    raise
        # Resumed after its last iteration; its evaluation may not have been finished.
        if self._has_stopped_early:
            logger.info(
                f"SOLVER.EARLY_STOPPING has ended this training after {self.max_iter} iterations: "
                "evaluating. To train on, raise it, or set it to 0"
            )
        else:
            logger.info(
                f"All {self.max_iter} iterations are done: evaluating. To train on, raise their "
                "number"
            )
        self.iter = self.max_iter
        with EventStorage(self.max_iter) as self.storage:
            self.after_train()

    def run_step(self):
        try:
            super().run_step()
        except (AssertionError, FloatingPointError) as e:
            # fvcore's GIoU loss ends boxes of NaN in an assertion about their corners.
            if isinstance(e, AssertionError) and is_finite(self.model):
                raise
            raise UserError(
                explain_divergence(
                    e,
                    self.cfg,
                    self.iter,
                    self.model,
                    self._trainer.optimizer.param_groups[0]["lr"],
                    self._trainer.data_loader.last_file_names,
                    comm.get_world_size(),
                )
            ) from e

    def state_dict(self) -> Dict[str, Any]:
        return with_optimizer(self, super().state_dict())

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if "_trainer" not in state_dict:
            raise UserError(
                f"{self.cfg.OUTPUT_DIR}: its checkpoints were written by another program and lack "
                "the state of the optimizer: they cannot be resumed. Give one as MODEL.WEIGHTS and "
                "another OUTPUT_DIR, without --resume"
            )
        optimizer = self._trainer.optimizer
        new = [dict(group) for group in optimizer.param_groups]
        if not can_resume(optimizer, state_dict["_trainer"]["optimizer"]):
            raise UserError(
                f"{self.cfg.OUTPUT_DIR}: its checkpoints are of another optimizer than "
                f"SOLVER.OPTIMIZER {self.cfg.SOLVER.OPTIMIZER}, of one for other layers, or with a "
                "SOLVER.BBOX_PRED_LR_FACTOR or ANCHOR_DELTAS_LR_FACTOR of 1 instead of another "
                "number, or the reverse, which --resume cannot change: give one as MODEL.WEIGHTS "
                "and another OUTPUT_DIR, without --resume"
            )
        base_lrs = list(self.scheduler.base_lrs)
        super().load_state_dict(state_dict)
        load_optimizer(self, state_dict)
        if self.iter + 1 >= self.max_iter:
            return
        changed = follow_config(optimizer, self.scheduler, new, base_lrs)
        if changed:
            logger.info(f"--resume: from here on {changed}, as the config says")

    build_optimizer = staticmethod(build_optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        if cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
            logger.warning(
                f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS} is not less than SOLVER.MAX_ITER "
                f"{cfg.SOLVER.MAX_ITER}: the learning rate never reaches SOLVER.BASE_LR, and "
                "little is learned; for a short trial lower WARMUP_ITERS, too"
            )
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        check_proposals(cfg)
        return ResumableTrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        check_proposals(cfg)
        mapper = NameBrokenImage(DatasetMapper(cfg, is_train=False))
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        if output_folder is None:
            output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_coco_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        # Training goes on with the numbers it would have drawn without the evaluation.
        with preserve_rng():
            results = super().test(cfg, model, evaluators)
        if cfg.TEST.LOSS and not isinstance(model, GeneralizedRCNNWithTTA):
            losses = {name: validation_losses(cfg, model, name) for name in cfg.DATASETS.TEST}
            for name, found in losses.items():
                (results if len(losses) == 1 else results[name])["val"] = found
        return results

    @classmethod
    def test_with_TTA(cls, cfg, model) -> Dict[str, Any]:
        """
        Evaluate with Detectron2's test-time augmentation, ``cfg.TEST.AUG``.

        Returns:
            The results of :meth:`test` with ``_TTA`` at the end of each key, as Detectron2's
            ``tools/train_net.py`` names them.
        """
        logger.info("Running inference with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, CBBLGeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}
