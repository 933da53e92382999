"""
Settings that suit the objects of a data set, each with its reason, as a piece of a YAML config.

What they rest on is simple: anchors are fitted, the number of detections and the offsets are
counted; for the input size there is a rule of thumb (``CELLS``). None of it replaces trying.
"""

import dataclasses
from typing import Any

import numpy as np
from cbbl_d2.architectures import anchor_node, detection_node
from cbbl_d2.errors import ConfigError
from cbbl_d2.messages import listed
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import _broadcast_params
from detectron2.modeling.matcher import Matcher

from .anchor_fit import (
    POOR_OVERLAP,
    AnchorLevels,
    best_overlaps,
    fit_anchors,
    largest_offset,
    regression_targets,
)
from .object_table import ObjectTable, resized_shapes

__all__ = ["Suggestion", "anchor_levels", "format_yaml", "suggest_settings"]

# An object should reach over as many cells of the finest feature map, for nine objects in ten.
CELLS = 4
_QUANTILE = 0.1
# Short sides beyond it are a matter of memory: the answer to smaller objects is then to cut the
# images into tiles.
_LARGEST_SHORT_SIDE = 1600
_SIZE_STEP = 32
# So many times larger than in training, objects at inference are others than those it has learned.
_UNLIKE = 1.25

_LEAST_DETECTIONS = 100  # Detectron2's default, and COCO's metric
# Detections for each object of the fullest image: false ones take their place among the best, too.
_DETECTIONS_PER_OBJECT = 1.5
_DETECTIONS_STEP = 50

_EPOCHS = 12  # of Detectron2's schedule "1x" on COCO, and of the paper

_MAX_CLIPPED = 0.01  # share of targets outside the grid that is no reason to widen it


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """
    Attributes:
        values: config key -> value; empty: a remark.
        reason: one line.
    """

    values: dict[str, Any]
    reason: str


def suggest_settings(
    cfg: CfgNode, objects: ObjectTable, class_names: list[str], keep_input_size: bool = False
) -> list[Suggestion]:
    """
    Args:
        cfg: of the detector that is to be trained, see :func:`anchor_levels`.
        objects: in pixels of the image files, at least one.
        keep_input_size: suggest the rest for the input size of ``cfg``.

    Raises:
        ConfigError: the model of ``cfg`` has no such feature levels.
    """
    node = detection_node(cfg)
    suggestions = []
    if node is not None:
        names = listed(" ".join(x.split()) for x in class_names)
        values = {f"MODEL.{node}.NUM_CLASSES": len(class_names)}
        suggestions.append(Suggestion(values, f"{names}; 0: as many as the data have"))
    levels = anchor_levels(cfg)
    finest = min(levels.strides) if levels else _finest_stride(cfg)
    size, size_suggestion = _input_size(cfg, objects, finest, keep_input_size)
    suggestions.append(size_suggestion)
    at_input = objects.resized(*size)
    if levels is not None:
        fitted = fit_anchors(at_input, levels)
        suggestions.append(_anchors(at_input, levels, fitted))
        suggestions += _anchor_grid(cfg, at_input, fitted)
    suggestions += _box_head_grid(cfg)
    suggestions += _fcos_grid(cfg, at_input)
    suggestions.append(_detections(cfg, objects))
    suggestions.append(_length(cfg, objects))
    return suggestions


def anchor_levels(cfg: CfgNode) -> AnchorLevels | None:
    """
    The anchors of an RPN or of a RetinaNet; None for a model without, or with rotated ones.

    Raises:
        ConfigError: the backbone has no such levels, or they do not go with the anchors.
    """
    node = anchor_node(cfg)
    if node is None or cfg.MODEL.ANCHOR_GENERATOR.NAME != "DefaultAnchorGenerator":
        return None
    strides, divisor = _strides(cfg, cfg.MODEL[node].IN_FEATURES)
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    return AnchorLevels(
        _broadcast_params(list(anchors.SIZES), len(strides), "sizes"),
        _broadcast_params(list(anchors.ASPECT_RATIOS), len(strides), "aspect_ratios"),
        strides,
        anchors.OFFSET,
        divisor,
    )


def _strides(cfg: CfgNode, features: list[str]) -> tuple[list[int], int]:
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    unknown = [name for name in features if name not in shapes]
    if unknown:
        raise ConfigError(
            f"MODEL.BACKBONE.NAME = {cfg.MODEL.BACKBONE.NAME} has no feature level "
            f"{listed(unknown)}: choose among {listed(sorted(shapes), limit=9)}"
        )
    return [shapes[name].stride for name in features], max(backbone.size_divisibility, 1)


def _finest_stride(cfg: CfgNode) -> int:
    if detection_node(cfg) == "FCOS":
        return min(_strides(cfg, cfg.MODEL.FCOS.IN_FEATURES)[0])
    return 4  # P2 of an FPN


# -- input size ------------------------------------------------------------------------------------


def _input_size(
    cfg: CfgNode, objects: ObjectTable, stride: int, keep: bool
) -> tuple[tuple[int, int], Suggestion]:
    """The short and the long side of the model's input, and the suggestion."""
    now, max_now = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    goal = CELLS * stride
    aspects = objects.shapes.max(axis=1) / objects.shapes.min(axis=1)
    usual_aspect = float(np.quantile(aspects, 0.95))
    median_side = float(np.median(objects.shapes.min(axis=1)))

    def small(size: tuple[int, int]) -> float:
        """Nine objects in ten are at least as large, pixels of the input."""
        return float(np.quantile(objects.resized(*size).sizes, _QUANTILE))

    current = small((now, max_now))
    means = f"nine objects in ten are {current:.0f} px or more at the input"
    if keep or now == 0 or current >= goal:
        reason = f"kept: {means}"
        if current < goal:
            reason += f", which is less than {CELLS} cells of {stride} px"
        elif median_side < 0.9 * now:
            cost = (median_side / now) ** 2
            reason += (
                f"; images are enlarged {now / median_side:.2f} times: their own short side, "
                f"{median_side:.0f}, would take {cost:.0%} of the time"
            )
        at_input = float(np.median(resized_shapes(objects.shapes, now, max_now).min(axis=1)))
        if at_input < 0.95 * now:
            reason += f"; MAX_SIZE_TEST {max_now} leaves a short side of {at_input:.0f}"
        return (now, max_now), _size_suggestion(cfg, now, max_now, reason)

    largest = max(now, min(_LARGEST_SHORT_SIDE, _round_up(2 * median_side)))
    sides = [*range(_round_up(now), largest + 1, _SIZE_STEP), largest]
    sizes = [(side, max(max_now, _round_up(side * usual_aspect))) for side in sides]
    size = next((x for x in sizes if small(x) >= goal), sizes[-1])
    reached = small(size)
    reason = (
        f"at {now} only: {means}; with {size[0]} {reached:.0f} px. {CELLS} cells of the finest "
        f"level, {goal} px, are a rule of thumb; a step takes {(size[0] / now) ** 2:.1f} times as "
        "long"
    )
    if reached < goal:
        reason += (
            "; beyond it memory ends, and tiles of the images are the way (tools/slice_dataset.py)"
            if largest < 2 * median_side
            else "; beyond twice the size of the files there is nothing more to see"
        )
    return size, _size_suggestion(cfg, *size, reason)


def _size_suggestion(cfg: CfgNode, short: int, long: int, reason: str) -> Suggestion:
    base = now = cfg.INPUT.MIN_SIZE_TEST
    train, max_train = tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    if now > 0 and min(train) > 0 and not min(train) <= now <= _UNLIKE * max(train):
        reason += f"; trained at {listed(map(str, train))} it would not know objects of this size"
        base = max(train)
    if short != base:
        scaled = {short if x == base else _round_up(x * short / base) for x in train}
        train, max_train = tuple(sorted(scaled)), max(max_train, long)
    values = {
        "INPUT.MIN_SIZE_TRAIN": train,
        "INPUT.MAX_SIZE_TRAIN": max_train,
        "INPUT.MIN_SIZE_TEST": short,
        "INPUT.MAX_SIZE_TEST": long,
    }
    return Suggestion(values, reason)


def _round_up(number: float, step: int = _SIZE_STEP) -> int:
    return int(-(-number // step) * step)


# -- anchors and grids -----------------------------------------------------------------------------


def _anchors(objects: ObjectTable, levels: AnchorLevels, fitted: AnchorLevels) -> Suggestion:
    def text(overlaps: np.ndarray) -> str:
        poor = np.mean(overlaps < POOR_OVERLAP)
        return f"{overlaps.mean():.2f} ({poor:.1%} of the objects under {POOR_OVERLAP:g})"

    measure = "mean IoU of an object with its best anchor"
    now = text(best_overlaps(objects, levels))
    reason = f"kept: {measure} {now}"
    if fitted is not levels:
        then = text(best_overlaps(objects, fitted))
        reason = f"{measure} {then}, with those of the config {now}"
    ratios = [list(x) for x in fitted.aspect_ratios]
    are_shared = all(x == ratios[0] for x in ratios)
    values = {
        "MODEL.ANCHOR_GENERATOR.SIZES": [list(x) for x in fitted.sizes],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ratios[:1] if are_shared else ratios,
    }
    return Suggestion(values, reason)


def _anchor_grid(cfg: CfgNode, objects: ObjectTable, levels: AnchorLevels) -> list[Suggestion]:
    """Of CBBLRPN or CBBLRetinaNet: the share of what they learn that their grid does not cover."""
    if cfg.MODEL.META_ARCHITECTURE == "CBBLRetinaNet":
        node = "RETINANET"
    elif cfg.MODEL.PROPOSAL_GENERATOR.NAME == "CBBLRPN" and anchor_node(cfg) == "RPN":
        node = "RPN"
    else:
        return []
    settings, alpha = cfg.MODEL[node], cfg.MODEL.CBBL[node].ALPHA
    matcher = Matcher(
        list(settings.IOU_THRESHOLDS), list(settings.IOU_LABELS), allow_low_quality_matches=True
    )
    targets = np.abs(regression_targets(objects, levels, matcher, settings.BBOX_REG_WEIGHTS))
    covers_most = float(np.quantile(targets, 1 - _MAX_CLIPPED))
    clipped = float(np.mean(targets > alpha))
    if clipped <= _MAX_CLIPPED:
        value, advice = alpha, "kept"
    else:
        value, advice = np.ceil(4 * covers_most) / 4, f"instead of {alpha}"
    reason = (
        f"{advice}: {clipped:.2%} of the offsets of positive anchors are outside [-{alpha}, "
        f"{alpha}]; 99% are within {covers_most:.2f} (a narrower grid is a thing to try, no advice)"
    )
    return [Suggestion({f"MODEL.CBBL.{node}.ALPHA": float(value)}, reason)]


def _box_head_grid(cfg: CfgNode) -> list[Suggestion]:
    """Proposals are not known before training, but how far they can be off is."""
    name = cfg.MODEL.ROI_HEADS.NAME
    if not (name.startswith("CBBL") and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"):
        return []
    if name == "CBBLCascadeROIHeads":
        head = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        stages = list(zip(head.IOUS, head.BBOX_REG_WEIGHTS))
        alphas = list(cfg.MODEL.CBBL.CASCADE.ALPHA) or [cfg.MODEL.CBBL.ALPHA] * len(stages)
        key = "MODEL.CBBL.CASCADE.ALPHA"
    else:
        head = cfg.MODEL.ROI_BOX_HEAD
        stages = [(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[-1], head.BBOX_REG_WEIGHTS)]
        alphas, key = [cfg.MODEL.CBBL.ALPHA], "MODEL.CBBL.ALPHA"
    needed = [largest_offset(iou, weights) for iou, weights in stages]
    reason = (
        f"no advice from the data: {key} {listed(f'{x:g}' for x in alphas)}; proposals of an IoU "
        f"of {listed(f'{iou:g}' for iou, _ in stages)} or more have offsets of at most "
        f"{listed(f'{x:.3g}' for x in needed)}, on any data (weights "
        f"{listed(f'{x:g}' for x in stages[0][1])}); most are far smaller"
    )
    return [Suggestion({}, reason)]


def _fcos_grid(cfg: CfgNode, objects: ObjectTable) -> list[Suggestion]:
    if cfg.MODEL.META_ARCHITECTURE != "CBBLFCOS":
        return []
    alpha, features = cfg.MODEL.CBBL.FCOS.ALPHA, cfg.MODEL.FCOS.IN_FEATURES
    last = max(_strides(cfg, features)[0])
    # The point in the middle is nearest to all sides.
    longest = (objects.boxes[:, 2:] - objects.boxes[:, :2]).max(axis=1) / 2
    share = np.mean(longest > alpha * last)
    reason = (
        f"no anchors, and no advice on MODEL.CBBL.FCOS.ALPHA {alpha:g}: each level is given the "
        f"objects of its own range; {share:.2%} of the objects are larger than what it covers on "
        f"the last level, {2 * alpha * last:g} px"
    )
    return [Suggestion({}, reason)]


# -- detections ------------------------------------------------------------------------------------


def _detections(cfg: CfgNode, objects: ObjectTable) -> Suggestion:
    largest = int(objects.per_image().max())
    number = max(_LEAST_DETECTIONS, _round_up(_DETECTIONS_PER_OBJECT * largest, _DETECTIONS_STEP))
    values = {"TEST.DETECTIONS_PER_IMAGE": number}
    reason = f"the fullest image has {largest} objects"
    if number > _LEAST_DETECTIONS:
        reason += "; false detections need room beside them, and the metric here counts them all"
    if anchor_node(cfg) == "RPN" and cfg.MODEL.RPN.POST_NMS_TOPK_TEST < number:
        values["MODEL.RPN.POST_NMS_TOPK_TEST"] = number
        reason += f"; {cfg.MODEL.RPN.POST_NMS_TOPK_TEST} proposals would be fewer than that"
    return Suggestion(values, reason)


# -- length of the training ------------------------------------------------------------------------


def _length(cfg: CfgNode, objects: ObjectTable) -> Suggestion:
    iterations, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    images = len(objects.shapes)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        images = np.count_nonzero(objects.per_image())
    epochs = iterations * batch / images
    reason = (
        f"no advice from the data: SOLVER.MAX_ITER {iterations} with IMS_PER_BATCH {batch} is "
        f"{epochs:.3g} epochs of {images} images; Detectron2's 1x of {_EPOCHS} would be "
        f"{_round_up(_EPOCHS * images / batch, step=1)}"
    )
    return Suggestion({}, reason)


# -- text ------------------------------------------------------------------------------------------


def format_yaml(suggestions: list[Suggestion]) -> str:
    """
    A piece of a config file that Detectron2 reads, with the reasons as comments. Keys of the same
    node come together; remarks stand at the end.
    """
    tree: dict = {}
    for suggestion in suggestions:
        for i, (key, value) in enumerate(suggestion.values.items()):
            *path, last = key.split(".")
            node = tree
            for name in path:
                node = node.setdefault(name, {})
            node[last] = (value, suggestion.reason if i == 0 else "")
    remarks = [f"# {x.reason}" for x in suggestions if not x.values]
    return "\n".join([*_lines(tree, ""), *remarks])


def _lines(tree: dict, indent: str) -> list[str]:
    lines = []
    for key, entry in tree.items():
        if isinstance(entry, dict):
            lines += [f"{indent}{key}:", *_lines(entry, indent + "  ")]
        else:
            value, reason = entry
            lines += [f"{indent}# {reason}"] if reason else []
            lines.append(f"{indent}{key}: {value!r}")
    return lines
