"""
VisDrone-DET: 10 classes of people and vehicles on images taken from drones (arXiv 1804.07437,
https://github.com/VisDrone/VisDrone-Dataset). Importing this module registers
``visdrone_{train,val,test_dev}``.

The published format is a text file for each image, a line for each box:

    x, y, width, height, score, category, truncation, occlusion

in whole pixels. Categories 1 to 10 are the classes; 0 is an ignored region, 11 "others" (tanker,
forklift, ...). A score of 0 says that the box is not considered in the evaluation. What becomes of
it in the COCO file:

============================================  ======================================================
a box of class 1 to 10 with the score 1       an object
the same with the score 0                     ignored, for its own class
at least half of it in ignored regions        ignored, for its own class (the toolkit removes it)
an ignored region, category 0                 ignored, for every class; also listed in the entry of
                                              its image as ``ignored_regions``, by which the
                                              evaluator drops detections
others, category 11                           ignored, for every class
no width or no height (three are known)       left out and counted
============================================  ======================================================

Ignored boxes have ``"iscrowd": 1``. Training sees no object there, but background: Detectron2 has
no regions to ignore. With ``erase_ignored`` the ignored regions (not "others", which are visible
and no object of any class) are painted over on copies of the images.
"""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
from cbbl_d2.data.coco_writer import CocoWriter, numbered_categories
from cbbl_d2.data.datasets.public_data import (
    CANNOT_WRITE,
    converted_json,
    images_bar,
    register_public,
    write_jpeg,
)
from cbbl_d2.data.ignored_regions import covered_share, erase_regions
from cbbl_d2.data.image_files import image_size
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import EvaluationRules
from cbbl_d2.messages import count, short
from PIL import Image

__all__ = ["VISDRONE_CLASSES", "VISDRONE_FOLDERS", "convert_visdrone", "read_visdrone_boxes"]

VISDRONE_CLASSES = (
    "pedestrian",
    "people",
    "bicycle",
    "car",
    "van",
    "truck",
    "tricycle",
    "awning-tricycle",
    "bus",
    "motor",
)
_IGNORED_REGION, _OTHERS = 0, 11

# Folders of the published archives, in the folder of the data set.
VISDRONE_FOLDERS = {
    "train": "VisDrone2019-DET-train",
    "val": "VisDrone2019-DET-val",
    "test_dev": "VisDrone2019-DET-test-dev",
}
_FOLDER = "VisDrone"

# An object or a detection with this share of its area in ignored regions does not count.
_IGNORED_SHARE = 0.5
_MAX_DETECTIONS = 500


@dataclasses.dataclass(frozen=True)
class VisDroneBox:
    """One line of an annotation file."""

    box: tuple[int, int, int, int]
    """x, y, width, height in pixels"""
    score: int
    category: int

    @property
    def is_empty(self) -> bool:
        return self.box[2] <= 0 or self.box[3] <= 0


def read_visdrone_boxes(path: str) -> list[VisDroneBox]:
    """
    Read one annotation file. Empty lines and a comma at the end of a line, which some of the
    published files have, are passed over.

    Raises:
        UserError: a malformed line; names file and line number.
    """
    try:
        # The published files are ASCII; what is not becomes a sign that is no number.
        with open(path, encoding="utf-8-sig", errors="replace") as f:
            return list(_parse(f, path))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def _parse(lines: Iterator[str], path: str) -> Iterator[VisDroneBox]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        where = f"{path}, line {number}: {short(text)}"
        values = text.removesuffix(",").split(",")
        if len(values) != 8:
            raise UserError(
                f"{where} has {count(len(values), 'value', 'values')}: must be x,y,width,height,"
                "score,category,truncation,occlusion"
            )
        try:
            values = [int(value) for value in values]
        except ValueError as e:
            raise UserError(f"{where}: all 8 values must be whole numbers") from e
        x, y, width, height, score, category, _, _ = values
        if score not in (0, 1):
            raise UserError(f"{where}: the score must be 0 or 1; is it a file of detections?")
        if not _IGNORED_REGION <= category <= _OTHERS:
            raise UserError(f"{where}: the category must be 0 to 11")
        yield VisDroneBox((x, y, width, height), score, category)


def convert_visdrone(root: str, split: str, erase_ignored: bool = False) -> str:
    """
    Write ``{root}/coco/instances_{split}.json``.

    Args:
        root: the folder that holds ``VisDrone2019-DET-train`` and so on.
        split: "train", "val" or "test_dev".
        erase_ignored: use copies of the images, in ``images_erased`` beside ``images``, on which
            the ignored regions are filled with their mean color. For training alone: the numbers
            of an evaluation on them would not be comparable.

    Returns:
        one line that says what was converted.

    Raises:
        UserError: files are missing, malformed or cannot be written.
    """
    folder = os.path.join(root, VISDRONE_FOLDERS[split])
    writer = CocoWriter(numbered_categories(VISDRONE_CLASSES), description=f"VisDrone-DET {split}")
    num_ignored = num_regions = num_empty = num_erased = 0
    for name in images_bar(_image_names(folder), f"VisDrone {split}"):
        image_file = os.path.join(folder, "images", f"{name}.jpg")
        boxes = read_visdrone_boxes(os.path.join(folder, "annotations", f"{name}.txt"))
        width, height, _ = image_size(image_file)
        num_empty += sum(b.is_empty for b in boxes)
        boxes = [b for b in boxes if not b.is_empty]
        regions = [b.box for b in boxes if b.category == _IGNORED_REGION]
        others = [b.box for b in boxes if b.category == _OTHERS]
        labeled = [b for b in boxes if _IGNORED_REGION < b.category < _OTHERS]
        shares = covered_share([b.box for b in labeled], regions, height, width)
        is_object = [b.score == 1 and s < _IGNORED_SHARE for b, s in zip(labeled, shares)]

        if erase_ignored and regions:
            keep = [b.box for b, use in zip(labeled, is_object) if use]
            image_file = _write_erased(image_file, regions, keep)
            num_erased += 1
        image_id = writer.add_image(
            os.path.relpath(image_file, root), width, height, ignored_regions=regions
        )
        for b, use in zip(labeled, is_object):
            writer.add_object(image_id, b.category, b.box, ignore=not use)
        for box in (*regions, *others):
            writer.add_ignored(image_id, box)
        num_ignored += len(labeled) - sum(is_object) + len(others)
        num_regions += len(regions)
    message = (
        f"{writer.write(converted_json(root, split), CANNOT_WRITE)}; ignored: "
        f"{count(num_regions, 'region', 'regions')} and {count(num_ignored, 'box', 'boxes')}"
    )
    if num_empty:
        message += f"; left out: {count(num_empty, 'box', 'boxes')} of no size"
    if num_erased:
        message += f"; regions erased on copies of {count(num_erased, 'image', 'images')}"
    return message


def _image_names(folder: str) -> list[str]:
    """Names without extension, sorted; every image must have its annotations and the reverse."""
    names = {}
    for kind, extension in (("images", ".jpg"), ("annotations", ".txt")):
        path = os.path.join(folder, kind)
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such folder: unpack the archive of VisDrone-DET there")
        files = (os.path.splitext(file) for file in os.listdir(path))
        names[kind] = {name for name, found in files if found == extension}
    for kind, other in (("images", "annotations"), ("annotations", "images")):
        alone = sorted(names[kind] - names[other])
        if alone:
            raise UserError(
                f"{folder}: {len(alone)} of the {kind} have no file of their name in {other}, "
                f"for example {alone[0]}: unpack the archive again"
            )
    if not names["images"]:
        raise UserError(f"{folder}: has no images: unpack the archive of VisDrone-DET there")
    return sorted(names["images"])


def _write_erased(image_file: str, regions: list[tuple], keep: list[tuple]) -> str:
    folder, name = os.path.split(image_file)
    erased_file = os.path.join(os.path.dirname(folder), "images_erased", name)

    def make() -> Image.Image:
        with Image.open(image_file) as image:
            pixels = np.asarray(image.convert("RGB"))
        return Image.fromarray(erase_regions(pixels, regions, keep))

    write_jpeg(erased_file, make, image_file)
    return erased_file


for _split, _archive in VISDRONE_FOLDERS.items():
    register_public(
        f"visdrone_{_split}",
        folder=_FOLDER,
        split=_split,
        classes=VISDRONE_CLASSES,
        rules=EvaluationRules(
            max_detections=_MAX_DETECTIONS,
            max_detections_of_image=_MAX_DETECTIONS,
            ignored_region_share=_IGNORED_SHARE,
        ),
        source=f"{_archive} from https://github.com/VisDrone/VisDrone-Dataset",
        command=f"visdrone --split {_split}",
    )
