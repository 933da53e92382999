"""What detections carry of the distributions that their boxes were decoded from."""

import torch
from detectron2.structures import Instances
from torch import nn

"""
Shape shorthand in this module:

    D: number of detections in an image
    G: number of grid points
"""


def set_uncertainty(
    result: Instances,
    transform,
    logits: torch.Tensor,
    source_boxes: torch.Tensor,
    decoded: torch.Tensor,
    keeps_distributions: bool,
) -> None:
    """
    Set ``pred_boxes_std``, shape ``(D, 4)``: the standard deviation of the sides x1, y1, x2, y2,
    relative to the width or height of the box: it holds at any size of the image. Where asked for,
    also the distributions:

    * ``offset_probabilities``, shape ``(D, 4, G)``;
    * ``offset_coordinates``, shape ``(D, 4, G)``: what each grid point stands for, see the method
      ``coordinates`` of the transforms, relative to the width or height of the image.

    Args:
        result: D detections; changed in place. Sizes are those that their ``pred_boxes``, after
            voting where there is any, have within the image.
        transform: :class:`CBBLBox2BoxTransform` or :class:`CBBLBox2BoxTransformLinear`.
        logits, source_boxes: what the boxes were decoded from, shapes ``(D, 4 * G)`` and
            ``(D, 4)``, XYXY.
        decoded: the boxes as decoded, shape ``(D, 4)``.
    """
    deviations = transform.side_deviations(logits, source_boxes, decoded)
    boxes = result.pred_boxes.clone()
    boxes.clip(result.image_size)  # as Detectron2 does with those of dense detectors later
    result.pred_boxes_std = relative_std(deviations, boxes.tensor)
    if keeps_distributions:
        height, width = result.image_size
        coordinates = transform.coordinates(source_boxes)
        result.offset_probabilities = transform.probabilities(logits)
        result.offset_coordinates = (
            coordinates / coordinates.new_tensor([width, height] * 2)[:, None]
        )


def relative_std(deviations: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`std_in_pixels`."""
    return deviations / _sizes(boxes)


def std_in_pixels(relative: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """
    Args:
        relative: the field ``pred_boxes_std``, shape ``(D, 4)``.
        boxes: of the same detections, shape ``(D, 4)``, XYXY.

    Returns:
        Tensor: standard deviations of the sides, shape ``(D, 4)``, pixels.
    """
    return relative * _sizes(boxes)


def _sizes(boxes: torch.Tensor) -> torch.Tensor:
    """Width, height, width, height, shape ``(D, 4)``; never 0."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6).repeat(1, 2)


def keep_distributions(model: nn.Module) -> tuple[str, ...]:
    """
    From here on the detections of a model carry their distributions, see :func:`set_uncertainty`.

    Returns:
        the names of the four coordinates; empty for a model whose boxes are not C-BBL's.
    """
    names: tuple[str, ...] = ()
    for module in model.modules():
        if hasattr(module, "keeps_distributions"):
            module.keeps_distributions = True
            names = module.box2box_transform.coordinate_names
    return names
