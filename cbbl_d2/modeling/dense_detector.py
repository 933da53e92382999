"""What RetinaNet and FCOS share once they localize by C-BBL."""

from typing import Dict, List

import torch
from cbbl_d2.compat import box_tensors
from detectron2.structures import Boxes, Instances

from .box_voting import variance_voting, voting_variances
from .localization_loss import pick_foreground
from .logits_on_demand import LogitsOnDemand
from .refinement import Localized, results_of
from .uncertainty import set_uncertainty

"""
Shape shorthand in this module:

    N: number of images
    A: number of anchors on one feature level
    G: number of grid points
"""


class _DecodedSources:
    """A transform that keeps what it has decoded."""

    def __init__(self, transform):
        self.box2box_transform = self
        self._transform = transform

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        self.logits, self.boxes = deltas, boxes
        return self._transform.apply_deltas(deltas, boxes)


class _DecodedCandidates:
    """A detector that keeps what it has decoded, for one call: the detector itself serves many."""

    def __init__(self, detector):
        self._detector = detector

    def __getattr__(self, name: str):
        return getattr(self._detector, name)

    def _decode_multi_level_predictions(self, *args) -> Instances:
        self.candidates = self._detector._decode_multi_level_predictions(*args)
        return self.candidates


class DistributionsPerAnchor:
    """
    For a class of Detectron2's dense detectors, before it among the bases, with the attributes
    ``box2box_transform``, ``localization_loss``, ``box_reg_loss_weight``, ``refinement`` (or None)
    and ``voting_sigma``, see :func:`variance_voting`.
    """

    has_distributions = True  # MODEL.CBBL.VOTING_SIGMA and STD_SCALE
    keeps_distributions = False  # see set_uncertainty()
    can_refine = True  # MODEL.CBBL.REFINEMENT
    loss_prefix = "loss_box"  # of the names of all losses of localization but the first

    def forward_training(self, images, features, predictions, gt_instances):
        """As in the base class, with the loss of the refinement, if there is one."""
        if self.refinement is None:
            return super().forward_training(images, features, predictions, gt_instances)
        with results_of(self, "label_anchors") as labeled:
            losses = super().forward_training(images, features, predictions, gt_instances)
        anchors = self.anchor_generator(features)
        ((gt_labels, gt_boxes),) = labeled
        targets, foreground = box_tensors(gt_boxes), self._is_foreground(gt_labels)

        def localize(features):
            # Neither the head's other branches are needed, nor other anchors.
            head = self.head
            logits = [LogitsOnDemand(head.bbox_pred, head.bbox_subnet(x)) for x in features]
            picked = pick_foreground(logits, anchors, targets, foreground)
            return [Localized(self.localization_loss, self.box2box_transform, *picked)]

        (loss,) = self.refinement(features, localize, self)
        losses[f"{self.loss_prefix}_refine"] = self._weighted(loss)
        return losses

    def _transpose_dense_predictions(self, predictions, dims_per_anchor):
        scores, logits, *others = predictions
        num_classes, box_dim, *other_dims = dims_per_anchor
        on_demand = isinstance(logits[0], LogitsOnDemand)
        if on_demand and self.training:  # with layers in evaluation mode
            logits, on_demand = [x.dense() for x in logits], False
        if on_demand:
            scores, *others = super()._transpose_dense_predictions(
                [scores, *others], [num_classes, *other_dims]
            )
            return [scores, logits, *others]
        return super()._transpose_dense_predictions(
            [scores, logits, *others],
            [num_classes, box_dim * self.box2box_transform.num_points, *other_dims],
        )

    def inference_single_image(self, anchors, scores, logits, image_size) -> Instances:
        """
        As in the base class, with variance voting if ``voting_sigma`` is not 0, and with one more
        field, ``pred_boxes_std``, see :meth:`CBBLFastRCNNOutputLayers.inference`.
        """
        detector = _DecodedCandidates(self)
        result = super().inference_single_image.__func__(
            detector, anchors, scores, logits, image_size
        )
        decoded = result.pred_boxes.tensor
        if self.voting_sigma > 0:
            candidates = detector.candidates
            variances = self.box2box_transform.side_variances(
                candidates.logits, candidates.source_boxes, candidates.pred_boxes.tensor
            )
            result.pred_boxes = Boxes(
                variance_voting(
                    result.pred_boxes.tensor,
                    result.pred_classes,
                    candidates.pred_boxes.tensor,
                    candidates.pred_classes,
                    candidates.scores,
                    voting_variances(variances, candidates.source_boxes),
                    self.voting_sigma,
                )
            )
        set_uncertainty(
            result,
            self.box2box_transform,
            result.logits,
            result.source_boxes,
            decoded,
            self.keeps_distributions,
        )
        for field in ("logits", "source_boxes"):
            result.remove(field)
        return result

    def _decode_per_level_predictions(
        self, anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, image_size
    ) -> Instances:
        """
        As in the base class, with the fields ``logits``, shape ``(D, 4 * G)``, and
        ``source_boxes``, shape ``(D, 4)``, of what each of the D boxes was decoded from.
        """
        # Which anchors are decoded is known only inside the function of the base class, which needs
        # nothing of the detector but this.
        decoder = _DecodedSources(self.box2box_transform)
        result = super()._decode_per_level_predictions.__func__(
            decoder, anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, image_size
        )
        result.logits, result.source_boxes = decoder.logits, decoder.boxes
        return result

    def _localization_losses(
        self, anchors, gt_labels, logits, gt_boxes, name: str
    ) -> Dict[str, torch.Tensor]:
        """
        To be called after the ``losses`` of the base class, which bring its moving average of the
        number of positives up to date.

        Args:
            anchors, gt_labels, gt_boxes: as for ``losses``, the boxes as tensors.
            logits: for each level, shape ``(N, A, 4 * G)``.
            name: see :meth:`LocalizationLoss.named`.
        """
        terms = self.localization_loss.dense(
            self.box2box_transform,
            logits,
            anchors,
            gt_boxes,
            foreground=self._is_foreground(gt_labels),
        )
        return self.localization_loss.named(self._weighted(terms), name, self.loss_prefix)

    def _is_foreground(self, gt_labels: List[torch.Tensor]) -> torch.Tensor:
        labels = torch.stack(gt_labels)
        return (labels >= 0) & (labels != self.num_classes)

    def _weighted(self, loss: torch.Tensor) -> torch.Tensor:
        return loss / self.loss_normalizer * self.box_reg_loss_weight
