"""How the logits of an untrained head start."""

import math

import torch


def gaussian_logits(grid: torch.Tensor, std: float) -> torch.Tensor:
    """
    Logits of a discretised Gaussian around zero offset: ``-y_i^2 / (2 std^2) + log(w_i)``, with
    ``w_i`` the width of the cell around ``y_i``. As the bias of a new head they say "the proposal
    is roughly right", where zero bias says "any offset is as likely as any other". On a symmetric
    grid both decode to zero.

    Args:
        grid: shape ``(G,)``.
        std: width of the Gaussian, in the unit of the grid; > 0.

    Returns:
        Tensor: shape ``(G,)``.

    Raises:
        ValueError: if ``std`` is not a finite number > 0, or too small for the grid.
    """
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std must be a finite number > 0, got {std!r}")
    spacing = grid.diff()
    cell = torch.cat((spacing[:1], spacing[:-1] + spacing[1:], spacing[-1:])) / 2
    if std**2 == 0:
        raise ValueError(f"std={std!r} is too small: its square is 0")
    logits = cell.log() - grid**2 / (2 * std**2)
    if not logits.isfinite().all():
        raise ValueError(f"std={std!r} is too small for a grid up to {float(grid.max()):g}")
    return logits
