"""Detectron2's test-time augmentation, whose detections keep how sure the head was of them."""

from typing import Optional

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from fvcore.transforms.transform import Transform

from .refinement import results_of

"""
Shape shorthand in this module:

    D: number of detections in an image
    C: number of detections in all augmentations of it, from which these are chosen
"""


class CBBLGeneralizedRCNNWithTTA(GeneralizedRCNNWithTTA):
    """
    As the base class, which chooses among the detections in all augmentations of an image by NMS.
    Each of those that are kept keeps its ``pred_boxes_std``, shape ``(D, 4)``, see
    :func:`set_uncertainty`. Detections of other models have no such field, and get none.
    """

    # Of the image at hand, between the two methods below: shape (C, 4), or None.
    _candidates_std: Optional[torch.Tensor] = None

    def _get_augmented_boxes(self, augmented_inputs, tfms):
        with results_of(self, "_batch_inference") as results:
            detections = super()._get_augmented_boxes(augmented_inputs, tfms)
        (outputs,) = results
        self._candidates_std = None
        if all(output.has("pred_boxes_std") for output in outputs):
            std = [_undo_flips(o.pred_boxes_std, tfm) for o, tfm in zip(outputs, tfms)]
            self._candidates_std = torch.cat(std)
        return detections

    def _merge_detections(self, all_boxes, all_scores, all_classes, shape_hw) -> Instances:
        merged = super()._merge_detections(all_boxes, all_scores, all_classes, shape_hw)
        std, self._candidates_std = self._candidates_std, None
        if std is None:
            return merged
        if len(merged) == 0:
            std = std[:0]
        else:
            # Which candidates were kept is not returned: they have the same box, score and class.
            boxes = Boxes(all_boxes)
            boxes.clip(shape_hw)
            same = (merged.pred_boxes.tensor[:, None] == boxes.tensor).all(dim=-1)  # (D, C)
            same &= merged.scores[:, None] == torch.stack(all_scores)
            same &= merged.pred_classes[:, None] == torch.stack(all_classes)
            std = std[same.int().argmax(dim=1)]
        merged.pred_boxes_std = std
        return merged


def _undo_flips(std: torch.Tensor, transform: Transform) -> torch.Tensor:
    """
    Args:
        std: of the sides x1, y1, x2, y2 in an image that ``transform`` has made, shape ``(C, 4)``.
        transform: resizes and flips.

    Returns:
        Tensor: of the sides in the image before.
    """
    (x1, y1), (x2, y2) = transform.apply_coords(np.array([[0.0, 0.0], [1.0, 1.0]]))
    sides = [2 if x2 < x1 else 0, 3 if y2 < y1 else 1]
    return std[:, [*sides, sides[0] ^ 2, sides[1] ^ 2]]
