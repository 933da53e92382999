"""The localization loss of C-BBL on logits and target offsets."""

from typing import Tuple

import torch

from .coding import encode, entropy_of, log_probabilities

UNCERTAINTIES = ("entropy_gap", "entropy", "none")
REDUCTIONS = ("sum", "mean", "none")


def cbbl_loss(
    logits: torch.Tensor,
    offsets: torch.Tensor,
    grid: torch.Tensor,
    *,
    uncertainty: str = "entropy_gap",
    reduction: str = "sum",
    label: str = "two_hot",
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Cross entropy ``-p*_l log(p_l) - p*_r log(p_r)`` between ``p = softmax(logits)`` and the label
    ``p*`` of the offset, and the uncertainty loss. The gradient of the cross entropy with respect
    to a logit is exactly ``p_i - p*_i``: within [-1, 1] whatever the size of the object.

    Args:
        logits: shape ``(..., G)``. Computed in at least float32, also under autocast.
        offsets: target offsets, shape ``(...)``, finite. Those outside the grid count as its ends.
        grid: shape ``(G,)``.
        uncertainty: "entropy_gap", ``|H(p*) - H(p)|`` (first version of the paper); "entropy",
            ``H(p)`` (second version); or "none", zero.
        reduction: "sum" or "mean" over all coordinates, or "none".
        label: "two_hot", or "one_hot" on the nearest grid point (for the ablation).

    Returns:
        (Tensor, Tensor): cross entropy and uncertainty, both unweighted; scalars, or of the
        offsets' shape with ``reduction="none"``. Zero, with a live gradient, for empty input.

    Raises:
        ValueError: unknown option, shapes that do not fit, or an offset that is not finite.
    """
    for name, value, allowed in (
        ("uncertainty", uncertainty, UNCERTAINTIES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if logits.shape != (*offsets.shape, grid.numel()):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit offsets of shape "
            f"{tuple(offsets.shape)} and a grid of {grid.numel()} points"
        )

    left, right_weight = encode(offsets, grid, label)
    log_p = log_probabilities(logits)
    neighbors = log_p.gather(-1, torch.stack((left, left + 1), dim=-1))
    cross_entropy = -torch.lerp(neighbors[..., 0], neighbors[..., 1], right_weight.to(log_p.dtype))

    if uncertainty == "none":
        uncertainty_loss = torch.zeros_like(cross_entropy)
    else:
        uncertainty_loss = entropy_of(log_p)
        if uncertainty == "entropy_gap":
            uncertainty_loss = (_code_entropy(right_weight) - uncertainty_loss).abs()

    return _reduce(cross_entropy, reduction), _reduce(uncertainty_loss, reduction)


def _code_entropy(right_weight: torch.Tensor) -> torch.Tensor:
    """
    Entropy ``H(p*)`` of a two-hot code, in nats: 0 on a grid point, log(2) midway.

    Args:
        right_weight: as returned by :func:`two_hot`, any shape.
    """
    return torch.special.entr(right_weight) + torch.special.entr(1 - right_weight)


def _reduce(loss: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum" or loss.numel() == 0:  # the mean of nothing would be NaN
        return loss.sum()
    return loss.mean()
