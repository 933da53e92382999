"""
Data sets in COCO format that a user brings: registered by name, and checked when they are loaded.

What is wrong with a file is treated in one of two ways:

* it cannot be read or its structure is broken: one :class:`UserError` that names file, id and cure;
* a box cannot be used: it is left out and counted in the log, of training and of evaluation alike
  (:func:`cbbl_d2.evaluation.rules.clean_ground_truth`). Left in, it would be an object that no
  detector can find.

Which is which: :mod:`cbbl_d2.data.coco_validation`. The user's files are never written to.
"""

import json
import logging
import os
from typing import Any

from cbbl_d2.compat import reading_parsed
from cbbl_d2.data.broken_images import check_depth, check_some_exist, missing_images
from cbbl_d2.data.coco_validation import (
    check_boxes,
    check_structure,
    count_over_the_edge,
    describe_faults,
    describe_other_format,
    find_faults,
    usable_mask,
)
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.messages import count, explain_json_error, listed, short
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json

__all__ = [
    "CocoLoader",
    "ComputedPaths",
    "is_coco_format",
    "load_coco_format",
    "read_annotation_json",
    "read_coco_json",
    "register_coco_format",
    "register_from_config",
]

logger = logging.getLogger(__name__)


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
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if is_coco_format(name) and (metadata.json_file, metadata.image_root) == (
            json_file,
            image_root,
        ):
            return
        raise UserError(
            f"data set name {name} is already registered with other files: choose another name "
            f"for {json_file}"
        )
    DatasetCatalog.register(name, CocoLoader(name))
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
                f"DATASETS.COCO_FORMAT: {short(entry)} must be [name, annotation_json, "
                "image_folder], in all for example [['mine', 'mine.json', 'images']]"
            )
        register_coco_format(*entry)


def is_coco_format(name: str) -> bool:
    """Whether a data set is one that :class:`CocoLoader` checks."""
    return name in DatasetCatalog and isinstance(DatasetCatalog[name], CocoLoader)


class ComputedPaths(Metadata):
    """
    Metadata of files in Detectron2's data-set root, which may change after import, or that are made
    on first use. Its ``paths`` is a function, called at each access.
    """

    @property
    def json_file(self) -> str:
        return self.paths()[0]

    @property
    def image_root(self) -> str:
        return self.paths()[1]


class CocoLoader:
    """
    What ``DatasetCatalog.get`` calls for a data set whose metadata have ``json_file`` and
    ``image_root``.
    """

    def __init__(self, name: str):
        self.name = name
        self._kept: list[dict] | None = None
        self._state: tuple | None = None

    def __call__(self) -> list[dict]:
        """
        Detectron2's dataset dicts, for the caller to change.

        Raises:
            UserError: see :func:`load_coco_format`.
        """
        kept, self._kept = self._kept, None
        return kept if kept is not None and self._state == self._file_state() else self.load()

    def load(self) -> list[dict]:
        metadata = MetadataCatalog.get(self.name)
        return load_coco_format(metadata.json_file, metadata.image_root, self.name)

    def check(self) -> list[dict]:
        """
        Load the data set ahead of its use: the next call hands over what this one has loaded, and
        parses the file again only if it has changed.

        Returns:
            the dataset dicts, to look at alone.
        """
        dicts = self()
        self._kept, self._state = dicts, self._file_state()
        return dicts

    def _file_state(self) -> tuple | None:
        """Another one after a change of the annotation file; None where it is gone."""
        json_file = MetadataCatalog.get(self.name).json_file
        if not os.path.isfile(json_file):
            return None
        stat = os.stat(json_file)
        return json_file, stat.st_mtime_ns, stat.st_size


def _path(path: str) -> str:
    return os.path.normpath(os.path.expanduser(path))


# -- loading ---------------------------------------------------------------------------------------


def load_coco_format(json_file: str, image_root: str, name: str) -> list[dict]:
    """
    Check an annotation file and load it with Detectron2's ``load_coco_json``, without the boxes
    that cannot be used. One log line has all the counts. For a file with nothing wrong the result
    is that of ``load_coco_json``.

    An image file that is missing is counted and stays in the result: training skips it
    (:class:`cbbl_d2.data.broken_images.SkipBrokenImages`), and
    :func:`cbbl_d2.data.dataset_checks.check_datasets` refuses to evaluate without it.

    Args:
        json_file: annotations in COCO's format for instances. Category ids can be any integers.
        image_root: the folder of the images.
        name: of the data set; ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` of its
            metadata are set.

    Returns:
        Detectron2's dataset dicts, one for each image.

    Raises:
        UserError: the file cannot be read or is malformed, it has no image or no box that can be
            used, or none of its images exists; or its images have 16 bits, see
            :func:`cbbl_d2.data.broken_images.check_depth`.
    """
    content = read_coco_json(json_file)
    faults = find_faults(content)
    check_boxes(content, faults, json_file)
    _check_same_classes_as_before(name, content, json_file)
    images = {image["id"]: image for image in content["images"]}
    # load_coco_json leaves a box out whose segmentation it cannot use: only masks need one.
    usable = [
        {**a, "segmentation": usable_mask(a, images[a["image_id"]])}
        for a in content["annotations"]
        if a["id"] not in faults
    ]
    with reading_parsed({**content, "annotations": usable}):
        dicts = load_coco_json(json_file, image_root, name)

    missing = missing_images(dicts)
    check_some_exist(missing, len(dicts), image_root, json_file)
    check_depth(dicts)
    other_format = describe_other_format(content, faults)
    if other_format:
        logger.warning(f"{json_file}: {other_format}")
    _log_counts(name, content, faults, dicts, missing)
    return dicts


def read_coco_json(json_file: str) -> dict:
    """
    Returns:
        the content of an annotation file, of a sound structure.

    Raises:
        UserError: it cannot be read or is malformed.
    """
    content = read_annotation_json(json_file)
    check_structure(content, json_file)
    return content


def read_annotation_json(json_file: str) -> Any:
    """
    The content of a JSON file, whatever it is.

    Raises:
        UserError: it cannot be read or is no JSON.
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError as e:
        raise UserError(f"{json_file}: no such annotation file: correct the path") from e
    except json.JSONDecodeError as e:
        # Detectron2 and pycocotools, which may read it after us, cannot take a byte order mark.
        cure = (
            "save it without a byte order mark" if "BOM" in e.msg else "correct or export it again"
        )
        raise UserError(f"{json_file}: {explain_json_error(e)}: {cure}") from e
    except UnicodeDecodeError as e:
        raise UserError(
            f"{json_file}: not a text file in UTF-8: give the COCO JSON file, not an archive"
        ) from e
    except RecursionError as e:
        raise UserError(f"{json_file}: nested too deeply for a COCO file") from e
    except OSError as e:
        raise UserError(f"{json_file}: cannot be read ({e.strerror or e})") from e


def _check_same_classes_as_before(name: str, content: dict, json_file: str) -> None:
    """Metadata can be set once; Detectron2's own message on a second value is an assertion."""
    present = MetadataCatalog.get(name).get("thing_classes")
    classes = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    if present is not None and list(present) != classes:
        raise UserError(
            f"{json_file}: its classes ({listed(classes)}) are not those that data set {name} is "
            f"known by ({listed(present)}): register it under another name"
        )


def _log_counts(
    name: str, content: dict, faults: dict[int, str], dicts: list[dict], missing: list[str]
) -> None:
    annotations = [a for d in dicts for a in d["annotations"]]
    num_crowds = sum(a.get("iscrowd", 0) for a in annotations)
    num_clipped = count_over_the_edge(content, faults)

    message = f"{name}: {len(dicts)} images, {len(annotations) - num_crowds} boxes"
    if num_crowds:
        message += f" and {count(num_crowds, 'crowd', 'crowds')}"
    if faults:
        message += f"; dropped {count(len(faults), 'box', 'boxes')}: {describe_faults(faults)}"
    if missing:
        num = count(len(missing), "image file is", "image files are")
        message += f"; {num} missing and will be skipped, the first is {missing[0]}"
    if num_clipped:
        num = count(num_clipped, "box reaches", "boxes reach")
        message += f"; {num} over the edge of the image and will be clipped"
    logger.log(logging.WARNING if faults or missing else logging.INFO, message)
