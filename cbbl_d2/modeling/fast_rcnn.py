"""The last layers of a Fast R-CNN head, with C-BBL in the place of box regression."""

import logging
from typing import Dict, List, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from torch import nn

from cbbl_d2.config import check_cbbl_config
from cbbl_d2.distribution import cbbl_loss, gaussian_logits

from .box_regression import CBBLBox2BoxTransform
from .monitoring import log_localization_stats

"""
Shape shorthand in this module:

    R: number of ROIs, combined over all images, in the minibatch
    Rf: number of foreground ROIs among them
    Ri: number of ROIs in image i
    K: number of foreground classes
    B: number of grid points, MODEL.CBBL.NUM_INTERVALS + 1

Naming convention:

    offsets: the 4 weighted deltas (dx, dy, dw, dh) of a box against its proposal, as returned by
        ``Box2BoxTransform.get_deltas``
    logits: scores of the grid points; ``bbox_pred`` returns them as (R, 4 * B), or (R, K * 4 * B)
        for class-specific heads, coordinate-major
"""


class CBBLFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    Predicts, for each coordinate of a box, a distribution over a grid of offsets instead of the
    offset. Classification is Detectron2's own.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        box2box_transform: CBBLBox2BoxTransform,
        label: str = "two_hot",
        uncertainty: str = "entropy_gap",
        uncertainty_weight: float = 0.1,
        init_std: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            input_shape: shape of the input feature to this module.
            box2box_transform: holds the grid.
            label, uncertainty: see :func:`cbbl_d2.distribution.cbbl_loss`.
            uncertainty_weight: weight of the uncertainty loss relative to the cross entropy.
            init_std: width of the distribution that the untrained layer predicts, see
                :func:`cbbl_d2.distribution.gaussian_logits`; 0: the uniform distribution.
            kwargs: passed to ``FastRCNNOutputLayers``. Its ``box_reg_loss_type`` and
                ``smooth_l1_beta`` have no effect here.
        """
        super().__init__(input_shape, box2box_transform=box2box_transform, **kwargs)
        self.label = label
        self.uncertainty = uncertainty
        self.uncertainty_weight = uncertainty_weight

        # super() made the stock layer; ours is B times as wide, and starts alike.
        num_coordinates = self.bbox_pred.out_features
        num_points = box2box_transform.num_points
        self.bbox_pred = nn.Linear(self.bbox_pred.in_features, num_coordinates * num_points)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.constant_(self.bbox_pred.bias, 0)
        if init_std > 0:
            bias = gaussian_logits(box2box_transform.grid, init_std)
            self.bbox_pred.bias.data.copy_(bias.repeat(num_coordinates))

    @classmethod
    def from_config(cls, cfg, input_shape):
        check_cbbl_config(cfg)
        c = cfg.MODEL.CBBL
        return {
            **super().from_config(cfg, input_shape),
            "box2box_transform": CBBLBox2BoxTransform.from_config(
                cfg, weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
            ),
            "label": c.LABEL,
            "uncertainty": c.UNCERTAINTY,
            "uncertainty_weight": c.UNCERTAINTY_WEIGHT,
            "init_std": c.INIT_STD,
        }

    def losses(self, predictions, proposals) -> Dict[str, torch.Tensor]:
        """
        As in the base class, with ``loss_box_uncertainty`` beside ``loss_cls`` and
        ``loss_box_reg``, unless the uncertainty is "none".
        """
        losses = super().losses(predictions, proposals)
        # box_reg_loss() hands over both parts at once; super() has applied the weight of
        # "loss_box_reg" to both.
        losses["loss_box_reg"], uncertainty = losses["loss_box_reg"].unbind()
        if self.uncertainty != "none":
            losses["loss_box_uncertainty"] = uncertainty * self.uncertainty_weight
        return losses

    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes) -> torch.Tensor:
        """
        Args:
            proposal_boxes, gt_boxes: shape ``(R, 4)``.
            pred_deltas: logits, shape ``(R, 4 * B)`` or ``(R, K * 4 * B)``.
            gt_classes: shape ``(R,)``, in ``[0, K]``; K is background.

        Returns:
            Tensor: shape ``(2,)``: cross entropy and uncertainty, summed over the coordinates of
            the foreground ROIs and divided by R, as the base class normalises its loss.
        """
        foreground = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        logits = self._foreground_logits(pred_deltas, foreground, gt_classes)
        offsets = self.box2box_transform.get_deltas(
            proposal_boxes[foreground], gt_boxes[foreground]
        )
        finite = torch.isfinite(offsets).all(dim=1)
        if not finite.all():
            # A broken box must neither become an index nor poison the mean of the others.
            get_event_storage().put_scalar("cbbl/nonfinite_targets", int((~finite).sum()))
            log_first_n(
                logging.WARNING,
                "C-BBL leaves out targets that are not finite: some annotated boxes are NaN, "
                "infinite or of no size. The count is logged as cbbl/nonfinite_targets.",
                name=__name__,
            )
            logits, offsets = logits[finite], offsets[finite]

        grid = self.box2box_transform.grid_like(logits)
        log_localization_stats(logits, offsets, grid, self.label)
        losses = cbbl_loss(
            logits, offsets, grid, uncertainty=self.uncertainty, label=self.label, reduction="sum"
        )
        return torch.stack(losses) / max(gt_classes.numel(), 1.0)

    def inference(self, predictions: Tuple[torch.Tensor, torch.Tensor], proposals: List[Instances]):
        """
        As in the base class. A class-specific head decodes only the (box, class) pairs whose
        score is above the threshold: the others are dropped next anyway.
        """
        if self._is_class_agnostic(predictions[1]):
            return super().inference(predictions, proposals)

        scores = self.predict_probs(predictions, proposals)
        logits = predictions[1].split([len(p) for p in proposals])
        boxes = [
            self._decode_above_threshold(logits_i, p.proposal_boxes.tensor, scores_i)
            for logits_i, scores_i, p in zip(logits, scores, proposals)
        ]
        return fast_rcnn_inference(
            boxes,
            scores,
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )

    def _is_class_agnostic(self, logits: torch.Tensor) -> bool:
        return logits.shape[1] == 4 * self.box2box_transform.num_points

    def _foreground_logits(self, logits, foreground, gt_classes) -> torch.Tensor:
        """The logits that the loss sees, shape ``(Rf, 4, B)``: those of the true class."""
        num_points = self.box2box_transform.num_points
        if self._is_class_agnostic(logits):
            return logits[foreground].view(len(foreground), 4, num_points)
        logits = logits.view(len(logits), self.num_classes, 4, num_points)
        return logits[foreground, gt_classes[foreground]]

    def _decode_above_threshold(self, logits, proposal_boxes, scores) -> torch.Tensor:
        """
        Args:
            logits: shape ``(Ri, K * 4 * B)``.
            proposal_boxes: shape ``(Ri, 4)``.
            scores: shape ``(Ri, K + 1)``.

        Returns:
            Tensor: boxes, shape ``(Ri, K * 4)``; below the threshold just the proposal.
        """
        num_regions, num_classes = len(logits), self.num_classes
        num_logits = 4 * self.box2box_transform.num_points
        region, class_ = nonzero_tuple(scores[:, :num_classes] > self.test_score_thresh)
        logits = logits.view(num_regions, num_classes, num_logits)[region, class_]
        decoded = self.box2box_transform.apply_deltas(logits, proposal_boxes[region])
        boxes = proposal_boxes.float()[:, None].repeat(1, num_classes, 1)
        boxes[region, class_] = decoded
        return boxes.view(num_regions, num_classes * 4)
