"""
AI-TOD: 8 classes of objects of 12.8 px on average on aerial images of 800x800
(https://github.com/jwwangchn/AI-TOD), and AI-TOD-v2, the same images annotated anew
(arXiv 2206.13996, https://github.com/Chasel-Tsui/mmdet-aitod). Importing this module registers
``aitod_{train,val,trainval,test}`` and ``aitod_v2_{train,val,trainval,test}``.

The published JSON is COCO's. Conversion makes ids start at 1 (pycocotools takes 0 for "no match"),
gives the classes the same numbers in every file, computes areas from the boxes, and says where each
image is, as the archives have been unpacked in several ways.

The benchmark measures COCO's AP with up to 1500 detections of an image and class, and its own
sizes, by the square root of the box's area: very tiny (APvt) up to 8 px, tiny (APt) up to 16, small
(APs) up to 32 and medium (APm) above. APs and APm are other than COCO's.
"""

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
)
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import EvaluationRules, SizeMetric
from cbbl_d2.messages import count, listed

__all__ = ["AI_TOD_CLASSES", "AI_TOD_SPLITS", "ai_tod_annotation_files", "convert_ai_tod"]

AI_TOD_CLASSES = (
    "airplane",
    "bridge",
    "storage-tank",
    "ship",
    "swimming-pool",
    "vehicle",
    "person",
    "wind-mill",
)
AI_TOD_SPLITS = ("train", "val", "trainval", "test")
_FOLDER = "AI-TOD"

_RULES = EvaluationRules(
    size_metrics=(
        SizeMetric("APvt", 0, 8**2),
        SizeMetric("APt", 8**2, 16**2),
        SizeMetric("APs", 16**2, 32**2),
        SizeMetric("APm", 32**2, 1e10),
    ),
    max_detections=1500,
)


def ai_tod_annotation_files(split: str, version: int) -> list[str]:
    """The names under which a split was published, relative to the folder of the data set."""
    names = {
        1: (f"aitod_{split}_v1.json", f"aitod_{split}.json", f"small_{split}_v1_1.0.json"),
        2: (f"aitodv2_{split}.json", f"small_{split}_v2_2.0.json", f"small_{split}_v2_1.0.json"),
    }
    return [os.path.join("annotations", name) for name in names[version]]


def convert_ai_tod(
    root: str,
    split: str,
    version: int = 1,
    annotations: str | None = None,
    images: str | None = None,
) -> str:
    """
    Write ``{root}/coco/instances_{split}.json``, for version 2 ``instances_v2_{split}.json``.

    Args:
        root: the folder that holds ``annotations`` and the images.
        split: "train", "val", "trainval" or "test".
        version: 1 for AI-TOD, 2 for AI-TOD-v2.
        annotations, images: another annotation file and image folder, relative to ``root``.

    Returns:
        one line that says what was converted.

    Raises:
        UserError: files are missing, malformed or cannot be written.
    """
    what = f"annotations of {split}, version {version}"
    candidates = ai_tod_annotation_files(split, version)
    json_file = os.path.join(root, annotations or first_existing(root, candidates, what))
    content = read_published_coco(json_file, ["ignore"])
    known = {name: i for i, name in enumerate(AI_TOD_CLASSES, start=1)}
    new_id = class_ids(content, json_file, "AI-TOD", known)
    folders = _image_folders(root, split) if images is None else [images]

    title = f"AI-TOD{'-v2' if version == 2 else ''} {split}"
    writer = CocoWriter(numbered_categories(AI_TOD_CLASSES), description=title)
    new_image_id = {}
    missing = []
    for image in images_bar(content["images"], f"AI-TOD {split}"):
        paths = [os.path.join(folder, image["file_name"]) for folder in folders]
        found = next((path for path in paths if os.path.isfile(os.path.join(root, path))), None)
        if found is None:
            missing.append(image["file_name"])
            continue
        new_image_id[image["id"]] = writer.add_image(found, image["width"], image["height"])
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of the {len(content['images'])} images of {json_file} are not "
            f"there, for example {missing[0]}; looked in {listed(folders) or 'no folder'}: unpack "
            "the images (those from xView have to be made by the authors' tool), or give their "
            "folder as --images"
        )
    num_lost = 0
    for annotation in content["annotations"]:
        if min(annotation["bbox"][2:]) <= 0:
            num_lost += 1
            continue
        writer.add_object(
            new_image_id[annotation["image_id"]],
            new_id[annotation["category_id"]],
            annotation["bbox"],
            ignore=bool(annotation["iscrowd"]),
        )
    written = writer.write(converted_json(root, _converted_split(split, version)), CANNOT_WRITE)
    return (
        f"{written}; ignored: {count(writer.num_ignored, 'box', 'boxes')}; left out: "
        f"{count(num_lost, 'box', 'boxes')} of no size"
    )


def _converted_split(split: str, version: int) -> str:
    return split if version == 1 else f"v{version}_{split}"


def _image_folders(root: str, split: str) -> list[str]:
    """Where the images of a split may be. Those of train and val together are those of trainval."""
    same = {"train": ["trainval"], "val": ["trainval"], "trainval": ["train", "val"], "test": []}
    folders = []
    for name in [split, *same[split]]:
        inside = os.path.join("images", name)
        folders += [os.path.join(name, "images"), name, os.path.join(inside, "images"), inside]
    folders.append("images")
    return [folder for folder in folders if os.path.isdir(os.path.join(root, folder))]


for _version in (1, 2):
    for _split in AI_TOD_SPLITS:
        register_public(
            f"aitod_{_converted_split(_split, _version)}",
            folder=_FOLDER,
            split=_converted_split(_split, _version),
            classes=AI_TOD_CLASSES,
            rules=_RULES,
            source=(
                "images and annotations from https://github.com/jwwangchn/AI-TOD"
                if _version == 1
                else "the images from https://github.com/jwwangchn/AI-TOD and the annotations from "
                "https://github.com/Chasel-Tsui/mmdet-aitod"
            ),
            command=f"aitod --split {_split}" + (" --version 2" if _version == 2 else ""),
        )
