"""
TinyPerson: persons of 2 to 20 px on images of beaches and the sea (arXiv 1912.10664,
https://github.com/ucas-vg/TinyBenchmark). Importing this module registers
``tiny_person_{train,test}``.

The published JSON is COCO's with more fields. The benchmark's rules, and what becomes of them:

* ``sea_person`` and ``earth_person`` are one class, "person".
* ``ignore`` (crowds, reflections), ``uncertain`` and ``logo``: the box has ``"iscrowd": 1``, a
  detection in it counts neither for nor against. For training the authors publish images on which
  these boxes are erased (``erase_with_uncertain_dataset``), which are used here.
* ``in_dense_image``: images with more than 200 boxes are used neither for training nor for the
  evaluation: left out.
* ``corner``, ``[x0, y0, x1, y1]``, of an image: the entry is this part of the file, its boxes are
  relative to (x0, y0). Detectron2 knows no parts of files: the tiles, 640x512, are cut out and
  written as files of their own. Training uses tiles, the test whole images.

The test set is measured with AP at a single IoU, above all .50, by size: tiny (2 to 20 px, of
these tiny1 up to 8, tiny2 up to 12, tiny3 up to 20) and small (20 to 32). Size: square root of the
box's area.
"""

import functools
import os

from cbbl_d2.data.coco_writer import CocoWriter, numbered_categories
from cbbl_d2.data.datasets.public_data import (
    CANNOT_WRITE,
    class_ids,
    converted_json,
    first_existing,
    images_bar,
    read_published_coco,
    register_public,
    write_jpeg,
)
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import EvaluationRules, SizeMetric
from cbbl_d2.messages import count, short
from PIL import Image

__all__ = ["TINY_PERSON_CLASSES", "TINY_PERSON_FILES", "convert_tiny_person"]

TINY_PERSON_CLASSES = ("person",)
_PUBLISHED_CLASSES = {"sea_person": 1, "earth_person": 1, "person": 1}
_IGNORE_FLAGS = ("ignore", "uncertain", "logo")
_FOLDER = "tiny_set"

# Of each split: annotation files, the first that exists is used, and the image folder. The "task"
# files have one class; in others the two are joined here.
TINY_PERSON_FILES = {
    "train": (
        (
            "erase_with_uncertain_dataset/annotations/corner/task/"
            "tiny_set_train_sw640_sh512_all.json",
            "mini_annotations/tiny_set_train_sw640_sh512_all_erase.json",
        ),
        "erase_with_uncertain_dataset/train",
    ),
    "test": (
        (
            "annotations/task/tiny_set_test_all.json",
            "mini_annotations/tiny_set_test_all.json",
            "annotations/tiny_set_test.json",
        ),
        "test",
    ),
}

_SIZES = {"tiny": (1, 20), "tiny1": (1, 8), "tiny2": (8, 12), "tiny3": (12, 20), "small": (20, 32)}
_RULES = EvaluationRules(
    size_metrics=tuple(
        SizeMetric(f"AP{round(100 * iou)}_{size}", _SIZES[size][0] ** 2, _SIZES[size][1] ** 2, iou)
        for iou, size in [(0.5, size) for size in _SIZES] + [(0.25, "tiny"), (0.75, "tiny")]
    ),
    max_detections=200,
    ignores_by_coverage=True,
)


def convert_tiny_person(
    root: str,
    split: str,
    annotations: str | None = None,
    images: str | None = None,
) -> str:
    """
    Write ``{root}/coco/instances_{split}.json``, and the tiles, where the annotation file has them,
    to ``{root}/coco/tiles_{split}``.

    Args:
        root: the folder ``tiny_set`` of the published archive.
        split: "train" or "test".
        annotations, images: another annotation file and image folder, relative to ``root``.

    Returns:
        one line that says what was converted.

    Raises:
        UserError: files are missing, malformed or cannot be written.
    """
    candidates, image_folder = TINY_PERSON_FILES[split]
    json_file = os.path.join(
        root, annotations or first_existing(root, candidates, f"annotations of the {split} set")
    )
    image_folder = images or image_folder
    content = read_published_coco(json_file, _IGNORE_FLAGS)
    class_ids(content, json_file, "TinyPerson", _PUBLISHED_CLASSES)
    boxes_of = {image["id"]: [] for image in content["images"]}
    num_lost = 0
    for annotation in content["annotations"]:
        if min(annotation["bbox"][2:]) <= 0:
            num_lost += 1
        else:
            boxes_of[annotation["image_id"]].append(annotation)

    title = f"TinyPerson {split}"
    writer = CocoWriter(numbered_categories(TINY_PERSON_CLASSES), description=title)
    num_dense = 0
    # Tiles of one image one after the other: it is read once.
    for image in images_bar(sorted(content["images"], key=lambda x: x["file_name"]), title):
        boxes = boxes_of[image["id"]]
        if any(a.get("in_dense_image") for a in boxes):
            num_dense += 1
            continue
        file_name = os.path.join(image_folder, image["file_name"])
        if not os.path.isfile(os.path.join(root, file_name)):
            raise UserError(
                f"{os.path.join(root, file_name)}: no such image, named in {json_file}: unpack the "
                "archive again, or give its folder as --images"
            )
        if "corner" in image:
            corner = _check_corner(image, json_file)
            tile = os.path.join("coco", f"tiles_{split}", _tile_name(image["file_name"], corner))
            source = os.path.join(root, file_name)
            make = functools.partial(_cut_out, source, corner)
            write_jpeg(os.path.join(root, tile), make, source)
            file_name = tile
        image_id = writer.add_image(file_name, image["width"], image["height"])
        for a in boxes:
            writer.add_object(image_id, 1, a["bbox"], ignore=bool(a["iscrowd"]))
    written = writer.write(converted_json(root, split), CANNOT_WRITE)
    return (
        f"{written}; ignored: {count(writer.num_ignored, 'box', 'boxes')}; left out: "
        f"{count(num_dense, 'dense image', 'dense images')} and "
        f"{count(num_lost, 'box', 'boxes')} of no size"
    )


def _check_corner(image: dict, json_file: str) -> tuple[int, int, int, int]:
    corner = image["corner"]
    if (
        not isinstance(corner, list)
        or len(corner) != 4
        or not all(isinstance(value, int) for value in corner)
        or min(corner) < 0
        or (corner[2] - corner[0], corner[3] - corner[1]) != (image["width"], image["height"])
    ):
        raise UserError(
            f"{json_file}: image {image['id']} has the corner {short(corner)}: it must be "
            f"[x0, y0, x1, y1] of a part of {image['width']}x{image['height']} pixels"
        )
    return tuple(corner)


def _tile_name(file_name: str, corner: tuple[int, int, int, int]) -> str:
    stem = os.path.splitext(file_name)[0].replace("/", "_").replace("\\", "_")
    return f"{stem}_{corner[0]}_{corner[1]}.jpg"


@functools.lru_cache(maxsize=1)
def _read(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _cut_out(path: str, corner: tuple[int, int, int, int]) -> Image.Image:
    width, height = _read(path).size
    if corner[2] > width or corner[3] > height:
        raise UserError(
            f"{path}: is {width}x{height} pixels, but a tile reaches to {corner[2]}x{corner[3]}: "
            "unpack the archive again"
        )
    return _read(path).crop(corner)


for _split in TINY_PERSON_FILES:
    register_public(
        f"tiny_person_{_split}",
        folder=_FOLDER,
        split=_split,
        classes=TINY_PERSON_CLASSES,
        rules=_RULES,
        source="tiny_set of TinyPerson, see https://github.com/ucas-vg/TinyBenchmark,",
        command=f"tinyperson --split {_split}",
    )
