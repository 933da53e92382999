"""What benchmarks/sliced_inference.py measures with."""

import json
from pathlib import Path

import cv2
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("sahi")

from cbbl_d2.errors import UserError  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402


@pytest.fixture(scope="module")
def benchmark(load_script):
    return load_script("benchmarks/sliced_inference.py")


def test_mosaics_show_the_objects_where_the_annotations_say(benchmark, tmp_path):
    path = benchmark.make_mosaics("small_shapes_mini_test", 2, 330, str(tmp_path))
    coco = json.loads(Path(path).read_text())
    records = DatasetCatalog.get("small_shapes_mini_test")[:8]
    boxes = [(r, a["bbox"]) for r in records for a in r["annotations"]]
    assert len(coco["annotations"]) == len(boxes)
    mosaics = {i["id"]: cv2.imread(str(tmp_path / i["file_name"])) for i in coco["images"]}
    for annotation, (record, box) in zip(coco["annotations"], boxes, strict=True):
        (x, y, w, h), (left, top, *_) = annotation["bbox"], box
        dx, dy = round(x - left), round(y - top)
        assert (dx - 5) % 160 == 0 == (dy - 5) % 160  # 2 x 160 of 330: a margin of 5
        tile = cv2.imread(record["file_name"])
        rows, columns = slice(int(top), int(top + h) + 1), slice(int(left), int(left + w) + 1)
        moved = mosaics[annotation["image_id"]][dy:, dx:][rows, columns]
        assert (moved == tile[rows, columns]).all()


def test_more_images_than_there_are(benchmark, tmp_path):
    with pytest.raises(UserError, match="--mosaics"):
        benchmark.make_mosaics("small_shapes_mini_test", 2, 2000, str(tmp_path))


def test_recall_at_a_precision(benchmark, tmp_path):
    """Four objects, two of them small; by score: right, wrong, right (large), wrong, right."""
    sides = [10, 10, 40, 40]
    truth = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [100 * i, 0, side, side],
            "area": side**2,
            "iscrowd": 0,
        }
        for i, side in enumerate(sides)
    ]
    image = {"id": 1, "file_name": "x", "width": 400, "height": 400}
    content = {"images": [image], "annotations": truth, "categories": [{"id": 1, "name": "a"}]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))

    def detection(score, box):
        return {"image_id": 1, "category_id": 1, "bbox": box, "score": score}

    detections = [
        detection(0.9, truth[0]["bbox"]),  # precision 1
        detection(0.8, [0, 200, 10, 10]),  # 1 / 2
        detection(0.7, truth[2]["bbox"]),  # 2 / 3
        detection(0.6, [0, 300, 10, 10]),  # 2 / 4
        detection(0.5, truth[1]["bbox"]),  # 3 / 5
    ]
    measure = benchmark.recall_at_precision
    assert measure(str(path), detections, 0.9, 16) == (0.5, 0.9)
    assert measure(str(path), detections, 0.65, 16) == (0.5, 0.7)
    assert measure(str(path), detections, 0.6, 16) == (1.0, 0.5)
    assert measure(str(path), detections[1:2], 0.5, 16) == (0.0, float("inf"))
    assert measure(str(path), [], 0.5, 16) == (0.0, float("inf"))
