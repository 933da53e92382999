"""Metrics."""

from cbbl_d2.evaluation.coco import (
    VERY_SMALL_AREA,
    SmallObjectCOCOEvaluator,
    build_coco_evaluator,
    check_keypoint_sigmas,
)

__all__ = [
    "VERY_SMALL_AREA",
    "SmallObjectCOCOEvaluator",
    "build_coco_evaluator",
    "check_keypoint_sigmas",
]
