"""What the benchmarks of the public data sets count; every number is derived by hand."""

import logging
import math

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.data.coco_writer import CocoWriter, numbered_categories  # noqa: E402
from cbbl_d2.evaluation import build_coco_evaluator  # noqa: E402
from cbbl_d2.evaluation import coco as coco_module  # noqa: E402
from cbbl_d2.evaluation.rules import SizeMetric  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

WIDTH, HEIGHT = 200, 100


@pytest.fixture(params=[False, True], ids=["python", "compiled"])
def evaluate(request, tmp_path, monkeypatch):
    """
    ``evaluate(data set, objects, detections, ignored, regions)``: the results. Boxes are
    [x, y, width, height]; a detection is (box, score) or (box, score, category id).
    """
    if request.param and not coco_module.has_fast_evaluation():
        pytest.skip("Detectron2 has no compiled operations here")
    monkeypatch.setattr(coco_module, "has_fast_evaluation", lambda: request.param)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def run(name, objects, detections, ignored=(), regions=()):
        metadata = MetadataCatalog.get(name)
        writer = CocoWriter(numbered_categories(metadata.thing_classes))
        image = writer.add_image("a.png", WIDTH, HEIGHT, ignored_regions=list(regions))
        for box in objects:
            writer.add_object(image, 1, box)
        for box in ignored:
            writer.add_ignored(image, box)
        writer.write(metadata.json_file)
        evaluator = build_coco_evaluator(get_cfg(), name)
        instances = Instances((HEIGHT, WIDTH))
        boxes = torch.tensor([d[0] for d in detections], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([d[1] for d in detections])
        categories = [d[2] if len(d) > 2 else 1 for d in detections]
        instances.pred_classes = torch.tensor(categories, dtype=torch.long) - 1
        evaluator.reset()
        evaluator.process([{"image_id": image}], [{"instances": instances}])
        return evaluator.evaluate()["bbox"]

    return run


OBJECT = [10, 10, 20, 20]


# -- VisDrone: a detection with half of its area in ignored regions does not count -----------------

REGIONS = [[100, 0, 50, 100], [140, 0, 60, 100]]  # together x from 100 to 200


@pytest.mark.parametrize(
    "false_alarm, ap",
    [
        ([120, 10, 20, 20], 100),
        ([90, 50, 20, 20], 100),  # half of it
        ([89, 50, 20, 20], 50),  # 9 of 20 columns: a false alarm before the hit, precision 1/2
        ([135, 50, 20, 20], 100),  # in the union, 15 of 20 columns in each region
        ([40, 50, 20, 20], 50),
    ],
)
def test_visdrone_ignored_regions(evaluate, false_alarm, ap):
    detections = [(OBJECT, 0.5), (false_alarm, 0.9)]
    result = evaluate("visdrone_val", [OBJECT], detections, regions=REGIONS)
    assert result["AP"] == pytest.approx(ap)
    assert result["AP75"] == pytest.approx(ap)  # the same share for every IoU


def test_visdrone_others_are_ignored_for_every_class(evaluate):
    detections = [(OBJECT, 0.5), ([100, 10, 8, 8], 0.9), ([101, 11, 8, 8], 0.8)]
    assert evaluate("visdrone_val", [OBJECT], detections)["AP"] == pytest.approx(100 / 3)
    result = evaluate("visdrone_val", [OBJECT], detections, ignored=[[100, 10, 20, 20]])
    assert result["AP"] == pytest.approx(100)


@pytest.mark.parametrize("number, found", [(499, True), (500, False)])
def test_visdrone_counts_500_detections_of_an_image(evaluate, number, found):
    """Whatever the model's own limit is, and over all classes together."""
    others = [([50 + i % 50, 20, 8, 8], 0.9, 2 + i % 9) for i in range(number)]
    result = evaluate("visdrone_val", [OBJECT], [*others, (OBJECT, 0.5)])
    assert result["AP50"] == pytest.approx(100 if found else 0)


def test_visdrone_without_detections_outside_of_the_regions(evaluate):
    detections = [([120, 10, 20, 20], 0.9)]
    result = evaluate("visdrone_val", [OBJECT], detections, regions=REGIONS)
    assert math.isnan(result["AP"]) and math.isnan(result["APvs"])


# -- AI-TOD: sizes of its own, 1500 detections -----------------------------------------------------

VERY_TINY, TINY, SMALL, MEDIUM = [5, 5, 6, 6], [30, 5, 12, 12], [50, 5, 20, 20], [90, 5, 40, 40]


def test_ai_tod_sizes(evaluate):
    objects = [VERY_TINY, TINY, SMALL, MEDIUM]
    result = evaluate("aitod_test", objects, [(VERY_TINY, 0.9), (SMALL, 0.8)])
    assert [result[key] for key in ("APvt", "APt", "APs", "APm")] == pytest.approx([100, 0, 100, 0])
    assert result["AP"] == pytest.approx(100 * 51 / 101)  # recall levels 0, .01 ... .50 of 101


@pytest.mark.parametrize("name", ["aitod_val", "aitod_v2_trainval"])
@pytest.mark.parametrize(
    "side, sizes",
    [
        (8, {"APvt", "APt"}),
        (8.01, {"APt"}),
        (16, {"APt", "APs"}),
        (32, {"APs", "APm"}),
        (90, {"APm"}),
    ],
)
def test_ai_tod_both_ends_of_a_size_belong_to_it(evaluate, name, side, sizes):
    box = [5, 5, side, side]
    result = evaluate(name, [box], [(box, 0.9)])
    counted = {key for key in ("APvt", "APt", "APs", "APm") if not math.isnan(result[key])}
    assert counted == sizes
    assert all(result[key] == pytest.approx(100) for key in sizes)


@pytest.mark.parametrize("number, found", [(1499, True), (1500, False)])
def test_ai_tod_counts_1500_detections(evaluate, number, found):
    false_alarms = [([50 + i % 100, 20, 8, 8], 0.9) for i in range(number)]
    result = evaluate("aitod_test", [VERY_TINY], [*false_alarms, (VERY_TINY, 0.5)])
    assert result["AP50"] == pytest.approx(100 / (number + 1) if found else 0)


# -- TinyPerson: AP at one IoU, coverage in place of IoU for what is ignored -----------------------


def test_tiny_person_ious(evaluate):
    """Shifted by 4 of 10 pixels, the IoU is 60 / 140 = .43, by 2 it is 80 / 120 = .67."""
    box = [10, 10, 10, 10]
    keys = ("AP25_tiny", "AP50_tiny", "AP75_tiny")
    for shift, expected in ((0, (100, 100, 100)), (2, (100, 100, 0)), (4, (100, 0, 0))):
        result = evaluate("tiny_person_test", [box], [([10 + shift, 10, 10, 10], 0.9)])
        assert [result[key] for key in keys] == pytest.approx(expected)


@pytest.mark.parametrize(
    "side, sizes",
    [
        (5, {"tiny", "tiny1"}),
        (10, {"tiny", "tiny2"}),
        (15, {"tiny", "tiny3"}),
        (25, {"small"}),
        (40, set()),
    ],
)
def test_tiny_person_sizes(evaluate, side, sizes):
    box = [10, 10, side, side]
    result = evaluate("tiny_person_test", [box], [(box, 0.9)])
    all_sizes = ("tiny", "tiny1", "tiny2", "tiny3", "small")
    assert {size for size in all_sizes if result[f"AP50_{size}"] == pytest.approx(100)} == sizes
    assert {size for size in all_sizes if math.isnan(result[f"AP50_{size}"])} == (
        set(all_sizes) - sizes
    )


def test_tiny_person_ignores_what_lies_in_a_person_of_another_size(evaluate):
    """Two detections of parts of a large person: false alarms for COCO, for the benchmark not."""
    person, large = [10, 10, 10, 10], [100, 10, 60, 60]
    parts = [([110, 20, 12, 12], 0.9), ([130, 40, 12, 12], 0.8)]
    result = evaluate("tiny_person_test", [person, large], [(person, 0.5), *parts])
    assert result["AP50_tiny"] == pytest.approx(100)
    assert result["APvs"] == pytest.approx(100 / 3)  # objects up to 16 px, by COCO's rules
    # Less than half of it in the large person: a false alarm for both.
    result = evaluate("tiny_person_test", [person, large], [(person, 0.5), ([93, 10, 12, 12], 0.9)])
    assert result["AP50_tiny"] == pytest.approx(50)


def test_tiny_person_ignored_boxes_are_matched_by_coverage(evaluate):
    person = [10, 10, 10, 10]
    detections = [(person, 0.5), ([100, 20, 12, 12], 0.9), ([120, 20, 12, 12], 0.8)]
    assert evaluate("tiny_person_test", [person], detections)["AP50_tiny"] == (
        pytest.approx(100 / 3)
    )
    result = evaluate("tiny_person_test", [person], detections, ignored=[[90, 10, 60, 60]])
    assert result["AP50_tiny"] == pytest.approx(100)


def _matched(objects, ignored, detections, low, high, iou):
    """
    The benchmark's way to match, written out: a detection takes the unmatched object of the size
    with the highest IoU; one that finds none is ignored where its share in an ignored box or an
    object of another size reaches the threshold, or where it is itself of another size.

    Returns:
        for each detection that counts, by falling score, whether it is a hit; number of objects.
    """

    def area(box):
        return box[2] * box[3]

    def shared(a, b):
        width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        return max(width, 0) * max(height, 0)

    wanted = [box for box in objects if low <= area(box) <= high]
    others = [box for box in objects if not low <= area(box) <= high] + list(ignored)
    free, hits = list(wanted), []
    for box, _ in sorted(detections, key=lambda d: -d[1]):
        ious = [shared(box, o) / (area(box) + area(o) - shared(box, o)) for o in free]
        if ious and max(ious) >= iou:
            free.pop(ious.index(max(ious)))
            hits.append(True)
        elif all(shared(box, o) / area(box) < iou for o in others) and low <= area(box) <= high:
            hits.append(False)
    return hits, len(wanted)


def _ap(hits, number):
    """Mean over the recall levels 0, .01 ... 1 of the highest precision at this recall or more."""
    points = [(sum(hits[:i]) / number, sum(hits[:i]) / i) for i in range(1, len(hits) + 1)]
    levels = [level / 100 for level in range(101)]
    return sum(
        max((precision for recall, precision in points if recall >= level - 1e-9), default=0)
        for level in levels
    )


@pytest.mark.parametrize("seed", range(5))
def test_tiny_person_equals_its_matching_written_out(evaluate, seed):
    rng = np.random.default_rng(seed)

    def boxes(number, smallest, largest):
        sizes = rng.integers(smallest, largest, size=(number, 2))
        return np.hstack([rng.integers(0, (150, 60), size=(number, 2)), sizes]).tolist()

    objects, ignored = boxes(30, 3, 35), boxes(4, 15, 40)
    detections = []
    for box in [*objects * 2, *boxes(40, 3, 35)]:
        moved = np.array(box) + rng.integers(-2, 3, size=4)
        detections.append((np.maximum(moved, (0, 0, 2, 2)).tolist(), float(rng.random())))
    result = evaluate("tiny_person_test", objects, detections, ignored=ignored)
    rules = MetadataCatalog.get("tiny_person_test").evaluation_rules
    for m in rules.size_metrics:
        hits = _matched(objects, ignored, detections, m.min_area, m.max_area, m.iou)
        assert result[m.name] == pytest.approx(100 / 101 * _ap(*hits), abs=1e-3), m.name
    assert 0 < result["AP75_tiny"] < result["AP50_tiny"] < result["AP25_tiny"]


def test_tiny_person_counts_200_detections(evaluate):
    person = [10, 10, 10, 10]
    for number, found in ((199, 100 / 200), (200, 0)):
        false_alarms = [([50 + i % 100, 20, 8, 8], 0.9) for i in range(number)]
        result = evaluate("tiny_person_test", [person], [*false_alarms, (person, 0.5)])
        assert result["AP50_tiny"] == pytest.approx(found)


# -- what is common --------------------------------------------------------------------------------


def test_no_detections_give_nan(evaluate):
    result = evaluate("aitod_test", [VERY_TINY], [])
    assert all(math.isnan(result[key]) for key in ("AP", "APvt", "APm"))


def test_the_log_says_what_the_numbers_are(evaluate, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    with caplog.at_level("INFO"):
        evaluate("aitod_test", [TINY], [(TINY, 0.9)])
    assert "APvt: 0 to 8 px; APt: 8 to 16 px; APs: 16 to 32 px; APm: from 32 px" in caplog.text
    assert coco_module._describe(SizeMetric("AP50_tiny", 1, 400, 0.5)) == "1 to 20 px, IoU 0.5"
