"""
Data sets in COCO format that a user brings, checked before anything is trained or measured on them.

What is wrong with a file is treated in one of two ways:

* its structure is broken (no such file, not JSON, a missing field, an unknown category, an id that
  comes twice): one :class:`UserError` that names file, id and cure;
* a box cannot be used (no size, NaN, outside its image, of an image that is not listed): it is left
  out and counted in the log, of training and of evaluation alike (:func:`clean_ground_truth`). Left
  in, it would be an object that no detector can find.

A box that is partly outside its image stays: Detectron2 clips it in training, and COCO's metric
takes it as it is. The user's files are never written to.

Boxes are COCO's: ``[x, y, width, height]`` in pixels, x and y of the upper left corner.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO

from cbbl_d2.errors import ConfigError, UserError

__all__ = [
    "check_datasets",
    "check_num_classes",
    "clean_ground_truth",
    "load_coco_format",
    "register_coco_format",
    "register_from_config",
]

logger = logging.getLogger(__name__)

# Boxes that end this far outside their image are worth a word in the log, pixels. Below it are
# rounding and the many converters that are off by one.
_EDGE_TOLERANCE = 1.0

# As many ids or names are listed in a message.
_MAX_LISTED = 5


# -- registration ----------------------------------------------------------------------------------


def register_coco_format(name: str, json_file: str, image_root: str) -> None:
    """
    Register a data set, as Detectron2's ``register_coco_instances`` does, with a checked loader.
    No file is touched before first use. Registering the same again changes nothing.

    Args:
        name: what stands in ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: annotations in COCO's format for instances.
        image_root: the folder that the ``file_name`` of each image starts from.

    Raises:
        UserError: the name is taken by other data.
    """
    json_file, image_root = _path(json_file), _path(image_root)
    loader = _Loader(name, json_file, image_root)
    if name in DatasetCatalog:
        if DatasetCatalog[name] == loader:
            return
        raise UserError(
            f"data set name {name} is already registered with other files: choose another name "
            f"for {json_file}"
        )
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def register_from_config(cfg: CfgNode) -> None:
    """
    Register every ``[name, annotation JSON, image folder]`` of ``cfg.DATASETS.COCO_FORMAT``.

    Raises:
        ConfigError: an entry does not have this form.
        UserError: a name is taken by other data.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != 3
            or not all(isinstance(part, str) and part for part in entry)
        ):
            raise ConfigError(
                f"DATASETS.COCO_FORMAT: {_short(entry)} must be [name, annotation_json, "
                "image_folder], in all for example [['mine', 'mine.json', 'images']]"
            )
        register_coco_format(*entry)


@dataclasses.dataclass(frozen=True)
class _Loader:
    """What ``DatasetCatalog.get`` calls."""

    name: str
    json_file: str
    image_root: str

    def __call__(self) -> list[dict]:
        return load_coco_format(self.json_file, self.image_root, self.name)


def _is_coco_format(name: str) -> bool:
    return name in DatasetCatalog and isinstance(DatasetCatalog[name], _Loader)


# -- loading ---------------------------------------------------------------------------------------


def load_coco_format(json_file: str, image_root: str, name: str) -> list[dict]:
    """
    Check an annotation file and load it with Detectron2's ``load_coco_json``, without the boxes
    that cannot be used. One log line has all the counts. For a file with nothing wrong the result
    is that of ``load_coco_json``.

    An image file that is missing is counted and stays in the result: training skips it
    (:class:`cbbl_d2.data.broken_images.SkipBrokenImages`), :func:`check_datasets` refuses to
    evaluate without it.

    Args:
        json_file: annotations in COCO's format for instances. Category ids can be any integers.
        image_root: the folder of the images.
        name: of the data set; ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` of its
            metadata are set.

    Returns:
        Detectron2's dataset dicts, one for each image.

    Raises:
        UserError: the file cannot be read or is malformed, it has no image or no box that can be
            used, or none of its images exists.
    """
    content = _read_json(json_file)
    _check_structure(content, json_file)
    faults = _find_faults(content)
    dropped = {id for ids in faults.values() for id in ids}
    num_valid = len(content["annotations"]) - len(dropped)
    if all(a["id"] in dropped or a.get("iscrowd", 0) for a in content["annotations"]):
        raise UserError(
            f"{json_file}: no box that can be used"
            + (f", of {len(dropped)}: {_list_faults(faults)}" if dropped else "")
            + ": nothing to learn or to measure; is it the right file?"
        )
    num_clipped = sum(_is_clipped(a, i) for a, i in _with_images(content) if a["id"] not in dropped)
    _check_same_classes_as_before(name, content, json_file)

    dicts = load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])
    num_loaded = 0
    for d in dicts:
        d["annotations"] = [a for a in d["annotations"] if a.pop("id") not in dropped]
        num_loaded += len(d["annotations"])

    missing = _missing_images(dicts)
    if len(missing) == len(dicts):
        raise UserError(
            f"{image_root}: "
            + ("no such folder" if not os.path.isdir(image_root) else "probably the wrong folder")
            + f", none of the {len(dicts)} images of {json_file} is there, for example {missing[0]}"
            + ": correct the image folder or the file_name entries"
        )

    message = f"{name}: {len(dicts)} images, {num_loaded} boxes"
    if dropped:
        message += f"; dropped {_count(len(dropped), 'box', 'boxes')}: {_list_faults(faults)}"
    if num_loaded < num_valid:
        num = _count(num_valid - num_loaded, "box", "boxes")
        message += f"; {num} left out of training for an invalid segmentation"
    if missing:
        num = _count(len(missing), "image file is", "image files are")
        message += f"; {num} missing and will be skipped, the first is {missing[0]}"
    if num_clipped:
        num = _count(num_clipped, "box reaches", "boxes reach")
        message += f"; {num} over the edge of the image and will be clipped"
    wrong = dropped or missing or num_loaded < num_valid
    logger.log(logging.WARNING if wrong else logging.INFO, message)
    return dicts


def clean_ground_truth(name: str, coco: COCO) -> None:
    """
    Make the ground truth of an evaluator agree with what :func:`load_coco_format` returns, in
    place and in memory; to be called once the evaluator has read the file.

    * The boxes that were dropped from the data set are dropped here, too.
    * Where ``area`` is missing or no number > 0, it becomes width x height. COCO's metric needs it
      to tell small objects from large ones, and would count an area of NaN in every range.
    * Where ``iscrowd`` is missing, it becomes 0, as in training.
    * An annotation id of 0 becomes a free one: COCO's metric takes the id 0 for "no match" and
      counts a correct detection of that object as false.

    Data sets that :func:`register_coco_format` did not register are left alone: the numbers on
    COCO itself stay the official ones.

    Args:
        name: of the data set.
        coco: the ground truth; for Detectron2's ``COCOEvaluator`` its ``_coco_api``.
    """
    if not _is_coco_format(name):
        return
    _check_structure(coco.dataset, DatasetCatalog[name].json_file)
    faults = _find_faults(coco.dataset)
    dropped = {id for ids in faults.values() for id in ids}
    free_id = max(a["id"] for a in coco.dataset["annotations"]) + 1
    num_areas = 0
    annotations = []
    for annotation in coco.dataset["annotations"]:
        if annotation["id"] in dropped:
            continue
        area = annotation.get("area")
        if not (_is_number(area) and _is_finite(area) and area > 0):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            num_areas += 1
        annotation.setdefault("iscrowd", 0)
        if annotation["id"] == 0:
            annotation["id"] = free_id
        annotations.append(annotation)
    coco.dataset["annotations"] = annotations
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    if dropped:
        logger.warning(
            f"{name}: {_count(len(dropped), 'box', 'boxes')} of the ground truth not counted in "
            f"the evaluation: {_list_faults(faults)}"
        )
    if num_areas:
        logger.warning(
            f"{name}: {_count(num_areas, 'box', 'boxes')} without a usable area in the "
            "annotation file: evaluated with width x height"
        )


# -- checks before a model is built ----------------------------------------------------------------


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """
    Check that the data sets of a config exist and fit the model, before time goes into building it.
    Data sets of ``DATASETS.COCO_FORMAT`` and those to evaluate on are loaded for it.

    Args:
        cfg: ``DATASETS.TRAIN``, ``DATASETS.TEST`` and the number of classes are read.
        eval_only: leave ``DATASETS.TRAIN`` alone: its files need not be on this machine.

    Raises:
        ConfigError: an unknown data set, no data set to train on, or see
            :func:`check_num_classes`.
        UserError: files are missing or malformed.
    """
    if not eval_only and len(cfg.DATASETS.TRAIN) == 0:
        raise ConfigError("DATASETS.TRAIN is empty: name a data set to train on")
    for name in _used_datasets(cfg, eval_only):
        _check_files(name, needs_all_images=name in cfg.DATASETS.TEST)
    check_num_classes(cfg, eval_only)


def check_num_classes(cfg: CfgNode, eval_only: bool = False) -> None:
    """
    Compare the classes of the data sets with the model's number of classes and with each other.
    Either mismatch would train or measure the wrong classes, often without an error.

    Raises:
        ConfigError: the numbers differ, the names or their order differ, or a name is unknown.
    """
    key = _num_classes_key(cfg)
    first = None
    for name in _used_datasets(cfg, eval_only):
        if _is_coco_format(name) and MetadataCatalog.get(name).get("thing_classes") is None:
            DatasetCatalog.get(name)
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is None:  # a data set of another kind
            continue
        if key is not None and _get(cfg, key) != len(classes):
            raise ConfigError(
                f"{key} = {_get(cfg, key)}, but data set {name} has "
                f"{_count(len(classes), 'class', 'classes')} ({_listed(classes)}): "
                f"set {key} {len(classes)}"
            )
        if first is None:
            first = (name, classes)
        elif list(classes) != list(first[1]):
            raise ConfigError(
                f"data sets {first[0]} and {name} have different classes, or in another order: "
                f"({_listed(first[1])}) and ({_listed(classes)}): give their annotation files the "
                "same categories"
            )


def _used_datasets(cfg: CfgNode, eval_only: bool) -> list[str]:
    """The data sets of a config without repetition, checked to be registered."""
    names = {}
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
                raise ConfigError(
                    f"DATASETS.{key}: unknown data set {name}"
                    + (f", did you mean {' or '.join(near)}?" if near else "")
                    + "; data sets of your own are named in DATASETS.COCO_FORMAT"
                )
            names[name] = None
    return list(names)


def _check_files(name: str, needs_all_images: bool) -> None:
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not needs_all_images and not _is_coco_format(name) and _is_file(json_file):
        # Loading the training set of COCO takes half a minute. Its files are known to be sound.
        if image_root and not os.path.isdir(image_root):
            raise _not_there(name, image_root)
        return
    try:
        dicts = DatasetCatalog.get(name)
    except FileNotFoundError as e:
        raise _not_there(name, e.filename or json_file) from e
    except json.JSONDecodeError as e:
        raise UserError(f"{json_file}: {_explain_json(e)}: fetch or write it again") from e
    if not isinstance(dicts, list):  # Detectron2 allows a torch Dataset, too
        return
    if not dicts:
        raise UserError(f"data set {name} has no images: choose another one")
    missing = _missing_images(dicts) if needs_all_images else []
    if missing:
        raise UserError(
            f"data set {name}: {len(missing)} of its {len(dicts)} images are missing, the first is "
            f"{missing[0]}: an evaluation without them would not be one on {name}; restore the "
            "files" + (f" or take them out of {json_file}" if json_file else "")
        )


def _not_there(name: str, path: str | None) -> UserError:
    return UserError(
        f"data set {name}: {path} does not exist: put the data set there, or set the environment "
        "variable DETECTRON2_DATASETS to the folder that holds it"
    )


def _num_classes_key(cfg: CfgNode) -> str | None:
    """The config key of the number of classes; None for a model without classes."""
    # Subclasses keep the names of Detectron2's architectures at the end of their own.
    for architecture, node in (
        ("GeneralizedRCNN", "ROI_HEADS"),
        ("RetinaNet", "RETINANET"),
        ("FCOS", "FCOS"),
    ):
        if cfg.MODEL.META_ARCHITECTURE.endswith(architecture) and node in cfg.MODEL:
            return f"MODEL.{node}.NUM_CLASSES"
    return None


def _get(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


# -- the file's structure --------------------------------------------------------------------------


def _read_json(json_file: str) -> Any:
    try:
        with open(json_file, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError as e:
        raise UserError(f"{json_file}: no such annotation file: correct the path") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{json_file}: {_explain_json(e)}: correct or export it again") from e
    except UnicodeDecodeError as e:
        raise UserError(
            f"{json_file}: not a text file in UTF-8: give the COCO JSON file, not an archive"
        ) from e
    except RecursionError as e:
        raise UserError(f"{json_file}: nested too deeply for a COCO file") from e
    except OSError as e:
        raise UserError(f"{json_file}: cannot be read ({e.strerror or e})") from e


def _explain_json(e: json.JSONDecodeError) -> str:
    return f"not valid JSON at line {e.lineno}, column {e.colno} ({e.msg})"


def _check_structure(content: Any, json_file: str) -> None:
    """Raise a UserError unless Detectron2 and pycocotools can work with all entries."""
    for problem in _problems(content):
        raise UserError(f"{json_file}: {problem}")


def _problems(content: Any) -> Iterator[str]:
    """What is wrong with a file's structure. After the first one the rest cannot be trusted."""
    if not isinstance(content, dict):
        yield (
            "not a COCO file: the top level must be an object with images, annotations and "
            f"categories, not a {_json_type(content)}"
        )
    for key in ("images", "annotations", "categories"):
        if key not in content:
            yield f'not a COCO file: it has no "{key}"'
        if not isinstance(content[key], list):
            yield f'"{key}" must be a list, not a {_json_type(content[key])}'
        for i, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                yield f'"{key}"[{i}] must be an object, not {_short(entry)}'
            if "id" not in entry:
                yield f'"{key}"[{i}] has no id: add a unique one'
            id = entry["id"]
            if not _is_integer(id) and not (key == "images" and isinstance(id, str)):
                yield f'"{key}"[{i}] has the id {_short(id)}: it must be an integer'
        twice = _first_duplicate(entry["id"] for entry in content[key])
        if twice is not None:
            yield (
                f'the id {twice!r} comes twice in "{key}": make the ids unique, and correct the '
                "entries that refer to them"
            )
    yield from _problems_of_images(content["images"])
    yield from _problems_of_categories(content["categories"])
    categories = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        for problem in _problems_of_annotation(annotation, categories):
            yield f"annotation {annotation['id']} has {problem}"


def _problems_of_images(images: list[dict]) -> Iterator[str]:
    if not images:
        yield 'no images: "images" is empty; is it the right file?'
    if len({type(image["id"]) for image in images}) > 1:
        yield 'some ids in "images" are numbers and some are strings: use one kind'
    for image in images:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            yield f"image {image['id']!r} has no file_name: add it"
        for key in ("width", "height"):
            if key not in image:
                yield f"image {image['id']!r} ({name}) has no {key}: add it, in pixels"
            if not (_is_number(image[key]) and _is_finite(image[key]) and image[key] > 0):
                yield (
                    f"image {image['id']!r} ({name}) has the {key} {_short(image[key])}: it must "
                    "be the number of pixels"
                )


def _problems_of_categories(categories: list[dict]) -> Iterator[str]:
    if not categories:
        yield 'no categories: "categories" is empty; list the classes there'
    for category in categories:
        name = category.get("name")
        if not isinstance(name, str) or not name.strip():
            yield f'category {category["id"]} has no name: add "name": "..."'
    twice = _first_duplicate(category["name"] for category in categories)
    if twice is not None:
        yield f"two categories have the name {twice!r}: give each its own"


def _problems_of_annotation(annotation: dict, categories: set[int]) -> Iterator[str]:
    for key in ("image_id", "category_id", "bbox"):
        if key not in annotation:
            yield f"no {key}: add it or remove the annotation"
    id = annotation["category_id"]
    if not _is_integer(id) or id not in categories:
        yield (
            f'the category_id {_short(id)}, which "categories" lacks (ids there: '
            f"{_listed(sorted(categories))}): add the category with its name, or correct the id"
        )
    id = annotation["image_id"]
    if not _is_integer(id) and not isinstance(id, str):
        yield f"the image_id {_short(id)}: it must be the id of an image"
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        yield f"the bbox {_short(box)}: it must be four numbers, [x, y, width, height]"
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield f"the iscrowd {_short(annotation['iscrowd'])}: it must be 0 or 1"
    if annotation.get("ignore", 0) != 0:
        yield (
            f'"ignore": {_short(annotation["ignore"])}, which Detectron2 does not support: write '
            '"iscrowd": 1 instead, or remove the annotation'
        )
    if not _is_segmentation(annotation.get("segmentation")):
        yield (
            "a malformed segmentation: it must be a list of polygons [[x, y, x, y, ...], ...] or "
            "a run-length code with size and counts; for boxes alone, remove it"
        )
    keypoints = annotation.get("keypoints")
    if keypoints is not None and not (
        isinstance(keypoints, list) and all(map(_is_number, keypoints))
    ):
        yield "malformed keypoints: they must be numbers [x, y, v, ...]; or remove them"


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, dict):
        size = value.get("size")
        is_size = isinstance(size, list) and len(size) == 2 and all(map(_is_integer, size))
        return not value or (is_size and isinstance(value.get("counts"), (str, list)))
    if isinstance(value, list):
        return all(isinstance(p, list) and all(map(_is_number, p)) for p in value)
    return value is None


def _check_same_classes_as_before(name: str, content: dict, json_file: str) -> None:
    """Metadata can be set once; Detectron2's own message on a second value is an assertion."""
    present = MetadataCatalog.get(name).get("thing_classes")
    classes = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    if present is not None and list(present) != classes:
        raise UserError(
            f"{json_file}: its classes ({_listed(classes)}) are not those that data set {name} is "
            f"known by ({_listed(present)}): register it under another name"
        )


# -- boxes that cannot be used ---------------------------------------------------------------------


def _with_images(content: dict) -> list[tuple[dict, dict | None]]:
    """Each annotation with its image, or None if the image is not listed."""
    images = {image["id"]: image for image in content["images"]}
    return [(a, images.get(a["image_id"])) for a in content["annotations"]]


def _find_faults(content: dict) -> dict[str, list[int]]:
    """What is wrong -> ids of the annotations that cannot be used for it."""
    faults = {}
    for annotation, image in _with_images(content):
        fault = _fault(annotation["bbox"], image)
        if fault:
            faults.setdefault(fault, []).append(annotation["id"])
    return faults


def _fault(box: list, image: dict | None) -> str:
    """Why a box [x, y, width, height] cannot be used, "" if it can."""
    if image is None:
        return "of an image that is not listed"
    if not all(map(_is_finite, box)):
        return "with NaN or infinity"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "of no size"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return "outside its image"
    return ""


def _is_clipped(annotation: dict, image: dict) -> bool:
    x, y, width, height = annotation["bbox"]
    return (
        min(x, y) < -_EDGE_TOLERANCE
        or x + width > image["width"] + _EDGE_TOLERANCE
        or y + height > image["height"] + _EDGE_TOLERANCE
    )


def _list_faults(faults: dict[str, list[int]]) -> str:
    return ", ".join(
        f"{len(ids)} {fault} (annotation id{'s' if len(ids) > 1 else ''} {_listed(ids)})"
        for fault, ids in faults.items()
    )


# -- small things ----------------------------------------------------------------------------------


def _missing_images(dicts: list[dict]) -> list[str]:
    return [d["file_name"] for d in dicts if "file_name" in d and not _is_file(d["file_name"])]


def _is_file(path: str | None) -> bool:
    return path is not None and os.path.isfile(path)


def _path(path: str) -> str:
    return os.path.normpath(os.path.expanduser(path))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _first_duplicate(values) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _json_type(value: Any) -> str:
    names = {list: "list", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(values) -> str:
    values = [str(value) for value in values]
    more = f" and {len(values) - _MAX_LISTED} more" if len(values) > _MAX_LISTED else ""
    return ", ".join(values[:_MAX_LISTED]) + more


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
