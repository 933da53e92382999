"""Evaluating predictions of images that were cut into slices, and put together again."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .coco import SmallObjectCOCOEvaluator, build_coco_evaluator

# More than any image has: the metric then counts every detection.
_ALL_DETECTIONS = 10**6


def build_prediction_evaluator(
    cfg: CfgNode, dataset: str, folder: str, sliced: bool = False
) -> SmallObjectCOCOEvaluator:
    """
    The evaluator of ``train_net.py`` for predictions on whole images, ready to be fed.

    Args:
        dataset: name of a registered data set.
        folder: for the annotations of a data set that is not in COCO format, in that format.
        sliced: each slice has the model's limit, and an image any number of slices: count all the
            objects that are given.

    Raises:
        ConfigError, UserError: see :func:`build_coco_evaluator`.
    """
    if sliced:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.DETECTIONS_PER_IMAGE = _ALL_DETECTIONS
    has_file = MetadataCatalog.get(dataset).get("json_file", None) is not None
    evaluator = build_coco_evaluator(cfg, dataset, None if has_file else folder)
    evaluator.reset()
    return evaluator
