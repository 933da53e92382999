"""RetinaNet that localizes by C-BBL."""

from typing import Dict, Optional

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import RetinaNet

from .box_regression import CBBLBox2BoxTransform
from .build import build_grid, build_localization_loss, build_refinement
from .dense_detector import DistributionsPerAnchor
from .localization_loss import LocalizationLoss, stand_ins
from .output_layer import distribution_layer
from .refinement import Refinement

"""
Shape shorthand in this module:

    N: number of images
    A: number of anchors on one feature level
    G: number of grid points, MODEL.CBBL.RETINANET.NUM_INTERVALS + 1
"""


@META_ARCH_REGISTRY.register()
class CBBLRetinaNet(DistributionsPerAnchor, RetinaNet):
    """
    Detectron2's ``RetinaNet`` that predicts, for each coordinate of a box, a distribution over a
    grid of offsets. Use it with ``MODEL.META_ARCHITECTURE: CBBLRetinaNet``.
    """

    @configurable
    def __init__(
        self,
        *,
        head: torch.nn.Module,
        box2box_transform: CBBLBox2BoxTransform,
        localization_loss: Optional[LocalizationLoss] = None,
        box_reg_loss_weight: float = 0.25,
        voting_sigma: float = 0.0,
        refinement: Optional[Refinement] = None,
        init_std: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            head: its layer ``bbox_pred``, made for 4 numbers per anchor, is replaced.
            box2box_transform: holds the grid.
            localization_loss: None: that of the paper's first version, the class's defaults.
            box_reg_loss_weight: of all terms of the localization loss.
            voting_sigma: see :class:`CBBLFastRCNNOutputLayers`.
            refinement: in training; None: none.
            init_std: see :class:`CBBLFastRCNNOutputLayers`.
            kwargs: passed to ``RetinaNet``. Its ``box_reg_loss_type`` and ``smooth_l1_beta`` have
                no effect here.
        """
        kwargs["box_reg_loss_type"] = "smooth_l1"  # of the stand-ins in losses()
        super().__init__(head=head, box2box_transform=box2box_transform, **kwargs)
        self.localization_loss = localization_loss or LocalizationLoss()
        self.voting_sigma = voting_sigma
        self.refinement = refinement
        self.box_reg_loss_weight = box_reg_loss_weight
        head.bbox_pred = distribution_layer(
            head.bbox_pred,
            box2box_transform,
            weight_std=0.01,
            init_std=init_std,
            on_demand=True,
        )

    @classmethod
    def from_config(cls, cfg):
        c = cfg.MODEL.CBBL.RETINANET
        return {
            **super().from_config(cfg),
            "box2box_transform": CBBLBox2BoxTransform(
                weights=cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS,
                grid=build_grid(cfg, "RETINANET"),
                std_scale=cfg.MODEL.CBBL.STD_SCALE,
            ),
            "localization_loss": build_localization_loss(cfg),
            "voting_sigma": cfg.MODEL.CBBL.VOTING_SIGMA,
            "refinement": build_refinement(cfg),
            "box_reg_loss_weight": c.BBOX_REG_LOSS_WEIGHT,
            "init_std": c.INIT_STD,
        }

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes
    ) -> Dict[str, torch.Tensor]:
        """
        As in the base class, with ``pred_anchor_deltas`` the logits of shape ``(N, A, 4 * G)``.
        ``loss_box_uncertainty`` and ``loss_box_giou`` may stand beside ``loss_cls`` and
        ``loss_box_reg``.
        """
        losses = super().losses(
            anchors, pred_logits, gt_labels, stand_ins(pred_anchor_deltas, 4), gt_boxes
        )
        return losses | self._localization_losses(
            anchors, gt_labels, pred_anchor_deltas, gt_boxes, "loss_box_reg"
        )
