"""
The logits of a dense detector where they are used: at inference a few hundred of some ten thousand
anchors have a score that counts, in training those of an object, and the layer is G times as wide
as the stock one.
"""

from typing import Optional

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import nn
from torch.nn import functional as F

"""
Shape shorthand in this module:

    N: number of images
    C: number of channels of the features
    A: number of anchors at each location
    R: number of anchors to decode, of one image
    G: number of grid points
"""


# Locations of a level from which on an exported model, of which the number of anchors to decode is
# not known, computes some: on smaller levels all take no longer than finding them.
_LARGE_LEVEL = 512


class ConvOnDemand(nn.Conv2d):
    """
    In training a convolution, in evaluation mode a :class:`LogitsOnDemand`. Of stride 1, with as
    many outputs as inputs.

    Attributes:
        num_anchors: A; the layer has ``A * 4 * G`` outputs.
    """

    num_anchors: int

    def forward(self, features: torch.Tensor):
        """
        Args:
            features: shape ``(N, C, H, W)``.
        """
        return super().forward(features) if self.training else LogitsOnDemand(self, features)


class LogitsOnDemand:
    """
    Stands for the logits of a feature level as ``DenseDetector`` uses them, a tensor of shape
    ``(N, H * W * A, 4 * G)``: indexed by the number of an image and then by anchors, or by both.
    """

    def __init__(self, layer: ConvOnDemand, features: torch.Tensor):
        """
        Args:
            features: shape ``(N, C, H, W)``, or ``(C, H, W)`` of one image.
        """
        self._layer, self._features = layer, features

    def dense(self) -> torch.Tensor:
        """All logits, as the layer returns them in training: shape ``(N, A * 4 * G, H, W)``."""
        return nn.Conv2d.forward(self._layer, self._features)

    def __getitem__(self, index):
        """
        Args:
            index: the number of an image; of one image, anchors of shape ``(R,)``, int64; or images
                and anchors, both of shape ``(R,)``.

        Returns:
            LogitsOnDemand of the image; or the logits of the anchors, shape ``(R, 4 * G)``.
        """
        image = None
        if isinstance(index, tuple):
            image, index = index
        elif self._features.dim() == 4:
            return LogitsOnDemand(self._layer, self._features[index])
        layer, num_anchors = self._layer, self._layer.num_anchors
        if not self._are_few(index):
            maps = self._features if image is not None else self._features[None]
            logits = nn.Conv2d.forward(layer, maps)
            logits = permute_to_N_HWA_K(logits, layer.out_channels // num_anchors)
            return logits[0 if image is None else image, index]
        weight = layer.weight.flatten(1)
        if num_anchors == 1:
            return F.linear(self._patches(index, image), weight, layer.bias)
        location = index.div(num_anchors, rounding_mode="trunc")
        logits = F.linear(self._patches(location, image), weight, layer.bias)
        rows = torch.arange(index.shape[0], device=index.device)
        logits = logits.unflatten(1, (num_anchors, layer.out_channels // num_anchors))
        return logits[rows, index - location * num_anchors]

    def _are_few(self, anchors: torch.Tensor) -> bool:
        """Whether to compute these alone is faster; gathering costs about as much as computing."""
        num_locations = int(self._features.shape[-2]) * int(self._features.shape[-1])
        if torch.jit.is_tracing():
            return num_locations >= _LARGE_LEVEL
        num_images = len(self._features) if self._features.dim() == 4 else 1
        return 2 * len(anchors) < num_images * num_locations

    def _patches(self, location: torch.Tensor, image: Optional[torch.Tensor]) -> torch.Tensor:
        """
        What the kernel sees.

        Args:
            location: shape ``(R,)``, in row-major order.
            image: of each, shape ``(R,)``; None: there is but one.

        Returns:
            Tensor: shape ``(R, C * kernel height * kernel width)``.
        """
        (height, width), (top, left) = self._layer.kernel_size, self._layer.padding
        padded = F.pad(self._features, (left, left, top, top))
        # "trunc" as nothing is negative: of "floor" an ONNX graph would have several nodes.
        y = location.div(self._features.shape[-1], rounding_mode="trunc")
        start = location + y * (2 * left)  # in the padded map
        tap_y = location.new_tensor([i for i in range(height) for _ in range(width)])
        tap_x = location.new_tensor([j for _ in range(height) for j in range(width)])
        window = tap_y * padded.shape[-1] + tap_x
        if image is not None:
            start = start + image * (padded.shape[-2] * padded.shape[-1])
            padded = padded.transpose(0, 1)
        return padded.flatten(1)[:, start[:, None] + window].transpose(0, 1).flatten(1)
