import csv
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.data import SmallShapesSpec, register_coco_format, register_small_shapes  # noqa: E402
from cbbl_d2.errors import ConfigError, UserError  # noqa: E402
from cbbl_d2.evaluation import build_coco_evaluator, check_keypoint_sigmas  # noqa: E402
from cbbl_d2.evaluation import coco as coco_module  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, BoxMode, Instances  # noqa: E402
from detectron2.structures.masks import polygons_to_bitmask  # noqa: E402

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


def test_the_table_of_the_classes_and_the_curves_are_left_beside_the_predictions(
    evaluate, tmp_path
):
    truth = [(SMALL, 0), (OTHER_SMALL, 0), (LARGE, 0), (MIDDLE, 1)]
    result = evaluate(truth, [(SMALL, 0, 0.9), ([200, 10, 210, 20], 0, 0.8), (MIDDLE, 1, 0.7)])
    with open(tmp_path / "out" / f"{NAME}_per_class.csv") as f:
        a, b, every = csv.DictReader(f)
    assert (a["class"], b["class"], every["class"]) == ("a", "b", "all classes")
    for name in ("AP", "AP50", "AP75", "APvs", "APs", "APm", "APl"):
        # The log's table and the file are of the same arrays.
        expected = "" if math.isnan(result[name]) else f"{result[name]:.2f}"
        assert every[name] == expected, name
    assert a["AP"] == f"{result['AP-a']:.2f}" and b["AP"] == f"{result['AP-b']:.2f}" == "100.00"
    # Half of the two very small ones is found before the first false alarm: recall 0 to .5.
    assert a["APvs"] == f"{100 * 51 / 101:.2f}" and b["APvs"] == ""
    assert (a["objects"], b["objects"], every["objects"]) == ("3", "1", "4")
    assert [row["very small objects"] for row in (a, b, every)] == ["2", "0", "2"]
    curves = tmp_path / "out" / f"{NAME}_pr_curves.png"
    assert curves.read_bytes().startswith(b"\x89PNG")

    evaluate(truth, [])  # curves of an earlier evaluation would be taken for this one's
    assert not curves.exists()
    with open(tmp_path / "out" / f"{NAME}_per_class.csv") as f:
        rows = list(csv.DictReader(f))
    assert [row["objects"] for row in rows] == ["3", "1", "4"] and "AP" not in rows[0]


def test_an_evaluation_is_not_lost_with_its_report(evaluate, tmp_path, monkeypatch, caplog):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(coco_module, "write_per_class", full_disk)
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    assert evaluate([(LARGE, 0)], [(LARGE, 0, 0.9)])["AP"] == pytest.approx(100)
    assert "no report in" in caplog.text and "No space left on device" in caplog.text


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


@pytest.fixture
def shapes(tmp_path):
    """``evaluated_val``: three images of SmallShapes, and where its COCO JSON will be."""
    spec = SmallShapesSpec(num_train=1, num_val=3, num_test=1)
    register_small_shapes("evaluated", spec, root=str(tmp_path))
    yield SimpleNamespace(
        name="evaluated_val", json_file=MetadataCatalog["evaluated_val"].json_file
    )
    for split in ("train", "val", "test"):
        DatasetCatalog.remove(f"evaluated_{split}")
        MetadataCatalog.remove(f"evaluated_{split}")


def test_data_made_on_first_use_is_made_for_the_evaluator(shapes):
    evaluator = build_coco_evaluator(get_cfg(), shapes.name)
    assert len(evaluator._coco_api.imgs) == 3


# -- masks and keypoints ---------------------------------------------------------------------------


def config(masks=False, keypoints=False, detections_per_image=100, sigma=0.05):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = masks, keypoints
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 4
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [sigma] * 4
    cfg.TEST.DETECTIONS_PER_IMAGE = detections_per_image
    return cfg


def ground_truth_as_predictions(record):
    """All objects of a dataset dict, predicted as they are."""
    annotations = record["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    size = record["height"], record["width"]
    masks = [
        polygons_to_bitmask([np.array(p) for p in a["segmentation"]], *size) for a in annotations
    ]
    keypoints = torch.tensor([a["keypoints"] for a in annotations]).reshape(-1, 4, 3)
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
    instances.scores = torch.linspace(0.9, 0.5, len(annotations))
    instances.pred_masks = torch.from_numpy(np.stack(masks))
    instances.pred_keypoints = keypoints
    return instances


def evaluate_instances(cfg, name, predict):
    """``predict`` makes the instances from a dataset dict."""
    evaluator = build_coco_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": predict(record)}])
    return evaluator.evaluate()


def test_the_deviations_are_in_the_file_of_results(shapes, tmp_path):
    evaluator = build_coco_evaluator(config(), shapes.name, str(tmp_path))
    evaluator.reset()
    records, expected = DatasetCatalog.get(shapes.name)[:3], []
    for i, record in enumerate(records):
        instances = ground_truth_as_predictions(record)
        if i != 1:  # of a stock detector
            instances.pred_boxes_std = torch.rand(len(instances), 4)
        rows = instances.pred_boxes_std.tolist() if i != 1 else [None] * len(instances)
        expected += [(record["image_id"], row) for row in rows]
        evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]
    found = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [(d["image_id"], d.get("pred_boxes_std")) for d in found] == expected


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("limit", [50, 100, 150])
def test_perfect_masks_and_keypoints(shapes, monkeypatch, fast, limit):
    if fast and not coco_module.has_fast_evaluation():
        pytest.skip("Detectron2 without its C++ extension")
    monkeypatch.setattr(coco_module, "has_fast_evaluation", lambda: fast)
    cfg = config(True, True, limit)
    results = evaluate_instances(cfg, shapes.name, ground_truth_as_predictions)
    assert list(results) == ["bbox", "keypoints", "segm"]
    for task in results:
        assert results[task]["AP"] == pytest.approx(100)
        assert results[task]["AP-ring"] == pytest.approx(100)
    assert results["bbox"]["APvs"] == pytest.approx(100)
    assert "APvs" not in results["segm"] and "APvs" not in results["keypoints"]


def test_masks_are_compared_as_masks(shapes):
    """Boxes in the place of the masks: right for no ring, and for some of the squares."""

    def predict(record):
        instances = ground_truth_as_predictions(record)
        for mask, box in zip(instances.pred_masks, instances.pred_boxes.tensor, strict=True):
            x0, y0, x1, y1 = box.round().int().tolist()
            mask[y0:y1, x0:x1] = True
        return instances

    results = evaluate_instances(config(masks=True), shapes.name, predict)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] < 50
    assert results["segm"]["AP-square"] > results["segm"]["AP-ring"]


@pytest.mark.parametrize("sigma, found", [(0.02, 0), (0.2, 100)])
def test_the_sigmas_say_how_far_a_keypoint_may_be_off(shapes, sigma, found):
    """
    All are a sixth of the object's size off: their similarity is exp(-(1/6)^2 / (8 sigma^2)), under
    .001 with the first sigma and .92 with the second.
    """

    def predict(record):
        instances = ground_truth_as_predictions(record)
        step = instances.pred_boxes.area().sqrt() / 6
        instances.pred_keypoints[:, :, 0] += step[:, None]
        return instances

    results = evaluate_instances(config(keypoints=True, sigma=sigma), shapes.name, predict)
    assert results["keypoints"]["AP50"] == pytest.approx(found)


def test_no_predictions_give_nan_for_each_task(shapes):
    results = evaluate_instances(
        config(True, True), shapes.name, lambda record: ground_truth_as_predictions(record)[:0]
    )
    assert list(results) == ["bbox", "keypoints", "segm"]
    assert all(math.isnan(results[task]["AP"]) for task in results)


def test_a_data_set_of_a_user_keeps_its_masks_and_keypoints(shapes, tmp_path):
    """One whose boxes are cleaned, with an object of no size among them."""
    DatasetCatalog.get(shapes.name)
    with open(shapes.json_file) as f:
        content = json.load(f)
    empty = {**content["annotations"][0], "id": 10**6, "bbox": [5, 5, 0, 0]}
    content["annotations"].append(empty)
    (tmp_path / "user.json").write_text(json.dumps(content))
    name = "cbbl_test_user"
    image_root = MetadataCatalog.get(shapes.name).image_root
    register_coco_format(name, str(tmp_path / "user.json"), image_root)
    try:
        results = evaluate_instances(config(True, True), name, ground_truth_as_predictions)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert [round(results[task]["AP"], 6) for task in results] == [100, 100, 100]


@pytest.mark.parametrize(
    "sigmas, words",
    [
        ([], "TEST.KEYPOINT_OKS_SIGMAS has 0 numbers, but .*NUM_KEYPOINTS is 4"),
        ([0.05] * 17, "TEST.KEYPOINT_OKS_SIGMAS has 17 numbers, but .*NUM_KEYPOINTS is 4"),
        ([0.05, 0.05, 0, 0.05], "number > 0"),
        ([0.05, 0.05, "a", 0.05], "number > 0"),
    ],
)
def test_sigmas_that_do_not_fit_the_keypoints(shapes, sigmas, words):
    cfg = config(keypoints=True)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas
    with pytest.raises(ConfigError, match=words) as e:
        build_coco_evaluator(cfg, shapes.name)
    assert "\n" not in str(e.value)
    cfg.MODEL.KEYPOINT_ON = False
    check_keypoint_sigmas(cfg)


def test_no_sigmas_stand_for_those_of_coco():
    cfg = config(keypoints=True)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS = 17, []
    check_keypoint_sigmas(cfg)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("keypoints", None, "annotation 2 has 0 keypoints.*NUM_KEYPOINTS is 4"),
        ("keypoints", [1, 1, 2], "annotation 2 has 1 keypoints.*NUM_KEYPOINTS is 4"),
        ("num_keypoints", None, "annotation 2 has no num_keypoints"),
    ],
)
def test_ground_truth_without_what_the_model_predicts(shapes, field, value, words):
    DatasetCatalog.get(shapes.name)
    with open(shapes.json_file) as f:
        content = json.load(f)
    content["annotations"][1].pop(field)
    if value is not None:
        content["annotations"][1][field] = value
    with open(shapes.json_file, "w") as f:
        json.dump(content, f)
    with pytest.raises(UserError, match=f"evaluated_val: {words}") as e:
        build_coco_evaluator(config(True, True), shapes.name)
    assert "\n" not in str(e.value)
    build_coco_evaluator(config(), shapes.name)
