import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from pycocotools.coco import COCO

pytest.importorskip("detectron2")

from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.inference import Classes, ImageResult, to_detections  # noqa: E402
from cbbl_d2.inference.writers import (  # noqa: E402
    _cell,
    write_coco_annotations,
    write_coco_results,
    write_csv,
    write_yolo,
)
from detectron2.data.catalog import Metadata  # noqa: E402

CLASSES = Classes(('a: "q"', "b"), (3, 7), "", Metadata())


@pytest.fixture
def results(make_instances):
    """An image with two objects, and one without any."""
    std = torch.tensor([[0.5, 1, 1.5, 2], [0, 0, 0, 0.25]])
    found = make_instances(
        [[6, 4, 18, 14], [0, 0, 60, 40]], [0.75, 0.5], [1, 0], (40, 60), pred_boxes_std=std
    )
    empty = make_instances([], [], [], (10, 20))
    return [
        ImageResult(5, "in/x.png", 40, 60, to_detections(found, 5), {"pred_boxes_std": 4}),
        ImageResult(6, "y.png", 10, 20, to_detections(empty, 6), {}),
    ]


def test_coco_files_belong_together(results, tmp_path):
    """pycocotools reads both, and finds the predictions to be a perfect result of themselves."""
    from pycocotools.cocoeval import COCOeval

    write_coco_annotations(str(tmp_path / "a.json"), results, CLASSES)
    write_coco_results(str(tmp_path / "new/r.json"), results, CLASSES)
    truth = COCO(str(tmp_path / "a.json"))
    assert [truth.imgs[i]["file_name"] for i in (5, 6)] == ["in/x.png", "y.png"]
    assert truth.anns[1]["category_id"] == 7 and truth.anns[1]["bbox"] == [6, 4, 12, 10]
    assert truth.anns[1]["area"] == 120 and truth.anns[1]["score"] == 0.75
    assert truth.anns[1]["pred_boxes_std"] == [0.5, 1, 1.5, 2]
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "new/r.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_masks_are_run_lengths_in_results_and_polygons_in_annotations(make_instances, tmp_path):
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[0, 4:14, 6:18] = True
    found = make_instances([[6, 4, 18, 14]], [0.5], [0], pred_masks=masks)
    results = [ImageResult(1, "x.png", 40, 60, to_detections(found, 1), {})]
    write_coco_annotations(str(tmp_path / "a.json"), results, CLASSES)
    write_coco_results(str(tmp_path / "r.json"), results, CLASSES)
    (annotation,) = json.loads((tmp_path / "a.json").read_text())["annotations"]
    assert annotation["area"] == 120
    points = np.reshape(annotation["segmentation"][0], (-1, 2))
    assert (points.min(0) >= (5.5, 3.5)).all() and (points.max(0) <= (18, 14)).all()
    assert "counts" in json.loads((tmp_path / "r.json").read_text())[0]["segmentation"]


def test_keypoints(make_instances, tmp_path):
    found = make_instances(
        [[6, 4, 18, 14]], [0.5], [0], pred_keypoints=torch.tensor([[[7.5, 5.5, 0.1], [9, 9, 0.2]]])
    )
    results = [ImageResult(1, "x.png", 40, 60, to_detections(found, 1), {})]
    metadata = Metadata().set(keypoint_names=["p", "q"])
    write_coco_annotations(str(tmp_path / "a.json"), results, Classes(("a",), (1,), "", metadata))
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["annotations"][0]["keypoints"] == [7, 5, 2, 8.5, 8.5, 2]
    assert content["annotations"][0]["num_keypoints"] == 2
    assert content["categories"][0]["keypoints"] == ["p", "q"]


def test_csv(results, tmp_path):
    write_csv(str(tmp_path / "x.csv"), results, CLASSES)
    with open(tmp_path / "x.csv", newline="") as f:
        first, second = csv.DictReader(f)
    assert first["file_name"] == "in/x.png" and first["class"] == "b" and first["class_id"] == "7"
    assert second["class"] == 'a: "q"'
    box = [float(first[k]) for k in ("x_min", "y_min", "x_max", "y_max", "score")]
    assert box == [6, 4, 18, 14, 0.75]
    assert [float(first[f"pred_boxes_std_{i}"]) for i in range(4)] == [0.5, 1, 1.5, 2]


def test_csv_without_objects_has_the_columns_of_the_detector(results, tmp_path):
    write_csv(str(tmp_path / "all.csv"), results, CLASSES)
    write_csv(str(tmp_path / "none.csv"), [dataclasses.replace(results[0], detections=[])], CLASSES)
    lines = [(tmp_path / f"{name}.csv").read_text().splitlines() for name in ("all", "none")]
    assert lines[0][:1] == lines[1] and lines[1][0].endswith("pred_boxes_std_3")


def test_yolo(results, tmp_path):
    write_yolo(str(tmp_path / "yolo"), results, CLASSES)
    first, second = (tmp_path / "yolo/labels/in/x.txt").read_text().splitlines()
    # x (6 + 18) / 2 / 60, y (4 + 14) / 2 / 40, width 12 / 60, height 10 / 40
    assert first == "1 0.200000 0.225000 0.200000 0.250000"
    assert second == "0 0.500000 0.500000 1.000000 1.000000"
    assert (tmp_path / "yolo/labels/y.txt").read_text() == ""
    assert (tmp_path / "yolo/classes.txt").read_text() == 'a: "q"\nb\n'
    names = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"]
    assert names == {0: 'a: "q"', 1: "b"}


def test_a_folder_that_cannot_be_made(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_csv(str(tmp_path / "file/x.csv"), results, CLASSES)


@pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@a", "\ta"])
def test_no_cell_is_a_formula(name, tmp_path):
    assert _cell(name) == f"'{name}"
    assert _cell("a=1") == "a=1" and _cell("") == ""
