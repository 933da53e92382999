"""
The mathematics of C-BBL: grid, two-hot code, loss and decoding. Needs torch alone.

Shape shorthand in this package:

    G: number of grid points, ``n + 1`` for a grid of ``n`` intervals
    ...: any leading dimensions, e.g. ``(R, 4)`` for the coordinates of R regions

Naming convention:

    offset: the value to localize (``t`` in the paper), e.g. the ``dx`` of Detectron2's
        ``Box2BoxTransform`` after its weights. Same unit as the grid.
    logits: unnormalized log-probabilities of the grid points, shape ``(..., G)``
"""

from .coding import (
    LABELS,
    all_finite,
    entropy,
    expectation,
    one_hot,
    probabilities,
    two_hot,
    variance,
)
from .grid import exponential_grid
from .initialization import gaussian_logits
from .losses import UNCERTAINTIES, cbbl_loss
from .spread import gaussian_variance

__all__ = [
    "LABELS",
    "UNCERTAINTIES",
    "all_finite",
    "cbbl_loss",
    "entropy",
    "expectation",
    "exponential_grid",
    "gaussian_logits",
    "gaussian_variance",
    "one_hot",
    "probabilities",
    "two_hot",
    "variance",
]
