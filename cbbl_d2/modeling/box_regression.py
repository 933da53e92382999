"""From boxes to offsets and from logits over a grid back to boxes."""

from typing import Optional, Sequence, Tuple

import torch
from cbbl_d2.distribution import expectation, gaussian_variance, probabilities, variance
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
    _std_scale: Sequence[float]
    coordinate_names: Tuple[str, ...]

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

    def side_variances(
        self, logits: torch.Tensor, boxes: torch.Tensor, decoded: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """
        Variance of each side of the boxes that :meth:`apply_deltas` returns: that of the predicted
        distributions, carried to the sides. It holds the variance that a two-hot code has between
        two grid points far apart.

        Args:
            logits: shape ``(R, 4 * G)``.
            boxes: shape ``(R, 4)``, absolute XYXY.
            decoded: what :meth:`apply_deltas` returns for them, where that is known already.

        Returns:
            Tensor: shape ``(R, 4)``, for x1, y1, x2, y2; square pixels, float32.
        """
        offsets = variance(self._distributions(logits), self.grid_like(logits))
        return self._to_sides(offsets, logits, boxes, decoded)

    def side_deviations(
        self, logits: torch.Tensor, boxes: torch.Tensor, decoded: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """
        How unsure the head is of each side: as the square root of :meth:`side_variances` without
        what the code adds, see :func:`cbbl_d2.distribution.gaussian_variance`, times
        ``std_scale``. Pixels.
        """
        offsets = gaussian_variance(self._distributions(logits), self.grid_like(logits))
        sides = self._to_sides(offsets, logits, boxes, decoded).sqrt()
        if all(scale == 1 for scale in self._std_scale):
            return sides
        return sides * sides.new_tensor(self._std_scale)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """From logits of shape ``(R, 4 * G)`` to the distributions ``(R, 4, G)``, float32."""
        return probabilities(self._distributions(logits))

    def coordinates(self, boxes: torch.Tensor) -> torch.Tensor:
        """
        What the grid points stand for: the coordinates of the box that each would decode to.

        Args:
            boxes: shape ``(R, 4)``, absolute XYXY.

        Returns:
            Tensor: shape ``(R, 4, G)``, pixels, of ``coordinate_names``.
        """
        raise NotImplementedError

    def _to_sides(
        self,
        variances: torch.Tensor,
        logits: torch.Tensor,
        boxes: torch.Tensor,
        decoded: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """From the variances of the offsets to those of the sides, both of shape ``(R, 4)``."""
        raise NotImplementedError


class CBBLBox2BoxTransform(_GridDecoder, Box2BoxTransform):
    """
    Detectron2's ``(dx, dy, dw, dh)`` transform whose "deltas" to apply are logits over a grid of
    offsets. :meth:`get_deltas` is inherited and returns offsets as floats; only decoding differs.

    Attributes:
        grid (Tensor): shape ``(G,)``; the points, in the unit of the weighted offsets.
    """

    coordinate_names = ("center x", "center y", "width", "height")

    def __init__(
        self,
        weights: Tuple[float, float, float, float],
        grid: torch.Tensor,
        std_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        **kwargs,
    ) -> None:
        """
        Args:
            weights: as in ``Box2BoxTransform``: multiply the offsets before they meet the grid.
            grid: shape ``(G,)``, see :func:`cbbl_d2.distribution.exponential_grid`.
            std_scale: calibrates :meth:`side_deviations`, for x1, y1, x2, y2.
            kwargs: passed to ``Box2BoxTransform`` (``scale_clamp``).
        """
        super().__init__(weights=weights, **kwargs)
        self._grid, self._std_scale = grid, std_scale

    def coordinates(self, boxes):
        offsets = self.grid_like(boxes) / boxes.new_tensor(self.weights)[:, None]  # (4, G)
        sizes = (boxes[:, 2:] - boxes[:, :2]).float()[..., None]
        centers = (boxes[:, 2:] + boxes[:, :2]).float()[..., None] / 2
        shifted = centers + sizes * offsets[:2]
        scaled = sizes * offsets[2:].clamp(max=self.scale_clamp).exp()
        return torch.cat((shifted, scaled), dim=1)

    def _to_sides(self, variances, logits, boxes, decoded):
        # To first order, and as if the four offsets were independent.
        variances = variances / variances.new_tensor(self.weights) ** 2
        boxes = boxes.float()  # squares of pixels do not fit into float16
        if decoded is None:
            decoded = self.apply_deltas(logits, boxes)
        # x1 = center - width / 2, and the width is the exponential of its offset.
        center = variances[:, :2] * (boxes[:, 2:] - boxes[:, :2]) ** 2
        half_size = variances[:, 2:] * (decoded[:, 2:] - decoded[:, :2]) ** 2 / 4
        return (center + half_size).repeat(1, 2)


class CBBLBox2BoxTransformLinear(_GridDecoder, Box2BoxTransformLinear):
    """
    The same for Detectron2's linear transform of FCOS: the offsets are the distances from a point
    to the left, top, right and bottom side, in strides, and never negative. The grid is one-sided.

    Attributes:
        grid (Tensor): shape ``(G,)``, from 0 up; in strides.
    """

    coordinate_names = ("left", "top", "right", "bottom")

    def __init__(
        self,
        grid: torch.Tensor,
        normalize_by_size: bool = True,
        std_scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    ) -> None:
        """
        Args:
            grid: shape ``(G,)``, see :func:`cbbl_d2.distribution.exponential_grid` with
                ``one_sided=True``.
            normalize_by_size: as in ``Box2BoxTransformLinear``.
            std_scale: as in :class:`CBBLBox2BoxTransform`.

        Raises:
            ValueError: if the grid has negative points: half of it would never be a target.
        """
        super().__init__(normalize_by_size=normalize_by_size)
        if grid[0] < 0:
            raise ValueError(
                f"distances need a one-sided grid, from 0 up; got one from {grid[0].item():g}"
            )
        self._grid, self._std_scale = grid, std_scale

    def coordinates(self, boxes):
        centers = (boxes[:, 2:] + boxes[:, :2]).float() / 2
        strides = (boxes[:, 2] - boxes[:, 0]).float()[:, None, None]
        distances = self.grid_like(boxes) * (strides if self.normalize_by_size else 1)
        signs = boxes.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
        return centers.repeat(1, 2)[..., None] + signs * distances

    def _to_sides(self, variances, logits, boxes, decoded):
        # Each offset belongs to one side.
        if not self.normalize_by_size:
            return variances
        strides = boxes[:, 2] - boxes[:, 0]  # as the base class takes them
        return variances * strides[:, None].float() ** 2
