"""What RetinaNet and FCOS share once they localize by C-BBL."""

from typing import Dict

import torch

"""
Shape shorthand in this module:

    N: number of images
    A: number of anchors on one feature level
    G: number of grid points
"""


class DistributionsPerAnchor:
    """
    For a class of Detectron2's dense detectors, before it among the bases, with the attributes
    ``box2box_transform``, ``localization_loss`` and ``box_reg_loss_weight``.
    """

    def _transpose_dense_predictions(self, predictions, dims_per_anchor):
        num_classes, box_dim, *others = dims_per_anchor
        return super()._transpose_dense_predictions(
            predictions, [num_classes, box_dim * self.box2box_transform.num_points, *others]
        )

    def _localization_losses(
        self, anchors, gt_labels, logits, gt_boxes, name: str, prefix: str
    ) -> Dict[str, torch.Tensor]:
        """
        To be called after the ``losses`` of the base class, which bring its moving average of the
        number of positives up to date.

        Args:
            anchors, gt_labels, gt_boxes: as for ``losses``, the boxes as tensors.
            logits: for each level, shape ``(N, A, 4 * G)``.
            name, prefix: see :meth:`LocalizationLoss.named`.
        """
        labels = torch.stack(gt_labels)
        terms = self.localization_loss.dense(
            self.box2box_transform,
            logits,
            anchors,
            gt_boxes,
            foreground=(labels >= 0) & (labels != self.num_classes),
        )
        terms = terms / self.loss_normalizer * self.box_reg_loss_weight
        return self.localization_loss.named(terms, name, prefix)
