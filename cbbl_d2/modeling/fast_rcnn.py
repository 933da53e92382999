"""The last layers of a Fast R-CNN head, with C-BBL in the place of box regression."""

from typing import Dict, List, Optional, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat, nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances

from .box_regression import CBBLBox2BoxTransform
from .box_voting import variance_voting, voting_variances
from .build import build_grid, build_localization_loss
from .localization_loss import LocalizationLoss
from .output_layer import distribution_layer
from .refinement import Localized
from .uncertainty import set_uncertainty

"""
Shape shorthand in this module:

    R: number of ROIs, combined over all images, in the minibatch
    Rf: number of foreground ROIs among them
    Ri: number of ROIs in image i
    D: number of detections in an image
    K: number of foreground classes
    G: number of grid points, MODEL.CBBL.NUM_INTERVALS + 1
    T: number of terms of the localization loss, see LocalizationLoss

Naming convention:

    offsets: the 4 weighted deltas (dx, dy, dw, dh) of a box against its proposal, as returned by
        ``Box2BoxTransform.get_deltas``
    logits: scores of the grid points; ``bbox_pred`` returns them as (R, 4 * G), or (R, K * 4 * G)
        for class-specific heads, coordinate-major
"""


class CBBLFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    Predicts, for each coordinate of a box, a distribution over a grid of offsets instead of the
    offset. Classification is Detectron2's own.

    Attributes:
        keeps_distributions: detections carry their distributions, see :func:`set_uncertainty`.
    """

    keeps_distributions = False

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        box2box_transform: CBBLBox2BoxTransform,
        localization_loss: Optional[LocalizationLoss] = None,
        init_std: float = 0.0,
        voting_sigma: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the input feature to this module.
            box2box_transform: holds the grid.
            localization_loss: None: that of the paper's first version, the class's defaults.
            init_std: width of the distribution that the untrained layer predicts, see
                :func:`cbbl_d2.distribution.gaussian_logits`; 0: the uniform distribution.
            voting_sigma: of :func:`variance_voting` at inference; 0: no voting.
            kwargs: passed to ``FastRCNNOutputLayers``. Its ``box_reg_loss_type`` and
                ``smooth_l1_beta`` have no effect here.
        """
        super().__init__(input_shape, box2box_transform=box2box_transform, **kwargs)
        self.localization_loss = localization_loss or LocalizationLoss()
        self.voting_sigma = voting_sigma
        self.bbox_pred = distribution_layer(
            self.bbox_pred, box2box_transform, weight_std=0.001, init_std=init_std
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "box2box_transform": CBBLBox2BoxTransform(
                weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS,
                grid=build_grid(cfg),
                std_scale=cfg.MODEL.CBBL.STD_SCALE,
            ),
            "localization_loss": build_localization_loss(cfg),
            "init_std": cfg.MODEL.CBBL.INIT_STD,
            "voting_sigma": cfg.MODEL.CBBL.VOTING_SIGMA,
        }

    def losses(self, predictions, proposals) -> Dict[str, torch.Tensor]:
        """
        As in the base class, with ``loss_box_uncertainty`` (unless the uncertainty is "none") and
        ``loss_box_giou`` (if it has a weight) beside ``loss_cls`` and ``loss_box_reg``.
        """
        losses = super().losses(predictions, proposals)
        # box_reg_loss() hands over all terms at once; super() has applied the weight of
        # "loss_box_reg" to all of them.
        terms = losses.pop("loss_box_reg")
        losses.update(self.localization_loss.named(terms, "loss_box_reg", "loss_box"))
        return losses

    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes) -> torch.Tensor:
        """
        Args:
            proposal_boxes, gt_boxes: shape ``(R, 4)``.
            pred_deltas: logits, shape ``(R, 4 * G)`` or ``(R, K * 4 * G)``.
            gt_classes: shape ``(R,)``, in ``[0, K]``; K is background.

        Returns:
            Tensor: shape ``(T,)``: the terms of the loss, summed over the coordinates of the
            foreground ROIs and divided by R, as the base class normalizes its loss.
        """
        foreground = self._foreground(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        terms = self.localization_loss(self.box2box_transform, *foreground)
        return terms / max(gt_classes.numel(), 1.0)

    def localized(self, predictions, proposals: List[Instances]) -> Localized:
        """
        Args:
            predictions, proposals: as for :meth:`losses`.
        """
        proposal_boxes = cat([p.proposal_boxes.tensor for p in proposals])
        # Without objects in an image there is no such field, nor a foreground; as in super().losses
        gt_boxes = cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
        )
        gt_classes = cat([p.gt_classes for p in proposals])
        foreground = self._foreground(proposal_boxes, gt_boxes, predictions[1], gt_classes)
        return Localized(self.localization_loss, self.box2box_transform, *foreground)

    def _foreground(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
        """
        Args:
            those of :meth:`box_reg_loss`.

        Returns:
            logits of the class, proposals and targets of the foreground, of the shapes
            ``(Rf, 4 * G)``, ``(Rf, 4)`` and ``(Rf, 4)``.
        """
        foreground = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        logits = self._logits_of_class(pred_deltas[foreground], gt_classes[foreground])
        return logits, proposal_boxes[foreground], gt_boxes[foreground]

    def inference(self, predictions: Tuple[torch.Tensor, torch.Tensor], proposals: List[Instances]):
        """
        As in the base class, with variance voting if ``voting_sigma`` is not 0. The results have
        one more field, ``pred_boxes_std``: shape ``(D, 4)``, the standard deviation of the sides
        x1, y1, x2, y2, as the head predicts it, relative to the width or height of the box, see
        :func:`set_uncertainty`.

        A class-specific head decodes only the (box, class) pairs whose score is above the
        threshold: the others are dropped next anyway.
        """
        return self.detect(self.predict_probs(predictions, proposals), predictions, proposals)

    def detect(self, scores, predictions: Tuple[torch.Tensor, torch.Tensor], proposals):
        """
        :meth:`inference` with other scores than those of ``predictions``.

        Args:
            scores: of each image, shape ``(Ri, K + 1)``.
        """
        # Not len(), which tracing would make a constant.
        logits = predictions[1].split([p.proposal_boxes.tensor.shape[0] for p in proposals])
        if self._is_class_agnostic(predictions[1]):
            boxes = self.predict_boxes(predictions, proposals)
        else:
            boxes = [
                self._decode_above_threshold(logits_i, p.proposal_boxes.tensor, scores_i)
                for logits_i, scores_i, p in zip(logits, scores, proposals)
            ]
        results, kept = fast_rcnn_inference(
            boxes,
            scores,
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        for result, kept_i, boxes_i, scores_i, logits_i, p in zip(
            results, kept, boxes, scores, logits, proposals
        ):
            regions = boxes_i, scores_i, logits_i, p.proposal_boxes.tensor
            # fast_rcnn_inference leaves out what is not finite before it counts.
            finite = torch.isfinite(boxes_i).all(dim=1) & torch.isfinite(scores_i).all(dim=1)
            if not finite.all():
                regions = [x[finite] for x in regions]
            self._add_uncertainty(result, kept_i, *regions)
        return results, kept

    def _add_uncertainty(
        self, result: Instances, regions, region_boxes, scores, logits, proposal_boxes
    ) -> None:
        """
        Vote, and set ``pred_boxes_std``.

        Args:
            result: D detections of one image; changed in place.
            regions: the ROI of each detection, shape ``(D,)``.
            region_boxes: decoded, of the Ri ROIs of the image: ``(Ri, 4)`` or ``(Ri, K * 4)``.
            scores, logits, proposal_boxes: of these ROIs.
        """
        if self.voting_sigma > 0:
            result.pred_boxes = self._vote(result, region_boxes, scores, logits, proposal_boxes)
        set_uncertainty(
            result,
            self.box2box_transform,
            self._logits_of_class(logits[regions], result.pred_classes),
            proposal_boxes[regions],
            self._of_class(region_boxes[regions], result.pred_classes, 4),
            self.keeps_distributions,
        )

    def _vote(self, result: Instances, region_boxes, scores, logits, proposal_boxes) -> Boxes:
        """As :meth:`_add_uncertainty`; the boxes of the detections after the vote."""
        regions, classes = nonzero_tuple(scores[:, : self.num_classes] > self.test_score_thresh)
        proposal_boxes = proposal_boxes[regions]
        decoded = self._of_class(region_boxes[regions], classes, 4)
        variances = self.box2box_transform.side_variances(
            self._logits_of_class(logits[regions], classes), proposal_boxes, decoded
        )
        candidates = Boxes(decoded)
        candidates.clip(result.image_size)  # as NMS has them
        return Boxes(
            variance_voting(
                result.pred_boxes.tensor,
                result.pred_classes,
                candidates.tensor,
                classes,
                scores[regions, classes],
                voting_variances(variances, proposal_boxes),
                self.voting_sigma,
            )
        )

    def _is_class_agnostic(self, logits: torch.Tensor) -> bool:
        return logits.shape[1] == 4 * self.box2box_transform.num_points

    def _logits_of_class(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """:meth:`_of_class` for logits: shape ``(R, 4 * G)``."""
        return self._of_class(logits, classes, 4 * self.box2box_transform.num_points)

    def _of_class(self, values: torch.Tensor, classes: torch.Tensor, width: int) -> torch.Tensor:
        return of_class(values, classes, self.num_classes, width)

    def _decode_above_threshold(self, logits, proposal_boxes, scores) -> torch.Tensor:
        """
        Args:
            logits: shape ``(Ri, K * 4 * G)``.
            proposal_boxes: shape ``(Ri, 4)``.
            scores: shape ``(Ri, K + 1)``.

        Returns:
            Tensor: boxes, shape ``(Ri, K * 4)``; below the threshold just the proposal.
        """
        num_classes = self.num_classes
        region, class_ = nonzero_tuple(scores[:, :num_classes] > self.test_score_thresh)
        num_logits = 4 * self.box2box_transform.num_points
        logits = logits.unflatten(1, (num_classes, num_logits))[region, class_]
        boxes = proposal_boxes.float()[:, None].repeat(1, num_classes, 1)
        boxes[region, class_] = self.box2box_transform.apply_deltas(logits, proposal_boxes[region])
        return boxes.flatten(1)


def of_class(
    values: torch.Tensor, classes: torch.Tensor, num_classes: int, width: int
) -> torch.Tensor:
    """
    Args:
        values: of some ROIs, shape ``(R, width)`` or ``(R, K * width)``.
        classes: shape ``(R,)``, in ``[0, K)``.
        num_classes: ``K``.

    Returns:
        Tensor: shape ``(R, width)``.
    """
    if values.shape[1] == width:
        return values
    regions = torch.arange(values.shape[0], device=values.device)
    # No -1, which is ambiguous for zero regions.
    return values.unflatten(1, (num_classes, width))[regions, classes]
