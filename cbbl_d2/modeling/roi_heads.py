"""ROI heads whose box predictors are C-BBL."""

from typing import Dict, List, Optional

import torch
from cbbl_d2.errors import ConfigError
from detectron2.config import configurable
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.roi_heads import select_foreground_proposals
from detectron2.structures import Instances
from torch import nn

from .box_regression import CBBLBox2BoxTransform
from .build import build_cascade_grids, build_refinement
from .fast_rcnn import CBBLFastRCNNOutputLayers
from .iterated_boxes import IteratedBoxes
from .refinement import Refinement, results_of


class _RefinedBoxes:
    """For a class of Detectron2's ROI heads, before it among the bases: what ours share."""

    has_distributions = True  # MODEL.CBBL.VOTING_SIGMA and STD_SCALE
    can_refine = True  # MODEL.CBBL.REFINEMENT

    @configurable
    def __init__(self, *, refinement: Optional[Refinement] = None, **kwargs):
        """
        Args:
            refinement: of the box branch in training; None: none.
            kwargs: passed to the base class.
        """
        super().__init__(**kwargs)
        self.refinement = refinement

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {**super().from_config(cfg, input_shape), "refinement": build_refinement(cfg)}

    def _predict(self, features: List[torch.Tensor], proposals: List[Instances], stage: int):
        """Predictions of the box branch, that of a stage of a Cascade R-CNN."""
        raise NotImplementedError

    def _refinement_losses(
        self, features: List[torch.Tensor], stages: List[List[Instances]]
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            features: for each level, shape ``(N, C, H, W)``.
            stages: for each stage of the box branch, the labeled proposals of each image.

        Returns:
            dict: ``loss_box_refine``, in a Cascade R-CNN one for each stage.
        """
        predictors = self.box_predictor
        names = [f"loss_box_refine_stage{k}" for k in range(len(stages))]
        if not isinstance(predictors, nn.ModuleList):
            predictors, names = [predictors], ["loss_box_refine"]
        regions = stages
        # The others have no loss of localization, but batch norm normalizes by them, too.
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()):
            regions = [select_foreground_proposals(x, self.num_classes)[0] for x in stages]
        losses = self.refinement(
            features,
            lambda features: [
                predictor.localized(self._predict(features, x, stage), x)
                for stage, (predictor, x) in enumerate(zip(predictors, regions))
            ],
            self,
        )
        return {
            # Normalized and weighted as loss_box_reg.
            name: loss / max(sum(map(len, x)), 1) * predictor.loss_weight.get("loss_box_reg", 1.0)
            for name, loss, predictor, x in zip(names, losses, predictors, stages)
        }


@ROI_HEADS_REGISTRY.register()
class CBBLROIHeads(IteratedBoxes, _RefinedBoxes, StandardROIHeads):
    """
    Detectron2's ``StandardROIHeads`` (Faster, Mask and Keypoint R-CNN with FPN) with a C-BBL box
    predictor. Use it with ``MODEL.ROI_HEADS.NAME: CBBLROIHeads``.
    """

    def _forward_box(self, features, proposals):
        if not self.training or self.refinement is None:
            return super()._forward_box(features, proposals)
        # Comes first: super() may put the predicted boxes in the place of the proposals.
        maps = [features[name] for name in self.box_in_features]
        refined = self._refinement_losses(maps, [proposals])
        return super()._forward_box(features, proposals) | refined

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = CBBLFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret


@ROI_HEADS_REGISTRY.register()
class CBBLCascadeROIHeads(_RefinedBoxes, CascadeROIHeads):
    """
    Detectron2's ``CascadeROIHeads`` with a C-BBL box predictor in every stage. The stages may have
    different grids, see ``MODEL.CBBL.CASCADE``. Each grid applies to the offsets after the weights
    of its stage, which grow from stage to stage as the offsets shrink, so that one grid suits all.

    As in the base class, scores are the mean of all stages and boxes those of the last one, whose
    distributions also give ``pred_boxes_std`` and the votes, see
    :meth:`CBBLFastRCNNOutputLayers.inference`. A refinement moves the feature maps once, along the
    uncertainty of all stages.
    """

    def _forward_box(self, features, proposals, targets=None):
        if self.training and self.refinement is None:
            return super()._forward_box(features, proposals, targets)
        if self.training:
            with results_of(self, "_match_and_label_boxes") as later_stages:
                losses = super()._forward_box(features, proposals, targets)
            maps = [features[name] for name in self.box_in_features]
            return losses | self._refinement_losses(maps, [proposals, *later_stages])
        # The base class does not say which region a detection comes from.
        features = [features[name] for name in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        boxes, scores = None, []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
            predictions = self._run_stage(features, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            scores.append(predictor.predict_probs(predictions, proposals))
        mean = [sum(of_image) * (1.0 / len(scores)) for of_image in zip(*scores)]
        detections, _ = predictor.detect(mean, predictions, proposals)
        return detections

    def _predict(self, features, proposals, stage):
        return self._run_stage(features, proposals, stage)

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False: a Cascade R-CNN of Detectron2 "
                "has one box for all classes: set it True"
            )
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictors"] = [
            CBBLFastRCNNOutputLayers(
                cfg,
                box_head.output_shape,
                box2box_transform=CBBLBox2BoxTransform(
                    weights=weights, grid=grid, std_scale=cfg.MODEL.CBBL.STD_SCALE
                ),
            )
            for box_head, weights, grid in zip(
                ret["box_heads"],
                cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS,
                build_cascade_grids(cfg),
            )
        ]
        return ret


@ROI_HEADS_REGISTRY.register()
class CBBLRes5ROIHeads(_RefinedBoxes, Res5ROIHeads):
    """Detectron2's ``Res5ROIHeads`` (the C4 models, without FPN) with a C-BBL box predictor."""

    def forward(self, images, features, proposals, targets=None):
        if not self.training or self.refinement is None:
            return super().forward(images, features, proposals, targets)
        with results_of(self, "label_and_sample_proposals") as sampled:
            instances, losses = super().forward(images, features, proposals, targets)
        maps = [features[name] for name in self.in_features]
        return instances, losses | self._refinement_losses(maps, sampled)

    def _predict(self, features, proposals, stage):
        pooled = self._shared_roi_transform(features, [p.proposal_boxes for p in proposals])
        return self.box_predictor(pooled.mean(dim=[2, 3]))

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        num_features = ret["box_predictor"].cls_score.in_features
        ret["box_predictor"] = CBBLFastRCNNOutputLayers(cfg, num_features)
        return ret
