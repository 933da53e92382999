"""
What there is to know about a data set in COCO format before a detector is trained on it: numbers,
sizes, and what is wrong with boxes and images.
"""

import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from cbbl_d2.data.broken_images import TO_8_BITS, check_some_exist, misread, why_broken
from cbbl_d2.data.coco_format import read_coco_json
from cbbl_d2.data.coco_validation import (
    check_boxes,
    check_structure,
    count_over_the_edge,
    describe_faults,
    describe_odd_areas,
    describe_other_format,
    find_faults,
    unusable_masks,
)
from cbbl_d2.data.dataset_checks import load_dataset
from cbbl_d2.messages import count, listed
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.data.detection_utils import check_image_size, read_image
from PIL import ExifTags, Image
from tqdm import tqdm

from .object_table import ObjectTable, object_table
from .size_histogram import format_sizes

__all__ = ["DatasetReport", "check_images", "format_report", "read_dataset", "report_on"]

# A side under that many pixels of the file is more often a slip of the mouse than an object.
_TINY = 2.0
# Fewer boxes of a class are hardly enough to learn it from.
_FEW_BOXES = 10
# Values of EXIF's orientation that leave width and height as they are.
_TURNED_IN_PLACE = (2, 3, 4)
# COCO itself has 1 % of crowds; some converters mark every object with a run-length mask as one.
_MANY_CROWDS = 1 / 3
_SMALL = (8, 16, 32)  # pixels


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """
    Attributes:
        title: name and files.
        class_names: in the order of Detectron2's contiguous class ids.
        objects: in pixels of the image files.
        num_crowds: regions that are no single objects; Detectron2 leaves them out of training.
        warnings: one line each.
    """

    title: str
    class_names: list[str]
    objects: ObjectTable
    num_crowds: int
    warnings: list[str]


# -- reading ---------------------------------------------------------------------------------------


def read_dataset(name: str) -> tuple[dict, str, str]:
    """
    A registered data set, also one that is made on first use or that is no COCO file.

    Returns:
        content in COCO's format, the annotation file ("" if it has none), the image folder.

    Raises:
        UserError: its files are missing or malformed.
    """
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not os.path.isfile(json_file):
        load_dataset(name)  # makes it, or says what is missing
    if json_file and image_root is not None:
        return read_coco_json(json_file), json_file, image_root
    content = convert_to_coco_dict(name)
    check_structure(content, f"data set {name}")
    return content, "", ""


def report_on(content: dict, json_file: str, image_root: str, name: str = "") -> DatasetReport:
    """
    Args:
        content: of a sound structure; no image is opened, see :func:`check_images`.
        json_file: where it is from.
        image_root: the folder of the images.
        name: of the data set, if it has one.

    Raises:
        UserError: no box can be used, or the boxes are no pixels.
    """
    faults = find_faults(content)
    check_boxes(content, faults, json_file or f"data set {name}")
    objects = object_table(content, faults)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    files = ": ".join(x for x in (name, json_file) if x)
    return DatasetReport(
        title=files + (f", images in {image_root}" if image_root else ""),
        class_names=[c["name"] for c in categories],
        objects=objects,
        num_crowds=sum(
            bool(a.get("iscrowd", 0)) for a in content["annotations"] if a["id"] not in faults
        ),
        warnings=[
            *_warnings_of_format(content, faults),
            *_warnings_of_boxes(content, faults),
            *_warnings_of_masks(content, faults),
            *describe_odd_areas(content),
            *_warnings_of_classes(objects, categories),
            *_warnings_of_file_names(content, objects),
        ],
    )


def _warnings_of_format(content: dict, faults: dict[int, str]) -> Iterable[str]:
    other_format = describe_other_format(content, faults)
    if other_format:
        yield other_format
    if faults:
        yield (
            f"{count(len(faults), 'box', 'boxes')} that cannot be used and will be left out: "
            f"{describe_faults(faults)}"
        )
    crowds = [a["id"] for a in content["annotations"] if a.get("iscrowd", 0)]
    if len(crowds) > _MANY_CROWDS * len(content["annotations"]):
        yield (
            f"{len(crowds)} of {len(content['annotations'])} boxes are marked as crowds, which "
            'training leaves out: if they are single objects, write "iscrowd": 0 (annotation ids '
            f"{listed(crowds)})"
        )
    over = count_over_the_edge(content, faults)
    if over:
        reach = count(over, "box reaches", "boxes reach")
        yield f"{reach} over the edge of the image and will be clipped"


def _warnings_of_boxes(content: dict, faults: dict[int, str]) -> Iterable[str]:
    tiny, first, same, same_place = [], {}, [], []
    for a in content["annotations"]:
        if a["id"] in faults or a.get("iscrowd", 0):
            continue
        if min(a["bbox"][2:]) < _TINY:
            tiny.append(a["id"])
        before = first.setdefault((a["image_id"], *a["bbox"]), a)
        if before is not a:
            (same if before["category_id"] == a["category_id"] else same_place).append(a["id"])
    if tiny:
        yield (
            f"{count(len(tiny), 'box has', 'boxes have')} a side under {_TINY:g} px of the image: "
            f"objects or slips? (annotation ids {listed(tiny)})"
        )
    if same:
        yield (
            f"{count(len(same), 'box repeats', 'boxes repeat')} another one of the same image and "
            f"class: remove them, they can only be missed (annotation ids {listed(same)})"
        )
    if same_place:
        yield (
            f"{count(len(same_place), 'box lies', 'boxes lie')} exactly on one of another class: "
            f"which one is right? (annotation ids {listed(same_place)})"
        )


def _warnings_of_masks(content: dict, faults: dict[int, str]) -> Iterable[str]:
    unusable = unusable_masks(content, faults)
    if unusable:
        yield (
            f"{count(len(unusable), 'box has', 'boxes have')} a segmentation that is no mask, no "
            "polygon of three points or more, no run-length code of the image's size: the boxes "
            "are used, but with MODEL.MASK_ON True left out of training and evaluation "
            f"(annotation ids {listed(unusable)})"
        )
    coded = [
        a["id"]
        for a in content["annotations"]
        if isinstance(a.get("segmentation"), dict) and a["segmentation"] and not a.get("iscrowd", 0)
    ]
    if coded:
        yield (
            f"{count(len(coded), 'mask is', 'masks are')} run-length codes: MODEL.MASK_ON True "
            f"needs INPUT.MASK_FORMAT bitmask (annotation ids {listed(coded)})"
        )


def _warnings_of_classes(objects: ObjectTable, categories: list[dict]) -> Iterable[str]:
    numbers = np.bincount(objects.classes, minlength=len(categories))
    never = [c["name"] for c, number in zip(categories, numbers) if number == 0]
    if never:
        yield (
            f"{count(len(never), 'class has', 'classes have')} no box here, and an AP of NaN: "
            f"{listed(never)}"
        )
    few = [c["name"] for c, number in zip(categories, numbers) if 0 < number < _FEW_BOXES]
    if few:
        yield (
            f"{count(len(few), 'class has', 'classes have')} fewer than {_FEW_BOXES} boxes, hardly "
            f"enough to learn from: {listed(few)}"
        )


def _warnings_of_file_names(content: dict, objects: ObjectTable) -> Iterable[str]:
    names = Counter(os.path.normpath(image["file_name"]) for image in content["images"])
    twice = [name for name, number in names.items() if number > 1]
    if twice:
        yield (
            f"{count(len(twice), 'image file is', 'image files are')} listed more than once, and "
            "each entry lacks the boxes of the others: join them under one image id "
            f"({listed(twice)})"
        )
    empty = int(np.sum(objects.per_image() == 0))
    if empty:
        yield (
            f"{count(empty, 'image', 'images')} without boxes: training leaves them out unless "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS is False; an evaluation counts what is found there"
        )


# -- images ----------------------------------------------------------------------------------------


def check_images(content: dict, image_root: str, image_format: str = "BGR") -> list[str]:
    """
    Read every image as training does, with a progress bar.

    Args:
        content: of a sound structure.
        image_root: the folder of the images.
        image_format: ``INPUT.FORMAT``.

    Returns:
        warnings, one line each: missing and broken images, those of another size than the
        annotation file says, that Detectron2 would read as black or white, of several pages, of
        the same content.

    Raises:
        UserError: all are missing.
    """
    missing, broken, pages, turned = [], [], [], []
    misread_as, files_of = defaultdict(list), defaultdict(list)
    for image in tqdm(content["images"], desc="reading images", unit="image"):
        path = os.path.join(image_root, image["file_name"])
        if not os.path.isfile(path):
            missing.append(path)
            continue
        try:
            with open(path, "rb") as f:
                files_of[hashlib.file_digest(f, "sha1").digest()].append(image["file_name"])
            expected = {"file_name": path, "width": image["width"], "height": image["height"]}
            check_image_size(expected, read_image(path, format=image_format))
            with Image.open(path) as opened:
                misread_as[misread(opened)].append(path)  # first: it must not be loaded yet
                if getattr(opened, "n_frames", 1) > 1:
                    pages.append(path)
                if opened.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED_IN_PLACE:
                    turned.append(path)
        except Exception as e:  # a damaged file can make a decoder raise anything
            broken.append(f"{path}: {why_broken(e, path) or e}")
    check_some_exist(missing, len(content["images"]), image_root, "the annotation file")
    warnings = []
    if missing:
        warnings.append(
            f"{count(len(missing), 'image file is', 'image files are')} missing; training skips "
            f"them, an evaluation stops: {listed(missing)}"
        )
    if broken:
        warnings.append(
            f"{count(len(broken), 'image', 'images')} cannot be used; training skips them, an "
            f"evaluation stops: {'; '.join(broken[:5])}"
            + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
        )
    warnings += [
        f"{count(len(paths), 'image has', 'images have')} {fault}: {TO_8_BITS}: {listed(paths)}"
        for fault, paths in misread_as.items()
        if fault
    ]
    if pages:
        warnings.append(
            f"{count(len(pages), 'file has', 'files have')} several pages, of which the first is "
            f"used: {listed(pages)}"
        )
    if turned:
        warnings.append(
            f"{count(len(turned), 'image is', 'images are')} turned by 180 degrees or mirrored by "
            "EXIF data, also when Detectron2 reads them, and their size does not tell whether the "
            f"boxes are: look at some with tools/visualize.py: {listed(turned)}"
        )
    copies = [sorted(set(names)) for names in files_of.values() if len(set(names)) > 1]
    if copies:
        number = sum(len(names) - 1 for names in copies)
        warnings.append(
            f"{count(number, 'image file is a copy', 'image files are copies')} of another one: "
            + listed((" = ".join(names) for names in copies), limit=3)
        )
    return warnings


# -- text ------------------------------------------------------------------------------------------


def format_report(report: DatasetReport, cfg: CfgNode) -> str:
    """
    Args:
        cfg: ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST`` say what the model sees.
    """
    objects, names = report.objects, report.class_names
    at_input = objects.resized(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    per_image = objects.per_image()
    crowds = f" and {count(report.num_crowds, 'crowd', 'crowds')}" if report.num_crowds else ""
    shares = ", ".join(f"{np.mean(at_input.sizes < x):.1%} under {x} px" for x in _SMALL)
    return "\n".join(
        [
            report.title,
            f"{count(len(objects.shapes), 'image', 'images')} ({_shapes(objects.shapes)}), "
            f"{count(len(objects), 'box', 'boxes')}{crowds} of "
            f"{count(len(names), 'class', 'classes')}; boxes in an image: "
            f"{per_image.min()} to {per_image.max()}, {per_image.mean():.1f} on average",
            "",
            _class_table(objects, names),
            "",
            "Square root of the box's area, in pixels of the file and at the model's input, "
            f"{_shapes(at_input.shapes)}",
            f"(INPUT.MIN_SIZE_TEST {cfg.INPUT.MIN_SIZE_TEST}, MAX_SIZE_TEST "
            f"{cfg.INPUT.MAX_SIZE_TEST}):",
            format_sizes({"file": objects.sizes, "input": at_input.sizes}),
            f"At the input: {shares}",
            "",
            *([f"warning: {line}" for line in report.warnings] or ["Nothing wrong was found."]),
        ]
    )


def _shapes(shapes: np.ndarray) -> str:
    """Width x height, of all images or from the smallest to the largest area."""
    different = np.unique(shapes, axis=0)
    different = different[np.argsort(different.prod(axis=1), kind="stable")]
    ends = [f"{width:g}x{height:g}" for height, width in (different[0], different[-1])]
    return ends[0] if len(different) == 1 else f"{ends[0]} to {ends[1]}"


def _class_table(objects: ObjectTable, names: list[str]) -> str:
    shown = [" ".join(name.split()) for name in names]
    width = max(5, *map(len, shown))
    lines = [f"{'class':{width}}{'boxes':>9}{'share':>9}{'images':>9}{'median size [px]':>19}"]
    numbers = np.bincount(objects.classes, minlength=len(names))
    for i in np.argsort(-numbers, kind="stable"):
        mask = objects.classes == i
        median = f"{np.median(objects.sizes[mask]):.1f}" if numbers[i] else "-"
        lines.append(
            f"{shown[i]:{width}}{numbers[i]:>9}{numbers[i] / len(objects):>9.1%}"
            f"{len(np.unique(objects.images[mask])):>9}{median:>19}"
        )
    return "\n".join(lines)
