"""
Do the data sets of a config exist, and do they fit the model? Asked before time goes into building
a model. What a data set holds is checked where it is loaded, for a user's own in
:mod:`cbbl_d2.data.coco_format`.
"""

import difflib
import functools
import itertools
import json
import logging
import os

from cbbl_d2.architectures import detection_node
from cbbl_d2.data.broken_images import missing_images
from cbbl_d2.data.coco_format import is_coco_format, register_from_config
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.messages import count, explain_json_error, listed
from cbbl_d2.plain_pickle import check_pickle
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

__all__ = [
    "check_datasets",
    "check_num_classes",
    "check_proposals",
    "check_registered",
    "describe_classes",
    "load_dataset",
    "set_num_classes",
    "with_num_classes",
]

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """
    Check that the data sets of a config exist and fit the model, before time goes into building it.
    All but Detectron2's own training sets are loaded for it, see
    :meth:`cbbl_d2.data.coco_format.CocoLoader.check`.

    Args:
        cfg: ``DATASETS.TRAIN``, ``DATASETS.TEST``, ``MODEL.MASK_ON``, ``MODEL.KEYPOINT_ON`` and the
            number of classes, after :func:`set_num_classes`, are read.
        eval_only: leave ``DATASETS.TRAIN`` alone: its files need not be on this machine.

    Raises:
        ConfigError: an unknown data set, no data set to train or evaluate on, or see
            :func:`check_num_classes`.
        UserError: files are missing or malformed.
    """
    if not eval_only and len(cfg.DATASETS.TRAIN) == 0:
        raise ConfigError("DATASETS.TRAIN is empty: name a data set to train on")
    if eval_only and len(cfg.DATASETS.TEST) == 0:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    check_proposals(cfg)
    for name in _used_datasets(cfg, eval_only):
        dicts = _check_files(name, needs_all_images=name in cfg.DATASETS.TEST)
        _check_heads(cfg, name, dicts)
        if name in cfg.DATASETS.TEST:
            warn_of_many_objects(cfg, name, dicts)
            _check_has_objects(cfg, name, dicts)
    check_num_classes(cfg, eval_only)


def warn_of_many_objects(cfg: CfgNode, name: str, dicts: list[dict]) -> None:
    """
    Log a warning where an image has more objects than a detector may find.

    Args:
        cfg: ``TEST.DETECTIONS_PER_IMAGE`` is read.
        dicts: Detectron2's dataset dicts.
    """
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    numbers = [sum(not a.get("iscrowd", 0) for a in d.get("annotations", ())) for d in dicts]
    above = sum(number > limit for number in numbers)
    if limit >= 0 and above:
        logger.warning(
            f"data set {name}: {count(above, 'image has', 'images have')} more objects (up to "
            f"{max(numbers)}) than TEST.DETECTIONS_PER_IMAGE {limit} lets a detector find: raise it"
        )


def set_num_classes(cfg: CfgNode, eval_only: bool = False) -> None:
    """
    Where the number of classes of the model is 0, "from the data", put that of the data sets in its
    place; any other number is left alone. Nothing else in a config says it was not given: the
    default is COCO's 80, as good a number as any.

    Args:
        cfg: changed in place: ``MODEL.ROI_HEADS.NUM_CLASSES``, or that of RetinaNet or FCOS.
        eval_only: ask ``DATASETS.TEST`` alone, where it names any.

    Raises:
        ConfigError: it is 0, and no data set says its classes.
        UserError: a data set cannot be read.
    """
    node = detection_node(cfg)
    if node is None or cfg.MODEL[node].NUM_CLASSES != 0:
        return
    key = f"MODEL.{node}.NUM_CLASSES"
    names = _used_datasets(cfg, eval_only and len(cfg.DATASETS.TEST) > 0)
    for name in names:
        if MetadataCatalog.get(name).get("thing_classes") is None:
            load_dataset(name, used_again=True)  # loaders of COCO files set them
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes:
            cfg.MODEL[node].NUM_CLASSES = len(classes)
            logger.info(f"{key} 0: {len(classes)}, from data set {name} ({listed(classes)})")
            return
    raise ConfigError(
        f"{key} = 0 stands for the number of classes of the data, but "
        + (
            f"{listed(names)} does not name its classes"
            if names
            else "DATASETS.TRAIN and DATASETS.TEST are empty"
        )
        + f": {'' if names else 'name a data set, or '}set {key} to a number"
    )


def with_num_classes(cfg: CfgNode, eval_only: bool = False) -> CfgNode:
    """
    For use from Python: a config whose number of classes may be 0, and whose data sets may not be
    registered yet.

    Returns:
        a copy, where a number of classes of 0 has become that of :func:`set_num_classes`.
    """
    register_from_config(cfg)
    known = cfg.clone()
    known.defrost()
    set_num_classes(known, eval_only)
    if cfg.is_frozen():
        known.freeze()
    return known


def describe_classes(cfg: CfgNode) -> str:
    """
    One line for the log: the number of classes, their names, and the first data set that names
    them; "" where there is none, or for a model without classes.
    """
    node = detection_node(cfg)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if node is not None else ()
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes") or ()
        # An evaluation does not read the training data: it may have other classes.
        if classes and len(classes) == cfg.MODEL[node].NUM_CLASSES:
            return (
                f"MODEL.{node}.NUM_CLASSES {len(classes)}: the classes of data set {name} "
                f"({listed(classes)})"
            )
    return ""


def check_num_classes(cfg: CfgNode, eval_only: bool = False) -> None:
    """
    Compare the classes of the data sets with the model's number of classes and with each other.
    Either mismatch would train or measure the wrong classes, often without an error.

    Raises:
        ConfigError: the numbers differ, the names or their order differ, or a name is unknown.
    """
    node = detection_node(cfg)
    classes_of = {}
    for name in _used_datasets(cfg, eval_only):
        if is_coco_format(name) and MetadataCatalog.get(name).get("thing_classes") is None:
            load_dataset(name, used_again=True)  # sets them
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None:  # None: a data set of another kind
            classes_of[name] = list(classes)
    for (first, classes), (name, others) in itertools.pairwise(classes_of.items()):
        if classes != others:
            raise ConfigError(
                f"data sets {first} and {name} have different classes, or in another order: "
                f"({listed(classes)}) and ({listed(others)}): give their annotation files the same "
                "categories"
            )
    for name, classes in classes_of.items():
        if node is not None and cfg.MODEL[node].NUM_CLASSES != len(classes):
            key = f"MODEL.{node}.NUM_CLASSES"
            raise ConfigError(
                f"{key} = {cfg.MODEL[node].NUM_CLASSES}, but data set {name} has "
                f"{count(len(classes), 'class', 'classes')} ({listed(classes)}): "
                f"set {key} {len(classes)}, or 0 to take it from the data"
            )


def check_proposals(cfg: CfgNode) -> None:
    """
    Precomputed proposals are pickle files: look that they run no code.

    Args:
        cfg: ``MODEL.LOAD_PROPOSALS`` and ``DATASETS.PROPOSAL_FILES_*`` are read.

    Raises:
        UserError: a file holds more than arrays and plain values, or cannot be read.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for path in dict.fromkeys(
        (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST)
    ):
        try:
            file = PathManager.get_local_path(path)
            stat = os.stat(file)
            _check_proposal_file(file, stat.st_mtime_ns, stat.st_size)
        except OSError as e:
            raise UserError(
                f"{path}: proposals cannot be read ({e.strerror or e}): correct "
                "DATASETS.PROPOSAL_FILES_TRAIN or PROPOSAL_FILES_TEST"
            ) from e


@functools.lru_cache
def _check_proposal_file(file: str, _mtime: int, _size: int) -> None:
    """Once for each state of a file: it is asked before every training and evaluation."""
    check_pickle(file)


def check_registered(name: str, where: str) -> None:
    """
    Args:
        where: the config key or option that names the data set, for the message.

    Raises:
        ConfigError: no data set of this name is registered.
    """
    if name in DatasetCatalog:
        return
    near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    raise ConfigError(
        f"{where}: unknown data set {name}"
        + (f" (did you mean {' or '.join(near)}?)" if near else "")
        + "; data sets of your own are named in DATASETS.COCO_FORMAT"
    )


def load_dataset(name: str, used_again: bool = False) -> list[dict]:
    """
    Detectron2's dataset dicts of a registered data set.

    Args:
        used_again: they are only to be looked at, and Detectron2 loads the data set afterwards,
            for which it need not be parsed a second time.

    Raises:
        UserError: its files are missing or malformed, or it has no images.
    """
    json_file = MetadataCatalog.get(name).get("json_file")
    try:
        if used_again and is_coco_format(name):
            return DatasetCatalog[name].check()
        dicts = DatasetCatalog.get(name)
    except FileNotFoundError as e:
        raise _not_there(name, e.filename or json_file) from e
    except json.JSONDecodeError as e:
        raise UserError(f"{json_file}: {explain_json_error(e)}: fetch or write it again") from e
    if isinstance(dicts, list) and not dicts:
        raise UserError(f"data set {name} has no images: choose another one")
    return dicts


def _used_datasets(cfg: CfgNode, eval_only: bool) -> list[str]:
    """The data sets of a config without repetition, checked to be registered."""
    names = []
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            check_registered(name, f"DATASETS.{key}")
            if name not in names:
                names.append(name)
    return names


def _check_heads(cfg: CfgNode, name: str, dicts: list[dict]) -> None:
    """Masks and keypoints that the model is to predict have to be in the data."""
    objects = [
        (record, a)
        for record in dicts
        for a in record.get("annotations", ())
        if not a.get("iscrowd", 0)
    ]
    for key, field in (("MASK_ON", "segmentation"), ("KEYPOINT_ON", "keypoints")):
        without = [record for record, a in objects if field not in a]
        if not cfg.MODEL[key] or not without:
            continue
        if len(without) == len(objects) or field == "keypoints":
            some = "its annotations" if len(without) == len(objects) else f"{len(without)} boxes"
            raise UserError(
                f"data set {name}: {some} have no {field}, which MODEL.{key} True needs: set "
                f"MODEL.{key} False, or add them{_examples(without)}"
            )
        logger.warning(
            f"data set {name}: {len(without)} of {len(objects)} boxes have no mask and are left "
            f"out of training and evaluation{_examples(without)}: set MODEL.MASK_ON False to use "
            "their boxes, or add the masks"
        )
    coded = [record for record, a in objects if isinstance(a.get("segmentation"), dict)]
    is_training = name in cfg.DATASETS.TRAIN
    has_loss = is_training or cfg.TEST.get("LOSS", False)
    if cfg.MODEL.MASK_ON and has_loss and coded and cfg.INPUT.MASK_FORMAT == "polygon":
        raise ConfigError(
            f"data set {name}: {count(len(coded), 'mask is', 'masks are')} run-length codes"
            f"{_examples(coded)}, which INPUT.MASK_FORMAT polygon cannot read: set "
            "INPUT.MASK_FORMAT bitmask"
        )
    if cfg.MODEL.KEYPOINT_ON and is_training:
        metadata = MetadataCatalog.get(name)
        if metadata.get("keypoint_names") is None or metadata.get("keypoint_flip_map") is None:
            raise UserError(
                f"data set {name}: lacks the names of its keypoints: set keypoint_names and "
                f"keypoint_flip_map of MetadataCatalog.get({name!r}), as Detectron2 needs them"
            )


def _check_has_objects(cfg: CfgNode, name: str, dicts: list[dict]) -> None:
    """A loss on validation data needs some."""
    annotations = (a for record in dicts for a in record.get("annotations", ()))
    has_loss = cfg.TEST.get("LOSS", False)  # absent without this project's config keys
    if has_loss and dicts and all(a.get("iscrowd", 0) for a in annotations):
        raise ConfigError(
            f"TEST.LOSS = True: data set {name} has no annotated object: set TEST.LOSS False"
        )


def _examples(records: list[dict]) -> str:
    ids = dict.fromkeys(record["image_id"] for record in records if "image_id" in record)
    return f" (image ids {listed(ids)})" if ids else ""


def _check_files(name: str, needs_all_images: bool) -> list[dict]:
    """The dataset dicts, where it had to load them; else []."""
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not needs_all_images and not is_coco_format(name) and os.path.isfile(json_file or ""):
        # Loading the training set of COCO takes half a minute. Its files are known to be sound.
        if image_root and not os.path.isdir(image_root):
            raise _not_there(name, image_root)
        return []
    dicts = load_dataset(name, used_again=True)
    if not isinstance(dicts, list):  # Detectron2 allows a torch Dataset, too
        return []
    missing = missing_images(dicts) if needs_all_images else []
    if missing:
        raise UserError(
            f"data set {name}: {len(missing)} of its {len(dicts)} images are missing, the first is "
            f"{missing[0]}: an evaluation without them would not be one on {name}; restore the "
            "files" + (f" or take them out of {json_file}" if json_file else "")
        )
    return dicts


def _not_there(name: str, path: str | None) -> UserError:
    return UserError(
        f"data set {name}: {path} does not exist: put the data set there, or set the environment "
        "variable DETECTRON2_DATASETS to the folder that holds it"
    )
