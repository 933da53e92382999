"""Predictions as plain values: what is written to files."""

import dataclasses
import math

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from .frames import Frame

# What instances_to_coco_json writes itself, and the heat maps of keypoints, which are images.
_KNOWN = ("pred_boxes", "scores", "pred_classes", "pred_masks", "pred_keypoints")
_LEFT_OUT = (*_KNOWN, "pred_keypoint_heatmaps")


@dataclasses.dataclass
class ImageResult:
    """
    Attributes:
        image_id: as in the COCO files.
        file_name: relative, with forward slashes.
        height, width: pixels of the image, after its EXIF orientation.
        detections: see :func:`to_detections`.
        extra: the name of each field of :func:`extra_fields`, and how many numbers an object has in
            it; also of an image without objects.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    detections: list[dict]
    extra: dict[str, int]


class Results:
    """Collects predictions, to be written when all are there."""

    def __init__(self) -> None:
        self._by_index: dict[int, ImageResult] = {}

    def take(self, frame: Frame, instances: Instances) -> None:
        """
        Args:
            instances: predictions for the frame, on the CPU.
        """
        image_id = (frame.record or {}).get("image_id", frame.index + 1)
        self._by_index[frame.index] = ImageResult(
            image_id,
            frame.file_name,
            *frame.image.shape[:2],
            to_detections(instances, image_id),
            {k: math.prod(v.shape[1:]) for k, v in extra_fields(instances).items()},
        )

    def in_order(self) -> list[ImageResult]:
        """One for each image and each frame, in the order of the source."""
        return [self._by_index[i] for i in sorted(self._by_index)]


def to_detections(instances: Instances, image_id: int) -> list[dict]:
    """
    Args:
        instances: predictions for one image, on the CPU.

    Returns:
        one dict for each object, in the format of COCO results ("image_id", "bbox" in XYWH pixels,
        "score", masks as RLE, keypoints), but with the model's class index as "category_id". Every
        other field of ``instances`` that holds a tensor of N rows is there under its own name.
    """
    if instances.has("pred_keypoints"):
        # Detectron2's function shifts them in place.
        copy = Instances(instances.image_size, **instances.get_fields())
        copy.pred_keypoints = instances.pred_keypoints.clone()
        instances = copy
    detections = instances_to_coco_json(instances, image_id)
    for name, rows in extra_fields(instances).items():
        for detection, row in zip(detections, rows.tolist()):
            detection[name] = row
    return detections


def extra_fields(instances: Instances) -> dict[str, torch.Tensor]:
    """The fields beyond Detectron2's own that are tensors with one row for each object."""
    return {
        name: torch.as_tensor(value)
        for name, value in instances.get_fields().items()
        if name not in _LEFT_OUT and isinstance(value, (torch.Tensor, np.ndarray))
    }
