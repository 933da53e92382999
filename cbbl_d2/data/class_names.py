"""The names of the classes beside the checkpoints, which hold only their number."""

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from cbbl_d2.files import atomic_write

__all__ = ["CLASSES_NAME", "save_class_names"]

CLASSES_NAME = "classes.txt"


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
