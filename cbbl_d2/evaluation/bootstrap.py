"""How much AP owes to the images that happen to be in a data set: AP of resampled images."""

import contextlib
import copy
import io
from typing import Dict, List, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .report import average_precision
from .rules import VERY_SMALL_AREA

NUM_RESAMPLES = 200
_AREAS = {"all": [0, 1e10], "very small": [0, VERY_SMALL_AREA], "small": [0, 32**2]}
# Name -> area range and IoU; None: the mean over COCO's ten
_METRICS = {
    "bbox/AP": ("all", None),
    "bbox/AP50": ("all", 0.5),
    "bbox/AP75": ("all", 0.75),
    "bbox/APvs": ("very small", None),
    "bbox/APs": ("small", None),
}


def bootstrap_ap(
    truth: COCO,
    detections: Sequence[dict],
    *,
    max_detections: int = 100,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Dict[str, np.ndarray]:
    """
    COCO's AP of boxes on resamples of the images. Images are drawn with replacement; those of one
    sequence, the ``"sequence"`` of their entries in the COCO file, come together, as neighboring
    frames are no independent samples. The same images are drawn for every detector, so that
    differences can be taken resample by resample.

    Args:
        truth: the data set.
        detections: as in ``coco_instances_results.json``.
        max_detections: the best so many of an image and class count.
        seed: of the resampling.

    Returns:
        for AP, AP50, AP75, APvs and APs, each named "bbox/...", shape ``(num_resamples,)``, in
        percent; NaN where a resample has no object of the size.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes(list(detections)) if detections else _without_detections(truth)
        coco_eval = COCOeval(truth, found, "bbox")
        coco_eval.params.areaRng = list(_AREAS.values())
        coco_eval.params.areaRngLbl = list(_AREAS)
        coco_eval.params.maxDets = [max_detections]
        coco_eval.evaluate()
    params = coco_eval.params
    # evaluate() has matched each image by itself: a resample only counts the matches anew.
    matches = np.array(coco_eval.evalImgs, dtype=object).reshape(
        len(params.catIds), len(_AREAS), len(params.imgIds)
    )
    groups = image_groups(truth, params.imgIds)
    rng = np.random.default_rng(seed)
    thresholds = np.round(params.iouThrs, 2).tolist()
    values = {name: np.full(num_resamples, np.nan) for name in _METRICS}
    for i in range(num_resamples):
        drawn = np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])
        coco_eval.evalImgs = list(matches[:, :, drawn].reshape(-1))
        # Numbers instead of ids, which would be taken for the same image when drawn twice.
        params.imgIds = list(range(len(drawn)))
        coco_eval._paramsEval = copy.deepcopy(params)
        with contextlib.redirect_stdout(io.StringIO()):
            coco_eval.accumulate()
        precision = coco_eval.eval["precision"][..., -1]
        for name, (area, iou) in _METRICS.items():
            of_iou = slice(None) if iou is None else thresholds.index(iou)
            of_area = list(_AREAS).index(area)
            values[name][i] = average_precision(precision[of_iou, ..., of_area])
    return values


def image_groups(truth: COCO, images: Sequence[int]) -> List[np.ndarray]:
    """Positions in ``images`` of those that belong together: of one sequence, or one image each."""
    by_sequence: Dict[object, List[int]] = {}
    for position, image_id in enumerate(images):
        key = truth.imgs[image_id].get("sequence", ("image", image_id))
        by_sequence.setdefault(key, []).append(position)
    return [np.array(positions) for positions in by_sequence.values()]


def _without_detections(truth: COCO) -> COCO:
    """pycocotools cannot load an empty list."""
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty
