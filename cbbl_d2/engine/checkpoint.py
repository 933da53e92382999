"""Checkpoints that are never half written, and weights that never fail to fit in silence."""

import os
import pickle
from typing import Any, Dict, List

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import listed


class _AtomicPathManager:
    """Detectron2's path manager; local files are written to a temporary name, then renamed."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" in mode and "://" not in path:
            return atomic_write(path, mode)
        return self._path_manager.open(path, mode, **kwargs)


class CBBLCheckpointer(DetectionCheckpointer):
    """
    Detectron2's checkpointer with atomic writes, and with a check of what it loads:

    * no parameter of the model is in the file: :class:`UserError`;
    * some are not (a stock Faster R-CNN loaded into a C-BBL model, another number of classes):
      one log line names the layers that start anew, or, with ``require_all``,
      :class:`UserError`.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, require_all=False, **kwargs: Any):
        """
        Args:
            require_all: whether every parameter must come from the file, as for evaluation.
                Can be changed later. Resuming always requires all.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = _AtomicPathManager(self.path_manager)
        self.require_all = require_all
        self._path = ""

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        except AssertionError as e:
            if "not found" in str(e):
                raise UserError(f"{path}: no such weights file (MODEL.WEIGHTS)") from e
            raise
        except OSError as e:
            raise UserError(f"{path}: cannot load these weights (MODEL.WEIGHTS): {e}") from e

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        require_all, self.require_all = self.require_all, True
        try:
            return super().resume_or_load(path, resume=True)
        finally:
            self.require_all = require_all

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            return super()._load_file(filename)
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as e:
            reason = str(e).strip().split("\n")[0]
            raise UserError(
                f"{filename}: not a checkpoint that Detectron2 can read ({reason})"
            ) from e

    def _load_model(self, checkpoint: Any):
        incompatible = super()._load_model(checkpoint)
        model = getattr(self.model, "module", self.model)
        parameters = [name for name, _ in model.named_parameters()]
        there = {name: shape for name, shape, _ in incompatible.incorrect_shapes}
        absent = set(incompatible.missing_keys) | set(there)
        anew = _layers([name for name in parameters if name in absent])
        if parameters and len(absent.intersection(parameters)) == len(parameters):
            raise UserError(
                f"{self._path}: weights of another architecture: none of the {len(parameters)} "
                "parameters of this model is in it; give the config that it was trained with"
            )
        if anew and self.require_all:
            raise UserError(
                f"{self._path}: does not fit this model, which needs weights for "
                f"{listed(anew, limit=8)}; give the config that it was trained with"
            )
        if anew:
            self.logger.info(
                f"{self._path}: loaded; {len(anew)} of {len(_layers(parameters))} layers start "
                f"anew, as it has no weights of their shape: {listed(anew, limit=8)}"
            )
        return incompatible


class BestModelCheckpointer(CBBLCheckpointer):
    """Its files are never the "last checkpoint", from which training resumes."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


def load_weights(model: nn.Module, path: str) -> None:
    """
    Load weights for inference.

    Args:
        path: file, or URL that Detectron2 knows.

    Raises:
        UserError: ``path`` is empty, cannot be read or lacks a parameter of the model.
    """
    if not path:
        raise UserError("no weights given: set MODEL.WEIGHTS, e.g. to OUTPUT_DIR/model_best.pth")
    CBBLCheckpointer(model, require_all=True).load(path)


def _layers(parameters: List[str]) -> List[str]:
    """Names of the modules that own the parameters, in order."""
    return list(dict.fromkeys(os.path.splitext(name)[0] for name in parameters))
