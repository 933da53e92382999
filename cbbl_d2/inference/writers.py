"""
Predictions as files: COCO results, COCO annotations (CVAT, Label Studio), CSV and YOLO labels.
Every file is written whole or not at all.
"""

import csv
import json
import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from cbbl_d2.data.coco_writer import CocoWriter
from cbbl_d2.files import open_whole
from detectron2.utils.visualizer import GenericMask
from pycocotools import mask as mask_util

from .classes import Classes
from .names import unique_stems
from .results import ImageResult

_COLUMNS = "image_id file_name class_id class score x_min y_min x_max y_max".split()


def write_coco_results(path: str, results: Sequence[ImageResult], classes: Classes) -> None:
    """
    The format of COCO's results, a list of detections, as ``COCO.loadRes`` of pycocotools reads it.
    """
    write_json(
        path,
        [
            {**detection, "category_id": classes.ids[detection["category_id"]]}
            for result in results
            for detection in result.detections
        ],
    )


def write_coco_annotations(path: str, results: Sequence[ImageResult], classes: Classes) -> None:
    """
    The format of COCO's annotations, with images and categories, which labeling tools import. The
    ids are those of :func:`write_coco_results`. Each annotation also has its "score".
    """
    writer = CocoWriter(classes.categories())
    for result in results:
        writer.add_image(result.file_name, result.width, result.height, id=result.image_id)
        for detection in result.detections:
            _, _, width, height = detection["bbox"]
            fields = {**detection, "area": width * height, "iscrowd": 0, "segmentation": []}
            if "segmentation" in detection:
                rle = detection["segmentation"]
                mask = GenericMask(rle, result.height, result.width)
                fields["area"] = float(mask_util.area(rle))
                fields["segmentation"] = [x.tolist() for x in mask.polygons]
            if "keypoints" in detection:
                # The third value is a score in results, and a visibility in annotations.
                points = np.reshape(detection["keypoints"], (-1, 3)).copy()
                points[:, 2] = 2
                fields["keypoints"] = points.ravel().tolist()
                fields["num_keypoints"] = len(points)
            fields["category_id"] = classes.ids[detection["category_id"]]
            writer.add_annotation(**fields)
    writer.write(path)


def write_csv(path: str, results: Sequence[ImageResult], classes: Classes) -> None:
    """
    One line for each detection: ``image_id, file_name, class_id, class, score, x_min, y_min, x_max,
    y_max``, in pixels; then other fields of the model, if it makes any, as ``NAME_0, NAME_1``, ...
    A name that a spreadsheet would take for a formula begins with ``'``.
    """
    names = {k: size for result in results for k, size in result.extra.items()}
    extra = [f"{k}_{i}" if size > 1 else k for k, size in names.items() for i in range(size)]
    with open_whole(path) as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(_COLUMNS + extra)
        for result in results:
            for d in result.detections:
                x, y, width, height = d["bbox"]
                table.writerow(
                    [
                        result.image_id,
                        _cell(result.file_name),
                        classes.ids[d["category_id"]],
                        _cell(classes.names[d["category_id"]]),
                        f"{d['score']:.5f}",
                        *(f"{value:.3f}" for value in (x, y, x + width, y + height)),
                        *(f"{value:.6g}" for k in names for value in np.ravel(d[k])),
                    ]
                )


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_yolo(folder: str, results: Sequence[ImageResult], classes: Classes) -> None:
    """
    ``labels/IMAGE.txt`` for every image, also for one without objects: a line ``class x y width
    height`` for each, the class from 0, the middle and the size of the box relative to the image's.
    ``classes.txt`` has the names, one a line; ``data.yaml`` has them as Ultralytics reads them.
    """
    for stem, result in zip(unique_stems([r.file_name for r in results]), results):
        lines = []
        for detection in result.detections:
            x, y, width, height = detection["bbox"]
            values = (
                (x + width / 2) / result.width,
                (y + height / 2) / result.height,
                width / result.width,
                height / result.height,
            )
            lines.append(f"{detection['category_id']} " + " ".join(f"{v:.6f}" for v in values))
        with open_whole(os.path.join(folder, "labels", f"{stem}.txt")) as f:
            f.writelines(f"{line}\n" for line in lines)
    with open_whole(os.path.join(folder, "classes.txt")) as f:
        f.writelines(f"{name}\n" for name in classes.names)
    with open_whole(os.path.join(folder, "data.yaml")) as f:
        f.write("path: .\ntrain: images\nval: images\nnames:\n")
        # A JSON string is one of YAML, too, whatever is in the name.
        f.writelines(f"  {i}: {json.dumps(name)}\n" for i, name in enumerate(classes.names))


# Format -> name in the folder of the output, and the function that writes it.
WRITERS = {
    "results": ("predictions.json", write_coco_results),
    "annotations": ("annotations.json", write_coco_annotations),
    "csv": ("predictions.csv", write_csv),
    "yolo": ("yolo", write_yolo),
}


def write_png(path: str, picture: np.ndarray) -> None:
    """
    Args:
        picture: (H, W, 3) uint8, RGB.

    Raises:
        UserError: the file cannot be written.
    """
    data = cv2.imencode(".png", picture[:, :, ::-1])[1]
    with open_whole(path, "wb") as f:
        f.write(data.tobytes())


def write_json(path: str, content: Any) -> None:
    with open_whole(path) as f:
        json.dump(content, f)
