"""Training hooks: what Detectron2's checkpoints lack to resume exactly, and the best model."""

import json
import logging
import os
from typing import Any, Dict, Optional

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_write

from .rng import rng_state, set_rng_state

logger = logging.getLogger(__name__)

# Detectron2's writers show the median of the last 20 values of a loss.
_SMOOTHING_WINDOW = 20


class ResumeState(HookBase):
    """
    Keeps in each checkpoint the place in the data stream, the random number generators and the
    values over which the logged losses are smoothed. With them, a resumed run logs the same losses
    as one that was never interrupted. Several processes: the generators are not restored, since
    only those of the first process are in the checkpoint.
    """

    def __init__(self, data_loader: ResumableTrainLoader):
        self._data_loader = data_loader
        self._loaded: Optional[Dict[str, Any]] = None

    def state_dict(self) -> Dict[str, Any]:
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        return {
            "data": self._data_loader.state_dict(),
            "rng": rng_state(),
            "scalars": {
                name: [[float(v), int(i)] for v, i in history.values()[-_SMOOTHING_WINDOW:]]
                for name, history in storage.histories().items()
                # What is smoothed is logged in each iteration. Others, such as AP, would be
                # written to metrics.json a second time.
                if hints[name] and history.values()[-1][1] == self.trainer.iter
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
        if comm.get_world_size() == 1:
            set_rng_state(self._loaded["rng"])
        self._loaded = None


class BestCheckpointer(hooks.BestCheckpointer):
    """
    Detectron2's, which forgets on resume how good its ``model_best.pth`` is. Here the figure
    stands beside it in ``model_best.json``: not in the checkpoints, which are written before the
    evaluation of the same iteration.
    """

    def __init__(self, eval_period: int, checkpointer, val_metric: str, resume: bool):
        """
        Args:
            resume: whether this run continues the one in ``checkpointer.save_dir``.
        """
        super().__init__(eval_period, checkpointer, val_metric)
        self._path = os.path.join(checkpointer.save_dir, f"{self._file_prefix}.json")
        if resume and os.path.isfile(self._path):
            try:
                with open(self._path) as f:
                    best = json.load(f)
                self.best_metric, self.best_iter = best[val_metric], best["iteration"]
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(
                    f"{self._path}: does not hold {val_metric} of the best model so far; "
                    "delete it to choose the best model anew"
                ) from e

    def _best_checking(self) -> None:
        before = self.best_iter
        super()._best_checking()
        if self.best_iter != before:
            with atomic_write(self._path, "w") as f:
                json.dump({self._val_metric: self.best_metric, "iteration": self.best_iter}, f)
