"""
What the public data sets have in common: names that are registered before the files exist, and the
COCO files that ``tools/convert_dataset.py`` writes.

Each data set is a folder in Detectron2's data-set root, ``$DETECTRON2_DATASETS`` or ``datasets``.
What was downloaded stays as it is; the converters add ``coco/instances_{split}.json`` to it, whose
``file_name`` entries start at the folder of the data set.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from cbbl_d2.data.coco_format import CocoLoader, ComputedPaths, read_annotation_json
from cbbl_d2.data.coco_validation import check_structure
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import EvaluationRules
from cbbl_d2.files import atomic_write
from cbbl_d2.messages import listed
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tqdm import tqdm

__all__ = [
    "CANNOT_WRITE",
    "class_ids",
    "converted_json",
    "dataset_folder",
    "first_existing",
    "images_bar",
    "read_published_coco",
    "register_public",
    "write_jpeg",
]

# For the message that a converter cannot write a file.
CANNOT_WRITE = "make room, or choose a --root you may write to"

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

    def paths() -> tuple[str, str]:
        root = dataset_folder(folder)
        return converted_json(root, split), root

    MetadataCatalog[name] = ComputedPaths(name=name, paths=paths)
    MetadataCatalog.get(name).set(
        evaluator_type="coco",
        thing_classes=list(classes),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(classes))},
        evaluation_rules=rules,
    )
    DatasetCatalog.register(name, _Loader(name, source, command))


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


def images_bar(images: Collection, what: str) -> tqdm:
    """
    The images, with a progress bar on stderr.

    Args:
        what: is converted.
    """
    return tqdm(images, desc=what, unit="image", mininterval=1)


def read_published_coco(json_file: str, ignore_flags: Iterable[str] = ()) -> dict:
    """
    Read an annotation file in COCO format that has fields of its own.

    Args:
        ignore_flags: names of the fields that mark boxes to ignore, for example "ignore".

    Returns:
        The content, checked, where a box with one of the flags set has ``"iscrowd": 1`` and any
        other 0, the flags are gone, and segmentations, which here are the boxes again, are, too.
        HIT-UAV's keys "annotation" and "filename" have become COCO's.

    Raises:
        UserError: the file cannot be read or is malformed, or an annotation is of no image; names
            file and entry.
    """
    content = read_annotation_json(json_file)
    if isinstance(content, dict):
        if "annotation" in content:
            content["annotations"] = content.pop("annotation")
        for image in _objects(content.get("images")):
            if "filename" in image:
                image["file_name"] = image.pop("filename")
        for annotation in _objects(content.get("annotations")):
            flags = [annotation.pop(flag, None) for flag in ignore_flags]
            annotation["iscrowd"] = int(any(flags) or bool(annotation.get("iscrowd", 0)))
            annotation.pop("segmentation", None)
    check_structure(content, json_file)
    ids = {image["id"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in ids:
            raise UserError(
                f"{json_file}: annotation {annotation['id']} has the image_id "
                f"{annotation['image_id']}, which no image has: download the file again"
            )
    return content


def _objects(value: Any) -> list[dict]:
    """Those of a list from a file that may hold anything."""
    return [x for x in value if isinstance(x, dict)] if isinstance(value, list) else []


def class_ids(
    content: dict, json_file: str, data_set: str, known: Mapping[str, int | None]
) -> dict[int, int | None]:
    """
    Args:
        content: from :func:`read_published_coco`.
        data_set: its name, for the message.
        known: name of a published class -> id of the class here; None: its boxes are left out.

    Returns:
        published id -> id here.

    Raises:
        UserError: the file has another class.
    """
    names = {c["id"]: c["name"] for c in content["categories"]}
    unknown = sorted(set(names.values()) - known.keys())
    if unknown:
        raise UserError(
            f"{json_file}: has the class{'es' if len(unknown) > 1 else ''} {listed(unknown, 8)}, "
            f"not those of {data_set} ({listed(known, 8)}): is it the right file?"
        )
    return {id: known[name] for id, name in names.items()}


def write_jpeg(path: str, make: Callable[[], Image.Image], source: str, **options) -> None:
    """
    Write an image that is made from another one; its folder is made.

    Args:
        make: reads the other one.
        source: its path, for the message.
        options: of Pillow's JPEG. By default it compresses little: tiny objects suffer first from
            a second compression.

    Raises:
        UserError: it cannot be written, or the other one is damaged.
    """
    try:
        image = make()
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path, "wb") as f:
            image.save(f, "JPEG", **(options or {"quality": 95, "subsampling": 0}))
    except (OSError, SyntaxError) as e:
        raise UserError(f"{source}: cannot be converted to {path} ({e})") from e


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
