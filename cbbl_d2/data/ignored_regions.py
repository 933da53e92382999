"""
Regions of an image in which nothing is known: objects may be there, but they are not labeled.

Boxes are COCO's: ``[x, y, width, height]`` in pixels, x and y of the upper left corner.
"""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_utils

__all__ = ["covered_share", "erase_regions"]


def covered_share(
    boxes: Sequence[Sequence[float]], regions: Sequence[Sequence[float]], height: int, width: int
) -> np.ndarray:
    """
    The share of each box that lies in the union of some regions, counted in pixels.

    Args:
        boxes: N of them; what reaches out of the image is cut off.
        regions: M of them; they may overlap.
        height, width: of the image.

    Returns:
        (N,) float64 in [0, 1]; 0 for a box that holds no pixel.
    """
    if len(boxes) == 0 or len(regions) == 0:
        return np.zeros(len(boxes))

    def encode(some):
        return mask_utils.frPyObjects(np.asarray(some, dtype=np.float64), height, width)

    union = mask_utils.merge(encode(regions))
    # With iscrowd = 1, the "IoU" is the intersection over the area of the first argument.
    return np.asarray(mask_utils.iou(encode(boxes), [union], [1])).reshape(-1)


def erase_regions(
    image: np.ndarray, regions: Sequence[Sequence[float]], keep: Sequence[Sequence[float]] = ()
) -> np.ndarray:
    """
    Fill regions with their mean color, so that a detector does not learn unlabeled objects as
    background. It is what TinyPerson's authors do for training.

    Args:
        image: (H, W, 3) uint8.
        regions: whole pixels; other values are rounded, and cut off at the edge of the image.
        keep: boxes of labeled objects, which stay visible also where they reach into a region.

    Returns:
        a new image.
    """
    kept = np.zeros(image.shape[:2], dtype=bool)
    for box in keep:
        kept[_pixels(box)] = True
    erased = image.copy()
    for region in regions:
        where = _pixels(region)
        if image[where].size:
            color = image[where].reshape(-1, image.shape[2]).mean(axis=0).round()
            erased[where][~kept[where]] = color
    return erased


def _pixels(box: Sequence[float]) -> tuple[slice, slice]:
    x0, y0, x1, y1 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    x0, y0, x1, y1 = (max(0, round(value)) for value in (x0, y0, x1, y1))
    return slice(y0, y1), slice(x0, x1)
