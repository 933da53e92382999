"""Training hooks: what Detectron2's checkpoints lack to resume exactly, and the best model."""

from typing import Any, Dict, List, Optional

from cbbl_d2.compat import at_last_iteration
from cbbl_d2.data.train_loader import ResumableTrainLoader
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from .rng import rng_state, set_rng_state

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


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, which forgets on resume how good its ``model_best.pth`` is."""

    def state_dict(self) -> Dict[str, Any]:
        if self.best_metric is None:
            return {}
        return {"best_metric": float(self.best_metric), "best_iter": int(self.best_iter)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]

    def after_train(self) -> None:
        before = self.best_metric
        super().after_train()
        if self.best_metric == before or self.trainer.iter < self.trainer.max_iter:
            return
        # The last checkpoint was written before the last evaluation. Once more, so that a training
        # that goes on from it knows this result.
        with at_last_iteration(self.trainer):
            self.trainer.checkpointer.save("model_final", iteration=self.trainer.iter)
