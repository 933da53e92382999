"""The localization loss that every C-BBL head shares."""

import logging
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import torch
from cbbl_d2.distribution import all_finite, cbbl_loss
from detectron2.layers import cat, nonzero_tuple
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from torchvision.ops import generalized_box_iou_loss

from .logits_on_demand import LogitsOnDemand
from .monitoring import log_localization_stats

"""
Shape shorthand in this module:

    P: number of foreground boxes, which alone have a localization loss
    N: number of images
    A: number of anchors on one feature level
    G: number of grid points
    T: number of terms of the loss: 1, and 1 for each of uncertainty and GIoU that is in use
"""


@dataclass(frozen=True, kw_only=True)
class LocalizationLoss:
    """
    Cross entropy between the predicted distributions and the labels of the target offsets, and, if
    asked for, the uncertainty loss and a GIoU loss on the decoded boxes.

    Attributes:
        label, uncertainty: see :func:`cbbl_d2.distribution.cbbl_loss`.
        uncertainty_weight: relative to the cross entropy.
        giou_weight: relative to the cross entropy; 0: none. Generalized Focal Loss
            (arXiv 2006.04388) has such a term.
    """

    label: str = "two_hot"
    uncertainty: str = "entropy_gap"
    uncertainty_weight: float = 0.1
    giou_weight: float = 0.0

    def __call__(
        self,
        transform,
        logits: torch.Tensor,
        source_boxes: torch.Tensor,
        target_boxes: torch.Tensor,
        prefix: Optional[str] = "cbbl",
    ) -> torch.Tensor:
        """
        Also puts the statistics of :func:`log_localization_stats` into the event storage.

        Args:
            transform: a C-BBL transform: gives the offsets, holds the grid, decodes.
            logits: shape ``(P, 4 * G)``, coordinate-major.
            source_boxes: anchors or proposals, shape ``(P, 4)``, absolute XYXY.
            target_boxes: shape ``(P, 4)``. Boxes whose offsets are not finite are left out and
                counted as ``{prefix}/nonfinite_targets``.
            prefix: of the names in the event storage; None: nothing is put there.

        Returns:
            Tensor: shape ``(T,)``, the terms summed over all coordinates (GIoU: over all boxes),
            with their relative weights; :meth:`named` tells which is which. For P = 0 zeros with a
            live gradient.

        Raises:
            ValueError: unknown ``label`` or ``uncertainty``.
        """
        offsets = transform.get_deltas(source_boxes, target_boxes)
        if not all_finite(offsets):
            finite = torch.isfinite(offsets).all(dim=1)
            # A broken box must neither become an index nor poison the mean of the others.
            if prefix is not None:
                get_event_storage().put_scalar(f"{prefix}/nonfinite_targets", int((~finite).sum()))
                log_first_n(
                    logging.WARNING,
                    "C-BBL leaves out targets that are not finite: some annotated boxes are NaN, "
                    f"infinite or of no size. The count is logged as {prefix}/nonfinite_targets.",
                    name=__name__,
                )
            logits, offsets = logits[finite], offsets[finite]
            source_boxes, target_boxes = source_boxes[finite], target_boxes[finite]

        grid = transform.grid_like(logits)
        distributions = logits.reshape(len(logits), 4, transform.num_points)
        cross_entropy, uncertainty = cbbl_loss(
            distributions,
            offsets,
            grid,
            uncertainty=self.uncertainty,
            label=self.label,
            reduction="none",
        )
        if prefix is not None:
            gap = uncertainty if self.uncertainty == "entropy_gap" else None
            log_localization_stats(distributions, offsets, grid, self.label, prefix, gap)
        terms = [cross_entropy.sum()]
        if self.uncertainty != "none":
            terms.append(uncertainty.sum() * self.uncertainty_weight)
        if self.giou_weight > 0:
            decoded = transform.apply_deltas(logits, source_boxes)
            # Not fvcore's, which asserts that boxes are valid: it would blame the boxes where the
            # network has diverged, and hide that the loss is NaN.
            targets = target_boxes.to(decoded.dtype)
            giou = generalized_box_iou_loss(decoded, targets, reduction="sum")
            terms.append(giou * self.giou_weight)
        return torch.stack(terms)

    def dense(
        self,
        transform,
        logits: List[torch.Tensor],
        anchors: List[Boxes],
        target_boxes: List[torch.Tensor],
        foreground: torch.Tensor,
        prefix: str = "cbbl",
    ) -> torch.Tensor:
        """
        The same on the dense predictions of a feature pyramid, see :func:`pick_foreground`.
        """
        picked = pick_foreground(logits, anchors, target_boxes, foreground)
        return self(transform, *picked, prefix=prefix)

    def named(self, terms: torch.Tensor, name: str, prefix: str) -> Dict[str, torch.Tensor]:
        """
        Args:
            terms: as returned by the call, possibly normalized and weighted.
            name: of the first term, e.g. "loss_box_reg".
            prefix: of the others, e.g. "loss_box" for "loss_box_uncertainty" and "loss_box_giou".

        Returns:
            dict: losses as Detectron2's models return them.
        """
        names = [name]
        if self.uncertainty != "none":
            names.append(f"{prefix}_uncertainty")
        if self.giou_weight > 0:
            names.append(f"{prefix}_giou")
        return dict(zip(names, terms.unbind()))


def pick_foreground(
    logits: List[torch.Tensor | LogitsOnDemand],
    anchors: List[Boxes],
    target_boxes: List[torch.Tensor],
    foreground: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        logits: for each level, shape ``(N, A, 4 * G)``.
        anchors: for each level, ``A`` boxes.
        target_boxes: for each image, shape ``(sum of A, 4)``.
        foreground: bool, shape ``(N, sum of A)``.

    Returns:
        logits, source boxes and target boxes of the foreground, as :class:`LocalizationLoss` takes
        them.
    """
    sizes = [len(boxes) for boxes in anchors]
    picked = []
    # Level by level: to concatenate all levels first would copy every logit for the few that have a
    # loss.
    for logits_l, anchors_l, targets_l, foreground_l in zip(
        logits,
        anchors,
        torch.stack(target_boxes).split(sizes, dim=1),
        foreground.split(sizes, dim=1),
    ):
        image, anchor = nonzero_tuple(foreground_l)
        picked.append((logits_l[image, anchor], anchors_l.tensor[anchor], targets_l[image, anchor]))
    return tuple(cat(tensors) for tensors in zip(*picked))


def stand_ins(predictions: List[torch.Tensor], width: int) -> List[torch.Tensor]:
    """
    Zeros for the ``losses`` of a dense detector's base class in the place of the logits. It
    computes a loss of localization from them, which is thrown away; all else in it is as it should
    be, and stays Detectron2's own.

    Args:
        predictions: for each level, shape ``(N, A, 4 * G)``.
        width: of the result: 4 where the base class takes offsets.

    Returns:
        for each level, shape ``(N, A, width)``, float32.
    """
    return [x.new_zeros((*x.shape[:2], width), dtype=torch.float32) for x in predictions]
