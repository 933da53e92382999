"""Where the points of the localization grid lie."""

import math

import torch

# No offset can be told that exactly; a slip such as 1e7 takes all memory.
MAX_INTERVALS = 10_000


def exponential_grid(
    alpha: float, beta: float, num_intervals: int, one_sided: bool = False
) -> torch.Tensor:
    """
    Points of a grid over ``[-alpha, alpha]`` that is dense near zero (the "interval non-uniform"
    grid of C-BBL, arXiv 2303.01803).

    With ``y_i = -alpha + 2 * alpha * i / n``, the points are

    ``y'_i = sign(y_i) * alpha / (exp(alpha * beta) - 1) * (exp(beta * |y_i|) - 1)``

    which tends to the uniform grid ``y_i`` for ``beta -> 0``. Both ends are on the grid, and it is
    exactly antisymmetric, so a uniform distribution decodes to zero. (The note on the first
    version of the paper writes ``n + 1`` in the denominator, which stops one interval short of
    ``+alpha``; the second version writes ``n``, as here.) A grid with odd ``n`` has no point at
    zero.

    Args:
        alpha: half-width of the grid, in the unit of the offsets; > 0.
        beta: how strongly the points crowd around zero, in 1/unit; >= 0. 0 is the uniform grid.
        num_intervals: ``n``, the number of intervals; 2 to ``MAX_INTERVALS``.
        one_sided: cover ``[0, alpha]`` instead, dense near zero. For distances, which are never
            negative (FCOS).

    Returns:
        Tensor: shape ``(num_intervals + 1,)``, float32, strictly increasing.

    Raises:
        ValueError: if an argument is out of its range or so large that points collide in float32.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number >= 0, got {beta!r}")
    if not isinstance(num_intervals, int) or isinstance(num_intervals, bool) or num_intervals < 2:
        raise ValueError(f"num_intervals must be an integer >= 2, got {num_intervals!r}")
    if num_intervals > MAX_INTERVALS:
        raise ValueError(f"num_intervals must be at most {MAX_INTERVALS}, got {num_intervals}")

    n = num_intervals
    if one_sided:
        points = [_stretch(alpha * i / n, alpha, beta) for i in range(n + 1)]
    else:
        # Mirror the positive half rather than compute both: exact antisymmetry.
        positive = [
            _stretch(alpha * (2 * i - n) / n, alpha, beta) for i in range(n // 2 + 1, n + 1)
        ]
        middle = [0.0] if n % 2 == 0 else []
        points = [-y for y in reversed(positive)] + middle + positive

    grid = torch.tensor(points, dtype=torch.float64).to(torch.float32)
    # Distinct is not enough: the two-hot code divides by the spacing.
    sound = torch.stack((grid.isfinite()[1:], grid.diff() > 0, (1.0 / grid.diff()).isfinite()))
    if not sound.all():
        raise ValueError(
            f"the points of the grid collide or overflow in float32 for alpha={alpha!r}, "
            f"beta={beta!r}, num_intervals={n}: lower alpha * beta"
        )
    return grid


def _stretch(y: float, alpha: float, beta: float) -> float:
    """``alpha * (exp(beta * y) - 1) / (exp(beta * alpha) - 1)`` for ``0 <= y <= alpha``."""
    if y >= alpha:
        return alpha
    if alpha * beta < 1e-12:  # the limit; expm1(0) / expm1(0) is not a number
        return y
    if alpha * beta > 700:  # exp() overflows; all inner points are zero in float32
        return 0.0
    return alpha * math.expm1(beta * y) / math.expm1(beta * alpha)
