"""Metrics."""

from cbbl_d2.evaluation.coco import (
    SmallObjectCOCOEvaluator,
    build_coco_evaluator,
    check_keypoint_sigmas,
)
from cbbl_d2.evaluation.rules import VERY_SMALL_AREA, EvaluationRules, SizeMetric

__all__ = [
    "VERY_SMALL_AREA",
    "EvaluationRules",
    "SizeMetric",
    "SmallObjectCOCOEvaluator",
    "build_coco_evaluator",
    "check_keypoint_sigmas",
]
