"""
Checkpoints that are never half written and never hold a NaN, and weights that run no code and never
fail to fit in silence.
"""

import glob
import os
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import listed
from cbbl_d2.modeling.torchvision_backbone import as_detector_weights
from cbbl_d2.plain_pickle import check_pickle
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn


class _AtomicPathManager:
    """
    Detectron2's path manager; local files are written to a temporary name, then renamed. fvcore's
    checkpointer opens all its files through its path manager, so that this makes each save atomic.
    """

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
    Detectron2's checkpointer with atomic writes. It saves nothing that is not finite, resumes from
    the newest checkpoint that is whole, and checks what it loads:

    * a file that holds more than tensors, arrays and plain values, or weights that are not finite:
      :class:`UserError`;
    * no weight of the model is in the file: :class:`UserError`;
    * some are not (a stock Faster R-CNN loaded into a C-BBL model, another number of classes):
      one log line names the layers that are randomly initialized, or, with ``require_all``,
      :class:`UserError`;
    * weights of a classification network of torchvision become those of the detector's backbone;
    * a C-BBL layer whose weights in the file are for another grid, or for no grid at all, counts
      as one of these. Their shape alone may fit: that of a stock layer for 6 classes fits a grid
      of 6 points.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, require_all=False, **kwargs: Any):
        """
        Args:
            require_all: whether every weight must come from the file, as for evaluation.
                Can be changed later. Resuming always requires all.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager = _AtomicPathManager(self.path_manager)
        self.require_all = require_all
        self._path = ""
        self._newest: Optional[Tuple[str, Dict[str, Any]]] = None

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_to_disk:
            return
        state = {"model": self.model, **self.checkpointables}
        bad = not_finite({key: value.state_dict() for key, value in state.items()})
        if bad:
            raise UserError(
                f"training has diverged: {bad} is not finite, and the checkpoint {name} is not "
                "written: lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True, and go "
                "on from the last one with --resume"
            )
        self._newest = None
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as e:  # torch turns a full disk into a RuntimeError
            raise UserError(
                f"{self.save_dir}: the checkpoint {name} cannot be written ({_reason(e)}): older "
                "ones are whole; make room and go on with --resume"
            ) from e

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        except AssertionError as e:
            if "not found" in str(e):
                final = os.path.join(os.path.dirname(path), "model_final.pth")
                hint = ""
                if os.path.basename(path) == "model_best.pth" and os.path.isfile(final):
                    hint = f"; no evaluation has found an object yet, but there is {final}"
                if os.path.basename(path) == "mobilenet_v2.pth":
                    hint = ": python tools/download_mobilenet.py writes datasets/mobilenet_v2.pth"
                raise UserError(f"{path}: no such weights file (MODEL.WEIGHTS){hint}") from e
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

    def has_checkpoint(self) -> bool:
        return bool(self._candidates())

    def get_checkpoint_file(self) -> str:
        """
        The newest checkpoint that can be resumed; a warning names those that cannot.

        Raises:
            UserError: there is none.
        """
        if self._newest is None:
            self._newest = self._find_newest()
        return self._newest[0]

    def _candidates(self) -> List[str]:
        """Checkpoints of this folder, first the one that ``last_checkpoint`` names."""
        files = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        # Not model_best.pth, from which training never resumes.
        files = [x for x in files if os.path.basename(x)[6:-4].replace("final", "0").isdigit()]
        files.sort(key=os.path.getmtime, reverse=True)
        try:
            with open(os.path.join(self.save_dir, "last_checkpoint"), encoding="utf-8") as f:
                last = os.path.join(self.save_dir, f.read().strip())
        except (OSError, ValueError):
            return files
        return [last, *(x for x in files if x != last)] if os.path.basename(last) else files

    def _find_newest(self) -> Tuple[str, Dict[str, Any]]:
        reasons = []
        for path in self._candidates():
            try:
                if not os.path.isfile(path):
                    raise UserError(f"{path}: no such file")
                loaded = self._load_file(path)
                if "trainer" in self.checkpointables and "trainer" not in loaded:
                    raise UserError(f"{path}: holds weights alone, and no state of a training")
            except UserError as e:
                reasons.append(str(e))
                continue
            if reasons:
                self.logger.warning(f"Going on from {path}: {'; '.join(reasons)}")
            return path, loaded
        raise UserError(
            f"{self.save_dir}: no checkpoint in it can be resumed ({'; '.join(reasons)}): start "
            "again with another OUTPUT_DIR, without --resume"
        )

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if self._newest is not None and self._newest[0] == filename:  # it has just been read
            (_, loaded), self._newest = self._newest, (filename, {})
            if loaded:
                return loaded
        try:
            if filename.endswith(".pkl"):
                check_pickle(filename)
                loaded = super()._load_file(filename)
            else:
                # Said here, not left to torch's default: a checkpoint runs no code.
                loaded = torch.load(filename, map_location="cpu", weights_only=True)
                if filename.endswith(".pyth"):
                    loaded = super()._load_file(filename)
        except (UserError, FileNotFoundError):
            raise
        except Exception as e:  # a damaged file can make torch raise anything
            # Not torch's own words: they advise to turn off the check for malicious files.
            raise UserError(
                f"{filename}: not a checkpoint, damaged, or with more in it than tensors and plain "
                "values"
            ) from e
        if isinstance(loaded, dict) and "model" not in loaded:
            loaded = {"model": loaded}
        weights = loaded.get("model") if isinstance(loaded, dict) else None
        if not isinstance(weights, dict) or not all(
            isinstance(name, str) and _is_real_tensor(value) for name, value in weights.items()
        ):
            raise UserError(
                f"{filename}: not a checkpoint of Detectron2: it must be a dict of tensors, or one "
                'with such a dict under "model"; convert it first'
            )
        bad = not_finite(weights)
        if bad:
            raise UserError(
                f"{filename}: its {bad} is not finite, as after a training that has diverged: give "
                "an earlier checkpoint"
            )
        return loaded

    def _drop_other_grids(self, checkpoint: Dict[str, Any]) -> None:
        """Take out of the weights those of layers with another grid than in the model."""
        weights = checkpoint["model"]
        for layer, module in self.model.named_modules():
            if "grid" not in module._buffers:
                continue
            grid, saved = module.grid.cpu(), weights.get(f"{layer}.grid")
            if saved is not None:
                saved = torch.as_tensor(saved).cpu()
                if saved.shape == grid.shape and torch.allclose(saved, grid):
                    continue
                if self.require_all:
                    raise UserError(
                        f"{self._path}: its {layer} was trained on the grid {_points(saved)}, this "
                        f"model has {_points(grid)}: give the keys of MODEL.CBBL that it was "
                        "trained with"
                    )
            weights = {k: v for k, v in weights.items() if k.rpartition(".")[0] != layer}
        checkpoint["model"] = weights

    def _load_model(self, checkpoint: Any):
        checkpoint["model"] = as_detector_weights(self.model, checkpoint["model"], self._path)
        self._drop_other_grids(checkpoint)
        incompatible = super()._load_model(checkpoint)
        # The statistics of batch norms are buffers; these others the config or the use decides.
        own = ("pixel_mean", "pixel_std", "num_batches_tracked")
        weights = [name for name in self.model.state_dict() if not name.endswith(own)]
        wrong_shape = [name for name, _, _ in incompatible.incorrect_shapes]
        absent = {*incompatible.missing_keys, *wrong_shape}
        anew = _layers([name for name in weights if name in absent])
        if weights and absent.issuperset(weights):
            raise UserError(
                f"{self._path}: weights of another architecture: none of the {len(weights)} "
                "tensors of this model is in it; give the config that it was trained with"
            )
        if anew and self.require_all:
            raise UserError(
                f"{self._path}: does not fit this model, which needs weights for "
                f"{listed(anew, limit=8)}; give the config that it was trained with"
            )
        if anew:
            self.logger.info(
                f"{self._path}: loaded; {len(anew)} of {len(_layers(weights))} layers are "
                "randomly initialized, as it has no weights that fit them: "
                f"{listed(anew, limit=8)}"
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
        UserError: ``path`` is empty, cannot be read or lacks a weight of the model.
    """
    if not path:
        raise UserError("no weights given: set MODEL.WEIGHTS, e.g. to OUTPUT_DIR/model_best.pth")
    CBBLCheckpointer(model, require_all=True).load(path)


def _is_real_tensor(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "fiub"  # floats, integers, bool
    return isinstance(value, torch.Tensor) and not value.is_complex()


def not_finite(value: Any, name: str = "") -> str:
    """Where in nested containers a tensor or array is with NaN or infinity; "" if nowhere."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return "" if np.isfinite(value).all() else name
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return "" if bool(torch.isfinite(value).all()) else name
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return ""
    found = (not_finite(v, f"{name}.{k}" if name else str(k)) for k, v in value.items())
    return next(filter(None, found), "")


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()[:20])


def _points(grid: torch.Tensor) -> str:
    return "[" + listed([f"{point:.3g}" for point in grid.tolist()], limit=6) + "]"


def _layers(weights: List[str]) -> List[str]:
    """Names of the modules that own the weights, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
