#!/usr/bin/env python
"""
Cut the images of a data set in COCO format into overlapping slices, with their boxes, to train on:

    python tools/slice_dataset.py --annotations my/train.json --images my/images \\
        --slice 640 --output my/train_sliced

writes my/train_sliced/annotations.json and my/train_sliced/images/, for DATASETS.COCO_FORMAT. It
needs the package sahi, which does the cutting (docs/large_images.md). The folder appears complete
or not at all.

Images may have up to 2^30 pixels, at about 18 bytes of memory each for the largest.

A box that a slice cuts through is clipped, and kept if at least --min-area-ratio of its area is in
the slice. Boxes keep their fractions of pixels. Masks and keypoints are left out.
"""

import argparse
import json
import os

import numpy as np
from cbbl_d2.data.broken_images import large_images
from cbbl_d2.data.coco_format import load_coco_format, read_annotation_json
from cbbl_d2.data.coco_validation import find_faults, is_positive_number
from cbbl_d2.data.coco_writer import CocoWriter
from cbbl_d2.engine.cli import number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_folder
from cbbl_d2.inference.frames import Skipped, read_frames
from cbbl_d2.inference.slicing import sahi_is_missing
from cbbl_d2.inference.sources import Source
from cbbl_d2.messages import count
from detectron2.utils.logger import setup_logger
from tqdm import tqdm


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO JSON")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of its images")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--slice", required=True, type=number(int, 16), metavar="PIXELS", help="side of the slices"
    )
    parser.add_argument(
        "--overlap",
        type=number(float, 0, 0.9),
        default=0.2,
        metavar="SHARE",
        help="of neighboring slices (default: 0.2); let it be larger than most objects, so that "
        "each is whole in a slice",
    )
    parser.add_argument(
        "--min-area-ratio",
        type=number(float, 0, 1),
        default=0.1,
        metavar="SHARE",
        help="of the area of a box that must be in a slice (default: 0.1; small objects are hard "
        "to tell from a tenth of them: 0.5 leaves such pieces out)",
    )
    return parser


def usable(content: dict, images: str) -> dict:
    """
    The part of a data set that can be cut: without the boxes that training leaves out, too, and
    without images that cannot be read, which are named on stderr.

    Args:
        content: the parsed JSON, of a sound structure.

    Returns:
        a new dict with "images", "annotations" and "categories".
    """
    faults = find_faults(content)
    entries = {image["id"]: image for image in content["images"]}
    records = [
        {
            "file_name": os.path.join(images, image["file_name"]),
            "image_id": id,
            "width": image["width"],
            "height": image["height"],
        }
        for id, image in entries.items()
    ]
    skipped = Skipped()
    names = [image["file_name"] for image in content["images"]]
    frames = read_frames(Source(records, names), skipped)
    bar = tqdm(frames, total=len(records), desc="Checking", unit="image")
    by_id = {f.record["image_id"]: entries[f.record["image_id"]] for f in bar}
    if not by_id:
        raise UserError(f"none of the {len(records)} images can be read, see the lines above")
    annotations = []
    for annotation in content["annotations"]:
        if annotation["id"] in faults or annotation["image_id"] not in by_id:
            continue
        image = by_id[annotation["image_id"]]
        box = clip(annotation["bbox"], [0, 0, image["width"], image["height"]])
        if box[2] * box[3] >= 1:  # sahi divides by the area in whole pixels
            annotations.append({**annotation, "bbox": box})
    dropped = len(content["annotations"]) - len(annotations)
    if skipped.count or dropped:
        print(
            f"{count(skipped.count, 'image', 'images')} and {count(dropped, 'box', 'boxes')} left "
            "out: images that cannot be read, boxes on them, without an area or under 1 pixel"
        )
    return {
        "images": list(by_id.values()),
        "annotations": annotations,
        "categories": content["categories"],
    }


def clip(box: list[float], window: list[float]) -> list[float]:
    """
    Args:
        box: x, y, width, height.
        window: x_min, y_min, x_max, y_max.

    Returns:
        the part of the box in the window, x, y, width, height.
    """
    x_min, y_min = max(box[0], window[0]), max(box[1], window[1])
    x_max, y_max = min(box[0] + box[2], window[2]), min(box[1] + box[3], window[3])
    return [x_min, y_min, max(0.0, x_max - x_min), max(0.0, y_max - y_min)]


def slice_dataset(
    content: dict, images: str, folder: str, size: int, overlap: float, min_area_ratio: float
) -> CocoWriter:
    """
    Cut the images into ``folder/images``.

    Args:
        content: from :func:`usable`.

    Returns:
        what is to be written.
    """
    try:
        from sahi.slicing import slice_coco
    except ModuleNotFoundError as e:
        raise sahi_is_missing("this", e) from e
    annotations = content["annotations"]
    # sahi hands on box and category alone, makes a polygon of whole pixels into the box where there
    # is one, and counts areas in whole pixels: too coarse for objects of a few. With a category for
    # each annotation one knows which piece is of which, and the rest can be exact.
    # Its image ids must be integers.
    ids = {image["id"]: i for i, image in enumerate(content["images"], start=1)}
    numbered = {
        "images": [{**image, "id": ids[image["id"]]} for image in content["images"]],
        "annotations": [
            {"id": i, "image_id": ids[a["image_id"]], "bbox": a["bbox"], "category_id": i}
            for i, a in enumerate(annotations, start=1)
        ],
        "categories": [{"id": i, "name": str(i)} for i in range(1, len(annotations) + 1)],
    }
    json_file = os.path.join(folder, "numbered.json")
    with open(json_file, "w", encoding="utf-8") as f:
        json.dump(numbered, f)
    sliced, _ = slice_coco(
        json_file,
        images,
        output_coco_annotation_file_name="",
        output_dir=os.path.join(folder, "images"),
        slice_height=size,
        slice_width=size,
        overlap_height_ratio=overlap,
        overlap_width_ratio=overlap,
        min_area_ratio=0.0,
    )
    os.remove(json_file)
    writer = CocoWriter(content["categories"])
    for image in sliced["images"]:
        writer.add_image(**image)
    for piece in sliced["annotations"]:
        original = annotations[piece["category_id"] - 1]
        _, _, width, height = original["bbox"]
        share = float(np.prod(piece["bbox"][2:])) / (width * height) if piece["bbox"] else 0.0
        # Of a crowd, a region to ignore, every piece counts: it may be larger than a slice.
        is_crowd = bool(original.get("iscrowd", 0))
        if share == 0 or (share < min_area_ratio and not is_crowd):
            continue
        area = original.get("area")
        new = {
            "image_id": piece["image_id"],
            "bbox": piece["bbox"],
            # An annotated area, of a mask for example, shrinks as the box does.
            "area": share * (area if is_positive_number(area) else width * height),
            "iscrowd": original.get("iscrowd", 0),
        }
        writer.add_annotation(**{k: v for k, v in original.items() if k not in _LOST}, **new)
    return writer


# What is another one for a piece of an object, or does not hold for it.
_LOST = (
    *("id", "image_id", "bbox", "area", "iscrowd"),
    *("segmentation", "keypoints", "num_keypoints"),
)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    if os.path.exists(args.output):
        raise UserError(f"{args.output}: exists already, choose another --output or remove it")
    with large_images():
        # It ends in one line for all that can be wrong with the file.
        load_coco_format(args.annotations, args.images, f"slice_dataset {args.annotations}")
        content = usable(read_annotation_json(args.annotations), args.images)
        try:
            with atomic_folder(args.output) as folder:
                sliced = slice_dataset(
                    content, args.images, folder, args.slice, args.overlap, args.min_area_ratio
                )
                sliced.write(os.path.join(folder, "annotations.json"))
        except OSError as e:
            raise UserError(f"{args.output}: cannot be written ({e.strerror or e})") from e
    print(
        f"{count(len(content['images']), 'image', 'images')} with "
        f"{count(len(content['annotations']), 'box', 'boxes')} cut into "
        f"{count(sliced.num_images, 'slice', 'slices')} with "
        f"{count(sliced.num_annotations, 'box', 'boxes')}, written to {args.output}"
    )
    print(
        f'DATASETS.COCO_FORMAT: ["my_sliced", "{args.output}/annotations.json", '
        f'"{args.output}/images"]'
    )


if __name__ == "__main__":
    main()
