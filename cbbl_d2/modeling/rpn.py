"""A region proposal network that localizes by C-BBL."""

from typing import Dict, List, Optional

import torch
from detectron2.config import configurable
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Instances

from .box_regression import CBBLBox2BoxTransform
from .build import build_grid, build_localization_loss, build_refinement
from .localization_loss import LocalizationLoss, pick_foreground, stand_ins
from .output_layer import distribution_layer
from .refinement import Localized, Refinement, results_of

"""
Shape shorthand in this module:

    N: number of images
    A: number of anchors on one feature level
    G: number of grid points, MODEL.CBBL.RPN.NUM_INTERVALS + 1
"""


@PROPOSAL_GENERATOR_REGISTRY.register()
class CBBLRPN(RPN):
    """
    Detectron2's ``RPN`` that predicts, for each coordinate of a proposal, a distribution over a
    grid of offsets. Objectness, matching and sampling are Detectron2's own. Use it with
    ``MODEL.PROPOSAL_GENERATOR.NAME: CBBLRPN``, with any ROI heads.
    """

    can_refine = True  # MODEL.CBBL.REFINEMENT

    @configurable
    def __init__(
        self,
        *,
        head: torch.nn.Module,
        anchor_generator: torch.nn.Module,
        box2box_transform: CBBLBox2BoxTransform,
        localization_loss: Optional[LocalizationLoss] = None,
        init_std: float = 0.0,
        refinement: Optional[Refinement] = None,
        **kwargs,
    ):
        """
        Args:
            head: its layer ``anchor_deltas``, made for 4 numbers per anchor, is replaced.
            anchor_generator: its ``box_dim`` becomes ``4 * G``: the base class reshapes the
                predictions by it.
            box2box_transform: holds the grid.
            localization_loss: None: that of the paper's first version, the class's defaults.
            init_std: see :class:`CBBLFastRCNNOutputLayers`.
            refinement: in training; None: none.
            kwargs: passed to ``RPN``. Its ``box_reg_loss_type`` and ``smooth_l1_beta`` have no
                effect here.
        """
        kwargs["box_reg_loss_type"] = "smooth_l1"  # of the stand-ins in losses()
        super().__init__(
            head=head,
            anchor_generator=anchor_generator,
            box2box_transform=box2box_transform,
            **kwargs,
        )
        self.localization_loss = localization_loss or LocalizationLoss()
        self.refinement = refinement
        anchor_generator.box_dim = 4 * box2box_transform.num_points
        head.anchor_deltas = distribution_layer(
            head.anchor_deltas, box2box_transform, weight_std=0.01, init_std=init_std
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "box2box_transform": CBBLBox2BoxTransform(
                weights=cfg.MODEL.RPN.BBOX_REG_WEIGHTS, grid=build_grid(cfg, "RPN")
            ),
            "localization_loss": build_localization_loss(cfg),
            "init_std": cfg.MODEL.CBBL.RPN.INIT_STD,
            "refinement": build_refinement(cfg),
        }

    def forward(self, images, features, gt_instances=None):
        """As in the base class, with ``loss_rpn_refine`` if there is a refinement."""
        if not self.training or self.refinement is None:
            return super().forward(images, features, gt_instances)
        with results_of(self, "label_and_sample_anchors") as labeled:
            proposals, losses = super().forward(images, features, gt_instances)
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        ((gt_labels, gt_boxes),) = labeled

        def localize(maps):
            _, outputs = self.rpn_head(maps)
            logits = [permute_to_N_HWA_K(x, self.anchor_generator.box_dim) for x in outputs]
            picked = pick_foreground(logits, anchors, gt_boxes, torch.stack(gt_labels) == 1)
            return [Localized(self.localization_loss, self.box2box_transform, *picked)]

        (loss,) = self.refinement(maps, localize, self)
        return proposals, {**losses, "loss_rpn_refine": self._weighted(loss, len(gt_labels))}

    def losses(
        self, anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes
    ) -> Dict[str, torch.Tensor]:
        """
        As in the base class, with ``pred_anchor_deltas`` the logits of shape ``(N, A, 4 * G)``.
        ``loss_rpn_uncertainty`` and ``loss_rpn_giou`` may stand beside ``loss_rpn_cls`` and
        ``loss_rpn_loc``.
        """
        losses = super().losses(
            anchors, pred_objectness_logits, gt_labels, stand_ins(pred_anchor_deltas, 4), gt_boxes
        )
        terms = self.localization_loss.dense(
            self.box2box_transform,
            pred_anchor_deltas,
            anchors,
            gt_boxes,
            foreground=torch.stack(gt_labels) == 1,
            prefix="rpn/cbbl",
        )
        terms = self._weighted(terms, len(gt_labels))
        losses.update(self.localization_loss.named(terms, "loss_rpn_loc", "loss_rpn"))
        return losses

    def _weighted(self, loss: torch.Tensor, num_images: int) -> torch.Tensor:
        normalizer = self.batch_size_per_image * num_images  # as in super().losses
        return loss / normalizer * self.loss_weight.get("loss_rpn_loc", 1.0)

    @torch.no_grad()
    def predict_proposals(
        self, anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
    ) -> List[Instances]:
        """
        As in the base class, but only the proposals of the highest objectness, which it would
        select after decoding all, are decoded.
        """
        pre_nms_topk = self.pre_nms_topk[self.training]
        scores, proposals = [], []
        for anchors_l, scores_l, logits_l in zip(
            anchors, pred_objectness_logits, pred_anchor_deltas
        ):
            num_anchors = scores_l.shape[1]
            if isinstance(num_anchors, torch.Tensor):  # in tracing
                num_kept = torch.clamp(num_anchors, max=pre_nms_topk)
            else:
                num_kept = min(num_anchors, pre_nms_topk)
            scores_l, kept = scores_l.topk(num_kept, dim=1)  # (N, num_kept)
            logits_l = logits_l.gather(1, kept[:, :, None].expand(-1, -1, logits_l.shape[2]))
            boxes = self.box2box_transform.apply_deltas(
                logits_l.flatten(0, 1), anchors_l.tensor[kept.flatten()]
            )
            scores.append(scores_l)
            proposals.append(boxes.unflatten(0, kept.shape))
        return find_top_rpn_proposals(
            proposals,
            scores,
            image_sizes,
            self.nms_thresh,
            pre_nms_topk,
            self.post_nms_topk[self.training],
            self.min_box_size,
            self.training,
        )
