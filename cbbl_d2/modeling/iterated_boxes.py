"""A box head that is applied to its own boxes, for C-BBL and for Detectron2's regression alike."""

from typing import List

import torch
from cbbl_d2.config import check_cbbl_config
from detectron2.config import configurable
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Boxes, Instances

from .fast_rcnn import of_class


class IteratedBoxes:
    """
    For a class of Detectron2's ``StandardROIHeads``, before it among the bases. At inference the
    box head moves each proposal to the box that it predicts, and is applied again, there: iterative
    localization (Gidaris and Komodakis, arXiv 1505.01749). Scores and boxes are those of the last
    time. Nothing is trained for it.
    """

    can_iterate = True  # MODEL.ROI_BOX_HEAD.ITERATIONS_TEST

    @configurable
    def __init__(self, *, box_iterations: int = 1, **kwargs):
        """
        Args:
            box_iterations: how often the box head is applied at inference; 1: once, as in the base
                class.
            kwargs: passed to the base class.

        Raises:
            ValueError: ``box_iterations`` is less than 1.
        """
        if box_iterations < 1:
            raise ValueError(f"box_iterations must be 1 or more; got {box_iterations}")
        super().__init__(**kwargs)
        self.box_iterations = box_iterations

    @classmethod
    def from_config(cls, cfg, input_shape):
        check_cbbl_config(cfg)
        iterations = cfg.MODEL.ROI_BOX_HEAD.ITERATIONS_TEST
        return {**super().from_config(cfg, input_shape), "box_iterations": iterations}

    def _forward_box(self, features, proposals):
        if not self.training:
            maps = [features[name] for name in self.box_in_features]
            for _ in range(self.box_iterations - 1):
                proposals = self._move(maps, proposals)
        return super()._forward_box(features, proposals)

    def _predict(self, features: List[torch.Tensor], proposals: List[Instances], stage: int = 0):
        """Predictions of the box branch."""
        pooled = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        return self.box_predictor(self.box_head(pooled))

    def _move(self, features: List[torch.Tensor], proposals: List[Instances]) -> List[Instances]:
        """The proposals where the box head sees the objects, without empty ones."""
        predictions = self._predict(features, proposals)
        boxes = torch.cat(self.box_predictor.predict_boxes(predictions, proposals))
        likeliest = predictions[0][:, : self.num_classes].argmax(dim=1)
        boxes = of_class(boxes, likeliest, self.num_classes, 4)
        moved = []
        # Not len(), which tracing would make a constant.
        sizes = [p.proposal_boxes.tensor.shape[0] for p in proposals]
        for proposals_i, boxes_i in zip(proposals, boxes.split(sizes)):
            there = Instances(proposals_i.image_size, **proposals_i.get_fields())
            there.proposal_boxes = Boxes(boxes_i)
            # Those of a model that has diverged, which detections leave out as well.
            there = there[torch.isfinite(boxes_i).all(dim=1)]
            there.proposal_boxes.clip(there.image_size)
            moved.append(there[there.proposal_boxes.nonempty()])
        return moved


@ROI_HEADS_REGISTRY.register()
class IteratedROIHeads(IteratedBoxes, StandardROIHeads):
    """
    Detectron2's ``StandardROIHeads`` with :class:`IteratedBoxes`. Use it with
    ``MODEL.ROI_HEADS.NAME: IteratedROIHeads``; it takes the same checkpoints.
    """
