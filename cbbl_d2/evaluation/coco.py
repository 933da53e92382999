"""COCO box metrics with one more number, the AP of very small objects."""

import contextlib
import io
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import create_small_table

from cbbl_d2.data.coco_format import clean_ground_truth

# APvs counts the objects of at most this area, in square pixels of the original image. COCO's APs
# reaches up to 32^2, and objects between 16 and 32 pixels can hide what happens below. AI-TOD draws
# its line for "tiny" at 16 pixels as well, where a shift by one pixel already costs 0.12 of IoU.
VERY_SMALL_AREA = 16**2

_COLUMNS = ("AP", "AP50", "AP75", "APvs", "APs", "APm", "APl")


class SmallObjectCOCOEvaluator(COCOEvaluator):
    """
    :class:`COCOEvaluator` whose box results also hold ``APvs``: AP over IoU .50:.95, in percent, of
    the objects whose annotated ``area`` is at most ``VERY_SMALL_AREA``.

    As with APs, larger objects and unmatched larger detections neither count for nor against.
    ``APvs`` is NaN where the data set has no such object and where there are no predictions.
    """

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type == "bbox":
            results["APvs"] = _average_precision(coco_eval, [0, VERY_SMALL_AREA])
            columns = {key: results[key] for key in _COLUMNS if key in results}
            self._logger.info(
                f"AP by size; APvs: objects of at most {VERY_SMALL_AREA} square pixels\n"
                + create_small_table(columns)
            )
        return results


def _average_precision(coco_eval, area_range) -> float:
    """AP in percent over one range of areas, on the objects and detections of ``coco_eval``."""
    if coco_eval is None:  # Detectron2's way to say that there were no predictions
        return float("nan")
    # Another pass on a new object: a fourth area range on the old one would shift what Detectron2
    # reads from it by position. Its type keeps the fast implementation where that is in use.
    again = type(coco_eval)(coco_eval.cocoGt, coco_eval.cocoDt, coco_eval.params.iouType)
    again.params.imgIds = coco_eval.params.imgIds
    again.params.maxDets = coco_eval.params.maxDets
    again.params.areaRng = [area_range]
    again.params.areaRngLbl = ["very small"]
    with contextlib.redirect_stdout(io.StringIO()):
        again.evaluate()
        again.accumulate()
    # (IoU thresholds, recall levels, classes, areas, max_dets); -1 where a class has no object.
    precision = again.eval["precision"][:, :, :, 0, -1]
    precision = precision[precision > -1]
    return float(precision.mean() * 100) if precision.size else float("nan")


def build_coco_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> SmallObjectCOCOEvaluator:
    """
    The evaluator for a data set in COCO format; runs with and without Detectron2's C++ extension.

    Args:
        cfg: ``TEST.DETECTIONS_PER_IMAGE`` is read.
        dataset_name: a registered data set. One that is made on first use is made here.
        output_folder: gets the predictions as COCO JSON; None writes none.
    """
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is not None and not os.path.isfile(json_file):
        DatasetCatalog.get(dataset_name)
    # COCO counts the best 100 detections of each class in an image. A model that is allowed more,
    # on images with hundreds of objects, would lose the rest without a word. Below 100 the model's
    # own limit acts, and the metric keeps COCO's definition.
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    evaluator = SmallObjectCOCOEvaluator(
        dataset_name,
        output_dir=output_folder,
        max_dets_per_image=limit if limit > 100 else None,
        use_fast_impl=_has_fast_evaluation(),
    )
    # The same boxes as in training: without those that cannot be used.
    clean_ground_truth(dataset_name, evaluator._coco_api)
    return evaluator


def _has_fast_evaluation() -> bool:
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "InstanceAnnotation")
