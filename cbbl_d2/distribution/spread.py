"""How unsure a distribution is of its offset, without the share of the grid itself."""

import math

import torch

from .coding import probabilities

_SQRT_2, _SQRT_2_PI = math.sqrt(2), math.sqrt(2 * math.pi)
# Newton steps, from above. They are exact to a few percent where s is a quarter of the mean's
# interval or more, mostly to float32. Where it is less and the mean in the middle of its interval,
# they end below a quarter of it: the code of such an offset says next to nothing of s.
_STEPS = 3


def gaussian_variance(logits: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """
    Variance of the Gaussian whose two-hot code has the mean and the variance of
    ``p = softmax(logits)``.

    A two-hot code has a variance of its own: an offset ``t`` known exactly, between neighbors
    ``y_l`` and ``y_r``, still has one of ``(t - y_l) * (y_r - t)``, up to a quarter of the squared
    interval. :func:`variance` has it in it, and the coarser the grid the more. A head that has
    learned labels of offsets ``t ~ N(m, s^2)`` predicts their mean code, of expectation m and

    ``variance(p) = (m - y_l) * (y_r - m) + sum_k (y_(k+1) - y_(k-1)) * s * psi(|m - y_k| / s)``,
    ``psi(z) = phi(z) - z * (1 - Phi(z))``,

    with k over the inner points of the grid and the standard normal's density ``phi`` and
    distribution function ``Phi``: the expectation of a piecewise linear function under a Gaussian.
    The right side is increasing and convex in s; Newton's method solves for it.

    A distribution on two neighbors has no more than a mean: the result is then up to a quarter of
    the interval, however small s is. It is a Gaussian's: on an exponential grid a percent of the
    probability at a far end counts for much. For one-hot labels :func:`variance` is closer.

    Args:
        logits: shape ``(..., G)``.
        grid: shape ``(G,)``; outside of it the code is taken to go on as at its ends.

    Returns:
        Tensor: ``s^2``, shape ``(...)``, at least float32, from 0 to :func:`variance`, which it is
        for distributions as wide as the grid. Without a gradient: a result, not a loss.
    """
    with torch.no_grad():
        p = probabilities(logits)
        mean = (p * grid).sum(dim=-1)
        # Points first: sums over a short last dimension are slow on the CPU.
        p, points = p.movedim(mean.dim(), 0), grid.reshape(-1, *[1] * mean.dim())
        total = (p * (points - mean) ** 2).sum(dim=0)
        # variance(p) - (m - y_l) * (y_r - m) is the least over all intervals of the mean of
        # (y - y_l) * (y - y_r): of terms >= 0, where the difference of the two would be rounding.
        products = (grid[:, None] - grid[:-1]) * (grid[:, None] - grid[1:])  # (G, n)
        products = products.reshape(*products.shape, *[1] * mean.dim())
        excess = (p[:, None] * products).sum(dim=0).amin(dim=0)

        slopes = (points[2:] - points[:-2]) / _SQRT_2_PI
        distance = (points[1:-1] - mean).abs()
        tail_slopes = slopes * distance * (_SQRT_2_PI / 2)
        distance = distance / _SQRT_2
        # Nothing below is 0 / 0, then: NaN. A derivative that vanishes leaves the step before.
        least = torch.finfo(total.dtype).tiny ** 0.5
        excess, std = excess.clamp(min=least), total.clamp(min=least).sqrt()
        for _ in range(_STEPS):
            z = distance / std
            derivative = (slopes * torch.exp(-z * z)).sum(dim=0)
            # s * psi has s * phi in it, which Newton's s - (sum - excess) / derivative cancels.
            rest = (tail_slopes * (1 - torch.erf(z))).sum(dim=0)
            std = torch.minimum(std, (rest + excess) / derivative)
        return std**2
