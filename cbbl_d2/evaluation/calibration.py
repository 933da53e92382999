"""Whether the deviations that detections carry, ``pred_boxes_std``, are those of their errors."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from cbbl_d2.errors import UserError
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .bootstrap import image_groups

"""
Shape shorthand in this module:

    M: number of detections that match an object; 4: their sides x1, y1, x2, y2

Naming convention:

    std: standard deviations in pixels of the image
    errors: detection minus ground truth, pixels; NaN for a side that lies on the border of the
        image, where it is exact because it was clipped
"""

SIDES = ("x1", "y1", "x2", "y2")
# Of a Gaussian, this share lies within one standard deviation.
ONE_SIGMA = math.erf(1 / math.sqrt(2))
# Edges of the size classes of the tables, sqrt(width * height) of the ground truth, pixels.
SIZE_EDGES = (0, 8, 16, 32, 96, math.inf)
# Fewer matched detections in one half are no basis for four scales.
_LEAST_MATCHES = 50
_BORDER = 0.5  # pixels
_LEAST_STD = 1e-3  # pixels; a logarithm and a quotient are taken
# Shares that central intervals ought to cover.
_LEVELS = np.linspace(0.01, 0.99, 99)


@dataclasses.dataclass
class MatchedSides:
    """
    Attributes:
        errors, std: shape ``(M, 4)``, or ``(M, 1)`` of one side.
        sizes: shape ``(M,)``, sqrt(width * height) of the ground truth, pixels.
        in_first_half: shape ``(M,)``, bool: of the data set, see :func:`halves`.
        num_detections: of which M match.
    """

    errors: np.ndarray
    std: np.ndarray
    sizes: np.ndarray
    in_first_half: np.ndarray
    num_detections: int

    def __len__(self) -> int:
        return len(self.errors)

    def __getitem__(self, chosen: np.ndarray) -> "MatchedSides":
        fields = (self.errors, self.std, self.sizes, self.in_first_half)
        return MatchedSides(*(x[chosen] for x in fields), self.num_detections)

    def side(self, index: int) -> "MatchedSides":
        """One of :data:`SIDES` alone."""
        one = slice(index, index + 1)
        return dataclasses.replace(self, errors=self.errors[:, one], std=self.std[:, one])

    def scaled(self, scale: Sequence[float]) -> "MatchedSides":
        return dataclasses.replace(self, std=self.std * np.asarray(scale))


def match_sides(truth: COCO, detections: Sequence[dict], iou: float = 0.5) -> MatchedSides:
    """
    Match as COCO's metric does: class by class, the best score first, each object once, without
    crowds. What does not reach the IoU has no error here: the largest errors are cut off, at most
    half of the box at IoU 0.5, and deviations are compared with what is left.

    Args:
        truth: the data set; images with the same ``"sequence"`` belong together.
        detections: COCO results with ``pred_boxes_std``, four numbers relative to the box.

    Raises:
        UserError: detections without deviations.
    """
    if any("pred_boxes_std" not in d for d in detections):
        raise UserError(
            "these detections have no pred_boxes_std: give those of a detector whose boxes are "
            "C-BBL's"
        )
    first = _first_half(truth, sorted(truth.getImgIds()))
    matches = _match(truth, detections, iou) if detections else []
    found = [detections[i] for i, _ in matches]
    boxes = _corners([d["bbox"] for d in found])
    true = _corners([truth.anns[i]["bbox"] for _, i in matches])
    sizes = boxes[:, 2:] - boxes[:, :2]
    std = np.reshape([d["pred_boxes_std"] for d in found], (-1, 4)) * np.tile(sizes, 2)
    frames = [truth.imgs[d["image_id"]] for d in found]
    border = np.reshape([[x["width"], x["height"]] for x in frames], (-1, 2))
    clipped = np.concatenate((boxes[:, :2] < _BORDER, boxes[:, 2:] > border - _BORDER), axis=1)
    return MatchedSides(
        errors=np.where(clipped, np.nan, boxes - true),
        std=np.maximum(std, _LEAST_STD),
        sizes=np.sqrt((true[:, 2:] - true[:, :2]).prod(axis=1)),
        in_first_half=np.array([d["image_id"] in first for d in found], dtype=bool),
        num_detections=len(detections),
    )


def _match(truth: COCO, detections: Sequence[dict], iou: float) -> list[tuple[int, int]]:
    """Index of a detection and id of the object, for each match."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        coco_eval.params.iouThrs = np.array([iou])
        coco_eval.params.areaRng = coco_eval.params.areaRng[:1]
        coco_eval.params.maxDets = [len(detections)]
        coco_eval.evaluate()
    matches = []
    for of_image in filter(None, coco_eval.evalImgs):
        for detection, match, ignored in zip(
            of_image["dtIds"], of_image["dtMatches"][0], of_image["dtIgnore"][0]
        ):
            if match and not ignored:
                matches.append((detection - 1, int(match)))  # loadRes counts from 1
    return sorted(matches)


def _corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """From XYWH to XYXY."""
    boxes = np.reshape(boxes, (-1, 4)).astype(float)
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def _first_half(truth: COCO, images: Sequence[int]) -> set[int]:
    """
    Ids of images with about half of the objects. Those of one sequence are in the same half:
    neighboring frames are no independent samples. It depends on the data set alone, so that all
    detectors are fitted and judged on the same images.
    """
    groups = [[images[i] for i in positions] for positions in image_groups(truth, images)]
    counts = [len(truth.getAnnIds(imgIds=of_group)) for of_group in groups]
    first, sums = set(), [0, 0]
    for g in sorted(range(len(groups)), key=lambda g: -counts[g]):
        half = int(sums[1] < sums[0])
        sums[half] += counts[g]
        if half == 0:
            first.update(groups[g])
    return first


def halves(matched: MatchedSides) -> tuple[MatchedSides, MatchedSides]:
    """
    Raises:
        UserError: too few detections in one of them.
    """
    first, second = matched[matched.in_first_half], matched[~matched.in_first_half]
    # Of the side that is clipped most often.
    usable = [int(np.isfinite(x.errors).sum(axis=0).min(initial=len(x))) for x in (first, second)]
    if min(usable) < _LEAST_MATCHES:
        raise UserError(
            f"{len(matched)} of {matched.num_detections} detections match an object, {usable[0]} "
            f"and {usable[1]} of them in two halves of the data set without a common sequence and "
            f"not on the border of the image: a calibration needs {_LEAST_MATCHES} in each: take a "
            "larger data set, of two sequences or more, or a better detector"
        )
    return first, second


def fit_scale(matched: MatchedSides) -> np.ndarray:
    """
    Shape ``(4,)``: what the deviations of each side have to be multiplied by for 68.3 % of the
    errors to lie within one. Not what makes the likelihood largest: that is ruled by the few large
    errors of boxes that miss their object.
    """
    scale = np.nanquantile(np.abs(matched.errors) / matched.std, ONE_SIGMA, axis=0)
    return np.maximum(scale, 1e-6)  # of a detector without errors


def coverage(matched: MatchedSides, z: float) -> float:
    """Share of the errors within ``z`` deviations; NaN without any."""
    ratios = _ratios(matched)
    return float(np.mean(ratios <= z)) if len(ratios) else math.nan


def coverage_curve(matched: MatchedSides) -> tuple[np.ndarray, np.ndarray]:
    """
    Of 99 central intervals of a Gaussian: the share that each ought to cover, and does; NaN without
    errors.
    """
    ratios = np.sort(_ratios(matched))
    if len(ratios) == 0:
        return _LEVELS, np.full_like(_LEVELS, math.nan)
    z = [NormalDist().inv_cdf((1 + level) / 2) for level in _LEVELS]
    return _LEVELS, np.searchsorted(ratios, z, side="right") / len(ratios)


def _ratios(matched: MatchedSides) -> np.ndarray:
    """Absolute error by deviation, of the sides that have an error."""
    used = np.isfinite(matched.errors)
    return np.abs(matched.errors[used]) / matched.std[used]


def calibration_error(matched: MatchedSides) -> float:
    """
    Expected calibration error of a regression: the mean over 99 levels p of the absolute difference
    between p and the share of errors in the central interval of level p. (Kuleshov et al., arXiv
    1807.00263, have the squared difference and one-sided intervals.)
    """
    expected, observed = coverage_curve(matched)
    return float(np.abs(expected - observed).mean())


def negative_log_likelihood(matched: MatchedSides) -> float:
    """
    Of the errors under Gaussians with these deviations, the mean over all sides; nats, NaN without
    any.
    """
    used = np.isfinite(matched.errors)
    ratios, std = _ratios(matched), matched.std[used]
    values = np.log(std * math.sqrt(2 * math.pi)) + ratios**2 / 2
    return float(values.mean()) if len(values) else math.nan


def spearman(matched: MatchedSides) -> list[float]:
    """Rank correlation of deviation and absolute error, for each side; NaN for fewer than three."""
    return [
        _rank_correlation(std[~np.isnan(error)], np.abs(error[~np.isnan(error)]))
        for std, error in zip(matched.std.T, matched.errors.T)
    ]


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    if min(len(set(a)), len(set(b))) < 3:
        return math.nan
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def summary(matched: MatchedSides) -> dict[str, float]:
    """The numbers of the tables; NaN where there are no errors."""
    used = np.isfinite(matched.errors)
    ranks = [x for x in spearman(matched) if math.isfinite(x)]
    return {
        "coverage of 68 % intervals": coverage(matched, 1.0),
        "coverage of 95 % intervals": coverage(matched, 1.96),
        "expected calibration error": calibration_error(matched),
        "negative log-likelihood": negative_log_likelihood(matched),
        "median deviation [px]": float(np.median(matched.std[used])) if used.any() else math.nan,
        "Spearman": float(np.mean(ranks)) if ranks else math.nan,
        # What no deviation accounts for; over all sides it says whether boxes lie too far right and
        # below.
        "mean error [px]": float(matched.errors[used].mean()) if used.any() else math.nan,
    }


def size_classes(matched: MatchedSides) -> list[tuple[str, MatchedSides]]:
    """Those of :data:`SIZE_EDGES` that have detections, with a label in pixels."""
    return [
        (f"{low} to {high}" if high < math.inf else f"{low} and more", matched[chosen])
        for low, high, chosen in occurring_sizes(matched.sizes)
    ]


def occurring_sizes(sizes):
    """
    Args:
        sizes: pixels, an array or a tensor of shape ``(N,)``.

    Yields:
        those classes of :data:`SIZE_EDGES` that occur: from, to (not included), and which of the
        sizes are in it, bool, of the kind and shape of ``sizes``.
    """
    for low, high in zip(SIZE_EDGES, SIZE_EDGES[1:]):
        chosen = (sizes >= low) & (sizes < high)
        if chosen.any():
            yield low, high, chosen
