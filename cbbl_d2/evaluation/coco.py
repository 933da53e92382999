"""
COCO metrics of boxes, masks and keypoints, with one more number for boxes, the AP of very small
objects, and with what the benchmarks of public data sets count.
"""

import contextlib
import io
import logging
import os

import numpy as np
from cbbl_d2.compat import has_fast_evaluation
from cbbl_d2.data.coco_format import is_coco_format
from cbbl_d2.data.coco_validation import (
    check_structure,
    describe_faults,
    describe_odd_areas,
    find_faults,
    usable_mask,
)
from cbbl_d2.data.ignored_regions import covered_share
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.messages import count, short
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO

from .report import average_precision, count_objects, write_per_class, write_pr_curves
from .rules import (
    AP_COLUMNS,
    VERY_SMALL_AREA,
    EvaluationRules,
    SizeMetric,
    clean_ground_truth,
)

_VERY_SMALL = SizeMetric("APvs", 0, VERY_SMALL_AREA)

# The points of a person: what COCO's own sigmas, which an empty TEST.KEYPOINT_OKS_SIGMAS stands
# for, belong to.
_NUM_COCO_KEYPOINTS = 17

_COCO_RULES = EvaluationRules()
logger = logging.getLogger(__name__)


class SmallObjectCOCOEvaluator(COCOEvaluator):
    """
    :class:`COCOEvaluator` whose box results also hold ``APvs``: AP over IoU .50:.95, in percent, of
    the objects whose annotated ``area`` is at most ``VERY_SMALL_AREA``.

    As with APs, larger objects and unmatched larger detections neither count for nor against.
    ``APvs`` is NaN where the data set has no such object and where there are no predictions.

    Where a benchmark has sizes and rules of its own (:class:`EvaluationRules`), its numbers are
    added. One with the name of a number of COCO (APs, APm) takes its place: the log says which.

    Masks and keypoints are evaluated where the predictions hold them, as Detectron2 does, and
    where there is no prediction at all with the metrics NaN, as for boxes.

    ``coco_instances_results.json`` has the field ``pred_boxes_std`` of detections, too.

    With an ``output_dir`` each evaluation leaves ``{data set}_per_class.csv`` and
    ``{data set}_pr_curves.png`` there, in place of those of the evaluation before.
    """

    def __init__(
        self, *args, expected_tasks=("bbox",), rules: EvaluationRules = _COCO_RULES, **kwargs
    ):
        """
        Args:
            expected_tasks: what the model predicts, of "bbox", "segm" and "keypoints"; asked for
                where nothing was predicted. The other arguments are those of
                :class:`COCOEvaluator`.
            rules: of the benchmark; ``max_detections`` is not read here, it is
                ``max_dets_per_image`` of COCO's metric, which counts each class apart.
        """
        super().__init__(*args, **kwargs)
        self._expected_tasks = sorted(expected_tasks)
        self._rules = rules

    @property
    def ground_truth(self) -> COCO:
        """What predictions are compared with, without the boxes that do not count."""
        return self._coco_api

    def process(self, inputs, outputs):
        first = len(self._predictions)
        super().process(inputs, outputs)
        kept = [x for x in outputs if "instances" in x or "proposals" in x]
        for prediction, output in zip(self._predictions[first:], kept, strict=True):
            instances = output.get("instances")
            if instances is not None and instances.has("pred_boxes_std"):
                rows = instances.pred_boxes_std.tolist()
                for detection, row in zip(prediction["instances"], rows, strict=True):
                    detection["pred_boxes_std"] = row

    def _tasks_from_predictions(self, predictions):
        return super()._tasks_from_predictions(predictions) if predictions else self._expected_tasks

    def _eval_predictions(self, predictions, *args, **kwargs):
        share = self._rules.ignored_region_share
        if share is not None:
            predictions = _outside_ignored_regions(predictions, self._coco_api.imgs, share)
        limit = self._rules.max_detections_of_image
        if limit is not None:
            predictions = [
                dict(p, instances=_best(p["instances"], limit)) if "instances" in p else p
                for p in predictions
            ]
        super()._eval_predictions(predictions, *args, **kwargs)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type != "bbox":
            return results
        metrics, by_coverage = self._rules.size_metrics, self._rules.ignores_by_coverage
        precisions = {"APvs": _precision(coco_eval, _VERY_SMALL)}
        precisions.update({m.name: _precision(coco_eval, m, by_coverage) for m in metrics})
        results.update({name: average_precision(p) for name, p in precisions.items()})
        names = AP_COLUMNS if not metrics else (*AP_COLUMNS[:4], *(m.name for m in metrics))
        columns = {name: results[name] for name in names if name in results}
        caption = f"AP by size; APvs: objects of at most {VERY_SMALL_AREA} square pixels"
        if metrics:
            caption += "".join(f"; {metric.name}: {_describe(metric)}" for metric in metrics)
            caption += " (the benchmark's, not COCO's of the table above)"
        self._logger.info(f"{caption}\n{create_small_table(columns)}")
        if self._output_dir:
            try:
                self._write_report(coco_eval, precisions)
            except OSError as e:  # the numbers are there, and a training may wait for them
                self._logger.warning(f"no report in {self._output_dir}: {e}")
        return results

    def _write_report(self, coco_eval, by_size: dict[str, np.ndarray]) -> None:
        """
        Only the main process comes here.

        Args:
            by_size: name of an AP -> precision (IoU thresholds, recall levels, classes).
        """
        name = self._metadata.name
        table, curves = (
            os.path.join(self._output_dir, f"{name.replace(os.sep, '_')}_{what}")
            for what in ("per_class.csv", "pr_curves.png")
        )
        truth = self._coco_api
        ids = sorted(truth.getCatIds())  # as COCO's metric orders the classes
        classes = [category["name"] for category in truth.loadCats(ids)]
        images = truth.getImgIds() if coco_eval is None else list(coco_eval.params.imgIds)
        counts = {}
        for column, area in (("objects", np.inf), ("very small objects", VERY_SMALL_AREA)):
            numbers = count_objects(truth, images, area)
            counts[column] = [numbers[i] for i in ids]
        if coco_eval is None:
            write_per_class(table, classes, counts, None)
            with contextlib.suppress(FileNotFoundError):
                os.remove(curves)  # those of an earlier evaluation
            return
        precision = coco_eval.eval["precision"][..., -1]
        thresholds = np.round(coco_eval.params.iouThrs, 2).tolist()
        areas = dict(zip(coco_eval.params.areaRngLbl, np.moveaxis(precision, -1, 0)))
        half, three_quarters = thresholds.index(0.5), thresholds.index(0.75)
        columns = {
            "AP": areas["all"],
            "AP50": areas["all"][[half]],
            "AP75": areas["all"][[three_quarters]],
            "APs": areas["small"],
            "APm": areas["medium"],
            "APl": areas["large"],
            **by_size,  # of the benchmark, where it has others
        }
        ordered = {n: columns[n] for n in (*AP_COLUMNS, *by_size) if n in columns}
        write_per_class(table, classes, counts, ordered)
        very_small = f"at most {VERY_SMALL_AREA**0.5:g} px"
        write_pr_curves(
            curves,
            name,
            classes,
            {f"IoU {t:g}": areas["all"][thresholds.index(t)] for t in (0.5, 0.75, 0.9)},
            {
                very_small: by_size["APvs"][half],
                **{label: areas[label][half] for label in ("small", "medium", "large")},
            },
        )


def _best(instances: list[dict], number: int) -> list[dict]:
    return sorted(instances, key=lambda x: x["score"], reverse=True)[:number]


def _describe(metric: SizeMetric) -> str:
    low, high = metric.min_area**0.5, metric.max_area**0.5
    size = f"{low:g} to {high:g} px" if high < 1e4 else f"from {low:g} px"
    return size if metric.iou is None else f"{size}, IoU {metric.iou:g}"


def _precision(coco_eval, metric: SizeMetric, by_coverage: bool = False) -> np.ndarray:
    """
    Precision (IoU thresholds, recall levels, classes) on the objects and detections of
    ``coco_eval``; -1 where a class has no object of the size. Empty where it is None, Detectron2's
    way to say that there were no predictions.

    Args:
        by_coverage: a detection is also ignored where it lies in an object of another size, see
            ``EvaluationRules.ignores_by_coverage``.
    """
    if coco_eval is None:
        return np.empty((0, 0, 0))
    truth = coco_eval.cocoGt
    if by_coverage:
        truth = _others_as_crowds(truth, metric)
    # Another pass on a new object: a fourth area range on the old one would shift what Detectron2
    # reads from it by position. Its type keeps the fast implementation where that is in use.
    again = type(coco_eval)(truth, coco_eval.cocoDt, coco_eval.params.iouType)
    again.params.imgIds = coco_eval.params.imgIds
    again.params.maxDets = coco_eval.params.maxDets
    again.params.areaRng = [[metric.min_area, metric.max_area]]
    again.params.areaRngLbl = [metric.name]
    if metric.iou is not None:
        again.params.iouThrs = np.array([metric.iou])
    with contextlib.redirect_stdout(io.StringIO()):
        again.evaluate()
        again.accumulate()
    # (IoU thresholds, recall levels, classes, areas, max_dets)
    return again.eval["precision"][:, :, :, 0, -1]


def _others_as_crowds(truth: COCO, metric: SizeMetric) -> COCO:
    """
    The ground truth in which objects of other sizes are crowds. COCO's metric ignores them in any
    case, but a crowd is matched by the share of a detection that lies in it, and more than once.
    """
    changed = COCO()
    changed.dataset = dict(
        truth.dataset,
        annotations=[
            a if metric.min_area <= a["area"] <= metric.max_area else dict(a, iscrowd=1)
            for a in truth.dataset["annotations"]
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        changed.createIndex()
    return changed


def _outside_ignored_regions(predictions: list[dict], images: dict, share: float) -> list[dict]:
    """
    The predictions without detections that lie in the ignored regions of their image.

    Args:
        predictions: as :class:`COCOEvaluator` collects them.
        images: id -> entry of the COCO file, with its ``ignored_regions``.
        share: of a detection's area, from which on it is dropped.
    """
    kept = []
    for prediction in predictions:
        image = images[prediction["image_id"]]
        instances, regions = prediction.get("instances", []), image.get("ignored_regions", [])
        boxes = [instance["bbox"] for instance in instances]
        shares = covered_share(boxes, regions, image["height"], image["width"])
        outside = [i for i, s in zip(instances, shares) if s < share]
        kept.append(dict(prediction, instances=outside))
    return kept


def build_coco_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> SmallObjectCOCOEvaluator:
    """
    The evaluator for a data set in COCO format; runs with and without Detectron2's C++ extension.
    The rules of a benchmark are taken from ``evaluation_rules`` in the metadata of the data set.

    Its results hold "bbox", with ``MODEL.MASK_ON`` also "segm", with ``MODEL.KEYPOINT_ON`` also
    "keypoints". For masks and keypoints, too, the sizes of APs, APm, APl are the annotated areas.

    Args:
        cfg: ``TEST.DETECTIONS_PER_IMAGE``, ``MODEL.MASK_ON``, ``MODEL.KEYPOINT_ON`` and what
            :func:`check_keypoint_sigmas` reads.
        dataset_name: a registered data set. One that is made on first use is made here.
        output_folder: gets the predictions as COCO JSON; None writes none.

    Raises:
        ConfigError: see :func:`check_keypoint_sigmas`.
        UserError: objects of the data set lack the keypoints to compare with.
    """
    check_keypoint_sigmas(cfg)
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is not None and not os.path.isfile(json_file):
        DatasetCatalog.get(dataset_name)
    # COCO counts the best 100 detections of each class in an image. A model that is allowed more,
    # on images with hundreds of objects, would lose the rest without a word. Below 100 the model's
    # own limit acts, and the metric keeps COCO's definition. (For keypoints it is 20, always.)
    rules = MetadataCatalog.get(dataset_name).get("evaluation_rules", _COCO_RULES)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    limit = limit if limit > 100 else None
    tasks = ["bbox"]
    tasks += ["segm"] if cfg.MODEL.MASK_ON else []
    tasks += ["keypoints"] if cfg.MODEL.KEYPOINT_ON else []
    evaluator = SmallObjectCOCOEvaluator(
        dataset_name,
        output_dir=output_folder,
        max_dets_per_image=rules.max_detections or limit,
        use_fast_impl=has_fast_evaluation(),
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        expected_tasks=tasks,
        rules=rules,
    )
    # The same boxes as in training: without those that cannot be used.
    prepare_ground_truth(dataset_name, evaluator._coco_api, masks=cfg.MODEL.MASK_ON)
    _check_ground_truth(cfg, dataset_name, evaluator._coco_api)
    return evaluator


def prepare_ground_truth(name: str, coco: COCO, masks: bool = False) -> None:
    """
    :func:`cbbl_d2.evaluation.rules.clean_ground_truth` for a data set, without the boxes that its
    training leaves out, where :class:`cbbl_d2.data.coco_format.CocoLoader` loads it; what was done
    is logged. The numbers on COCO itself stay the official ones.

    Args:
        coco: the ground truth, changed in place.
        masks: the model predicts masks: objects without one are left out, too.
    """
    content = coco.dataset
    if "annotations" not in content:  # a test set whose annotations are not public
        return
    faults: dict[int, str] = {}
    if is_coco_format(name):
        check_structure(content, MetadataCatalog.get(name).json_file)
        faults = find_faults(content)
        for annotation in content["annotations"]:
            if annotation.get("segmentation") and annotation["id"] not in faults:
                mask = usable_mask(annotation, coco.imgs[annotation["image_id"]])
                annotation["segmentation"] = [] if mask is None else mask
    if masks:
        faults.update(
            {
                a["id"]: "without a mask"
                for a in content["annotations"]
                if not a.get("segmentation") and a["id"] not in faults
            }
        )
    for line in describe_odd_areas(content):
        logger.warning(f"{name}: {line}")
    num_areas = clean_ground_truth(coco, faults)
    if faults:
        logger.warning(
            f"{name}: {count(len(faults), 'box', 'boxes')} of the ground truth not counted in the "
            f"evaluation: {describe_faults(faults)}"
        )
    if num_areas:
        logger.warning(
            f"{name}: {count(num_areas, 'box', 'boxes')} without a usable area in the annotation "
            "file: evaluated with width x height"
        )


def check_keypoint_sigmas(cfg: CfgNode) -> None:
    """
    Check, where the model predicts keypoints, that the metric can be computed.

    Keypoint AP takes exp(-d^2 / (8 area sigma^2)), averaged over the keypoints, for the IoU: d is
    the distance of a predicted keypoint from the true one, sigma how exactly this keypoint can be
    located, relative to sqrt(area) (0.025 for an eye, 0.107 for a hip).

    Args:
        cfg: ``MODEL.KEYPOINT_ON``, ``MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS`` and
            ``TEST.KEYPOINT_OKS_SIGMAS`` are read.

    Raises:
        ConfigError: there is not one sigma > 0 for each keypoint.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return
    sigmas, number = cfg.TEST.KEYPOINT_OKS_SIGMAS, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if not sigmas and number == _NUM_COCO_KEYPOINTS:
        return
    cure = "give one number > 0 for each keypoint, e.g. 0.05"
    if len(sigmas) != number:
        raise ConfigError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} numbers, but "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}: {cure}"
        )
    if not all(isinstance(sigma, (int, float)) and sigma > 0 for sigma in sigmas):
        raise ConfigError(f"TEST.KEYPOINT_OKS_SIGMAS = {short(sigmas)}: {cure}")


def _check_ground_truth(cfg: CfgNode, dataset_name: str, coco: COCO) -> None:
    """pycocotools and Detectron2 end in a KeyError or an assertion where a field is missing."""
    where = f"data set {dataset_name}: annotation"
    for annotation in coco.anns.values():
        if not cfg.MODEL.KEYPOINT_ON:
            continue
        expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        number = len(annotation.get("keypoints") or []) // 3
        if number != expected:
            raise UserError(
                f"{where} {annotation['id']} has {number} keypoints, but "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {expected}: set it to the number of "
                "keypoints of the data set, or MODEL.KEYPOINT_ON False"
            )
        if "num_keypoints" not in annotation:
            raise UserError(
                f"{where} {annotation['id']} has no num_keypoints: add the number of its "
                "keypoints with a visibility > 0"
            )
