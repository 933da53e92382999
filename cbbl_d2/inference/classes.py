"""
The names of the classes that a checkpoint predicts. A checkpoint holds tensors and its config the
number of classes; the names are with the data set, which may not be on this machine.
"""

import dataclasses
import json
import os
from typing import Sequence

from cbbl_d2.architectures import detection_node
from cbbl_d2.data.class_names import check_class_names, class_names_beside, read_class_names
from cbbl_d2.errors import UserError
from cbbl_d2.messages import count, listed
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata


@dataclasses.dataclass(frozen=True)
class Classes:
    """
    Attributes:
        names: of the K classes, in the order of the model's outputs.
        ids: K category ids for COCO files: those of the data set, or 1 ... K.
        source: where the names are from, for a message; "" if they are only numbered.
        metadata: with ``thing_classes`` and, from a data set, what else is known for drawing.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    source: str
    metadata: Metadata

    def categories(self) -> list[dict]:
        """``categories`` of a COCO file."""
        keypoints = self.metadata.get("keypoint_names", None)
        extra = {"keypoints": list(keypoints), "skeleton": []} if keypoints else {}
        return [{"id": i, "name": name, **extra} for i, name in zip(self.ids, self.names)]


def find_classes(
    cfg: CfgNode,
    given: Sequence[str] | None = None,
    dataset: str | None = None,
    stored: "Classes | None" = None,
) -> Classes:
    """
    In this order: the names given; those in the model's file; ``classes.txt`` beside the
    checkpoint; the data sets of the config, as far as they are registered or their annotation file
    can be read. Failing all, "class 0", "class 1", ...

    Args:
        cfg: from :func:`cbbl_d2.inference.load_inference_config`.
        given: the names, or one text file with a name in each line.
        dataset: name of the data set to predict on, asked before those of the config.
        stored: what the model's file says, which a checkpoint does not.

    Raises:
        UserError: the names given, or those in ``classes.txt``, are too many, too few or twice the
            same; or the classes of ``dataset`` are not those of the model, or in another order.
    """
    node = detection_node(cfg)
    number = cfg.MODEL[node].NUM_CLASSES if node else None
    names, source = (list(given), "--class-names") if given else (None, "")
    file = class_names_beside(cfg.MODEL.WEIGHTS)
    if given:
        file = given[0] if len(given) == 1 and os.path.isfile(given[0]) else None
    if stored is not None and not given:
        names, source = list(stored.names), stored.source
    elif file is not None:
        names, source = read_class_names(file), file
    if names is not None:
        if number is not None and len(names) != number:
            raise UserError(
                f"{source}: {count(len(names), 'name', 'names')} ({listed(names)}), but the model "
                f"has {count(number, 'class', 'classes')}: give one for each, in their order"
            )
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{source}: the class name {twice} is there twice")

    for name in [dataset] if dataset else [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]:
        found = _of_dataset(name)
        if found is None:
            continue
        classes, ids = found
        if number is not None and len(classes) != number:
            if not dataset:
                continue
            raise UserError(
                f"data set {name} has {count(len(classes), 'class', 'classes')} "
                f"({listed(classes)}), but the model has {number}: choose another data set"
            )
        if names is None:
            names, source = classes, f"data set {name}"
        elif dataset and not given:
            check_class_names(names, source, name, classes)
        # Maybe names of one's own, but what the data set knows besides them.
        return Classes(tuple(names), ids, source, _metadata(names, name))
    if names is None:
        names = [f"class {i}" for i in range(number or 0)]
    ids = stored.ids if stored is not None else tuple(range(1, len(names) + 1))
    return Classes(tuple(names), ids, source, _metadata(names))


def say_class_names(classes: Classes) -> None:
    """Print where they are from."""
    if classes.source:
        print(f"Class names: {classes.source}")
        return
    print(
        "The names of the classes are neither beside the checkpoint nor with a data set on this "
        'machine: they are numbered "class 0", "class 1", ...; name them with --class-names'
    )


def _of_dataset(name: str) -> tuple[list[str], tuple[int, ...]] | None:
    """Names and category ids; None where they are not to be had."""
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes", None):
        # Those of a COCO file are known only after it has been read. Not by loading the data set:
        # its images need not be on this machine.
        try:
            with open(metadata.get("json_file", None) or "", encoding="utf-8") as f:
                categories = sorted(json.load(f)["categories"], key=lambda c: c["id"])
            return [str(c["name"]) for c in categories], tuple(int(c["id"]) for c in categories)
        except (OSError, ValueError, KeyError, TypeError):
            return None
    names = list(metadata.thing_classes)
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id", None)
    # As Detectron2 evaluates data sets without such a table: the ids are those of the model.
    to_id = {v: k for k, v in to_contiguous.items()} if to_contiguous else {}
    return names, tuple(int(to_id.get(i, i)) for i in range(len(names)))


def _metadata(names: Sequence[str], dataset: str | None = None) -> Metadata:
    """With what is known for drawing, besides the names, of a data set."""
    known = MetadataCatalog.get(dataset).as_dict() if dataset else {}
    keys = ("keypoint_names", "keypoint_connection_rules", "thing_colors")
    drawing = {key: known[key] for key in keys if known.get(key) is not None}
    return Metadata(**drawing, thing_classes=list(names))
