"""The names of the classes beside the checkpoints, which hold only their number."""

import logging
import os
from collections.abc import Sequence

from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import listed
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

__all__ = [
    "CLASSES_NAME",
    "check_class_names",
    "class_names_beside",
    "read_class_names",
    "save_class_names",
]

CLASSES_NAME = "classes.txt"

logger = logging.getLogger(__name__)


def save_class_names(cfg: CfgNode) -> None:
    """
    Write ``classes.txt`` into ``cfg.OUTPUT_DIR``, a line for each class in the order of the model's
    outputs, so that a folder with a checkpoint is enough to predict with elsewhere. Nothing is
    written where the training data do not tell, or a name does not fit into a line.

    Args:
        cfg: ``DATASETS.TRAIN`` (loaded already) and ``OUTPUT_DIR`` are read.
    """
    if len(cfg.DATASETS.TRAIN) == 0:
        return
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", None)
    if not names or any(name != name.strip() or len(name.splitlines()) != 1 for name in names):
        return
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, CLASSES_NAME), "w") as f:
        f.write("".join(f"{name}\n" for name in names))


def class_names_beside(weights: str) -> str | None:
    """Path of the ``classes.txt`` beside a checkpoint; None where there is none."""
    path = os.path.join(os.path.dirname(weights), CLASSES_NAME)
    return path if "://" not in path and os.path.isfile(path) else None


def read_class_names(path: str) -> list[str]:
    """
    Raises:
        UserError: not a text file.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return [line.strip() for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: must be a text file with one class name in each line") from e


def check_class_names(
    names: Sequence[str], source: str, dataset: str, classes: Sequence[str]
) -> None:
    """
    Compare the classes that a checkpoint was trained on with those of a data set to test it on.
    Where the names differ, a warning is logged: they may mean the same.

    Args:
        names: those of the checkpoint.
        source: where they are from, its ``classes.txt``.

    Raises:
        UserError: the same names in another order: each object would count as another class.
    """
    if list(names) == list(classes):
        return
    if sorted(names) == sorted(classes):
        raise UserError(
            f"data set {dataset} has its classes in another order ({listed(classes)}) than the "
            f"checkpoint ({source}: {listed(names)}): give the categories of its annotation file "
            "ids in the order of the training"
        )
    logger.warning(
        f"The classes of data set {dataset} ({listed(classes)}) have other names than those of the "
        f"checkpoint ({source}: {listed(names)}): they are compared in this order"
    )
