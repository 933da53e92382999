"""ROI heads whose box predictors are C-BBL."""

from cbbl_d2.errors import ConfigError
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)

from .box_regression import CBBLBox2BoxTransform
from .build import build_cascade_grids
from .fast_rcnn import CBBLFastRCNNOutputLayers


@ROI_HEADS_REGISTRY.register()
class CBBLROIHeads(StandardROIHeads):
    """
    Detectron2's ``StandardROIHeads`` (Faster, Mask and Keypoint R-CNN with FPN) with a C-BBL box
    predictor. Use it with ``MODEL.ROI_HEADS.NAME: CBBLROIHeads``.
    """

    can_vote = True  # MODEL.CBBL.VOTING_SIGMA

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = CBBLFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret


@ROI_HEADS_REGISTRY.register()
class CBBLCascadeROIHeads(CascadeROIHeads):
    """
    Detectron2's ``CascadeROIHeads`` with a C-BBL box predictor in every stage. The stages may have
    different grids, see ``MODEL.CBBL.CASCADE``. Each grid applies to the offsets after the weights
    of its stage, which grow from stage to stage as the offsets shrink, so that one grid suits all.

    As in the base class, scores are the mean of all stages and boxes those of the last one, whose
    distributions also give ``pred_boxes_std`` and the votes, see
    :meth:`CBBLFastRCNNOutputLayers.inference`.
    """

    can_vote = True

    def _forward_box(self, features, proposals, targets=None):
        if self.training:
            return super()._forward_box(features, proposals, targets)
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
class CBBLRes5ROIHeads(Res5ROIHeads):
    """Detectron2's ``Res5ROIHeads`` (the C4 models, without FPN) with a C-BBL box predictor."""

    can_vote = True

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        num_features = ret["box_predictor"].cls_score.in_features
        ret["box_predictor"] = CBBLFastRCNNOutputLayers(cfg, num_features)
        return ret
