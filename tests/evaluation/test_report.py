import csv

import cv2
import numpy as np
import pytest
from cbbl_d2.evaluation.report import (
    average_precision,
    count_objects,
    write_per_class,
    write_pr_curves,
)
from pycocotools.coco import COCO


def step(recall):
    """Precision 1 up to a recall of so many percent, then 0: an AP of (recall + 1) / 101."""
    return (np.arange(101) <= recall).astype(float)


def test_classes_without_objects_do_not_count():
    precision = np.stack([step(49), step(99), np.full(101, -1.0)], axis=1)
    assert average_precision(precision) == pytest.approx(100 * (50 + 100) / 202)
    assert np.isnan(average_precision(precision[:, 2]))
    assert np.isnan(average_precision(np.empty((0, 101, 3))))


def test_crowds_and_images_that_are_not_evaluated_are_not_counted():
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "area": area, "iscrowd": crowd}
            for i, (image, category, area, crowd) in enumerate(
                [(1, 3, 256, 0), (1, 3, 257, 0), (1, 3, 9, 1), (2, 3, 9, 0)], start=1
            )
        ],
    }
    coco.createIndex()
    assert count_objects(coco, [1]) == {3: 2, 7: 0}
    assert count_objects(coco, [1, 2], max_area=256) == {3: 2, 7: 0}


def test_the_last_row_is_over_all_classes(tmp_path):
    # (1, 101, 3): the third class has no object, and names may hold commas.
    precision = np.stack([step(49), step(100), np.full(101, -1.0)], axis=1)[None]
    path = tmp_path / "table.csv"
    write_per_class(str(path), ["a", "b, c", "d"], {"objects": [3, 4, 0]}, {"AP": precision})
    with open(path) as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["class", "AP", "objects"]
    assert rows[1:4] == [["a", "49.50", "3"], ["b, c", "100.00", "4"], ["d", "", "0"]]
    assert rows[4] == ["all classes", "74.75", "7"]


@pytest.mark.parametrize("num_classes", (1, 12))
def test_curves(tmp_path, num_classes):
    def curves(path, recall):
        precision = np.stack([step(recall)] * num_classes, axis=1)
        nothing = np.full_like(precision, -1)
        names = ["$^$ _", *map(str, range(1, num_classes))]  # no formula
        by_size = {"small": precision, "large": nothing}
        write_pr_curves(str(path), "data", names, {"IoU 0.5": precision}, by_size)
        return cv2.imread(str(path)).astype(int)

    low, high = curves(tmp_path / "low.png", 20), curves(tmp_path / "high.png", 80)
    assert low.shape == high.shape
    # The curves are drawn: in each third of the picture something has moved.
    for part in np.array_split(np.abs(low - high).max(axis=2), 3, axis=1):
        assert (part > 50).sum() > 100
    assert [path.name for path in tmp_path.iterdir()].count("low.png") == 1
