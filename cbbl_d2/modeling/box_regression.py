"""From boxes to offsets and from logits over a grid back to boxes."""

from typing import Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from cbbl_d2.distribution import expectation, exponential_grid
from cbbl_d2.errors import ConfigError


class CBBLBox2BoxTransform(Box2BoxTransform):
    """
    Detectron2's ``(dx, dy, dw, dh)`` transform whose "deltas" to apply are logits over a grid of
    offsets. :meth:`get_deltas` is inherited and returns offsets as floats; only decoding differs.

    Attributes:
        grid (Tensor): shape ``(B,)``; the points, in the unit of the weighted offsets.
    """

    def __init__(
        self, weights: Tuple[float, float, float, float], grid: torch.Tensor, **kwargs
    ) -> None:
        """
        Args:
            weights: as in ``Box2BoxTransform``: multiply the offsets before they meet the grid.
            grid: shape ``(B,)``, see :func:`cbbl_d2.distribution.exponential_grid`.
            kwargs: passed to ``Box2BoxTransform`` (``scale_clamp``).
        """
        super().__init__(weights=weights, **kwargs)
        self.grid = grid

    @classmethod
    def from_config(cls, cfg, weights: Tuple[float, float, float, float]):
        """
        Args:
            weights: of the head that asks, e.g. ``cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS``.

        Raises:
            ConfigError: if the keys of the grid do not make a grid.
        """
        c = cfg.MODEL.CBBL
        try:
            grid = exponential_grid(c.ALPHA, c.BETA, c.NUM_INTERVALS)
        except ValueError as e:
            raise ConfigError(f"MODEL.CBBL.{{ALPHA,BETA,NUM_INTERVALS}}: {e}") from e
        return cls(weights=weights, grid=grid)

    @property
    def num_points(self) -> int:
        """``B``, the number of logits per coordinate."""
        return self.grid.numel()

    def grid_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """The grid on the device of ``tensor``. The transform is no module, so ``model.to()``
        does not move it."""
        if self.grid.device != tensor.device:
            self.grid = self.grid.to(tensor.device)
        return self.grid

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """
        Decode by expectation, then transform.

        Args:
            deltas: logits of shape ``(R, k * 4 * B)``, coordinate-major: the B logits of a
                coordinate are adjacent. ``k >= 1`` boxes per source box.
            boxes: shape ``(R, 4)``, absolute XYXY.

        Returns:
            Tensor: boxes of shape ``(R, k * 4)``, float32.

        Raises:
            ValueError: if the logits are not a multiple of ``4 * B`` wide.
        """
        num_regions, width = deltas.shape
        if width % (4 * self.num_points) != 0:
            raise ValueError(
                f"logits of width {width} do not fit a grid of {self.num_points} points: "
                f"need a multiple of {4 * self.num_points}"
            )
        # Explicit sizes: -1 is ambiguous for zero regions.
        logits = deltas.reshape(num_regions, width // self.num_points, self.num_points)
        return super().apply_deltas(expectation(logits, self.grid_like(logits)), boxes)
