"""
How well the anchors of a config fit the objects of a data set: the best overlap that each object
can have with an anchor, the anchors that fit better, and the offsets that an RPN or a RetinaNet
would learn.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from .object_table import ObjectTable

__all__ = [
    "AnchorLevels",
    "best_overlaps",
    "fit_anchors",
    "largest_offset",
    "regression_targets",
]

"""
Shape shorthand in this module:

    N: number of objects
    A: number of anchors at each place of a level
"""

# One factor for all sizes is tried in these steps, over these many octaves up and down.
_STEPS_PER_OCTAVE, _OCTAVES = 4, 5
# Less than that is no reason to leave the sizes, or the aspect ratios, of a config: mean overlap.
_MIN_GAIN = 0.01
# Under it an object is hardly matched. Anchors that leave more objects there are not taken, however
# well they fit the others.
POOR_OVERLAP = 0.5
# Of height to width, for the three aspect ratios that are tried: those of narrow, usual and wide.
_QUANTILES = (0.1, 0.5, 0.9)
_MAX_OBJECTS = 10_000


@dataclasses.dataclass(frozen=True)
class AnchorLevels:
    """
    The anchors of Detectron2's ``DefaultAnchorGenerator``.

    Attributes:
        sizes: for each level, square roots of the anchors' areas, pixels of the model's input.
        aspect_ratios: for each level, height / width.
        strides: of each level, pixels.
        offset: of the first anchor's center, in strides.
        divisor: height and width of the input are padded to a multiple of it.
    """

    sizes: Sequence[Sequence[float]]
    aspect_ratios: Sequence[Sequence[float]]
    strides: Sequence[int]
    offset: float = 0.0
    divisor: int = 32

    def generator(self) -> DefaultAnchorGenerator:
        return DefaultAnchorGenerator(
            sizes=self.sizes,
            aspect_ratios=self.aspect_ratios,
            strides=self.strides,
            offset=self.offset,
        )

    def grid_shapes(self, shapes: np.ndarray) -> list[np.ndarray]:
        """For each level height and width of the feature map, for inputs of ``shapes (M, 2)``."""
        padded = np.ceil(shapes / self.divisor) * self.divisor
        return [np.ceil(padded / stride) for stride in self.strides]

    def anchors(self, shape: Sequence[int]) -> Boxes:
        """All anchors on an input of this height and width."""
        grids = self.grid_shapes(np.array([shape], dtype=np.float64))
        features = [torch.empty(1).expand(1, 1, *map(int, grid[0])) for grid in grids]
        return Boxes.cat(self.generator()(features))


def best_overlaps(objects: ObjectTable, levels: AnchorLevels) -> np.ndarray:
    """
    The largest IoU of each object with any anchor on its image.

    The overlap with anchors of one shape is largest where their center is nearest, along x and
    along y: one anchor of each shape is looked at, not all places.

    Args:
        objects: at the size of the model's input.

    Returns:
        shape ``(N,)``.
    """
    boxes, best = objects.boxes, np.zeros(len(objects))
    extents = boxes[:, 2:] - boxes[:, :2]
    centers = (boxes[:, 2:] + boxes[:, :2]) / 2
    cells = levels.generator().cell_anchors
    for grids, stride, cell in zip(levels.grid_shapes(objects.shapes), levels.strides, cells):
        last = grids[objects.images][:, ::-1] - 1  # x, y
        place = np.clip(np.rint(centers / stride - levels.offset), 0, last)
        distance = np.abs(centers - (place + levels.offset) * stride)
        for anchor in (cell[:, 2:] - cell[:, :2]).double().numpy():
            overlap = np.minimum((extents + anchor) / 2 - distance, np.minimum(extents, anchor))
            intersection = np.clip(overlap, 0, None).prod(axis=1)
            union = extents.prod(axis=1) + anchor.prod() - intersection
            best = np.maximum(best, intersection / union)
    return best


def fit_anchors(objects: ObjectTable, levels: AnchorLevels) -> AnchorLevels:
    """
    Anchors of the largest mean overlap with the objects, as many on each level as now, so that the
    layers of a model keep their shapes. The mean is one over classes, so that a frequent class does
    not decide for all, and no more objects than now may overlap with less than 0.5. All sizes are
    multiplied by one factor: larger objects stay with coarser levels. Three aspect ratios that all
    levels share may be replaced by those of the objects.

    Args:
        objects: at the size of the model's input.

    Returns:
        ``levels`` itself where nothing gains more than 0.01 in mean overlap.
    """
    objects = objects.spread(_MAX_OBJECTS)
    numbers = np.bincount(objects.classes)
    weights = 1 / numbers[objects.classes]
    overlaps = best_overlaps(objects, levels)
    most_poor = np.sum(overlaps < POOR_OVERLAP)
    best, best_mean = levels, np.average(overlaps, weights=weights)
    limit = _OCTAVES * _STEPS_PER_OCTAVE
    steps = sorted(range(-limit, limit + 1), key=abs)  # of equals, the least change
    for ratios in _aspect_ratios(objects, levels):
        least = best_mean + _MIN_GAIN
        for step in steps:
            sizes = _scaled(levels.sizes, step)
            if min(map(min, sizes)) < min(levels.strides):
                continue  # smaller anchors than their distance would leave gaps
            candidate = dataclasses.replace(levels, sizes=sizes, aspect_ratios=ratios)
            overlaps = best_overlaps(objects, candidate)
            mean = np.average(overlaps, weights=weights)
            if mean > max(best_mean, least) and np.sum(overlaps < POOR_OVERLAP) <= most_poor:
                best, best_mean = candidate, mean
    return best


def _scaled(sizes: Sequence[Sequence[float]], step: int) -> list[list[float]]:
    factor = 2 ** (step / _STEPS_PER_OCTAVE)
    digits = 0 if all(size == int(size) for level in sizes for size in level) else 2
    scaled = [[round(size * factor, digits) for size in level] for level in sizes]
    return [[int(size) if size == int(size) else size for size in level] for level in scaled]


def _aspect_ratios(objects: ObjectTable, levels: AnchorLevels) -> list[Sequence[Sequence[float]]]:
    options = [levels.aspect_ratios]
    shared = {tuple(ratios) for ratios in levels.aspect_ratios}
    if len(shared) == 1 and len(levels.aspect_ratios[0]) == len(_QUANTILES):
        width, height = (objects.boxes[:, 2:] - objects.boxes[:, :2]).T
        ratios = [round(float(x), 2) for x in np.quantile(height / width, _QUANTILES)]
        if len(set(ratios)) == len(ratios) and min(ratios) > 0:
            options.append([ratios] * len(levels.aspect_ratios))
    return options


def regression_targets(
    objects: ObjectTable,
    levels: AnchorLevels,
    matcher: Matcher,
    weights: Sequence[float],
    num_images: int = 50,
) -> np.ndarray:
    """
    The offsets that an RPN or a RetinaNet learns: of all anchors that Detectron2's matcher calls
    positive, on a few images, evenly spread.

    Args:
        objects: at the size of the model's input.
        weights: of the box transform.

    Returns:
        shape ``(number of positive anchors, 4)``: ``dx, dy, dw, dh``.
    """
    transform, targets = Box2BoxTransform(tuple(weights)), []
    images = np.unique(objects.images)
    for image in images[:: max(1, -(-len(images) // num_images))]:
        boxes = torch.from_numpy(objects.boxes[objects.images == image]).float()
        anchors = levels.anchors(objects.shapes[image])
        index, label = matcher(pairwise_iou(Boxes(boxes), anchors))
        positive = label == 1
        targets.append(transform.get_deltas(anchors.tensor[positive], boxes[index[positive]]))
    return torch.cat(targets).numpy()


def largest_offset(iou: float, weights: Sequence[float]) -> float:
    """
    The least half-width of a grid that covers the offsets of every box from every proposal that
    overlaps it with at least this IoU.

    The ratio of two sides is at most 1 / iou, so that ``|dw| <= log(1 / iou)``. The center is
    farthest off for a proposal of ``iou`` times the width that lies at one end of the box, by
    ``(1 - iou) / 2`` of the box and so ``(1 / iou - 1) / 2`` of itself: this bounds ``|dx|``. For
    an IoU of .5 and the weights (10, 10, 5, 5) it is max(10 * .5, 5 * log(2)) = 5.

    Args:
        iou: in (0, 1], for example ``MODEL.ROI_HEADS.IOU_THRESHOLDS[0]``.
        weights: of the box transform.
    """
    shift, ratio = (1 / iou - 1) / 2, math.log(1 / iou)
    return max(max(weights[:2]) * shift, max(weights[2:]) * ratio)
