"""
Drawing of the SmallShapes images: which objects are on image ``index`` of a split, and its pixels.

Every image depends on ``(spec.seed, split, index)`` alone, so images can be drawn in any order, and
must come out with the same pixels on every machine. Only operations that IEEE 754 rounds exactly
(+ - * / sqrt, comparisons, rounding) touch a pixel, element by element: no BLAS, no floating-point
sums (their order depends on the SIMD width), no sine, cosine or Gaussian (they differ in the last
bit between math libraries). Rotations come from the rational parametrisation of the circle, noise
from integers, anti-aliasing from counting samples.

Coordinates are continuous: pixel (column i, row j) covers [i, i+1) x [j, j+1), as in COCO.

Glossary: H = W = ``spec.image_size``, pixels; M objects on the image.
"""

import dataclasses
import hashlib
import json
import math

import numpy as np
from cbbl_d2.data.datasets.small_shapes_geometry import CLASS_NAMES, Shape
from cbbl_d2.errors import UserError

SPLITS = ("train", "val", "test")

# Raise the first whenever a change alters pixels or boxes, the second whenever it alters anything
# else in the annotation files: they are part of the folder's name, so that data made by an older
# version is never taken for the new one.
DRAWING_VERSION = 1
ANNOTATION_VERSION = 2

# Samples per pixel side when a shape is rasterised: its edge is then right to 1/16 pixel.
_SUPERSAMPLING = 8

# A box may be covered by another one up to this share of the smaller one's area.
_MAX_OVERLAP = 0.1
_PLACEMENT_TRIES = 40

# The box is at least this far inside the image, pixels.
_BORDER = 1.0

# The difference between an object and its surroundings after blending: mean over the channels, grey
# levels of 255. The lower end is well above the noise, so that a person finds nearly every object.
_CONTRAST = (28.0, 90.0)
_COLOR_TRIES = 50


@dataclasses.dataclass(frozen=True)
class SmallShapesSpec:
    """
    What a SmallShapes data set contains. Equal specs give equal pixels and boxes.

    Attributes:
        num_train, num_val, num_test: images of each split.
        image_size: side of the square images, pixels.
        min_side, max_side: range of ``sqrt(box area)``, pixels; log-uniform in between.
        min_objects, max_objects: range of the objects per image. Fewer are drawn where no free
            place is left for more.
        seed: any non-negative integer.

    Raises:
        UserError: a field is out of its range.
    """

    num_train: int = 2000
    num_val: int = 300
    num_test: int = 300
    image_size: int = 160
    min_side: float = 6.0
    max_side: float = 40.0
    min_objects: int = 3
    max_objects: int = 12
    seed: int = 0

    def __post_init__(self):
        if min(self.num_train, self.num_val, self.num_test) < 1:
            raise UserError("SmallShapes: every split needs at least 1 image")
        if not 2.0 <= self.min_side <= self.max_side:
            raise UserError(
                f"SmallShapes: sides must satisfy 2 <= min_side <= max_side, "
                f"not {self.min_side}, {self.max_side}"
            )
        # The longest box is about 1.7 times as long as sqrt(its area).
        if self.image_size < 2 * self.max_side:
            raise UserError(
                f"SmallShapes: image_size {self.image_size} is under twice max_side "
                f"{self.max_side}: raise image_size or lower max_side"
            )
        if not 1 <= self.min_objects <= self.max_objects:
            raise UserError(
                f"SmallShapes: objects must satisfy 1 <= min_objects <= max_objects, "
                f"not {self.min_objects}, {self.max_objects}"
            )
        if self.seed < 0:
            raise UserError(f"SmallShapes: seed must be >= 0, not {self.seed}")

    def num_images(self, split: str) -> int:
        """Images in ``split``, one of ``SPLITS``."""
        return getattr(self, f"num_{split}")

    @property
    def fingerprint(self) -> str:
        """A short name for these fields and the versions of the drawing; names the folder."""
        fields = {
            f.name: f.type(getattr(self, f.name)) for f in dataclasses.fields(self)
        }  # the declared type: 40 and 40.0 are the same side
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        version = f"{DRAWING_VERSION}.{ANNOTATION_VERSION}"
        return f"v{version}-{self.image_size}px-{digest[:8]}"


def draw_image(spec: SmallShapesSpec, split: str, index: int) -> tuple[np.ndarray, list[Shape]]:
    """
    Draw image ``index`` of a split.

    Returns:
        image: (H, W, 3) uint8, RGB.
        shapes: its M objects, in the order in which they were drawn: a later one can cover a little
            of an earlier one.
    """
    rng = np.random.Generator(np.random.PCG64([spec.seed, SPLITS.index(split), index]))
    canvas = _background(rng, spec.image_size)
    _draw_distractors(rng, canvas)
    shapes = _place_shapes(rng, spec)
    for shape in shapes:
        _draw_shape(rng, canvas, shape)
    if rng.random() < 0.5:
        canvas = _slight_blur(canvas)
    canvas += _noise(rng, canvas.shape, amplitude=_uniform(rng, 0.5, 2.5))
    return _to_uint8(canvas), shapes


# -- shapes ----------------------------------------------------------------------------------------


def _place_shapes(rng: np.random.Generator, spec: SmallShapesSpec) -> list[Shape]:
    """Shapes with little overlap, large ones first: a large one never hides a small one."""
    count = int(rng.integers(spec.min_objects, spec.max_objects + 1))
    sides = sorted(_log_uniform(rng, spec.min_side, spec.max_side) for _ in range(count))[::-1]
    placed: list[Shape] = []
    for side in sides:
        shape = _place_shape(rng, spec.image_size, side, [other.box for other in placed])
        if shape is not None:
            placed.append(shape)
    return placed


def _place_shape(rng, image_size: int, side: float, taken: list[tuple]) -> Shape | None:
    """A random shape with ``sqrt(box area) == side`` in a free place; None where none was found."""
    class_name = CLASS_NAMES[int(rng.integers(len(CLASS_NAMES)))]
    detail = _uniform(rng, 0.5, 0.62) if class_name == "ring" else _uniform(rng, 0.26, 0.36)
    # At most about 20 degrees off the axes: at 45 a square of 6 pixels looks like a disk.
    cos, sin = _rotation(_uniform(rng, -0.18, 0.18))
    for _ in range(int(rng.integers(4))):
        cos, sin = -sin, cos
    shape = Shape(class_name, _uniform(rng, 0.7, 1.0), detail, cos, sin)
    left, top, right, bottom = shape.box
    scale = side / math.sqrt((right - left) * (bottom - top))
    width, height = scale * (right - left), scale * (bottom - top)
    for _ in range(_PLACEMENT_TRIES):
        x0 = _uniform(rng, _BORDER, image_size - _BORDER - width)
        y0 = _uniform(rng, _BORDER, image_size - _BORDER - height)
        box = (x0, y0, x0 + width, y0 + height)
        if all(_overlap(box, other) <= _MAX_OVERLAP for other in taken):
            return dataclasses.replace(
                shape, scale=scale, cx=x0 - scale * left, cy=y0 - scale * top
            )
    return None


def _overlap(a: tuple, b: tuple) -> float:
    """Intersection of two XYXY boxes over the smaller one's area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _draw_shape(rng: np.random.Generator, canvas: np.ndarray, shape: Shape) -> None:
    """Blend one shape into the (H, W, 3) canvas, in place."""
    x0, y0, coverage = _coverage(shape)
    height, width = coverage.shape
    window = canvas[y0 : y0 + height, x0 : x0 + width]
    opacity = _uniform(rng, 0.6, 1.0)
    color = _contrasting_color(rng, window, opacity)
    # Lit from one side, so that an object is not one flat color.
    cos, sin = _rotation(_uniform(rng, -1.0, 1.0))
    column = (np.arange(width) + 0.5) / width - 0.5
    row = (np.arange(height) + 0.5) / height - 0.5
    shading = _uniform(rng, 0.0, 24.0) * (cos * column[None, :] + sin * row[:, None])
    weight = (opacity * coverage)[:, :, None]
    window += weight * (color + shading[:, :, None] - window)


def _coverage(shape: Shape) -> tuple[int, int, np.ndarray]:
    """
    Left column, top row and (h, w) float64: the share of each pixel that the shape covers, over the
    pixels its box touches.
    """
    left, top, right, bottom = shape.box
    x0, y0, x1, y1 = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    x = x0 + (np.arange((x1 - x0) * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    y = y0 + (np.arange((y1 - y0) * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    inside = shape.contains(x[None, :], y[:, None])
    inside = inside.reshape(y1 - y0, _SUPERSAMPLING, x1 - x0, _SUPERSAMPLING)
    return x0, y0, inside.sum(axis=(1, 3), dtype=np.int64) / _SUPERSAMPLING**2


def _contrasting_color(rng: np.random.Generator, window: np.ndarray, opacity: float) -> np.ndarray:
    """A (3,) color that differs from a (h, w, 3) window's mean by ``_CONTRAST`` once blended."""
    total = np.rint(window).astype(np.int64).sum(axis=(0, 1))
    mean = total / (window.shape[0] * window.shape[1])
    best, best_contrast = None, -1.0
    for _ in range(_COLOR_TRIES):
        color = rng.integers(0, 256, size=3).astype(np.float64)
        difference = np.abs(color - mean)
        contrast = opacity * float(difference[0] + difference[1] + difference[2]) / 3
        if _CONTRAST[0] <= contrast <= _CONTRAST[1]:
            return color
        if contrast > best_contrast:
            best, best_contrast = color, contrast
    return best


# -- background ------------------------------------------------------------------------------------


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A (H, W, 3) float64 canvas of grey levels: one of three layouts under a common texture."""
    first, second = _muted_color(rng), _muted_color(rng)
    layout = int(rng.integers(3))
    if layout == 0:  # gradient
        mix = _ramp(rng, size)
    elif layout == 1:  # blotches
        mix = _value_noise(rng, size, cell=_uniform(rng, 30, 70), channels=1)
    else:  # areas with straight, soft borders, like fields, roads and roofs
        mix = np.zeros((size, size, 1))
        for _ in range(int(rng.integers(1, 4))):
            sharpness = _uniform(rng, 0.05, 0.5) * size
            mix += _uniform(rng, 0.3, 0.6) * np.clip((_ramp(rng, size) - 0.5) * sharpness, 0, 1)
        mix = np.clip(mix, 0, 1)
    canvas = first + mix * (second - first)
    for cell, amplitude in ((_uniform(rng, 24, 40), 30), (12.0, 18), (6.0, 14), (3.0, 10)):
        amplitude = _uniform(rng, 0.2, 1.0) * amplitude
        # Mostly grey: real textures change in brightness more than in hue.
        grey = _value_noise(rng, size, cell, channels=1) - 0.5
        canvas += 2 * amplitude * grey
    canvas += 20 * (_value_noise(rng, size, 32.0, channels=3) - 0.5)
    return canvas


def _muted_color(rng: np.random.Generator) -> np.ndarray:
    """A (3,) color near grey, as surfaces outdoors have; objects take any color."""
    return _uniform(rng, 55, 200) + rng.integers(-45, 46, size=3).astype(np.float64)


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """(H, W, 1) linear ramp in a random direction; 0.5 on a line that crosses the image."""
    cos, sin = _rotation(_uniform(rng, -1.0, 1.0))
    if rng.random() < 0.5:
        cos, sin = -cos, -sin
    x0, y0 = _uniform(rng, 0.2, 0.8) * size, _uniform(rng, 0.2, 0.8) * size
    x, y = _pixel_centers(size)
    return np.clip(0.5 + (cos * (x - x0) + sin * (y - y0)) / size, 0, 1)[:, :, None]


def _value_noise(rng: np.random.Generator, size: int, cell: float, channels: int) -> np.ndarray:
    """(H, W, channels) in [0, 1]: random values every ``cell`` pixels, smoothly interpolated."""
    nodes = math.ceil(size / cell) + 1
    values = rng.integers(0, 256, size=(nodes, nodes, channels)) / 255.0
    position = (np.arange(size) + 0.5) / cell
    start = np.floor(position).astype(np.int64)
    t = position - start
    t = (t * t * (3 - 2 * t))[:, None, None]
    rows = values[start] + t * (values[start + 1] - values[start])
    rows = rows.swapaxes(0, 1)
    return (rows[start] + t * (rows[start + 1] - rows[start])).swapaxes(0, 1)


def _draw_distractors(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Lines and wide arcs, in place: as sharp as the objects, and none of them."""
    size = canvas.shape[0]
    x, y = _pixel_centers(size)
    for _ in range(int(rng.integers(0, 7))):
        px, py = _uniform(rng, 0, size), _uniform(rng, 0, size)
        cos, sin = _rotation(_uniform(rng, -1.0, 1.0))
        dx, dy = x - px, y - py
        if rng.random() < 0.7:
            half_length = _uniform(rng, 0.1, 0.6) * size
            along = np.abs(cos * dx + sin * dy) - half_length
            distance = np.maximum(np.abs(cos * dy - sin * dx), along)
        else:
            radius = _uniform(rng, 0.3, 1.0) * size
            dx, dy = dx - radius * cos, dy - radius * sin
            distance = np.abs(np.sqrt(dx * dx + dy * dy) - radius)
        half_width = _uniform(rng, 0.3, 1.6)
        coverage = np.clip(half_width + 0.5 - distance, 0, 1)[:, :, None]
        color = rng.integers(20, 236, size=3).astype(np.float64)
        canvas += _uniform(rng, 0.2, 0.7) * coverage * (color - canvas)


# -- the sensor ------------------------------------------------------------------------------------


def _slight_blur(canvas: np.ndarray) -> np.ndarray:
    """The binomial filter (1, 6, 1) / 8 along both axes; the border is repeated."""
    for axis in (0, 1):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(canvas, pad, mode="edge")
        size = canvas.shape[axis]
        before, after = padded.take(range(size), axis), padded.take(range(2, size + 2), axis)
        canvas = 0.75 * canvas + 0.125 * (before + after)
    return canvas


def _noise(rng: np.random.Generator, shape: tuple, amplitude: float) -> np.ndarray:
    """Bell-shaped noise, grey levels, standard deviation about 1.5 x ``amplitude``."""
    # The sum of four uniform integers is nearly Gaussian, and exact.
    total = rng.integers(0, 16, size=(4, *shape), dtype=np.int8).sum(axis=0, dtype=np.int64)
    return amplitude * (total - 30) / 6.0


def _to_uint8(canvas: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


# -- random numbers --------------------------------------------------------------------------------


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    # exp and log may differ in the last bit between math libraries: rounding to 1/64 hides it.
    value = math.exp(_uniform(rng, math.log(low), math.log(high)))
    return min(max(round(value * 64) / 64, low), high)


def _rotation(t: float) -> tuple[float, float]:
    """(cos, sin) of the angle whose half has the tangent t; t in [-1, 1] is -90 to 90 degrees."""
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


def _pixel_centers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, W) and y (H, 1) of the pixels' centers."""
    centers = np.arange(size) + 0.5
    return centers[None, :], centers[:, None]
