"""
Training hooks: what Detectron2's checkpoints lack to resume exactly, the best model, and the end of
a training that does not become better.
"""

import logging
from typing import Any, Dict, List, Optional

from cbbl_d2.compat import at_last_iteration
from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.errors import UserError
from cbbl_d2.messages import count, listed
from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, get_event_storage

from .rng import rng_state, set_rng_state

logger = logging.getLogger(__name__)

# In metrics.json, of a training that EarlyStopping has ended: the number of its iterations.
STOPPED_EARLY = "stopped_early_after"

# Detectron2's writers show the median of the last 20 values of a loss.
_SMOOTHING_WINDOW = 20


class ResumeState(HookBase):
    """
    Keeps in each checkpoint the place in the data stream, the random number generators and the
    values over which the logged losses are smoothed. With them, a resumed run logs the same losses
    as one that was never interrupted, given as many processes. (RetinaNet and FCOS keep besides a
    moving average by which they divide their losses, in no buffer.)

    To be registered on all processes, after all hooks that draw random numbers and before the one
    that writes checkpoints.
    """

    def __init__(self, data_loader: ResumableTrainLoader, checkpoint_period: int):
        """
        Args:
            checkpoint_period: in iterations; a checkpoint is also written after the last one.
        """
        self._data_loader = data_loader
        self._checkpoint_period = checkpoint_period
        self._local_of_all: Optional[List[Dict[str, Any]]] = None
        self._loaded: Optional[Dict[str, Any]] = None

    def after_step(self) -> None:
        # Only the main process writes checkpoints: here all of them are still together.
        done = self.trainer.iter + 1
        if done % self._checkpoint_period == 0 or done >= self.trainer.max_iter:
            self.gather()

    def gather(self) -> None:
        """What each process has of its own, for a checkpoint of this iteration."""
        if comm.get_world_size() > 1:
            self._local_of_all = comm.gather(self._local_state())

    def _local_state(self) -> Dict[str, Any]:
        """What each process has of its own."""
        state = {"rng": rng_state()}
        model = getattr(self.trainer.model, "module", self.trainer.model)
        if hasattr(model, "loss_normalizer"):
            state["loss_normalizer"] = float(model.loss_normalizer)
        return state

    def state_dict(self) -> Dict[str, Any]:
        if self._loaded is not None:  # resumed after the last iteration: nothing has changed
            return self._loaded
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        return {
            "data": self._data_loader.state_dict(),
            "local": self._local_of_all or [self._local_state()],
            "scalars": {
                name: [[float(v), int(i)] for v, i in history.values()[-_SMOOTHING_WINDOW:]]
                for name, history in storage.histories().items()
                if hints[name]  # others, such as AP, would be written a second time
            },
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._data_loader.load_state_dict(state["data"])
        self._loaded = state

    def before_train(self) -> None:
        if self._loaded is None:
            return
        storage = self.trainer.storage
        now = storage.iter
        for name, values in self._loaded["scalars"].items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value)
        storage.iter = now
        # Last: nothing may be drawn between here and the first iteration.
        local_of_all = self._loaded["local"]
        if len(local_of_all) == comm.get_world_size():
            local = local_of_all[comm.get_rank()]
            if "loss_normalizer" in local:
                model = getattr(self.trainer.model, "module", self.trainer.model)
                model.loss_normalizer = local["loss_normalizer"]
            set_rng_state(local["rng"])
        self._loaded = None


class WriteEvaluations(HookBase):
    """
    Detectron2 writes its logs every 20 iterations; what an evaluation in between has found would be
    lost with a process that dies before.
    """

    def __init__(self, eval_period: int, periodic_writer: hooks.PeriodicWriter):
        self._eval_period = eval_period
        self._periodic_writer = periodic_writer

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if (
            self._eval_period > 0
            and done % self._eval_period == 0
            and done % self._periodic_writer._period != 0
            and done < self.trainer.max_iter
        ):
            for writer in self._periodic_writer._writers:
                writer.write()


class TrainingPrinter(CommonMetricPrinter):
    """
    Detectron2's, without the losses on validation data: it prints the median of the last 20 values,
    which of those would be evaluations of long ago.
    """

    def write(self) -> None:
        storage = get_event_storage()
        training = {k: v for k, v in storage.histories().items() if "val" not in k.split("/")}
        # An attribute of the instance hides the method of its class, and deleting it undoes that.
        storage.histories = lambda: training
        try:
            super().write()
        finally:
            del storage.histories


def is_validation_loss(metric: str) -> bool:
    """Whether a name in ``metrics.json`` is one of what ``TEST.LOSS`` measures."""
    return metric.split("/")[-2:-1] == ["val"]


class BestCheckpointer(hooks.BestCheckpointer):
    """
    Detectron2's, which forgets on resume how good its ``model_best.pth`` is. Of a loss the lowest
    value is the best.
    """

    def __init__(self, eval_period: int, checkpointer, metric: str, must_exist: bool = False):
        """
        Args:
            metric: its name in ``metrics.json``.
            must_exist: an evaluation without it ends the training.
        """
        mode = "min" if is_validation_loss(metric) else "max"
        super().__init__(eval_period, checkpointer, metric, mode)
        self.metric = metric
        self._must_exist = must_exist

    def state_dict(self) -> Dict[str, Any]:
        if self.best_metric is None:
            return {}
        return {
            "metric": self.metric,
            "best_metric": float(self.best_metric),
            "best_iter": int(self.best_iter),
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        before = state.get("metric", self.metric)  # not in older checkpoints
        if before != self.metric:
            logger.info(
                f"--resume: the best model so far was that of {before}; from here on it is that of "
                f"{self.metric}"
            )
            return
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]

    def after_step(self) -> None:
        """
        Raises:
            UserError: an evaluation has not found the metric, which must exist.
        """
        super().after_step()
        results = getattr(self.trainer, "_last_eval_results", None)
        if not self._must_exist or results is None or self.metric in self.trainer.storage.latest():
            return
        names = [name for name in flatten_results_dict(results) if "/AP-" not in name]  # a class
        raise UserError(
            f"TEST.BEST_METRIC = {self.metric}: an evaluation does not measure it: choose one of "
            f"{listed(names, limit=24)}"
        )

    def after_train(self) -> None:
        before = self.best_metric
        super().after_train()
        if self.best_metric == before or self.trainer.iter < self.trainer.max_iter:
            return
        # The last checkpoint was written before the last evaluation. Once more, so that a training
        # that goes on from it knows this result.
        with at_last_iteration(self.trainer):
            self.trainer.checkpointer.save("model_final", iteration=self.trainer.iter)


class EarlyStopping(HookBase):
    """
    Makes an iteration the last one of a training of which a number of evaluations in a row was not
    better than the best one before. The hooks after this one, and those of the end of a training,
    find it as if it were the last one of the config; the trainer has to leave its loop.

    To be registered on all processes, after :class:`BestCheckpointer` and before those hooks that
    do something special in the last iteration.

    Attributes:
        has_stopped: also of a resumed training that had been ended, if its patience is no longer.
    """

    def __init__(self, patience: int, eval_period: int, best: Optional[BestCheckpointer]):
        """
        Args:
            patience: number of evaluations.
            eval_period: in iterations.
            best: None on all processes but the main one.
        """
        self._patience = patience
        self._eval_period = eval_period
        self._best = best
        self._num_worse = 0
        self.has_stopped = False

    def state_dict(self) -> Dict[str, Any]:
        return {"num_worse": self._num_worse, "has_stopped": self.has_stopped}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._num_worse = state["num_worse"]
        self.has_stopped = state["has_stopped"] and self._num_worse >= self._patience

    def after_step(self) -> None:
        trainer = self.trainer
        done = trainer.iter + 1
        if done % self._eval_period != 0 or done >= trainer.max_iter:
            return
        best_iter = comm.all_gather(self._best and self._best.best_iter)[0]  # the main process's
        self._num_worse = 0 if best_iter == trainer.iter else self._num_worse + 1
        if self._num_worse < self._patience:
            return
        self.has_stopped = True
        trainer.max_iter = done
        for hook in trainer._hooks:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_iter = done
            for writer in getattr(hook, "_writers", ()):
                if isinstance(writer, CommonMetricPrinter):
                    writer._max_iter = done
        if self._best is not None:
            logger.info(self._reason())

    def _reason(self) -> str:
        best, number = self._best, self._num_worse
        stopped = f"Stopped early after iteration {self.trainer.iter}: {best.metric} was"
        if best.best_iter is None:
            evaluations = count(number, "evaluation", "evaluations")
            return f"{stopped} no finite number in {evaluations}: there is no model_best.pth"
        evaluations = "evaluation" if number == 1 else f"{number} evaluations"
        return (
            f"{stopped} not better in the last {evaluations} than the {best.best_metric:.4g} after "
            f"iteration {best.best_iter}, whose model is model_best.pth"
        )

    def after_train(self) -> None:
        if self.has_stopped:
            number = self.trainer.max_iter
            self.trainer.storage.put_scalar(STOPPED_EARLY, number, smoothing_hint=False)
