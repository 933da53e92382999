"""ROI heads whose box predictor is C-BBL."""

from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads

from .fast_rcnn import CBBLFastRCNNOutputLayers


@ROI_HEADS_REGISTRY.register()
class CBBLROIHeads(StandardROIHeads):
    """
    Detectron2's ``StandardROIHeads`` (Faster R-CNN with FPN) with a C-BBL box predictor. Use it
    with ``MODEL.ROI_HEADS.NAME: CBBLROIHeads``.
    """

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)
        ret["box_predictor"] = CBBLFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret
