"""
HIT-UAV: persons, vehicles and bicycles of 6 to 30 px (at half size) on thermal photographs from a
drone (Suo et al., Scientific Data 10, 227, 2023, doi 10.1038/s41597-023-02066-6, CC BY 4.0;
https://github.com/suojiashun/HIT-UAV-Infrared-Thermal-Dataset). Importing this module registers

    hit_uav_{train,val,test}                    640x512, split by sequence
    hit_uav_half_{train,val,test}               320x256, split by sequence
    hit_uav_published_{train,val,test}          640x512, the published split
    hit_uav_half_published_{train,val,test}     320x256, the published split

The published JSON (``normal_json``) is COCO's but for two keys, ``annotation`` and ``filename``.
The classes Car and OtherVehicle become Vehicle; DontCare, a hundredth of the boxes, is left out.

A sequence is the first four parts of a file name: day or night, altitude, angle of the camera,
weather. In the published split nearly every test image has a neighboring frame in train, so that
a detector is tested on scenes that it was trained on. The split by sequence keeps each sequence
together: those of over 100 frames are for training, of the others the SHA-256 of the sequence's
name modulo 100 decides: below 28 test, below 45 val, else train.
"""

import collections
import functools
import hashlib
import itertools
import os

from cbbl_d2.data.coco_writer import CocoWriter, numbered_categories
from cbbl_d2.data.datasets.public_data import (
    CANNOT_WRITE,
    class_ids,
    converted_json,
    images_bar,
    read_published_coco,
    register_public,
    write_jpeg,
)
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import EvaluationRules
from cbbl_d2.messages import count, listed
from PIL import Image

__all__ = ["HIT_UAV_CLASSES", "HIT_UAV_SPLITS", "convert_hit_uav", "sequence_of"]

HIT_UAV_CLASSES = ("Person", "Vehicle", "Bicycle")
HIT_UAV_SPLITS = ("train", "val", "test")
_FOLDER = "HIT-UAV"
_PUBLISHED = "normal_json"
_CLASS_IDS = {"Person": 1, "Car": 2, "OtherVehicle": 2, "Bicycle": 3, "DontCare": None}
# A sequence of more frames goes to the training set: a split would hold little else.
_LONG_SEQUENCE = 100


def sequence_of(file_name: str) -> str:
    """
    The sequence that an image belongs to: ``normal_json/train/0_100_30_0_03307.jpg`` is of
    ``0_100_30_0``.
    """
    return "_".join(os.path.basename(file_name).split("_")[:4])


def convert_hit_uav(root: str, half: bool = False) -> list[str]:
    """
    Write ``{root}/coco/instances_{split}.json`` and ``instances_published_{split}.json`` for each
    split; with ``half`` also the images at half size, to ``{root}/coco/half``, and
    ``instances_half_{split}.json`` and ``instances_half_published_{split}.json``.

    Args:
        root: the folder that holds ``normal_json``.

    Returns:
        one line for each file that was written, and one that names the images with boxes left out.

    Raises:
        UserError: files are missing, malformed or cannot be written. The split by sequence needs
            all three published files.
    """
    images, boxes, num_lost = {}, collections.defaultdict(list), collections.Counter()
    for split in HIT_UAV_SPLITS:
        json_file = os.path.join(root, _PUBLISHED, "annotations", f"{split}.json")
        content = read_published_coco(json_file)
        class_of = class_ids(content, json_file, "HIT-UAV", _CLASS_IDS)
        name_of = {image["id"]: image["file_name"] for image in content["images"]}
        for image in content["images"]:
            path = os.path.join(_PUBLISHED, split, image["file_name"])
            if image["file_name"] in images or not os.path.isfile(os.path.join(root, path)):
                what = "is listed twice" if image["file_name"] in images else f"is not at {path}"
                raise UserError(
                    f"{json_file}: image {image['file_name']} {what}: download the data set again"
                )
            images[image["file_name"]] = (split, path, image["width"], image["height"])
        for a in content["annotations"]:
            if class_of[a["category_id"]] is None or not all(x > 0 for x in a["bbox"][2:]):
                num_lost[name_of[a["image_id"]]] += 1
            else:
                boxes[name_of[a["image_id"]]].append((class_of[a["category_id"]], a["bbox"]))

    by_sequence = _split_by_sequence(images)
    lines = []
    for is_half in (False, True) if half else (False,):
        if is_half:
            for _, path, *_ in images_bar(images.values(), "HIT-UAV, half size"):
                source = os.path.join(root, path)
                make = functools.partial(_half, source)
                write_jpeg(os.path.join(root, _half_path(path)), make, source, quality=90)
        for published, split in itertools.product((False, True), HIT_UAV_SPLITS):
            converted = _converted_split(split, is_half, published)
            writer = CocoWriter(
                numbered_categories(HIT_UAV_CLASSES), description=f"HIT-UAV {converted}"
            )
            for name, (published_split, path, width, height) in sorted(images.items()):
                if split != (published_split if published else by_sequence[name]):
                    continue
                if is_half:  # an odd size is rounded up, as by reduce() of Pillow
                    path, width, height = _half_path(path), (width + 1) // 2, (height + 1) // 2
                image_id = writer.add_image(path, width, height, sequence=sequence_of(name))
                for class_id, box in boxes[name]:
                    box = [x / 2 for x in box] if is_half else box
                    writer.add_object(image_id, class_id, box)
            lines.append(writer.write(converted_json(root, converted), CANNOT_WRITE))
    left_out = f"left out: {count(num_lost.total(), 'box', 'boxes')} of DontCare or of no size"
    if num_lost:
        left_out += f", on {count(len(num_lost), 'image', 'images')}: {listed(sorted(num_lost))}"
    lines.append(left_out)
    return lines


def _split_by_sequence(file_names) -> dict[str, str]:
    frames = collections.Counter(sequence_of(name) for name in file_names)

    def split_of(sequence: str) -> str:
        if frames[sequence] > _LONG_SEQUENCE:
            return "train"
        part = int(hashlib.sha256(sequence.encode()).hexdigest(), 16) % 100
        return "test" if part < 28 else "val" if part < 45 else "train"

    return {name: split_of(sequence_of(name)) for name in file_names}


def _half_path(path: str) -> str:
    return os.path.join("coco", "half", os.path.basename(path))


def _half(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("L").reduce(2)


def _converted_split(split: str, half: bool, published: bool) -> str:
    return f"{'half_' if half else ''}{'published_' if published else ''}{split}"


for _is_half, _published, _split in itertools.product((False, True), (False, True), HIT_UAV_SPLITS):
    register_public(
        f"hit_uav_{_converted_split(_split, _is_half, _published)}",
        folder=_FOLDER,
        split=_converted_split(_split, _is_half, _published),
        classes=HIT_UAV_CLASSES,
        rules=EvaluationRules(),
        source="normal_json from https://github.com/suojiashun/HIT-UAV-Infrared-Thermal-Dataset",
        command="hituav --half" if _is_half else "hituav",
    )
