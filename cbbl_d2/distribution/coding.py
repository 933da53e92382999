"""From an offset to its two-hot code, and from logits back to an offset."""

import math
from typing import Tuple

import torch
from torch.nn import functional as F

LABELS = ("two_hot", "one_hot")


def two_hot(offsets: torch.Tensor, grid: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Compact two-hot code of ``offsets``. Between its neighbors ``y_l <= t <= y_r`` on the grid an
    offset ``t`` is the distribution

    ``p*_l = (y_r - t) / (y_r - y_l)``, ``p*_r = (t - y_l) / (y_r - y_l)``, 0 elsewhere,

    whose expectation is ``t``. Only ``l`` and ``p*_r`` are kept: ``r = l + 1``,
    ``p*_l = 1 - p*_r``. An offset outside the grid gets the code of the nearer end.

    Args:
        offsets: shape ``(...)``, finite.
        grid: shape ``(G,)``, strictly increasing.

    Returns:
        (Tensor, Tensor): ``left_index`` (int64, in ``[0, G - 2]``) and ``right_weight`` (of the
        grid's dtype, in ``[0, 1]``), both of the offsets' shape.

    Raises:
        ValueError: if an offset is NaN or infinite; it would become an arbitrary index.
    """
    if not all_finite(offsets):
        finite = torch.isfinite(offsets)
        raise ValueError(
            f"{int((~finite).sum())} of {offsets.numel()} offsets are not finite, "
            f"the first is {offsets[~finite][0].item()}"
        )
    offsets = offsets.to(grid.dtype).clamp(grid[0], grid[-1])
    # right=True sends an offset that lies on a point to the interval on the point's right;
    # the clamp puts the last point into the last interval. Inner points alone would do the same,
    # but a slice is one more kernel than a clamp in place.
    left = torch.searchsorted(grid, offsets.contiguous(), right=True).sub_(1)
    left = left.clamp_(0, grid.numel() - 2)
    low, high = grid.take(left), grid.take(left + 1)
    return left, (offsets - low) / (high - low)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # On a GPU one kernel where torch.isfinite() alone has five. The sum can be infinite of finite
    # elements, but not the other way round.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def one_hot(offsets: torch.Tensor, grid: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    As :func:`two_hot`, with the whole weight on the nearest grid point: the label of plain
    classification, for the ablation. ``right_weight`` is 0 or 1.
    """
    left, right_weight = two_hot(offsets, grid)
    return left, (right_weight >= 0.5).to(grid.dtype)


def encode(offsets: torch.Tensor, grid: torch.Tensor, label: str):
    """
    :func:`two_hot` or :func:`one_hot`, by name.

    Raises:
        ValueError: ``label`` is neither of :data:`LABELS`, or see :func:`two_hot`.
    """
    if label not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}; got {label!r}")
    return (two_hot if label == "two_hot" else one_hot)(offsets, grid)


def expectation(logits: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """
    Decoded offset: ``sum_i p_i * y_i`` over the whole distribution ``p = softmax(logits)``.

    Args:
        logits: shape ``(..., G)``.
        grid: shape ``(G,)``.

    Returns:
        Tensor: shape ``(...)``, at least float32, also under autocast.
    """
    # Not ``p @ grid``: autocast would run it in half precision, an error of 3e-3.
    return (probabilities(logits) * grid).sum(dim=-1)


def variance(logits: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """
    Variance of the predicted distribution, ``sum_i p_i * (y_i - E)^2``, in the squared unit of the
    grid. Shapes as in :func:`expectation`. How unsure the head is of the offset is a part of it,
    see :func:`gaussian_variance`.
    """
    p = probabilities(logits)
    mean = (p * grid).sum(dim=-1, keepdim=True)
    return (p * (grid - mean) ** 2).sum(dim=-1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    Entropy ``H(p) = -sum_i p_i * log(p_i)`` of ``p = softmax(logits)``, in nats.

    Args:
        logits: shape ``(..., G)``.

    Returns:
        Tensor: shape ``(...)``, at least float32, in ``[0, log(G)]``.
    """
    return entropy_of(log_probabilities(logits))


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """
    Log-softmax over the last dimension, in at least float32; finite for finite logits, also where
    their span is not.
    """
    log_p = F.log_softmax(_points_first(logits), dim=0).movedim(0, logits.dim() - 1)
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


def entropy_of(log_p: torch.Tensor) -> torch.Tensor:
    """As :func:`entropy`, for one who has the log-probabilities ``(..., G)`` already."""
    return -(log_p.exp() * log_p).sum(dim=-1)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension, in at least float32."""
    return F.softmax(_points_first(logits), dim=0).movedim(0, logits.dim() - 1)


def _points_first(logits: torch.Tensor) -> torch.Tensor:
    # Half precision becomes float32; float32 and float64 stay as they are. On the CPU, torch's
    # softmax over a short last dimension takes up to ten times as long as over the first one.
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).movedim(logits.dim() - 1, 0)
