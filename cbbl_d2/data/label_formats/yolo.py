"""
YOLO's labels: a text file for each image, a line for each object, in fractions of the image:

============================================  ======================================================
class x y width height                        a box, x and y of its middle
class x1 y1 x2 y2 x3 y3 ...                   a polygon, or the corners of an oriented box: the box
                                              around it, counted, and the polygon as
                                              ``segmentation``
class x y width height, and keypoints         the box, where the YAML has ``kpt_shape``; keypoints
                                              are left out and counted
a box without width or height                 left out and counted
a line that repeats one of its file           left out and counted, as in Ultralytics
============================================  ======================================================

Anything else is refused: another number of values (six are a file of detections), what is no number
or no fraction, a class that has no name.

The splits are those of a YAML (``path``, ``train``, ``val``, ``test``, ``names``, as Ultralytics
reads them, and ``valid``): folders, or text files that list images. Without a YAML, a list of
classes, and the folders ``train``, ``val``, ``valid`` and ``test`` in ``images``. The labels of
``images/a/1.jpg`` are in ``labels/a/1.txt``, or beside the image.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence

import yaml
from cbbl_d2.data.datasets.public_data import images_bar
from cbbl_d2.data.image_files import IMAGE_TYPES, find_images
from cbbl_d2.errors import UserError
from cbbl_d2.messages import count, listed, short
from cbbl_d2.yaml_checks import check_yaml

from .labeled_images import (
    NO_LABEL_FILE,
    NO_SIZE,
    SPLITS,
    LabeledImage,
    LabeledObject,
    check_class_list,
    check_some_labels,
    choose_splits,
    folders_of_splits,
    open_image,
    read_class_list,
    read_lines,
    refuse,
    write_splits,
)

__all__ = ["convert_yolo", "parse_yolo_line"]

_CLASS_LIST = "classes.txt"
# Text files that stand among label files.
_NO_LABELS = {_CLASS_LIST, *(f"{split}.txt" for split in SPLITS)}
# Fractions may be that far outside [0, 1], as in Ultralytics: rounding, and polygons at the edge.
_TOLERANCE = 0.01


def convert_yolo(
    root: str,
    data: str | None = None,
    classes: str | None = None,
    splits: Sequence[str] | None = None,
) -> list[str]:
    """
    Write ``{root}/coco/instances_{split}.json`` for each split, with the classes in the order of
    their names. Nothing is written if anything is refused.

    Args:
        root: the folder of the data set.
        data: path of its YAML; None: ``{root}/data.yaml``, or the one YAML that is there.
        classes: path of a text file with a name a line, in place of a YAML; None, where there is no
            YAML: ``{root}/classes.txt``.
        splits: None stands for all.

    Returns:
        lines that say what was written.

    Raises:
        UserError: files are missing, malformed or cannot be written; names the first one.
    """
    num_keypoint_values = 0
    data = None if classes else data or _find_yaml(root)
    if data:
        content = _read_yaml(data)
        names, where = _class_names(content, data), data
        num_keypoint_values = _num_keypoint_values(content, data)
        there = {s: content[s] for s in SPLITS if not _is_nothing(content.get(s))}
        if not there:
            raise UserError(f"{data}: has none of {listed(SPLITS)}: add the folders of images")
        bases = [root] if _is_nothing(content.get("path")) else [content["path"], "."]
        bases = [os.path.join(root, base) for base in bases]
    else:
        where = classes or os.path.join(root, _CLASS_LIST)
        names = read_class_list(where)
        folder = os.path.join(root, "images")
        folder = folder if os.path.isdir(folder) else root
        there, bases = folders_of_splits(folder) or {"all": folder}, [""]
    parse = functools.partial(
        parse_yolo_line, num_classes=len(names), num_keypoint_values=num_keypoint_values
    )
    read = {}
    for split in choose_splits(there, splits, where):
        files = _find_images(there[split], bases, f"{where}: {split}")
        read[split] = _read_split(files, split, parse)
    return write_splits(root, read, names, "YOLO labels,")


# -- the YAML --------------------------------------------------------------------------------------


def _find_yaml(root: str) -> str | None:
    """None: there is none, but a list of classes."""
    found = sorted(x for x in os.listdir(root) if x.endswith((".yaml", ".yml")))
    usual = [name for name in found if name in ("data.yaml", "data.yml")]
    if len(usual or found) == 1:
        return os.path.join(root, (usual or found)[0])
    if found:
        raise UserError(f"{root}: has {listed(found)}: choose one with --data")
    if not os.path.isfile(os.path.join(root, _CLASS_LIST)):
        raise UserError(
            f"{root}: has no data.yaml and no {_CLASS_LIST}: give the YAML with --data, or a file "
            "with the names of the classes, one a line, with --classes"
        )
    return None


def _read_yaml(path: str) -> dict:
    check_yaml(path, plain_keys=False)
    with open(path, encoding="utf-8") as f:
        # Every value stays text: as YAML's own types a class "no" would be False, and "01" be 1.
        content = yaml.load(f, Loader=yaml.BaseLoader)
    for key in ("path", *SPLITS):
        value = content.get(key, "")
        values = value if isinstance(value, list) and key != "path" else [value]
        if not all(isinstance(x, str) for x in values):
            allowed = "text" if key == "path" else "text or a list of texts"
            raise UserError(f"{path}: {key} must be {allowed}, not {short(value)}")
    return content


def _is_nothing(value) -> bool:
    return not value or value in ("null", "~")


def _class_names(content: dict, path: str) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names) != sorted(str(i) for i in range(len(names))):
            raise UserError(
                f"{path}: names has the keys {listed(names)}: they must be 0 to {len(names) - 1}, "
                "each once: give a class that is not used a name, too"
            )
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: names must be a list of names, or 0: name, 1: name, ...")
    if not _is_nothing(content.get("nc")) and content["nc"] != str(len(names)):
        raise UserError(f"{path}: nc is {content['nc']}, but names has {len(names)}: correct one")
    return check_class_list(names, path)


def _num_keypoint_values(content: dict, path: str) -> int:
    shape = content.get("kpt_shape")
    if _is_nothing(shape):
        return 0
    try:
        number, dimensions = map(int, shape if isinstance(shape, list) else ())
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: kpt_shape {shape} must be [number of keypoints, 2 or 3]") from e
    return number * dimensions


# -- images ----------------------------------------------------------------------------------------


def _find_images(entries: str | list[str], bases: Sequence[str], where: str) -> list[str]:
    """
    Args:
        entries: of a split: folders, lists of images or images.
        bases: the folders from which an entry may start.
    """
    found, missing = [], []
    for entry in [entries] if isinstance(entries, str) else entries:
        path = _existing(entry, bases)
        if path is None:
            looked = listed(os.path.normpath(os.path.join(base, entry)) for base in bases)
            raise UserError(
                f"{where}: no such folder or file as {short(entry)}; looked for {looked}: correct "
                "it (or choose the others with --split)"
            )
        if os.path.isdir(path):
            found += find_images(path)
        elif path.lower().endswith(IMAGE_TYPES):
            found.append(path)
        else:
            for line in filter(None, read_lines(path)):
                image = _existing(line, (os.path.dirname(path), *bases, ""))
                if image is None:
                    missing.append(f"{path}: the image {line} is not there: correct the list")
                else:
                    found.append(image)
    refuse(missing, "images")
    found = sorted({os.path.normpath(path) for path in found})
    if not found:
        raise UserError(
            f"{where}: no images in {entries} ({', '.join(IMAGE_TYPES)}): correct it (or choose "
            "the others with --split)"
        )
    return found


def _existing(entry: str, bases: Sequence[str]) -> str | None:
    """Roboflow's files begin with ``../``, for a folder deeper than where the YAML is."""
    for base in bases:
        for name in (entry, entry.removeprefix("../")):
            path = os.path.join(base, name)
            if os.path.exists(path):
                return path
    return None


def _label_file(image: str) -> str:
    """Where the labels of an image are, or should be."""
    beside = f"{os.path.splitext(image)[0]}.txt"
    folder, images, name = os.path.abspath(beside).rpartition(f"{os.sep}images{os.sep}")
    if not images:
        return beside
    path = os.path.join(folder, "labels", name)
    if not os.path.isfile(path) and os.path.isfile(beside):
        return beside
    return path if os.path.isabs(image) else os.path.relpath(path)


# -- labels ----------------------------------------------------------------------------------------


def _read_split(files: Sequence[str], split: str, parse: Callable) -> list[LabeledImage]:
    """
    Args:
        parse: see :func:`parse_yolo_line`, of the line alone.

    Raises:
        UserError: an image or a line cannot be used, or there is no label file at all.
    """
    images, problems = [], []
    label_file_of = {path: _label_file(path) for path in files}
    image_of = {label_file: path for path, label_file in label_file_of.items()}
    for path, label_file in images_bar(label_file_of.items(), f"YOLO {split}"):
        if image_of[label_file] != path:
            problems.append(f"{path} and {image_of[label_file]} share {label_file}: rename one")
        try:
            image = open_image(path)
        except UserError as e:
            problems.append(str(e))
            continue
        images.append(image)
        if not os.path.exists(label_file):
            image.notes[NO_LABEL_FILE] += 1
            continue
        seen = set()
        for number, line in enumerate(read_lines(label_file), start=1):
            try:
                parsed = parse(line) if line else None
            except ValueError as e:
                problems.append(f"{label_file}, line {number}: {short(line)}: {e}")
                continue
            words = tuple(line.split())
            if parsed and words in seen:
                image.notes["repeated lines, left out"] += 1
            elif parsed:
                seen.add(words)
                _add(image, *parsed)
    refuse(problems, "images and lines")
    check_some_labels(images, split, next(iter(image_of)))
    images[0].notes["label files without an image"] += _labels_without_image(label_file_of)
    return images


def parse_yolo_line(
    line: str, num_classes: int, num_keypoint_values: int = 0
) -> tuple[int, list[float], bool]:
    """
    Returns:
        the class, from 0; the box (x and y of its middle, width, height) or the points (x, y, x, y,
        ...), in fractions of the image; whether there were keypoints, which are left out.

    Raises:
        ValueError: it is none of what the module's text lists; says why.
    """
    words = line.split()
    has_keypoints = num_keypoint_values > 0 and len(words) == 5 + num_keypoint_values
    words = words[:5] if has_keypoints else words
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        what = "; is it a file of detections?" if len(words) == 6 else ""
        raise ValueError(
            f"has {count(len(words), 'value', 'values')}: must be class x y width height, or class "
            f"x1 y1 x2 y2 x3 y3 ...{what}"
        )
    try:
        number, *values = map(float, words)
    except ValueError as e:
        raise ValueError("all values must be numbers") from e
    if number not in range(num_classes):  # nor is NaN, or 0.5
        raise ValueError(f"the class must be 0 to {num_classes - 1}, as many as are named")
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        raise ValueError(
            "all but the class must be fractions of the image, 0 to 1 (divide pixels by its width "
            "and height)"
        )
    if len(values) == 4 and min(values[2:]) < 0:
        raise ValueError("width and height must not be negative")
    return int(number), values, has_keypoints


def _add(image: LabeledImage, number: int, values: list[float], has_keypoints: bool) -> None:
    image.notes["objects whose keypoints were left out"] += has_keypoints
    polygon = ()
    if len(values) == 4:
        x, y, width, height = values
        x0, y0 = x - width / 2, y - height / 2
    else:
        polygon = [
            value * side
            for point in zip(values[::2], values[1::2])
            for value, side in zip(point, (image.width, image.height))
        ]
        x0, y0 = min(values[::2]), min(values[1::2])
        width, height = max(values[::2]) - x0, max(values[1::2]) - y0
    if width <= 0 or height <= 0:
        image.notes[NO_SIZE] += 1
        return
    image.notes["polygons, taken as the box around them"] += bool(polygon)
    box = x0 * image.width, y0 * image.height, width * image.width, height * image.height
    image.objects.append(LabeledObject(number, box, tuple(polygon)))


def _labels_without_image(label_file_of: Mapping[str, str]) -> int:
    """
    Label files whose image is not there, or of a type that is not read: objects would be lost
    without a word.

    Args:
        label_file_of: image -> where its labels are, or should be.
    """
    folders = {(os.path.dirname(x), os.path.dirname(y)) for x, y in label_file_of.items()}
    number = 0
    for images, labels in sorted(folders):
        if os.path.isdir(labels or "."):
            files = map(os.path.splitext, os.listdir(images or "."))
            known = {stem for stem, kind in files if kind.lower() in IMAGE_TYPES}
            files = map(os.path.splitext, set(os.listdir(labels or ".")) - _NO_LABELS)
            number += sum(kind.lower() == ".txt" and stem not in known for stem, kind in files)
    return number
