"""
Pictures of small objects: ground truth beside predictions, enlarged so that a person can see them.

The boxes, keypoints and labels are drawn by Detectron2's :class:`Visualizer`, with the primitives
that it offers for a style of one's own. Its ready-made style is meant for large objects: its labels
would cover an object of 10 pixels, and its lines would be as thick as the object.

Glossary: images are (H, W, 3) uint8, RGB; boxes are XYXY in pixels of the image as it is on disk,
whatever the enlargement.
"""

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_ioa
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import GenericMask, VisImage, Visualizer
from matplotlib.colors import to_rgb
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke

from .errors import UserError
from .messages import count, plot_text

__all__ = [
    "ClassStyle",
    "contact_sheet",
    "draw_boxes",
    "draw_instances",
    "draw_masks",
    "draw_pair",
    "enlarge",
    "enlargement",
    "shrink",
]

# Seven colors of Okabe and Ito ("Color Universal Design", 2008), which people with any kind of
# color vision can tell apart, and three light ones that stay distinct from them.
_PALETTE = "#e69f00 #56b4e9 #d55e00 #009e73 #f0e442 #cc79a7 #0072b2 #fbafe4 #ca9161 #e1e1e1".split()

# Short side that `enlargement` aims at, and the long side that it does not exceed, pixels.
_SHORT_SIDE = 600
_LONG_SIDE = 4096
# matplotlib cannot render a larger figure than 2**16 pixels; a pair is two of them.
_LARGEST_SIDE = 2**15

_INK, _FAINT = "#222222", "#777777"
_TIMES, _SQUARE = "\N{MULTIPLICATION SIGN}", "\N{BLACK SQUARE}"
_GAP = 8  # between the panels of a pair and around those of a contact sheet, pixels
_WIDE = 2.5  # width / height from which on the panels of a pair are stacked
_PAGE = 1.4  # height / width that a contact sheet aims at

# Masks are laid over the image with this opacity: the object must stay visible.
_MASK_OPACITY = 0.4

# Of the band of a standard deviation.
_BAND_OPACITY = 0.35

# A label may cover this share of another object at most, otherwise it is left out.
_MAX_COVERED = 0.2


class ClassStyle:
    """
    Name and color of every class. The color depends on the class index alone, so that it is the
    same in all panels and pictures.
    """

    def __init__(self, metadata: Metadata | None = None):
        """
        Args:
            metadata: of the data set; ``thing_classes`` gives the names. ``thing_colors`` gives the
                colors of more than ten classes; up to ten have a palette which color-blind people
                can tell apart. It is not modified. Without it the names are "class 0", ...
        """
        self._names = [] if metadata is None else list(metadata.get("thing_classes", None) or [])
        self._colors = [to_rgb(color) for color in _PALETTE]
        if len(self._names) > len(_PALETTE):
            colors = metadata.get("thing_colors", None) or ()
            if len(colors) < len(self._names):
                colors = colormap(rgb=True, maximum=255)
            self._colors = [tuple(int(c) / 255 for c in color) for color in colors]

    def name(self, index: int) -> str:
        return self._names[index] if 0 <= index < len(self._names) else f"class {index}"

    def color(self, index: int) -> tuple[float, float, float]:
        """RGB in [0, 1], as matplotlib takes it."""
        return self._colors[index % len(self._colors)]


def enlargement(image_shape: Sequence[int], short_side: int = _SHORT_SIDE) -> int:
    """
    The smallest integer factor that brings the short side to ``short_side`` pixels or more. Never
    less than 1, and no more than keeps a long side within 4096 pixels.

    Args:
        image_shape: (height, width, ...).
    """
    height, width = image_shape[:2]
    wanted = math.ceil(short_side / min(height, width))
    return max(1, min(wanted, _LONG_SIDE // max(height, width)))


def enlarge(image: np.ndarray, scale: float) -> np.ndarray:
    """
    Resize an image by ``scale``. An integer factor repeats the pixels: the picture then shows what
    the detector got, and does not invent smooth contours.

    Returns:
        array (round(scale * H), round(scale * W), 3).

    Raises:
        UserError: the result would be too large, or empty.
    """
    height, width = (round(scale * side) for side in image.shape[:2])
    if not (0 < min(height, width) and max(height, width) <= _LARGEST_SIDE):
        raise UserError(
            f"scale {scale:g} makes a picture of {width} x {height} pixels: choose one that gives "
            f"sides of 1 to {_LARGEST_SIDE}"
        )
    if scale == int(scale):
        interpolation = cv2.INTER_NEAREST
    else:
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=interpolation)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[tuple[float, float, float]],
    dashed: Sequence[bool] | None = None,
    keypoints: Sequence[np.ndarray] = (),
    metadata: Metadata | None = None,
    deviations: np.ndarray | None = None,
) -> np.ndarray:
    """
    Draw N boxes with thin lines, keypoints and, where there is room beside the objects, the labels
    of the boxes. A label that would cover another label, or much of another object, is left out.

    Args:
        image: (H, W, 3), already enlarged.
        boxes: (N, 4), pixels of ``image``.
        labels: N texts, "" for none.
        colors: N colors, RGB in [0, 1].
        dashed: N flags, for crowd regions.
        keypoints: arrays (K, 3) of x, y in pixels of ``image`` and the visibility or score, one for
            each object with keypoints; those with a visibility of 0 are not labeled.
        metadata: its ``keypoint_names`` and ``keypoint_connection_rules`` say which of them are
            connected.
        deviations: (N, 4), how far each side is moved out and in for the edges of its band, pixels
            of ``image``.

    Returns:
        array (H, W, 3).
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    visualizer = Visualizer(image, metadata)
    canvas = visualizer.output
    short_side = min(image.shape[:2])
    line_width = np.clip(short_side / 420, 1.8, 3) * 72 / canvas.dpi  # points
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for i in np.argsort(-areas, kind="stable"):
        if deviations is not None:
            band = PathPatch(_band(boxes[i], deviations[i]), facecolor=colors[i], linewidth=0)
            band.set_alpha(_BAND_OPACITY)
            canvas.ax.add_patch(band)
        style = "--" if dashed is not None and dashed[i] else "-"
        visualizer.draw_box(boxes[i], alpha=1, edge_color=colors[i], line_style=style)
        patch = canvas.ax.patches[-1]
        patch.set_linewidth(line_width)
        # A dark rim keeps every color visible on every background.
        patch.set_path_effects([withStroke(linewidth=1.7 * line_width, foreground="black")])
    # All of an object that is drawn, as the metric counts them all. The score is a probability
    # among thousands of places, and low as long as a model is not sure of the exact one.
    visualizer.keypoint_threshold = 0.0
    for points in keypoints:
        visualizer.draw_and_connect_keypoints(points)
    for line in canvas.ax.lines:  # the connections: as thick as they are, they hide the points
        line.set_linewidth(line_width / 2)
    _draw_labels(visualizer, boxes, labels, colors)

    # Not canvas.get_image(): matplotlib < 3.11 moves the pixels of an image that it draws by one or
    # two. Take the drawing alone, and lay it over the image.
    canvas.ax.images[0].set_visible(False)
    data, (width, height) = canvas.canvas.print_to_buffer()
    drawing = np.frombuffer(data, dtype=np.uint8).reshape(height, width, 4).astype(np.float32)
    opacity = drawing[:, :, 3:] / 255
    return np.rint(image * (1 - opacity) + drawing[:, :, :3] * opacity).astype(np.uint8)


def _band(box: np.ndarray, deviations: np.ndarray) -> Path:
    """The region between a box whose sides are moved out and one whose sides are moved in."""
    outwards = deviations * [-1, -1, 1, 1]
    outer, inner = box + outwards, box - outwards
    corners = [(outer[[0, 2, 2, 0]], outer[[1, 1, 3, 3]])]
    if (inner[:2] < inner[2:]).all():
        corners.append((inner[[0, 0, 2, 2]], inner[[1, 3, 3, 1]]))  # the other way around: a hole
    return Path.make_compound_path(
        *(Path(np.column_stack([(*x, x[0]), (*y, y[0])]), closed=True) for x, y in corners)
    )


def draw_masks(
    image: np.ndarray,
    masks: Sequence[np.ndarray | None],
    colors: Sequence[tuple[float, float, float]],
) -> np.ndarray:
    """
    Lay N translucent masks with a solid edge over an image.

    Args:
        image: (H, W, 3), already enlarged.
        masks: N arrays (h, w) of bool, of any size: they are enlarged to the image's. None for an
            object without a mask.
        colors: N colors, RGB in [0, 1].

    Returns:
        array (H, W, 3).
    """
    # Not by matplotlib, which draws a mask with a hole as an image, see draw_boxes.
    image = image.copy()
    size = image.shape[1::-1]
    for mask, color in zip(masks, colors, strict=True):
        if mask is None:
            continue
        mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        inner = cv2.erode(mask, np.ones((3, 3), np.uint8), borderValue=0) > 0
        color = 255 * np.asarray(color)
        tinted = (1 - _MASK_OPACITY) * image[inner] + _MASK_OPACITY * color
        image[mask > 0] = np.rint(color)
        image[inner] = np.rint(tinted)
    return image


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    metadata: Metadata | None = None,
    scale: float | None = None,
    uncertainty: bool = False,
) -> np.ndarray:
    """
    Predictions over the enlarged image, without a caption: boxes with class and score, and the
    masks and keypoints that there are.

    Args:
        image: (H, W, 3).
        instances: "pred_boxes", "scores" and "pred_classes", and perhaps "pred_masks" (N, H, W)
            and "pred_keypoints" (N, K, 3), on the CPU or not.
        metadata: for names and colors, see :class:`ClassStyle`.
        scale: factor of the enlargement, by default that of :func:`enlargement`.
        uncertainty: a band around each side, one standard deviation to both sides of it. Needs
            "pred_boxes_std" (N, 4), relative to the box.

    Returns:
        array (round(scale * H), round(scale * W), 3).

    Raises:
        UserError: an impossible scale.
    """
    style = ClassStyle(metadata)
    canvas = enlarge(image, enlargement(image.shape) if scale is None else scale)
    # Sides are rounded to whole pixels, so the exact factors of x and y differ a little from scale.
    factors = np.divide(canvas.shape[1::-1], image.shape[1::-1])
    fields = instances.get_fields()
    classes, crowd = instances.pred_classes.tolist(), fields.get("is_crowd")
    labels, colors = [style.name(c) for c in classes], [style.color(c) for c in classes]
    if "scores" in fields:
        labels = [f"{x} {score:.0%}" for x, score in zip(labels, instances.scores.tolist())]
    if crowd is not None:
        labels = [f"{x} (crowd)" if is_crowd else x for x, is_crowd in zip(labels, crowd)]
    masks = [_mask(x, canvas.shape[:2], factors) for x in fields.get("pred_masks", ())]
    points = [
        np.reshape(_array(x), (-1, 3)) * [*factors, 1] for x in fields.get("pred_keypoints", ())
    ]
    boxes = _array(instances.pred_boxes.tensor) * np.tile(factors, 2)
    deviations = None
    if uncertainty:
        deviations = _array(instances.pred_boxes_std) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    drawn = draw_masks(canvas, masks, colors) if masks else canvas
    return draw_boxes(drawn, boxes, labels, colors, crowd, points, metadata, deviations)


def _array(values: Sequence[float] | np.ndarray | torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.array(values)


def _mask(segmentation, shape: tuple[int, int], factors: np.ndarray) -> np.ndarray | None:
    """
    A mask, of polygons in COCO's format as fine as the canvas.

    Args:
        segmentation: also a mask already, or None.
        shape: height and width of the canvas, ``factors`` larger (in x and y) than the image.
    """
    if isinstance(segmentation, list):
        return GenericMask([np.reshape(x, (-1, 2)) * factors for x in segmentation], *shape).mask
    if isinstance(segmentation, dict):
        return GenericMask(segmentation, *segmentation["size"]).mask
    return None if segmentation is None else _array(segmentation)


def _ground_truth(
    annotations: list[dict], image_size: tuple[int, int], name: str, shown: Sequence[str]
) -> Instances:
    """
    Args:
        shown: fields of predictions that are not in all annotations: "pred_masks" and the like.
    """
    if any(len(a["bbox"]) != 4 for a in annotations):
        raise UserError(f"{name}: only axis-aligned boxes can be drawn, not rotated ones")
    boxes = [
        BoxMode.convert(list(map(float, a["bbox"])), a["bbox_mode"], BoxMode.XYXY_ABS)
        for a in annotations
    ]
    fields = {
        "pred_masks": [a.get("segmentation") or None for a in annotations],
        "pred_keypoints": [a.get("keypoints", ()) for a in annotations],
    }
    return Instances(
        image_size,
        pred_boxes=Boxes(boxes),
        pred_classes=torch.tensor([int(a["category_id"]) for a in annotations], dtype=torch.int64),
        is_crowd=[bool(a.get("iscrowd", 0)) for a in annotations],
        **{key: fields[key] for key in shown},
    )


def draw_pair(
    image: np.ndarray,
    ground_truth: list[dict] | None,
    predictions: Instances | None,
    metadata: Metadata | None = None,
    scale: float | None = None,
    name: str = "",
    note: str = "",
    uncertainty: bool = False,
) -> np.ndarray:
    """
    Ground truth on the left, predictions on the right (very wide images: above and below), each
    under a caption that says which it is and counts the objects of every class. A side given as
    None is left out.

    Args:
        image: (H, W, 3).
        ground_truth: the "annotations" of Detectron2's dataset dict: "bbox", "bbox_mode",
            "category_id" and perhaps "iscrowd". Their "segmentation" and "keypoints" are drawn
            where the predictions have such, too, or where there are none.
        predictions: "pred_boxes", "scores" and "pred_classes", and perhaps "pred_masks" (N, H, W)
            and "pred_keypoints" (N, K, 3), on the CPU or not.
        metadata: for names and colors, see :class:`ClassStyle`.
        scale: factor of the enlargement, by default that of :func:`enlargement`.
        name: of the image, for the captions.
        note: for the caption of the predictions, e.g. the score threshold.
        uncertainty: of the predictions, see :func:`draw_instances`.

    Returns:
        array (height, width, 3): the panels of round(scale * H) x round(scale * W) pixels with
        their captions.

    Raises:
        UserError: an annotation that is no axis-aligned box, or an impossible scale.
    """
    scale = enlargement(image.shape) if scale is None else scale
    size = f"{image.shape[1]} {_TIMES} {image.shape[0]}"
    if scale != 1:
        size += f", shown {_TIMES}{scale:g}"
    panels = []

    def add_panel(title: str, instances: Instances, remarks: list[str], bands=False) -> None:
        drawn = draw_instances(image, instances, metadata, scale, bands)
        classes = instances.pred_classes
        panels.append(_with_caption(drawn, title, remarks, classes.tolist(), ClassStyle(metadata)))

    if ground_truth is not None:
        # Masks and keypoints only where the other side can have them, too.
        fields = ("pred_masks", "pred_keypoints")
        shown = [x for x in fields if predictions is None or predictions.has(x)]
        truth = _ground_truth(ground_truth, image.shape[:2], name, shown)
        add_panel("Ground truth", truth, [name, size])
    if predictions is not None:
        remarks = [note] if panels else [note, name, size]
        add_panel("Predictions", predictions, remarks, uncertainty)
    if not panels:
        raise ValueError("draw_pair: neither ground truth nor predictions were given")
    is_stacked = image.shape[1] > _WIDE * image.shape[0]
    gap = ((_GAP, 0), (0, 0)) if is_stacked else ((0, 0), (_GAP, 0))
    panels[1:] = [np.pad(p, (*gap, (0, 0)), constant_values=255) for p in panels[1:]]
    return np.concatenate(panels, axis=0 if is_stacked else 1)


def shrink(picture: np.ndarray, width: int) -> np.ndarray:
    """Make a picture (h, w, 3) at most ``width`` pixels wide; never enlarge it."""
    if picture.shape[1] <= width:
        return picture
    height = max(1, int(len(picture) * width / picture.shape[1]))
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def contact_sheet(pictures: Sequence[np.ndarray], max_side: int = 3000) -> np.ndarray:
    """
    All pictures on one sheet, row by row, in as many columns as bring it closest to the shape of
    an upright page: fewer and larger pictures a row than a square would have.

    Args:
        pictures: (h, w, 3) arrays of any sizes; a wide one is shrunk to the common column width.
        max_side: the sheet is shrunk to this, pixels.

    Returns:
        array (height, width, 3), no side longer than ``max_side``.
    """
    if not pictures:
        raise ValueError("contact_sheet: no pictures")
    # One huge picture among many does not dictate the width of all columns.
    column = int(np.median([p.shape[1] for p in pictures]))
    pictures = [shrink(p, column) for p in pictures]
    height = sum(len(p) for p in pictures) / len(pictures)

    def elongation(columns: int) -> float:
        rows = math.ceil(len(pictures) / columns)
        return abs(math.log(_PAGE * columns * column / (rows * height)))

    columns = min(range(1, len(pictures) + 1), key=elongation)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(len(p) for p in row) for row in rows]
    # First the final size, then the sheet: so it is never held at full size.
    full = (sum(heights) + _GAP * (len(rows) + 1), columns * (column + _GAP) + _GAP)
    factor = min(1.0, max_side / max(full))
    sheet = np.full([max(1, int(factor * side)) for side in full] + [3], 255, dtype=np.uint8)
    top = float(_GAP)
    for row, row_height in zip(rows, heights, strict=True):
        for j, picture in enumerate(row):
            left = _GAP + j * (column + _GAP) + (column - picture.shape[1]) / 2
            y, x = int(factor * top), int(factor * left)
            picture = shrink(picture, max(1, int(factor * picture.shape[1])))
            window = sheet[y : y + len(picture), x : x + picture.shape[1]]
            window[:] = picture[: window.shape[0], : window.shape[1]]
        top += row_height + _GAP
    return sheet


# -- labels ----------------------------------------------------------------------------------------


def _draw_labels(
    visualizer: Visualizer,
    boxes: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[tuple[float, float, float]],
) -> None:
    """Place the labels one after the other, those of the smallest objects first."""
    canvas = visualizer.output
    renderer = canvas.canvas.get_renderer()
    # In points. On a large image with many small objects the labels must not bury these.
    sides = boxes[:, 2:] - boxes[:, :2]
    usual = np.median(sides.min(axis=1)) if len(sides) else 0
    font_size = max(7.5, min(canvas.height / 90, canvas.width / 90, usual / 4))
    taken = []
    for i in np.argsort(sides.prod(axis=1), kind="stable"):
        if not labels[i]:
            continue
        visualizer.draw_text(
            plot_text(labels[i]),
            (0, 0),
            font_size=font_size,
            color=_lighten(colors[i]),
            horizontal_alignment="left",
        )
        text = canvas.ax.texts[-1]
        # The background reaches a little beyond the text.
        size = text.get_window_extent(renderer).size + 2
        place = _free_place(boxes, i, size, taken, (canvas.width, canvas.height))
        if place is None:
            text.remove()
            continue
        text.set_position(place + 1)
        taken.append(np.concatenate([place, place + size]))


def _free_place(
    boxes: np.ndarray,
    index: int,
    size: np.ndarray,
    taken: Sequence[np.ndarray],
    canvas_size: tuple[int, int],
) -> np.ndarray | None:
    """
    Top left corner for the label of box ``index``, next to the box, in the image, on no label and
    covering as little as possible of any object; None if there is no such place.

    Args:
        size: width and height of the label.
        taken: M boxes (4,) of other labels.
    """
    limit = canvas_size - size
    if (limit < 0).any():
        return None
    x0, y0, x1, y1 = boxes[index]
    w, h = size
    gap = 3
    places = [
        (x0, y0 - h - gap),
        (x0, y1 + gap),
        (x1 - w, y0 - h - gap),
        (x1 - w, y1 + gap),
        (x1 + gap, y0),
        (x0 - w - gap, y0),
        (x1 + gap, y1 - h),
        (x0 - w - gap, y1 - h),
        (x0 + gap, y0 + gap),  # inside, for objects that fill the image
    ]
    places = np.clip(places, 0, limit)
    spots = Boxes(np.hstack([places, places + size]))
    covered = pairwise_ioa(spots, Boxes(boxes)).numpy().max(axis=1)
    covered[pairwise_ioa(spots, Boxes(np.array(taken))).any(dim=1)] = np.inf
    best = covered.argmin()
    return places[best] if covered[best] < _MAX_COVERED else None


def _lighten(color: tuple[float, float, float]) -> tuple[float, float, float]:
    """The same hue, light enough to be read on the labels' black."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*color)
    return colorsys.hls_to_rgb(hue, max(lightness, 0.7), saturation)


# -- captions --------------------------------------------------------------------------------------


def _with_caption(
    panel: np.ndarray, title: str, remarks: list[str], classes: list[int], style: ClassStyle
) -> np.ndarray:
    """Put a strip above the panel: title, number of objects, remarks; below them the classes."""
    unit = max(1.0, min(panel.shape[:2]) / 640)
    strip = VisImage(np.full((round(52 * unit), panel.shape[1], 3), 255, dtype=np.uint8))
    remarks = [count(len(classes), "object", "objects"), *filter(None, remarks)]
    words = [(title, {"weight": "bold"}), *((text, {"color": _FAINT}) for text in remarks)]
    _write_line(strip, words, 15 * unit, unit)
    kinds = sorted(set(classes))
    words = [(f"{_SQUARE} {style.name(c)} {_TIMES}{classes.count(c)}", {}) for c in kinds]
    _write_line(strip, words, 37 * unit, unit, [style.color(c) for c in kinds])
    return np.concatenate([strip.get_image(), panel])


def _write_line(
    strip: VisImage,
    words: Sequence[tuple[str, dict]],
    y: float,
    unit: float,
    squares: Sequence[tuple[float, float, float]] = (),
) -> None:
    """
    Write words from left to right, as many as there is room for.

    Args:
        words: texts and their style.
        y: their middle.
        squares: colors of the squares that the words begin with.
    """
    font = {"size": 9.5 * unit, "va": "center"}
    x = 2.0
    for i, (text, style) in enumerate(words):
        drawn = strip.ax.text(x, y, plot_text(text), **{"color": _INK, **font, **style})
        width = drawn.get_window_extent(strip.canvas.get_renderer()).width
        if x + width > strip.width:
            # The end of a file name says more than its start. What comes after is left out.
            room = int(len(text) * (strip.width - x) / width) - 2
            end = "" if squares else text[-room:]
            drawn.set_text(plot_text(f"\N{HORIZONTAL ELLIPSIS}{end}") if room > 0 else "")
            return
        if squares:
            strip.ax.text(x, y, _SQUARE, color=squares[i], **font)
        x += width + 14 * unit
