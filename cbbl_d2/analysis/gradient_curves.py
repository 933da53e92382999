"""
The gradient of L2, Smooth-L1, IoU, GIoU and C-BBL against how far the predicted box is off, for
boxes of several sizes: what makes small objects hard to localize, and what C-BBL changes.
"""

from typing import Dict, Sequence, Tuple

import torch
from cbbl_d2.distribution import cbbl_loss, two_hot
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from fvcore.nn import giou_loss, smooth_l1_loss

"""
Shape shorthand in this module:

    S: number of box sizes
    E: number of errors, of each object; the gradients are computed for all S * E boxes at once
    B: number of grid points
"""

SIZES = (8, 16, 32, 64, 128)  # pixels
WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the box transform of a Fast R-CNN head
STD = 0.1  # how exactly the head of C-BBL knows the offset, in the unit of the grid


def gradient_curves(
    errors: torch.Tensor,
    grid: torch.Tensor,
    *,
    sizes: Sequence[float] = SIZES,
    weights: Tuple[float, float, float, float] = WEIGHTS,
    std: float = STD,
) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """
    A square object lies exactly on its proposal; the predicted box is the object shifted along x
    by an error in pixels. All gradients are those of autograd through the losses that are trained
    with.

    The first four losses see one number from the head, the offset ``dx`` after ``weights``. C-BBL
    sees the logits of a distribution over the grid: here of :func:`predicted_distribution` around
    that offset.

    Args:
        errors: shape ``(E,)``, in pixels; > 0 (at 0 some of the losses have a kink).
        grid: shape ``(B,)``, on the offsets after ``weights``.
        sizes: sides of the S objects, in pixels.
        weights: of the box transform.
        std: width of the predicted distribution, in the unit of the grid; 0: it is a two-hot code.

    Returns:
        (dict, dict): gradients, each of shape ``(S, E)``:

        * at the output of the head, for "L2", "Smooth-L1", "IoU", "GIoU" the absolute value of
          ``dL/d(dx)`` and for "C-BBL" the norm of ``dL/d(logits)``, which is ``p - p*``;
        * per pixel that the box moves, ``|dL/d(error)|``, for the first four. The loss of C-BBL
          acts on a distribution: what a pixel would be to it depends on the layers before.

        L2 is half the squared difference and Smooth-L1 has beta 0, Detectron2's default.
    """
    transform = Box2BoxTransform(weights)
    shape = len(sizes), len(errors)
    error = errors.detach().repeat(len(sizes)).requires_grad_()
    side = errors.new_tensor(sizes).repeat_interleave(len(errors))
    zeros = torch.zeros_like(side)
    objects = torch.stack((zeros, zeros, side, side), dim=1)
    dx = error * (weights[0] / side)
    predicted = transform.apply_deltas(torch.stack((dx, zeros, zeros, zeros), dim=1), objects)
    losses = {
        # For |x| < beta, Smooth-L1 is x^2 / (2 * beta).
        "L2": 1e4 * smooth_l1_loss(dx, zeros, beta=1e4, reduction="sum"),
        "Smooth-L1": smooth_l1_loss(dx, zeros, beta=0.0, reduction="sum"),
        "IoU": (1 - matched_pairwise_iou(Boxes(predicted), Boxes(objects))).sum(),
        "GIoU": giou_loss(predicted, objects, reduction="sum"),
    }
    at_output, per_pixel = {}, {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, (dx, error), retain_graph=True)
        at_output[name], per_pixel[name] = (x.abs().view(shape) for x in gradients)
    # Finite logits, of probabilities that no longer matter.
    logits = predicted_distribution(dx.detach(), grid, std).clamp(min=1e-12).log()
    logits.requires_grad_()
    cross_entropy, _ = cbbl_loss(logits, zeros, grid, uncertainty="none")
    (gradient,) = torch.autograd.grad(cross_entropy, logits)
    at_output["C-BBL"] = gradient.norm(dim=1).view(shape)
    return at_output, per_pixel


def predicted_distribution(
    offsets: torch.Tensor, grid: torch.Tensor, std: float, num_samples: int = 500
) -> torch.Tensor:
    """
    The mean of the two-hot codes of offsets that scatter around the given ones like a Gaussian:
    what a head that knows the offset up to an error of ``std`` predicts when its loss is least.

    Args:
        offsets: shape ``(E,)``.
        grid: shape ``(B,)``.
        std: in the unit of the grid.
        num_samples: of the Gaussian, at the middles of its quantiles.

    Returns:
        Tensor: probabilities, shape ``(E, B)``. Their expectation is the offset, away from the ends
        of the grid.
    """
    quantiles = (torch.arange(num_samples) + 0.5) / num_samples
    scatter = torch.special.ndtri(quantiles).to(offsets)
    left, right_weight = two_hot(offsets[:, None] + std * scatter, grid)
    probabilities = offsets.new_zeros(len(offsets), len(grid))
    probabilities.scatter_add_(1, left, 1 - right_weight)
    probabilities.scatter_add_(1, left + 1, right_weight)
    return probabilities / num_samples


def plot_gradient_curves(
    path,
    grid: torch.Tensor,
    largest_error: float = 8.0,
    *,
    weights: Tuple[float, float, float, float] = WEIGHTS,
    std: float = STD,
) -> None:
    """
    A panel for each loss and a line for each size, as PNG: above the gradient at the output of the
    head, below it the gradient per pixel; see :func:`gradient_curves`.

    Args:
        path: file name, or a binary file to write to.
        largest_error: in pixels; the curves begin at a hundredth of a pixel.
        grid, weights, std: see :func:`gradient_curves`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # Not to the end: there the smallest box just touches the object, and IoU has a kink.
    errors = torch.linspace(0.01, 0.999 * largest_error, 800)
    rows = gradient_curves(errors, grid, weights=weights, std=std)
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    axes = figure.subplots(2, len(rows[0]), sharex=True)
    # From dark to light: small boxes are what this is about.
    colors = colormaps["viridis"](torch.linspace(0, 0.9, len(SIZES)).tolist())
    for axis, name in zip(axes[0], rows[0]):
        axis.set_title(name)
    for curves, row in zip(rows, axes):
        for gradients, axis in zip(curves.values(), row):
            for gradient, size, color in zip(gradients, SIZES, colors):
                axis.plot(errors, gradient, color=color, linewidth=1.8, label=f"{size:g} px")
            axis.set_xlim(0, largest_error)
            axis.set_ylim(0, max(1.1 * gradients.max().item(), 1e-3))
            axis.grid(alpha=0.3)
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("error of the box in x [pixels]")
    axes[0, 0].set_ylabel("at the head's output, $|\\partial L/\\partial(dx)|$")
    axes[1, 0].set_ylabel("per pixel, $|\\partial L/\\partial x|$  [1/pixel]")
    axes[0, -1].set_ylabel("norm over the logits, $\\|p-p^*\\|_2$")
    axes[0, -1].axhline(2**0.5, color="black", linewidth=1, linestyle=":")
    axes[0, -1].text(0.98 * largest_error, 2**0.5, "$\\sqrt{2}$", ha="right", va="bottom")
    axes[0, -1].set_ylim(0, 1.6)
    axes[0, 1].text(0.5 * largest_error, 0.97, "all sizes", ha="center", va="top")
    corner = axes[1, -1]
    corner.axis("off")
    legend = axes[0, 0].get_legend_handles_labels()
    corner.legend(*legend, title="side of the box", ncols=2, loc="upper center", frameon=False)
    notes = (
        f"offset $dx$: weight {weights[0]:g}\n"
        f"C-BBL: grid of {len(grid)} points over ±{grid[-1]:g};\n"
        f"predicted $p$: label of the predicted $dx$,\nblurred by a Gaussian of width {std:g}"
    )
    corner.text(0.5, 0, notes, transform=corner.transAxes, ha="center", va="bottom", fontsize=9)
    figure.savefig(path, dpi=150, format="png")
