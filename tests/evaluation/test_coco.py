import json
import math

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

from cbbl_d2.evaluation import build_coco_evaluator  # noqa: E402

NAME = "cbbl_test_boxes"
SMALL, OTHER_SMALL = [10, 10, 20, 20], [40, 40, 56, 56]  # XYXY, areas 100 and 256
MIDDLE, LARGE = [60, 10, 80, 30], [100, 100, 220, 220]  # areas 400 and 14400


@pytest.fixture
def evaluate(tmp_path):
    """``evaluate(ground truth, predictions)``: lists of (box, class) and (box, class, score)."""

    def run(ground_truth, predictions, detections_per_image=100):
        annotations = [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": label + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for i, ((x0, y0, x1, y1), label) in enumerate(ground_truth)
        ]
        coco = {
            "info": {},
            "images": [{"id": 1, "file_name": "1.png", "height": 400, "width": 400}],
            "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
            "annotations": annotations,
        }
        json_file = tmp_path / "gt.json"
        json_file.write_text(json.dumps(coco))
        MetadataCatalog.get(NAME).set(
            json_file=str(json_file),
            thing_classes=["a", "b"],
            thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        )
        cfg = get_cfg()
        cfg.TEST.DETECTIONS_PER_IMAGE = detections_per_image
        evaluator = build_coco_evaluator(cfg, NAME, str(tmp_path / "out"))
        instances = Instances((400, 400))
        boxes = [box for box, _, _ in predictions]
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.pred_classes = torch.tensor([label for _, label, _ in predictions]).long()
        instances.scores = torch.tensor([score for _, _, score in predictions])
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [{"instances": instances}])
        return evaluator.evaluate()["bbox"]

    yield run
    MetadataCatalog.remove(NAME)


def test_only_the_very_small_are_right(evaluate):
    truth = [(SMALL, 0), (OTHER_SMALL, 0), (MIDDLE, 0), (LARGE, 0)]
    wrong = [([300, 300, 320, 320], 0, 0.95), ([250, 0, 399, 99], 0, 0.9)]
    result = evaluate(truth, [(SMALL, 0, 0.8), (OTHER_SMALL, 0, 0.7), *wrong])
    # The wrong boxes are larger than 16^2: they do not count as false alarms among small ones.
    assert result["APvs"] == pytest.approx(100)
    assert result["APs"] < 67  # COCO's small includes the missed 20-pixel object
    assert result["APl"] == pytest.approx(0)


def test_only_the_very_small_are_wrong(evaluate):
    truth = [(SMALL, 0), (MIDDLE, 0), (LARGE, 0)]
    result = evaluate(truth, [(MIDDLE, 0, 0.9), (LARGE, 0, 0.8)])
    assert result["APvs"] == pytest.approx(0)
    assert result["APl"] == pytest.approx(100)


def test_value_derived_by_hand(evaluate):
    """
    Class 0: two objects. In the order of scores: a hit at every IoU, a false alarm of 10 x 10, and
    a box shifted by 4 of 16 pixels: IoU 12*16 / (2*256 - 12*16) = .6, a hit at .50, .55, .60.
    There recall .5 has precision 1 and recall 1 has 2/3; above .60, recall ends at .5. On COCO's
    101 recall levels: (51 + 50*2/3)/101 three times, 51/101 seven times. Class 1: 1 of 1, AP 1.
    """
    shifted = [44, 40, 60, 56]
    result = evaluate(
        [(SMALL, 0), (OTHER_SMALL, 0), ([5, 60, 12, 66], 1), (LARGE, 0)],
        [
            (SMALL, 0, 0.9),
            ([200, 10, 210, 20], 0, 0.8),
            (shifted, 0, 0.7),
            ([5, 60, 12, 66], 1, 0.6),
        ],
    )
    class_0 = (3 * (51 + 50 * 2 / 3) + 7 * 51) / 1010
    assert result["APvs"] == pytest.approx(100 * (class_0 + 1) / 2, abs=0.01)


def test_the_line_is_drawn_at_an_area_of_256(evaluate):
    on_the_line, above = [40, 40, 56, 56], [100, 100, 116, 116.1]
    result = evaluate([(on_the_line, 0), (above, 0)], [(on_the_line, 0, 0.9)])
    assert result["APvs"] == pytest.approx(100)  # the missed one above the line is not counted


def test_no_predictions_and_no_very_small_objects_give_nan(evaluate):
    assert math.isnan(evaluate([(SMALL, 0)], [])["APvs"])
    result = evaluate([(LARGE, 0)], [(LARGE, 0, 0.9)])
    assert math.isnan(result["APvs"]) and result["AP"] == pytest.approx(100)


@pytest.mark.parametrize("limit, found", [(100, 0.0), (150, 100.0)])
def test_more_than_100_detections_count_only_when_the_model_may_make_them(evaluate, limit, found):
    """The right box comes after 120 better scored ones of the same class, off the object."""
    false_alarms = [([200 + i, 200, 208 + i, 208], 0, 0.9) for i in range(120)]
    result = evaluate([(SMALL, 0)], [*false_alarms, (SMALL, 0, 0.5)], limit)
    precision = found / 121  # one hit among 121 detections
    assert result["APvs"] == pytest.approx(precision, abs=1e-3)
    assert result["AP"] == pytest.approx(precision, abs=1e-3)


def test_a_low_limit_of_the_model_keeps_the_metric_of_coco(evaluate):
    """The right box comes 21st: it counts, because COCO looks at the best 100."""
    false_alarms = [([200 + i, 200, 208 + i, 208], 0, 0.9) for i in range(20)]
    result = evaluate([(SMALL, 0)], [*false_alarms, (SMALL, 0, 0.5)], detections_per_image=15)
    assert result["AP"] == result["APvs"] == pytest.approx(100 / 21)


def test_the_metrics_of_detectron2_stay(evaluate):
    result = evaluate([(SMALL, 0), (LARGE, 1)], [(SMALL, 0, 0.9)])
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-a", "AP-b", "APvs"} == set(result)


def test_data_made_on_first_use_is_made_for_the_evaluator(tmp_path):
    from cbbl_d2.data import SmallShapesSpec, register_small_shapes

    spec = SmallShapesSpec(num_train=1, num_val=1, num_test=1)
    names = [f"evaluated_{split}" for split in ("train", "val", "test")]
    register_small_shapes("evaluated", spec, root=str(tmp_path))
    try:
        evaluator = build_coco_evaluator(get_cfg(), "evaluated_val")
        assert len(evaluator._coco_api.imgs) == 1
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
