"""Detectron2's test-time augmentation, whose detections keep how sure the head was of them."""

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
        if self._candidates_std is not None:
            candidates = Instances(
                shape_hw,
                pred_boxes=Boxes(all_boxes),
                scores=merged.scores.new_tensor(all_scores),
                pred_classes=merged.pred_classes.new_tensor(all_classes),
            )
            candidates.pred_boxes.clip(shape_hw)
            merged.pred_boxes_std = self._candidates_std[_indices(merged, candidates)]
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


def _indices(merged: Instances, candidates: Instances) -> torch.Tensor:
    """Which of C candidates each of D detections is, which the base class does not tell."""
    if len(merged) == 0:  # maybe of no candidates, among which nothing can be the first
        return merged.pred_classes
    same = (merged.pred_boxes.tensor[:, None] == candidates.pred_boxes.tensor).all(dim=-1)
    same &= merged.scores[:, None] == candidates.scores
    same &= merged.pred_classes[:, None] == candidates.pred_classes
    return same.int().argmax(dim=1)  # (D,)
