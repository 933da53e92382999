"""Boxes averaged by how sure the detector is of each of their sides."""

import torch
from detectron2.structures import Boxes, pairwise_iou

"""
Shape shorthand in this module:

    D: number of detections that NMS has kept, in one image
    M: number of candidates, the boxes before NMS, in the same image
"""


def variance_voting(
    boxes: torch.Tensor,
    classes: torch.Tensor,
    candidates: torch.Tensor,
    candidate_classes: torch.Tensor,
    candidate_scores: torch.Tensor,
    candidate_variances: torch.Tensor,
    sigma: float,
) -> torch.Tensor:
    """
    Replace each side of a detection by a weighted mean of the same side of the candidates of its
    class that overlap it: "variance voting" of Softer-NMS (KL loss, arXiv 1809.08545, section 3.4),
    with weights

    ``score_j * exp(-(1 - IoU_ij)^2 / sigma) / variance_j``.

    The factor ``score_j`` is not Softer-NMS's: it was measured to help, see
    docs/study_small_shapes.md.

    Args:
        boxes: the detections, shape ``(D, 4)``, XYXY, pixels.
        classes: shape ``(D,)``.
        candidates: shape ``(M, 4)``; the detections are among them. One that is not finite, or
            whose score or variances are not, has no say.
        candidate_classes, candidate_scores: shape ``(M,)``.
        candidate_variances: of the sides, shape ``(M, 4)``, > 0, square pixels.
        sigma: > 0; the smaller, the closer a candidate has to lie to have a say.

    Returns:
        Tensor: boxes, shape ``(D, 4)``. One without an overlapping candidate stays as it is.
    """
    numbers = (candidates, candidate_variances, candidate_scores[:, None])
    usable = torch.isfinite(torch.cat(numbers, dim=1)).all(dim=1)
    # Zero times a number that is not finite is not zero.
    candidates = torch.where(usable[:, None], candidates, 0)
    candidate_variances = torch.where(usable[:, None], candidate_variances, 1)
    candidate_scores = torch.where(usable, candidate_scores, 0)
    iou = pairwise_iou(Boxes(boxes), Boxes(candidates))
    closeness = torch.exp(-((1 - iou) ** 2) / sigma) * candidate_scores
    closeness = closeness * ((classes[:, None] == candidate_classes) & (iou > 0))
    weights = closeness[:, :, None] / candidate_variances  # (D, M, 4)
    total = weights.sum(dim=1)
    voted = (weights * candidates).sum(dim=1) / total
    return torch.where(total > 0, voted, boxes)


def voting_variances(variances: torch.Tensor, source_boxes: torch.Tensor) -> torch.Tensor:
    """
    The variances with which :func:`variance_voting` weighs. A side that is sure to a hundredth of
    the proposal's or anchor's size is sure enough: no candidate has all the votes.

    They are ``side_variances``, with the part that the code of a coarse grid has in them: it grows
    with the distance from the proposal, and trust in near proposals is worth having, see
    docs/uncertainty.md.

    Args:
        variances: of the sides, shape ``(M, 4)``, square pixels.
        source_boxes: what the candidates were decoded from, shape ``(M, 4)``, XYXY.

    Returns:
        Tensor: shape ``(M, 4)``.
    """
    sizes = (source_boxes[:, 2:] - source_boxes[:, :2]).float()
    least = (0.01 * sizes.repeat(1, 2)) ** 2
    return variances + least.clamp(min=1e-6)
