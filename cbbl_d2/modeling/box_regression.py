"""From boxes to offsets and from logits over a grid back to boxes."""

from typing import Optional, Sequence, Tuple

import torch
from cbbl_d2.distribution import expectation, variance
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from torch import nn

"""
Shape shorthand in this module:

    R: number of boxes
    G: number of grid points
    k: number of boxes decoded from each source box, >= 1 (the classes of a class-specific head)

Naming convention:

    logits: shape (R, k * 4 * G), coordinate-major: the G logits of a coordinate are adjacent
"""


class _GridDecoder:
    """What the two transforms below share: the grid, and offsets from logits."""

    _grid: torch.Tensor
    _layer: Sequence[nn.Module] = ()

    @property
    def grid(self) -> torch.Tensor:
        """Shape ``(G,)``: the buffer of the layer whose logits are decoded, once there is one."""
        return self._layer[0].grid if self._layer else self._grid

    def refer_to(self, layer: nn.Module) -> None:
        """
        From here on the grid is the buffer ``grid`` of a layer: it is stored with the checkpoint
        and moves with the model.
        """
        self._layer = (layer,)

    @property
    def num_points(self) -> int:
        """``G``, the number of logits per coordinate."""
        return self.grid.numel()

    def grid_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """The grid on the device of ``tensor``; float32, also of a model in half precision."""
        return self.grid.to(tensor.device, torch.float32)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """
        Decode by expectation, then transform.

        Args:
            deltas: logits of shape ``(R, k * 4 * G)``.
            boxes: shape ``(R, 4)``, absolute XYXY.

        Returns:
            Tensor: boxes of shape ``(R, k * 4)``, float32.

        Raises:
            ValueError: if the logits are not a multiple of ``4 * G`` wide.
        """
        return super().apply_deltas(self.decode_offsets(deltas), boxes)

    def decode_offsets(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: shape ``(R, k * 4 * G)``.

        Returns:
            Tensor: expected offsets, shape ``(R, k * 4)``, float32.

        Raises:
            ValueError: if the logits are not a multiple of ``4 * G`` wide.
        """
        return expectation(self._distributions(logits), self.grid_like(logits))

    def _distributions(self, logits: torch.Tensor) -> torch.Tensor:
        """From shape ``(R, k * 4 * G)`` to ``(R, k * 4, G)``."""
        # In tracing these are tensors. The width is the layer's and may become a number; with it a
        # tensor, onnxruntime would write the shape with a -1, which is ambiguous for zero regions.
        num_regions, width = logits.shape[0], int(logits.shape[1])
        if width % (4 * self.num_points) != 0:
            raise ValueError(
                f"logits of width {width} do not fit a grid of {self.num_points} points: "
                f"need a multiple of {4 * self.num_points}"
            )
        return logits.reshape(num_regions, width // self.num_points, self.num_points)

    def offset_variances(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: shape ``(R, 4 * G)``.

        Returns:
            Tensor: variances of the offsets, shape ``(R, 4)``, float32.
        """
        return variance(self._distributions(logits), self.grid_like(logits))


def relative_std(variances: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """
    Args:
        variances: of the sides x1, y1, x2, y2, shape ``(R, 4)``, square pixels.
        boxes: shape ``(R, 4)``, absolute XYXY.

    Returns:
        Tensor: standard deviations, shape ``(R, 4)``, relative to the width or height of the box:
        they hold at any size of the image.
    """
    return variances.sqrt() / _sizes(boxes)


def std_in_pixels(relative: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """
    The inverse of :func:`relative_std`, from the field ``pred_boxes_std``.

    Args:
        relative: standard deviations of the sides, shape ``(R, 4)``.
        boxes: shape ``(R, 4)``, absolute XYXY.

    Returns:
        Tensor: standard deviations, shape ``(R, 4)``, pixels.
    """
    return relative * _sizes(boxes)


def _sizes(boxes: torch.Tensor) -> torch.Tensor:
    """Width, height, width, height, shape ``(R, 4)``; never 0."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6).repeat(1, 2)


class CBBLBox2BoxTransform(_GridDecoder, Box2BoxTransform):
    """
    Detectron2's ``(dx, dy, dw, dh)`` transform whose "deltas" to apply are logits over a grid of
    offsets. :meth:`get_deltas` is inherited and returns offsets as floats; only decoding differs.

    Attributes:
        grid (Tensor): shape ``(G,)``; the points, in the unit of the weighted offsets.
    """

    def __init__(
        self, weights: Tuple[float, float, float, float], grid: torch.Tensor, **kwargs
    ) -> None:
        """
        Args:
            weights: as in ``Box2BoxTransform``: multiply the offsets before they meet the grid.
            grid: shape ``(G,)``, see :func:`cbbl_d2.distribution.exponential_grid`.
            kwargs: passed to ``Box2BoxTransform`` (``scale_clamp``).
        """
        super().__init__(weights=weights, **kwargs)
        self._grid = grid

    def side_variances(
        self, logits: torch.Tensor, boxes: torch.Tensor, decoded: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """
        How unsure the head is of each side of the boxes that :meth:`apply_deltas` returns: the
        variance of the predicted distributions, carried from the offsets to the sides to first
        order, as if the four offsets were independent. A two-hot label between two points far
        apart has a variance of its own, so that a coarse grid overstates it.

        Args:
            logits: shape ``(R, 4 * G)``.
            boxes: shape ``(R, 4)``, absolute XYXY.
            decoded: what :meth:`apply_deltas` returns for them, where that is known already.

        Returns:
            Tensor: shape ``(R, 4)``, for x1, y1, x2, y2; square pixels, float32.
        """
        offsets = self.offset_variances(logits)
        offsets = offsets / offsets.new_tensor(self.weights) ** 2
        if decoded is None:
            decoded = self.apply_deltas(logits, boxes)
        # x1 = center - width / 2, and the width is the exponential of its offset.
        center = offsets[:, :2] * (boxes[:, 2:] - boxes[:, :2]) ** 2
        half_size = offsets[:, 2:] * (decoded[:, 2:] - decoded[:, :2]) ** 2 / 4
        return (center + half_size).repeat(1, 2)


class CBBLBox2BoxTransformLinear(_GridDecoder, Box2BoxTransformLinear):
    """
    The same for Detectron2's linear transform of FCOS: the offsets are the distances from a point
    to the left, top, right and bottom side, in strides, and never negative. The grid is one-sided.

    Attributes:
        grid (Tensor): shape ``(G,)``, from 0 up; in strides.
    """

    def __init__(self, grid: torch.Tensor, normalize_by_size: bool = True) -> None:
        """
        Args:
            grid: shape ``(G,)``, see :func:`cbbl_d2.distribution.exponential_grid` with
                ``one_sided=True``.
            normalize_by_size: as in ``Box2BoxTransformLinear``.

        Raises:
            ValueError: if the grid has negative points: half of it would never be a target.
        """
        super().__init__(normalize_by_size=normalize_by_size)
        if grid[0] < 0:
            raise ValueError(
                f"distances need a one-sided grid, from 0 up; got one from {grid[0].item():g}"
            )
        self._grid = grid

    def side_variances(
        self, logits: torch.Tensor, boxes: torch.Tensor, decoded: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """
        As :meth:`CBBLBox2BoxTransform.side_variances`; here each offset belongs to one side.

        Args:
            logits: shape ``(R, 4 * G)``.
            boxes: shape ``(R, 4)``, absolute XYXY, centered at the points.
            decoded: not needed here.

        Returns:
            Tensor: shape ``(R, 4)``, for x1, y1, x2, y2; square pixels, float32.
        """
        offsets = self.offset_variances(logits)
        if not self.normalize_by_size:
            return offsets
        strides = boxes[:, 2] - boxes[:, 0]  # as the base class takes them
        return offsets * strides[:, None].float() ** 2
