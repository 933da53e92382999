"""One detection explained: its place in the image, and the distributions behind its box."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import torch
from cbbl_d2.errors import UserError
from cbbl_d2.files import open_whole
from cbbl_d2.messages import count, plot_text
from cbbl_d2.modeling.uncertainty import std_in_pixels
from cbbl_d2.visualization import ClassStyle, draw_boxes, enlarge
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from matplotlib.colors import to_rgb

from .frames import Frame
from .names import picture_names
from .sources import Source

_FIELDS = ("offset_probabilities", "offset_coordinates")
_MARGIN = 1.0  # around the box, of its longer side
_CROP_SIDE = 500  # that the crop is enlarged to at least, pixels
_BLUE, _GREEN, _GRAY = "#0072b2", "#009e73", "#777777"
# An object of the ground truth is the detection's from here on.
_SAME_OBJECT = 0.5


@dataclasses.dataclass(frozen=True)
class Target:
    """
    Attributes:
        image: path or name of the image.
        index: of the detection in the image, from 0, the best score first.
    """

    image: str
    index: int

    @classmethod
    def parse(cls, text: str) -> "Target":
        """
        From ``IMAGE:INDEX``.

        Raises:
            ValueError: not of this form.
        """
        image, separator, index = text.rpartition(":")
        if not (image and separator and index.isdecimal()):
            raise ValueError(text)
        return cls(image, int(index))

    def is_in(self, names: Sequence[str], path: str) -> bool:
        """
        Args:
            names: that the image has.
            path: of its file; "" for a frame of a video.
        """
        same_file = path and os.path.abspath(self.image) == os.path.abspath(path)
        return bool(same_file) or self.image in names

    def __str__(self) -> str:
        return f"{self.image}:{self.index}"


class Explanations:
    """
    Writes ``NAME_INDEX.png`` for each target, and takes the distributions, which no file can hold,
    from the predictions: to be called before those who write.

    Attributes:
        written: the files.
    """

    def __init__(
        self,
        folder: str,
        targets: Sequence[Target],
        source: Source,
        coordinate_names: Sequence[str],
        style: ClassStyle,
        box_label: str = "detection",
    ):
        """
        Args:
            folder: of the figures; it is made.
            coordinate_names: see :func:`cbbl_d2.modeling.keep_distributions`.
            box_label: what the boxes are, which need not be those of the distributions alone.
        """
        self.written: list[str] = []
        self._problems: list[str] = []
        self._folder, self._files, self._names = folder, source.files, picture_names(source.files)
        self._targets, self._left = targets, list(targets)
        self._coordinate_names, self._style, self._label = coordinate_names, style, box_label

    def take(self, frame: Frame, instances: Instances) -> None:
        """
        Raises:
            UserError: the file cannot be written.
        """
        path = "" if frame.video else self._files[frame.source_index]
        for target in self._targets:
            if target.is_in(_names_of(frame.file_name), path):
                self._explain(target, frame, instances)
        for field in _FIELDS:
            instances.remove(field)

    def finish(self) -> None:
        """
        To be called when all else is written.

        Raises:
            UserError: there is no such detection or frame.
        """
        problems = self._problems + [f"{x}: no such image was read" for x in self._left]
        if problems:
            raise UserError(f"--explain {problems[0]}")

    def _explain(self, target: Target, frame: Frame, instances: Instances) -> None:
        if target in self._left:
            self._left.remove(target)
        if target.index >= len(instances):
            self._problems.append(
                f"{target}: {frame.file_name} has "
                f"{count(len(instances), 'detection', 'detections')}, counted from 0, the best "
                "score first: lower --confidence-threshold for more"
            )
            return
        order = torch.argsort(instances.scores, descending=True, stable=True)
        one = instances[order[target.index : target.index + 1]]
        name = self._names[frame.source_index]
        if frame.video is not None:
            name += "_" + os.path.splitext(os.path.basename(frame.file_name))[0]
        path = os.path.join(self._folder, f"{name}_{target.index}.png")
        with open_whole(path, "wb") as f:
            plot_explanation(f, frame, one, self._coordinate_names, self._style, self._label)
        self.written.append(path)


def check_targets(targets: Sequence[Target], source: Source) -> None:
    """
    Before hours of prediction.

    Raises:
        UserError: no image, or more than one, is called so. Frames of videos are not known yet.
    """
    pairs = list(zip(source.names, source.files, strict=True))
    if any(source.is_video(path) for path in source.files):
        return
    for target in targets:
        found = [path for name, path in pairs if target.is_in(_names_of(name), path)]
        if not found:
            raise UserError(
                f"--explain {target}: no such image among those to predict on: give its path"
            )
        if len(found) > 1:
            raise UserError(
                f"--explain {target}: {len(found)} images are called so, {found[0]} and "
                f"{found[1]}: give its path"
            )


def _names_of(file_name: str) -> tuple[str, str]:
    return file_name, os.path.basename(file_name)


def plot_explanation(
    path,
    frame: Frame,
    detection: Instances,
    coordinate_names: Sequence[str],
    style: ClassStyle,
    box_label: str,
) -> None:
    """
    The crop with the box and the deviation of its sides, and for each coordinate the probability of
    every grid point, over what the point stands for in pixels.

    Args:
        path: file name, or a binary file to write to.
        detection: one, with the fields of :func:`cbbl_d2.modeling.uncertainty.set_uncertainty`.
    """
    from matplotlib.figure import Figure

    box = detection.pred_boxes.tensor[0].numpy().astype(float)
    truth = _true_box(frame, detection)
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    layout = [["crop", "0", "1"], ["crop", "2", "3"]]
    mosaic = figure.subplot_mosaic(layout, width_ratios=[1.5, 1, 1])
    name = style.name(int(detection.pred_classes[0]))
    score = f"{float(detection.scores[0]):.0%}"
    figure.suptitle(plot_text(f"{frame.file_name}: {name} {score}"), fontsize=11)
    std = std_in_pixels(detection.pred_boxes_std, detection.pred_boxes.tensor)[0].numpy()
    _draw_crop(mosaic["crop"], frame.image, box, std, truth)
    values = zip(("x1", "y1", "x2", "y2"), box, std)
    sides = ", ".join(f"{side} {x:.1f} \N{PLUS-MINUS SIGN} {d:.1f}" for side, x, d in values)
    mosaic["crop"].set_xlabel(f"{sides} px", fontsize=8)

    height, width = frame.image.shape[:2]
    probabilities = detection.offset_probabilities[0].numpy()
    points = detection.offset_coordinates[0].numpy() * np.array([[width], [height]] * 2)
    for i, name in enumerate(coordinate_names):
        axes = mosaic[str(i)]
        axes.vlines(points[i], 0, probabilities[i], color=_GRAY, linewidth=1)
        axes.plot(points[i], probabilities[i], "o", color=_GRAY, markersize=5)
        values = [_coordinate(box, name)]
        axes.axvline(values[0], color=_BLUE, label=box_label)
        if truth is not None:
            values.append(_coordinate(truth, name))
            axes.axvline(values[1], color=_GREEN, linestyle="--", label="ground truth")
        axes.set_title(name, fontsize=10)
        axes.set(ylim=(0, max(1.05 * probabilities[i].max(), 0.1)), xlabel="pixels")
        axes.set_xlim(*_limits(points[i], probabilities[i], values))
        axes.tick_params(labelsize=8)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
    mosaic["0"].set_ylabel("probability")
    mosaic["2"].set_ylabel("probability")
    mosaic["0"].legend(fontsize=8)
    figure.savefig(path, format="png")


def _draw_crop(
    axes, image: np.ndarray, box: np.ndarray, std: np.ndarray, truth: np.ndarray | None
) -> None:
    height, width = image.shape[:2]
    margin = _MARGIN * max(box[2:] - box[:2])
    low = np.floor(np.maximum(box[:2] - margin, 0)).astype(int)
    high = np.ceil(np.minimum(box[2:] + margin, [width, height])).astype(int)
    high = np.maximum(high, low + 1)
    crop = np.ascontiguousarray(image[low[1] : high[1], low[0] : high[0]])
    scale = max(1, -(-_CROP_SIDE // max(crop.shape[:2])))
    picture = draw_boxes(
        enlarge(crop, scale),
        scale * (box - np.tile(low, 2))[None],
        [""],
        [to_rgb(_BLUE)],
        deviations=scale * std[None],
    )
    axes.imshow(picture, extent=(low[0], high[0], high[1], low[1]), interpolation="none")
    if truth is not None:
        x0, y0, x1, y1 = truth
        axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], "--", color=_GREEN)
    axes.set_title("band: one standard deviation of each side", fontsize=10)
    axes.tick_params(labelsize=8)


def _true_box(frame: Frame, detection: Instances) -> np.ndarray | None:
    """The object of the ground truth that overlaps the detection most, XYXY."""
    annotations = [
        a
        for a in (frame.record or {}).get("annotations", ())
        if a["category_id"] == int(detection.pred_classes[0]) and not a.get("iscrowd", 0)
    ]
    if not annotations:
        return None
    boxes = torch.tensor(
        [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    ).float()
    ious = pairwise_iou(detection.pred_boxes, Boxes(boxes))[0]
    return boxes[ious.argmax()].numpy() if ious.max() >= _SAME_OBJECT else None


def _coordinate(box: np.ndarray, name: str) -> float:
    x1, y1, x2, y2 = box
    return {
        "center x": (x1 + x2) / 2,
        "center y": (y1 + y2) / 2,
        "width": x2 - x1,
        "height": y2 - y1,
        "left": x1,
        "top": y1,
        "right": x2,
        "bottom": y2,
    }[name]


def _limits(
    points: np.ndarray, probabilities: np.ndarray, values: Sequence[float]
) -> tuple[float, float]:
    """The points that have a visible probability, and the values, with some room."""
    seen = [*points[probabilities > 0.01 * probabilities.max()], *values]
    room = max(0.15 * (max(seen) - min(seen)), 0.5)
    return min(seen) - room, max(seen) + room
