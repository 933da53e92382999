"""
The shapes of SmallShapes as geometry: extent, outline, extreme points, and which points they hold.

As in the drawing, only operations that IEEE 754 rounds exactly are used, so that the annotations
are the same on every machine.
"""

import dataclasses
import math

import numpy as np

CLASS_NAMES = ("disk", "ring", "square", "triangle", "cross")

# The extreme points of a shape: what all classes have in common, and what its box touches.
KEYPOINT_NAMES = ("left", "top", "right", "bottom")

# A quarter of an ellipse is outlined with 2^3 edges, so a disk with 32: its area is 0.7 % too
# small, and no edge is farther than 0.1 pixel from a circle of 40 pixels.
_BISECTIONS = 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """
    A shape and where its own frame lies in the image. In its own frame it fills
    [-1, 1] x [-aspect, aspect]; its point (u, v) is the image's point
    (cx, cy) + scale * (cos*u - sin*v, sin*u + cos*v).

    Coordinates are continuous, in pixels: pixel (column i, row j) covers [i, i+1) x [j, j+1).
    """

    class_name: str
    aspect: float
    detail: float  # relative to the outer shape; ring: its hole; cross: width of an arm
    cos: float
    sin: float
    scale: float = 1.0
    cx: float = 0.0
    cy: float = 0.0

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The exact extent in the image, XYXY."""
        cos, sin, aspect = self.cos, self.sin, self.aspect
        if self.class_name in ("disk", "ring"):
            half_w = math.sqrt(cos * cos + sin * sin * aspect * aspect)
            half_h = math.sqrt(sin * sin + cos * cos * aspect * aspect)
            left, top, right, bottom = -half_w, -half_h, half_w, half_h
        else:
            corners = self._corners()
            xs = [cos * u - sin * aspect * v for u, v in corners]
            ys = [sin * u + cos * aspect * v for u, v in corners]
            left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
        return (
            self.cx + self.scale * left,
            self.cy + self.scale * top,
            self.cx + self.scale * right,
            self.cy + self.scale * bottom,
        )

    @property
    def outline(self) -> np.ndarray:
        """
        The shape as one polygon, (N, 2) image points. Disk and ring are polygons with vertices on
        the ellipse, its four extreme points among them.

        A ring is a keyhole: around the outer ellipse, on a cut to the inner one, around it in the
        other direction, and back on the cut. A second polygon would fill the hole, because COCO
        takes the union of an object's polygons.
        """
        if self.class_name in ("disk", "ring"):
            points = self._circle()
            if self.class_name == "ring":
                points = np.concatenate([points, points[:1]])
                points = np.concatenate([points, self.detail * points[::-1]])
        else:
            points = np.array(self._corners(), dtype=np.float64)
        u, v = points[:, 0], self.aspect * points[:, 1]
        x = self.cx + self.scale * (self.cos * u - self.sin * v)
        y = self.cy + self.scale * (self.sin * u + self.cos * v)
        return np.stack([x, y], axis=1)

    @property
    def keypoints(self) -> np.ndarray:
        """
        The extreme points in the order of ``KEYPOINT_NAMES``, (4, 2). Where a whole edge is
        extreme, because it is parallel to an axis, its middle is taken.
        """
        points = self.outline
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        x, y = points[:, 0], points[:, 1]
        extreme = [x == left, y == top, x == right, y == bottom]
        return np.stack([points[where].mean(axis=0) for where in extreme])

    def contains(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether the image points (x, y) lie in the shape; the arguments broadcast."""
        dx, dy = (x - self.cx) / self.scale, (y - self.cy) / self.scale
        u = self.cos * dx + self.sin * dy
        v = (self.cos * dy - self.sin * dx) / self.aspect
        if self.class_name == "disk":
            return u * u + v * v <= 1
        if self.class_name == "ring":
            radius_squared = u * u + v * v
            return (radius_squared <= 1) & (radius_squared >= self.detail * self.detail)
        u_abs, v_abs = np.abs(u), np.abs(v)
        if self.class_name == "square":
            return (u_abs <= 1) & (v_abs <= 1)
        if self.class_name == "triangle":
            return (u_abs <= 1) & (v_abs <= (1 + u) / 2)
        return np.maximum(u_abs, v_abs) <= np.where(np.minimum(u_abs, v_abs) <= self.detail, 1, 0)

    def _corners(self) -> list[tuple[float, float]]:
        """The corners (u, v / aspect) of a square, triangle or cross, one after the other."""
        if self.class_name == "square":
            return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        if self.class_name == "triangle":
            return [(-1, 0), (1, -1), (1, 1)]
        a = self.detail
        quarter = [(1, -a), (1, a), (a, a)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-v, u) for u, v in quarter]
        return corners

    def _circle(self) -> np.ndarray:
        """
        Points (u, v / aspect) of the unit circle, (N, 2), in order, the first of them the one that
        lies rightmost in the image. Halfway between two points: their sum, brought to length 1.
        """
        cos, sin, aspect = self.cos, self.sin, self.aspect
        right, bottom = (cos, -sin * aspect), (sin, cos * aspect)
        points = _unit(np.array([right, bottom, np.negative(right), np.negative(bottom)]))
        for _ in range(_BISECTIONS):
            between = _unit(points + np.roll(points, -1, axis=0))
            points = np.stack([points, between], axis=1).reshape(-1, 2)
        return points


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(N, 2) vectors brought to length 1."""
    u, v = vectors[:, :1], vectors[:, 1:]
    return vectors / np.sqrt(u * u + v * v)
