"""
The objects of a data set as arrays, in pixels of their image and at the size that the model sees.
"""

import dataclasses

import numpy as np
from detectron2.data.transforms import ResizeShortestEdge

__all__ = ["ObjectTable", "object_table", "resized_shapes"]

"""
Shape shorthand in this module:

    N: number of objects
    M: number of images
"""


@dataclasses.dataclass(frozen=True)
class ObjectTable:
    """
    Attributes:
        boxes: shape ``(N, 4)``, ``x0, y0, x1, y1``; from :func:`object_table` in pixels of the
            image file.
        classes: shape ``(N,)``, index of the class.
        images: shape ``(N,)``, index of the image.
        shapes: shape ``(M, 2)``, height and width of every image.
    """

    boxes: np.ndarray
    classes: np.ndarray
    images: np.ndarray
    shapes: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def sizes(self) -> np.ndarray:
        """Shape ``(N,)``, square root of the area of each box, in pixels."""
        width, height = (self.boxes[:, 2:] - self.boxes[:, :2]).T
        return np.sqrt(width * height)

    def per_image(self) -> np.ndarray:
        """Shape ``(M,)``, number of objects of each image."""
        return np.bincount(self.images, minlength=len(self.shapes))

    def resized(self, min_size: int, max_size: int) -> "ObjectTable":
        """The same objects after :func:`resized_shapes`."""
        shapes = resized_shapes(self.shapes, min_size, max_size)
        scales = (shapes / self.shapes)[:, [1, 0, 1, 0]]
        return dataclasses.replace(self, boxes=self.boxes * scales[self.images], shapes=shapes)

    def spread(self, number: int) -> "ObjectTable":
        """At most about ``number`` objects, at equal distances."""
        step = slice(None, None, max(1, -(-len(self) // number)))
        return dataclasses.replace(
            self, boxes=self.boxes[step], classes=self.classes[step], images=self.images[step]
        )


def object_table(content: dict, faults: dict[int, str]) -> ObjectTable:
    """
    What a detector learns from: without crowds and without boxes that cannot be used, and clipped
    to the image, as Detectron2 does in training.

    Args:
        content: the parsed JSON in COCO's format, of a sound structure.
        faults: from :func:`cbbl_d2.data.coco_validation.find_faults`.
    """
    images = {image["id"]: i for i, image in enumerate(content["images"])}
    # In the order of Detectron2's contiguous class ids.
    classes = {id: i for i, id in enumerate(sorted(c["id"] for c in content["categories"]))}
    shapes = [(image["height"], image["width"]) for image in content["images"]]
    objects = [
        a for a in content["annotations"] if a["id"] not in faults and not a.get("iscrowd", 0)
    ]
    shapes = np.array(shapes, dtype=np.float64).reshape(-1, 2)
    index = np.array([images[a["image_id"]] for a in objects], dtype=np.int64)
    boxes = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    limits = shapes[index][:, [1, 0, 1, 0]]
    return ObjectTable(
        boxes=np.clip(boxes, 0, limits),
        classes=np.array([classes[a["category_id"]] for a in objects], dtype=np.int64),
        images=index,
        shapes=shapes,
    )


def resized_shapes(shapes: np.ndarray, min_size: int, max_size: int) -> np.ndarray:
    """
    Detectron2's ``ResizeShortestEdge``, for ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``.

    Args:
        shapes: shape ``(M, 2)``, height and width.
        min_size: length that the short side gets; 0: images stay as they are.
        max_size: what the long side must not exceed.

    Returns:
        shape ``(M, 2)``, whole numbers.
    """
    if min_size == 0:
        return shapes
    different, index = np.unique(shapes, axis=0, return_inverse=True)
    resized = [
        ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
        for height, width in different.tolist()
    ]
    return np.array(resized, dtype=np.float64).reshape(-1, 2)[index.reshape(-1)]
