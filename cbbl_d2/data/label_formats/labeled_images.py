"""
What a reader of labels hands on, and how it becomes a file in COCO format.

Labels that cannot be meant are refused, all of them in one error; nothing is written then. What can
be used in part is counted, by :attr:`LabeledImage.notes`, in the line that says what was written.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

from cbbl_d2.data.coco_validation import count_over_the_edge
from cbbl_d2.data.coco_writer import CocoWriter, numbered_categories
from cbbl_d2.data.datasets.public_data import CANNOT_WRITE, converted_json
from cbbl_d2.data.image_files import image_size
from cbbl_d2.errors import UserError
from cbbl_d2.messages import count, listed

__all__ = [
    "NO_LABEL_FILE",
    "NO_SIZE",
    "SPLITS",
    "LabeledImage",
    "LabeledObject",
    "check_class_list",
    "check_some_labels",
    "choose_splits",
    "folders_of_splits",
    "open_image",
    "read_class_list",
    "read_lines",
    "refuse",
    "write_splits",
]

# Notes that both formats make.
NO_LABEL_FILE = "images without a label file"
NO_SIZE = "boxes of no size, left out"
_TURNED = "images that EXIF data turn or mirror (boxes are taken as those of the turned image)"

SPLITS = ("train", "val", "valid", "test")


@dataclasses.dataclass(frozen=True)
class LabeledObject:
    class_index: int
    """from 0"""
    box: tuple[float, float, float, float]
    """x, y, width, height in pixels"""
    polygon: tuple[float, ...] = ()
    """x, y, x, y, ... in pixels"""
    ignore: bool = False


@dataclasses.dataclass
class LabeledImage:
    path: str
    width: int
    height: int
    """of the image as it is seen, after turning it as its EXIF data say"""
    is_turned: bool = False
    """or mirrored"""
    objects: list[LabeledObject] = dataclasses.field(default_factory=list)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    """what is to be reported -> how often"""


def open_image(path: str) -> LabeledImage:
    """
    Raises:
        UserError: not an image.
    """
    width, height, is_turned = image_size(path)
    image = LabeledImage(path, width, height, is_turned)
    image.notes[_TURNED] += is_turned
    return image


def refuse(problems: Sequence[str], what: str) -> None:
    """
    Args:
        problems: one line each.
        what: has them, in the plural.

    Raises:
        UserError: there are any; names the first and counts the others.
    """
    if problems:
        more = f" ({len(problems)} {what} in all that cannot be used)"
        raise UserError(problems[0] + (more if len(problems) > 1 else ""))


def check_some_labels(images: Sequence[LabeledImage], split: str, first: str) -> None:
    """
    Args:
        first: where the labels of the first image should be.

    Raises:
        UserError: no image has a label file.
    """
    if all(image.notes[NO_LABEL_FILE] for image in images):
        raise UserError(
            f"{split}: none of the {count(len(images), 'image', 'images')} has a label file, the "
            f"first should be {first}: put the labels there (or choose the other splits with "
            "--split)"
        )


def read_lines(path: str) -> list[str]:
    """
    Raises:
        UserError: it cannot be read.
    """
    try:
        # What is no UTF-8 becomes a sign that is no number, and no name of a file.
        with open(path, encoding="utf-8-sig", errors="replace") as f:
            return [line.strip() for line in f]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def read_class_list(path: str) -> list[str]:
    """
    The names of the classes, one a line.

    Raises:
        UserError: it cannot be read, or see :func:`check_class_list`.
    """
    lines = read_lines(path)
    while lines and not lines[-1]:
        lines.pop()
    return check_class_list(lines, path)


def check_class_list(names: Sequence[str], where: str) -> list[str]:
    """
    Raises:
        UserError: there is none, one is empty, or one comes twice.
    """
    twice = [name for name, number in collections.Counter(names).items() if number > 1]
    if not names or not all(name.strip() for name in names) or twice:
        what = f"the class {twice[0]} twice" if twice else "a class without name" if names else ""
        raise UserError(f"{where}: names {what or 'no class'}: give each class a name of its own")
    return list(names)


def folders_of_splits(folder: str) -> dict[str, str]:
    """The subfolders that are named as splits of a data set are; {} where there are none."""
    paths = {name: os.path.join(folder, name) for name in SPLITS}
    return {name: path for name, path in paths.items() if os.path.isdir(path)}


def choose_splits(there: Mapping, wanted: Sequence[str] | None, where: str) -> list[str]:
    """
    Args:
        there: has the names of the splits as its keys.
        wanted: None stands for all.

    Raises:
        UserError: one is not there.
    """
    for name in wanted or ():
        if name not in there:
            raise UserError(f"{where}: has no split {name}; --split can be {listed(there, 8)}")
    return list(dict.fromkeys(wanted or there))


def write_splits(
    root: str, splits: Mapping[str, Sequence[LabeledImage]], classes: Sequence[str], title: str
) -> list[str]:
    """
    Write ``{root}/coco/instances_{split}.json`` for each split. ``file_name`` starts at ``root``;
    of an image that is elsewhere it is absolute.

    Args:
        splits: name -> images.

    Returns:
        one line for each file, and one with the entries for a config.

    Raises:
        UserError: a file cannot be written.
    """
    root, lines, entries = os.path.normpath(root), [], []
    for split, images in splits.items():
        writer = CocoWriter(numbered_categories(classes), description=f"{title} {split}")
        notes = collections.Counter()
        for image in images:
            name = os.path.relpath(image.path, root)
            name = os.path.abspath(image.path) if name.startswith(os.pardir + os.sep) else name
            image_id = writer.add_image(name, image.width, image.height)
            for x in image.objects:
                polygon = {"segmentation": [list(x.polygon)]} if x.polygon else {}
                writer.add_object(image_id, x.class_index + 1, x.box, ignore=x.ignore, **polygon)
            notes["images without objects"] += not image.objects
            notes += image.notes
        notes["ignored boxes"] += writer.num_ignored
        notes["boxes over the edge of their image"] += count_over_the_edge(writer.content, {})
        path = converted_json(root, split)
        line = f"{writer.write(path, CANNOT_WRITE)} of {count(len(classes), 'class', 'classes')}"
        lines.append("; ".join([line, *(f"{what}: {n}" for what, n in notes.items() if n)]))
        name = os.path.basename(os.path.abspath(root))
        entries.append([f"{name}_{split}", path, root])
    lines.append(f"classes: {listed(classes, 20)}")
    lines.append(f"for a config: DATASETS.COCO_FORMAT: {json.dumps(entries, ensure_ascii=False)}")
    return lines
