"""
What the public data sets have in common: names that are registered before the files exist, and the
COCO files that ``tools/convert_dataset.py`` writes.

Each data set is a folder in Detectron2's data-set root, ``$DETECTRON2_DATASETS`` or ``datasets``.
What was downloaded stays as it is; the converters add ``coco/instances_{split}.json`` to it, whose
``file_name`` entries start at the folder of the data set.
"""

import json
import os
from collections.abc import Iterable, Sequence

from cbbl_d2.data.coco_format import CocoLoader, read_annotation_json
from cbbl_d2.data.coco_validation import check_structure
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import EvaluationRules
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import listed
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

__all__ = [
    "CocoWriter",
    "converted_json",
    "dataset_folder",
    "first_existing",
    "read_published_coco",
    "register_public",
]


# -- registration ----------------------------------------------------------------------------------


def dataset_folder(folder: str) -> str:
    """The folder of a data set in Detectron2's data-set root."""
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), folder)


def converted_json(root: str, split: str) -> str:
    """Where a converter writes: ``{root}/coco/instances_{split}.json``."""
    return os.path.join(root, "coco", f"instances_{split}.json")


def register_public(
    name: str,
    folder: str,
    split: str,
    classes: Sequence[str],
    rules: EvaluationRules,
    source: str,
    command: str,
) -> None:
    """
    Register a data set that a converter makes. No file is touched before first use.

    Args:
        name: what stands in ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        folder: in Detectron2's data-set root, looked up at each use.
        split: the part of ``instances_{split}.json``.
        classes: in the order of their category ids, which start at 1.
        rules: of the benchmark.
        source: what to download and where, for the message that the files are missing.
        command: arguments of ``tools/convert_dataset.py`` that make the file.
    """
    MetadataCatalog[name] = _PublicMetadata(name=name, public_folder=folder, public_split=split)
    MetadataCatalog.get(name).set(
        evaluator_type="coco",
        thing_classes=list(classes),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(classes))},
        evaluation_rules=rules,
    )
    DatasetCatalog.register(name, _Loader(name, source, command))


class _PublicMetadata(Metadata):
    """The paths are computed at each access: the data-set root may change after import."""

    @property
    def json_file(self) -> str:
        return converted_json(self.image_root, self.public_split)

    @property
    def image_root(self) -> str:
        return dataset_folder(self.public_folder)


class _Loader(CocoLoader):
    def __init__(self, name: str, source: str, command: str):
        super().__init__(name)
        self._source, self._command = source, command

    def load(self) -> list[dict]:
        """
        Raises:
            UserError: the files are missing or malformed.
        """
        metadata = MetadataCatalog.get(self.name)
        if not os.path.isfile(metadata.json_file):
            raise UserError(
                f"data set {self.name}: {metadata.json_file} does not exist: download "
                f"{self._source} to {metadata.image_root} and run: python tools/convert_dataset.py "
                f"{self._command} (or set DETECTRON2_DATASETS to the folder that holds the data "
                "sets)"
            )
        return super().load()


# -- conversion ------------------------------------------------------------------------------------


class CocoWriter:
    """Collects images and boxes, with ids that start at 1: pycocotools takes 0 for "no match"."""

    def __init__(self, description: str, classes: Sequence[str]):
        """
        Args:
            classes: get the category ids 1, 2, ...
        """
        self._classes = list(classes)
        self._content = {
            "info": {"description": description},
            "licenses": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
            "images": [],
            "annotations": [],
        }

    def add_image(self, file_name: str, width: int, height: int, **fields) -> int:
        """
        Args:
            file_name: starts at the folder of the data set.
            fields: more of its entry.

        Returns:
            its id.
        """
        images = self._content["images"]
        images.append(
            {
                "id": len(images) + 1,
                # The same file on every system.
                "file_name": file_name.replace(os.sep, "/"),
                "width": width,
                "height": height,
                **fields,
            }
        )
        return len(images)

    def add_object(
        self, image_id: int, category_id: int, box: Sequence[float], ignore: bool = False
    ) -> None:
        """
        Args:
            box: x, y, width, height in pixels.
            ignore: not an object, and a detection of this class that lies in the box counts neither
                for nor against: ``"iscrowd": 1``. Detectron2 leaves such boxes out of training.
        """
        annotations = self._content["annotations"]
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": int(ignore),
            }
        )

    def add_ignored(self, image_id: int, box: Sequence[float]) -> None:
        """A box to ignore for every class: COCO's metric looks at one class at a time."""
        for category_id in range(1, len(self._classes) + 1):
            self.add_object(image_id, category_id, box, ignore=True)

    def write(self, json_file: str) -> None:
        """
        Write the file whole or not at all; its folder is made.

        Raises:
            UserError: it cannot be written.
        """
        try:
            os.makedirs(os.path.dirname(json_file), exist_ok=True)
            with atomic_write(json_file) as f:
                json.dump(self._content, f)
        except OSError as e:
            raise UserError(
                f"{json_file}: cannot be written ({e.strerror or e}): make room, or choose a "
                "--root you may write to"
            ) from e


def read_published_coco(json_file: str, ignore_flags: Iterable[str]) -> dict:
    """
    Read an annotation file in COCO format that marks boxes to ignore by fields of its own.

    Args:
        ignore_flags: names of these fields, for example "ignore".

    Returns:
        The content, checked, where a box with one of the flags set has ``"iscrowd": 1`` and any
        other 0, the flags are gone, and segmentations, which here are the boxes again, are, too.

    Raises:
        UserError: the file cannot be read or is malformed; names file and entry.
    """
    content = read_annotation_json(json_file)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if isinstance(annotations, list) and all(isinstance(a, dict) for a in annotations):
        for annotation in annotations:
            flags = [annotation.pop(flag, None) for flag in ignore_flags]
            annotation["iscrowd"] = int(any(flags) or bool(annotation.get("iscrowd", 0)))
            annotation.pop("segmentation", None)
    check_structure(content, json_file)
    return content


def first_existing(root: str, candidates: Sequence[str], what: str) -> str:
    """
    The first of some paths, relative to ``root``, that exists.

    Raises:
        UserError: none does; names what is missing and where it was looked for.
    """
    for path in candidates:
        if os.path.exists(os.path.join(root, path)):
            return path
    raise UserError(
        f"{root}: no {what}; looked for {listed(candidates)}: put the data set there, or choose "
        "another --root"
    )
