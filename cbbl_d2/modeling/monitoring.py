"""What a user should watch while a C-BBL head trains."""

from typing import Optional

import torch
from cbbl_d2.distribution import cbbl_loss, expectation
from detectron2.utils.events import get_event_storage


@torch.no_grad()
def log_localization_stats(
    logits: torch.Tensor,
    offsets: torch.Tensor,
    grid: torch.Tensor,
    label: str,
    prefix: str,
    entropy_gap: Optional[torch.Tensor],
) -> None:
    """
    Put into the event storage, as means over all coordinates:

    * ``clipped_fraction``: share of the targets outside the grid. More than a few percent: the
      grid is too narrow, raise the ``ALPHA`` of that head.
    * ``entropy_gap``: ``|H(p*) - H(p)|`` in nats; how much more (or less) certain the head is
      than its label.
    * ``offset_l1``: ``|decoded - target|`` in the unit of the grid; what Smooth-L1 would see.

    Without a foreground region there is nothing to take a mean of, and nothing is logged, as
    Detectron2 does for ``fast_rcnn/fg_cls_accuracy``.

    Args:
        logits: shape ``(R, 4, G)``.
        offsets: finite targets, shape ``(R, 4)``.
        grid: shape ``(G,)``.
        label: as for :func:`cbbl_d2.distribution.cbbl_loss`.
        prefix: of the names in the storage.
        entropy_gap: shape ``(R, 4)``; None: it has not been computed yet.
    """
    if offsets.numel() == 0:
        return
    outside = (offsets < grid[0]) | (offsets > grid[-1])
    if entropy_gap is None:
        _, entropy_gap = cbbl_loss(
            logits, offsets, grid, uncertainty="entropy_gap", reduction="none", label=label
        )
    distance = (expectation(logits, grid) - offsets).abs()
    # One transfer from the device for all three.
    stats = torch.stack((outside.float().mean(), entropy_gap.mean(), distance.mean())).tolist()
    for name, value in zip(("clipped_fraction", "entropy_gap", "offset_l1"), stats):
        get_event_storage().put_scalar(f"{prefix}/{name}", value)
