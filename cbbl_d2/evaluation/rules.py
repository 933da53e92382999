"""
What is counted in an evaluation: the columns of AP, the rules of a benchmark, and which boxes of an
annotation file are its ground truth. Data sets state their rules, evaluators follow them: this
module imports neither.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Collection
from typing import Any

from pycocotools.coco import COCO

# APvs counts the objects of at most this area, in square pixels of the original image. COCO's APs
# reaches up to 32^2, and objects between 16 and 32 pixels can hide what happens below. AI-TOD draws
# its line for "tiny" at 16 pixels as well, where a shift by one pixel already costs 0.12 of IoU.
VERY_SMALL_AREA = 16**2

# Of every table, in this order.
AP_COLUMNS = ("AP", "AP50", "AP75", "APvs", "APs", "APm", "APl")


@dataclasses.dataclass(frozen=True)
class SizeMetric:
    """One more AP, of the objects of some sizes."""

    name: str
    """Key of the results, for example "APvt"."""
    min_area: float
    max_area: float
    """Square pixels of the original image; both ends belong to the range, as in COCO's metric."""
    iou: float | None = None
    """The IoU that a match needs; None: the mean over COCO's .50, .55 ... .95."""


@dataclasses.dataclass(frozen=True)
class EvaluationRules:
    """
    Where a benchmark differs from COCO's metric. Stands in the metadata of a data set as
    ``evaluation_rules`` and is read by :class:`cbbl_d2.evaluation.SmallObjectCOCOEvaluator`.
    """

    size_metrics: tuple[SizeMetric, ...] = ()
    """Added to the results; one whose name COCO has, too (APs), takes its place."""
    max_detections: int | None = None
    """The best so many detections of an image and class count. None: as for any data set."""
    max_detections_of_image: int | None = None
    """The best so many detections of an image count, all classes together. None: no limit."""
    ignored_region_share: float | None = None
    """Detections with at least this share of their area in the union of the ``ignored_regions`` of
    their image (boxes in its entry of the COCO file) are dropped before anything is counted."""
    ignores_by_coverage: bool = False
    """In ``size_metrics`` a detection that lies in an object of another size is ignored, as is one
    in an ignored box; for COCO's metric it would have to match that object."""


def clean_ground_truth(coco: COCO, faults: Collection[Any]) -> int:
    """
    Make the ground truth of an evaluator agree with what training sees, in place and in memory.

    * Boxes with faults are dropped.
    * Where ``area`` is missing or no number > 0, it becomes width x height. COCO's metric needs it
      to tell small objects from large ones, and would count an area of NaN in every range.
    * Where ``iscrowd`` is missing, it becomes 0, as in training.
    * An annotation id of 0 becomes a free one: COCO's metric takes the id 0 for "no match" and
      counts a correct detection of that object as false.

    Args:
        coco: of a sound structure; for Detectron2's ``COCOEvaluator`` its ``_coco_api``.
        faults: ids of the annotations that cannot be used.

    Returns:
        number of areas that were replaced.
    """
    content = coco.dataset
    free_id = max((a["id"] for a in content["annotations"]), default=0) + 1
    content["annotations"] = [a for a in content["annotations"] if a["id"] not in faults]
    num_areas = 0
    for annotation in content["annotations"]:
        area = annotation.get("area")
        if isinstance(area, bool) or not isinstance(area, (int, float)) or not 0 < area < math.inf:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            num_areas += 1
        annotation.setdefault("iscrowd", 0)
        if annotation["id"] == 0:
            annotation["id"] = free_id
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return num_areas
