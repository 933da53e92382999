"""The layer that predicts distributions in the place of one that predicts offsets."""

from typing import Tuple

import torch
from cbbl_d2.distribution import gaussian_logits
from torch import nn
from torch.nn import functional as F

"""
Shape shorthand in this module:

    N: number of images
    C, H, W: of a feature map
    A: number of anchors on it
    P: number of those that are asked for
    K: number of outputs for an anchor
"""


def distribution_layer(
    layer: nn.Module, transform, *, weight_std: float, init_std: float = 0.0
) -> nn.Module:
    """
    A new layer with G outputs, the logits of the grid points, where ``layer`` has one, an offset.
    The G logits of a coordinate are adjacent.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d``, the last one of a box regression branch.
        transform: a C-BBL transform: holds the grid, from here on as the buffer of the new layer.
        weight_std: standard deviation of the initial weights; that of the stock layer, so that
            both start alike.
        init_std: width of the distribution that the untrained layer predicts, see
            :func:`cbbl_d2.distribution.gaussian_logits`; 0: the uniform distribution.

    Raises:
        TypeError: another kind of layer.
    """
    grid, num_points = transform.grid, transform.num_points
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, layer.out_features * num_points)
    elif isinstance(layer, nn.Conv2d):
        window = layer.kernel_size, layer.stride, layer.padding
        new = nn.Conv2d(layer.in_channels, layer.out_channels * num_points, *window)
    else:
        raise TypeError(f"cannot put a distribution in the place of {type(layer).__name__}")
    # Persistent: in a checkpoint it tells weights for this grid from those for another one, or for
    # offsets, whose shape may be the same.
    new.register_buffer("grid", grid.clone())
    nn.init.normal_(new.weight, std=weight_std)
    nn.init.constant_(new.bias, 0)
    if init_std > 0:
        new.bias.data.view(-1, num_points).copy_(gaussian_logits(grid, init_std))
    transform.refer_to(new)
    return new


class OutputsOnDemand:
    """
    What a convolution says of each anchor, ``(N, A, K)`` as from Detectron2's
    ``permute_to_N_HWA_K``, computed for no other anchors than ``outputs[image, anchor]`` asks for.
    """

    def __init__(self, layer: nn.Conv2d, features: torch.Tensor, num_outputs: int):
        """
        Args:
            layer: of stride 1, its output as large as its input.
            features: shape ``(N, C, H, W)``.
            num_outputs: K.
        """
        self._layer, self._num_outputs, self._width = layer, num_outputs, features.shape[-1]
        rows, columns = layer.padding
        self._padded = F.pad(features, (columns, columns, rows, rows))

    def __getitem__(self, index: Tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            index: of images and of anchors, both of shape ``(P,)``.

        Returns:
            Tensor: shape ``(P, K)``.
        """
        image, anchor = index
        weight = self._layer.weight.permute(0, 2, 3, 1)  # as Tensor indices order what they pick
        num_anchors = len(weight) // self._num_outputs  # at a place
        place = anchor // num_anchors
        rows, columns = (torch.arange(size, device=place.device) for size in weight.shape[1:3])
        windows = self._padded[
            image[:, None, None],
            :,
            (place // self._width)[:, None, None] + rows[:, None],
            (place % self._width)[:, None, None] + columns,
        ]  # (P, kernel, kernel, C)
        outputs = F.linear(windows.flatten(1), weight.flatten(1), self._layer.bias)
        outputs = outputs.unflatten(1, (num_anchors, self._num_outputs))
        return outputs[torch.arange(len(place), device=place.device), anchor % num_anchors]
