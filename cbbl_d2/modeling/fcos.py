"""FCOS from a YAML config, stock and with localization by C-BBL."""

from typing import Dict, Optional

import torch
from cbbl_d2.architectures import check_has_classes
from cbbl_d2.compat import box_tensors, dense_head_norm, with_a_box
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone.fpn import (
    LastLevelP6P7,
    build_retinanet_resnet_fpn_backbone,
)
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from .box_regression import CBBLBox2BoxTransformLinear
from .build import build_grid, build_localization_loss, build_refinement
from .dense_detector import DistributionsPerAnchor
from .localization_loss import LocalizationLoss, stand_ins
from .output_layer import distribution_layer
from .refinement import Refinement

"""
Shape shorthand in this module:

    N: number of images
    A: number of points ("anchors" as large as a stride) on one feature level
    G: number of grid points, MODEL.CBBL.FCOS.NUM_INTERVALS + 1
"""


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_p5_backbone(cfg, input_shape):
    """
    As Detectron2's ``build_retinanet_resnet_fpn_backbone``, with P6 computed from P5 instead of
    C5, as FCOS does (:paper:`fcos`) and Detectron2's Lazy config of it.
    """
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    backbone.top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return backbone


@META_ARCH_REGISTRY.register()
class ConfigurableFCOS(FCOS):
    """
    Detectron2's ``FCOS``, which has no YAML config, built from the keys of ``MODEL.FCOS``. Use it
    with ``MODEL.META_ARCHITECTURE: ConfigurableFCOS``.
    """

    @configurable
    def __init__(self, *, box_reg_loss_weight: float = 1.0, **kwargs):
        """
        Args:
            box_reg_loss_weight: of the localization loss; Detectron2's class has no weight for it.
            kwargs: passed to ``FCOS``.
        """
        super().__init__(**kwargs)
        self.box_reg_loss_weight = box_reg_loss_weight

    @classmethod
    def from_config(cls, cfg):
        check_has_classes(cfg)
        c = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        input_shape = [shapes[name] for name in c.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": FCOSHead(
                input_shape=input_shape,
                num_classes=c.NUM_CLASSES,
                conv_dims=[input_shape[0].channels] * c.NUM_CONVS,
                norm=dense_head_norm(c.NORM),
                prior_prob=c.PRIOR_PROB,
            ),
            "head_in_features": c.IN_FEATURES,
            "num_classes": c.NUM_CLASSES,
            "center_sampling_radius": c.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": c.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": c.FOCAL_LOSS_GAMMA,
            "test_score_thresh": c.SCORE_THRESH_TEST,
            "test_topk_candidates": c.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": c.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "box_reg_loss_weight": c.BBOX_REG_LOSS_WEIGHT,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances):
        """As in the base class, which in Detectron2 v0.6 fails for an image without objects."""
        return super().label_anchors(anchors, [with_a_box(x) for x in gt_instances])

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ):
        """
        As in the base class, whose GIoU loss fails on half precision, i.e. under autocast, and has
        no weight.
        """
        offsets = [x.float() for x in pred_anchor_deltas]
        losses = super().losses(anchors, pred_logits, gt_labels, offsets, gt_boxes, pred_centerness)
        losses["loss_fcos_loc"] = losses["loss_fcos_loc"] * self.box_reg_loss_weight
        return losses


@META_ARCH_REGISTRY.register()
class CBBLFCOS(DistributionsPerAnchor, ConfigurableFCOS):
    """
    Detectron2's ``FCOS`` that predicts, for each of the four distances of a point to the sides of
    its box, a distribution over a one-sided grid. C-BBL replaces the GIoU loss; centerness is
    unchanged. Use it with ``MODEL.META_ARCHITECTURE: CBBLFCOS``.
    """

    loss_prefix = "loss_fcos"

    @configurable
    def __init__(
        self,
        *,
        head: torch.nn.Module,
        box2box_transform: CBBLBox2BoxTransformLinear,
        localization_loss: Optional[LocalizationLoss] = None,
        box_reg_loss_weight: float = 0.25,
        voting_sigma: float = 0.0,
        refinement: Optional[Refinement] = None,
        **kwargs,
    ):
        """
        Args:
            head: its layer ``bbox_pred``, made for 4 numbers per point, is replaced.
            box2box_transform: holds the grid.
            localization_loss: None: that of the paper's first version, the class's defaults.
            box_reg_loss_weight: of all terms of the localization loss.
            voting_sigma: see :class:`CBBLFastRCNNOutputLayers`.
            refinement: in training; None: none.
            kwargs: passed to ``FCOS``.
        """
        super().__init__(
            head=head,
            box2box_transform=box2box_transform,
            box_reg_loss_weight=box_reg_loss_weight,
            **kwargs,
        )
        self.localization_loss = localization_loss or LocalizationLoss()
        self.voting_sigma = voting_sigma
        self.refinement = refinement
        head.bbox_pred = distribution_layer(
            head.bbox_pred, box2box_transform, weight_std=0.01, on_demand=True
        )

    @classmethod
    def from_config(cls, cfg):
        return {
            **super().from_config(cfg),
            "box2box_transform": CBBLBox2BoxTransformLinear(
                build_grid(cfg, "FCOS"), std_scale=cfg.MODEL.CBBL.STD_SCALE
            ),
            "localization_loss": build_localization_loss(cfg),
            "voting_sigma": cfg.MODEL.CBBL.VOTING_SIGMA,
            "refinement": build_refinement(cfg),
            "box_reg_loss_weight": cfg.MODEL.CBBL.FCOS.BBOX_REG_LOSS_WEIGHT,
        }

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ) -> Dict[str, torch.Tensor]:
        """
        As in the base class, with ``pred_anchor_deltas`` the logits of shape ``(N, A, 4 * G)``.
        ``loss_fcos_uncertainty`` and ``loss_fcos_giou`` may stand beside ``loss_fcos_cls``,
        ``loss_fcos_loc`` and ``loss_fcos_ctr``.
        """
        # Logits, as super() decodes what it gets: zeros are proper boxes.
        zeros = stand_ins(pred_anchor_deltas, 4 * self.box2box_transform.num_points)
        losses = super().losses(anchors, pred_logits, gt_labels, zeros, gt_boxes, pred_centerness)
        targets = box_tensors(gt_boxes)
        return losses | self._localization_losses(
            anchors, gt_labels, pred_anchor_deltas, targets, "loss_fcos_loc"
        )
