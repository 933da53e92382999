"""
Where in an image the localization loss pulls: the magnitude of its gradient with respect to the
pixels, for checkpoints of a training, drawn side by side.

The gradient is taken at the image and not at a feature map: all detectors have the image in common,
while the finest features are of stride 4 in some of them and of stride 8 in others.
"""

import dataclasses
from typing import Dict, List, Sequence

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.transforms.functional import gaussian_blur

# Parts of the names of the losses of localization in all detectors
_LOCALISATION = ("box_reg", "_loc", "uncertainty", "giou", "refine")

# Width of the blur of a map, in pixels: strided convolutions leave a pattern of dots.
_BLUR = 1.5

# All that is brighter than this share of the pixels of a column looks alike: a few peaks would make
# the rest black.
_BRIGHTEST = 0.998


def localization_gradient_map(model: nn.Module, record: Dict, seed: int = 0) -> torch.Tensor:
    """
    Norm over the color channels of the gradient of the localization loss with respect to each
    pixel, as training would compute it, but with the statistics of batch norm kept as they are.
    The loss is that of the boxes; that of an RPN counts where the model has no other. Its weight
    in the whole loss is in it.

    Args:
        model: a detector; is left in training mode.
        record: as a ``DatasetMapper`` returns it for training.
        seed: of the sampling of anchors and regions.

    Returns:
        Tensor: shape ``(H, W)``, on the CPU.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    # The moving average of the number of positives, by which dense detectors divide, starts anew:
    # the result must not depend on the images before.
    vars(model).pop("loss_normalizer", None)
    image = record["image"].float().requires_grad_()
    with torch.random.fork_rng(), EventStorage():
        torch.manual_seed(seed)
        losses = model([{**record, "image": image}])
    names = [name for name in losses if any(part in name for part in _LOCALISATION)]
    of_boxes = [name for name in names if "rpn" not in name]
    (gradient,) = torch.autograd.grad(sum(losses[name] for name in of_boxes or names), image)
    return gradient.norm(dim=0).cpu()


@dataclasses.dataclass
class MapColumn:
    """
    One column of the picture.

    Attributes:
        title: of the column.
        group: columns of the same group share a color scale. The gradients of two methods differ
            by the weights of their losses, so that each method should have a group of its own.
        maps: for each image, shape ``(H, W)``.
    """

    title: str
    group: str
    maps: List[torch.Tensor]


def plot_gradient_maps(
    path, records: Sequence[Dict], columns: Sequence[MapColumn], image_format: str = "BGR"
) -> None:
    """
    A row for each image: the image itself and its maps, with the boxes of the ground truth, as PNG.

    Args:
        path: file name, or a binary file to write to.
        records: as for :func:`localization_gradient_map`, those of the rows.
        columns: at least one.
        image_format: channel order of the images, cfg.INPUT.FORMAT; only "BGR" is turned around.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    groups: Dict[str, List[np.ndarray]] = {}
    blurred = []
    for column in columns:
        maps = [gaussian_blur(x[None], kernel_size=9, sigma=_BLUR)[0].numpy() for x in column.maps]
        blurred.append(maps)
        groups.setdefault(column.group, []).extend(x.ravel() for x in maps)
    brightest = {k: np.quantile(np.concatenate(v), _BRIGHTEST) or 1.0 for k, v in groups.items()}

    size = 2.2 * (len(columns) + 1), 2.2 * len(records) + 0.9
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(records), len(columns) + 1, squeeze=False)
    drawn = {}
    for row, record in enumerate(records):
        pixels = record["image"].permute(1, 2, 0).byte().numpy()
        axes[row, 0].imshow(pixels[:, :, ::-1] if image_format == "BGR" else pixels)
        for axis, column, maps in zip(axes[row, 1:], columns, blurred):
            drawn[column.group] = axis.imshow(
                maps[row], cmap="inferno", vmin=0, vmax=brightest[column.group]
            )
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
            for x0, y0, x1, y1 in record["instances"].gt_boxes.tensor.tolist():
                # matplotlib puts the middle of the first pixel at 0.
                corner = (x0 - 0.5, y0 - 0.5)
                axis.add_patch(
                    Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor="cyan", linewidth=0.6)
                )
    for axis, title in zip(axes[0], ["image", *(column.title for column in columns)]):
        axis.set_title(title, fontsize=9)
    for group, image in drawn.items():
        below = [axes[-1, 1 + i] for i, c in enumerate(columns) if c.group == group]
        # With a format of its own: a common factor would stand in the label.
        bar = figure.colorbar(
            image, ax=below, location="bottom", fraction=0.05, extend="max", format="%.1e"
        )
        bar.set_label("|gradient| at a pixel")
        bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=150, format="png", bbox_inches="tight")
