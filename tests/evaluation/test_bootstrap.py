import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("detectron2")

from cbbl_d2.evaluation.bootstrap import bootstrap_ap  # noqa: E402


def data_set(num_images, sequence_of=None, seed=0):
    """Ground truth, and detections of which some are right, shifted, missing or false."""
    rng = np.random.default_rng(seed)
    images, annotations, detections = [], [], []
    for i in range(1, num_images + 1):
        image = {"id": i, "file_name": f"{i}.png", "width": 100, "height": 100}
        if sequence_of is not None:
            image["sequence"] = sequence_of(i)
        images.append(image)
        for _ in range(rng.integers(1, 6)):
            x, y = rng.uniform(0, 70, size=2)
            w, h = rng.uniform(5, 30, size=2)
            category = int(rng.integers(1, 3))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(scale=2, size=2)
                detections.append(
                    {
                        "image_id": i,
                        "category_id": category,
                        "bbox": [x + shift[0], y + shift[1], w, h],
                        "score": float(rng.random()),
                    }
                )
    return as_coco(images, annotations), detections


def as_coco(images, annotations):
    coco = COCO()
    coco.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def coco_ap(truth, detections):
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(truth, truth.loadRes(detections), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    ap, ap50, ap75, small = coco_eval.stats[:4] * 100
    return {"bbox/AP": ap, "bbox/AP50": ap50, "bbox/AP75": ap75, "bbox/APs": small}


def test_one_sequence_is_always_drawn_whole():
    """So that each resample is the data set itself."""
    truth, detections = data_set(12, lambda i: "all")
    values = bootstrap_ap(truth, detections, num_resamples=3)
    for name, expected in coco_ap(truth, detections).items():
        assert values[name] == pytest.approx([expected] * 3), name


def test_a_resample_is_coco_of_the_images_drawn():
    """Against a data set in which the images that were drawn stand as often, under new ids."""
    truth, detections = data_set(8, lambda i: i % 3)
    values = bootstrap_ap(truth, detections, num_resamples=4, seed=7)
    groups = [[i for i in range(1, 9) if i % 3 == rest] for rest in (1, 2, 0)]
    rng = np.random.default_rng(7)
    for n in range(4):
        images, annotations, found = [], [], []
        for i in [i for g in rng.integers(3, size=3) for i in groups[g]]:
            new = len(images) + 1
            images.append({**truth.imgs[i], "id": new})
            for a in truth.imgToAnns[i]:
                annotations.append({**a, "image_id": new, "id": len(annotations) + 1})
            found += [{**d, "image_id": new} for d in detections if d["image_id"] == i]
        for name, expected in coco_ap(as_coco(images, annotations), found).items():
            assert values[name][n] == pytest.approx(expected), (n, name)


def test_the_same_images_are_drawn_for_every_detector():
    truth, detections = data_set(20)
    worse = [d for d in detections if d["score"] > 0.5]
    a, b = (bootstrap_ap(truth, x, num_resamples=30)["bbox/AP"] for x in (detections, worse))
    again = bootstrap_ap(truth, detections, num_resamples=30)["bbox/AP"]
    np.testing.assert_array_equal(a, again)
    assert a.std() > 0 and (a - b).std() < np.sqrt(a.var() + b.var())


def test_independent_images_spread_less_than_sequences():
    truth, detections = data_set(60)
    grouped, _ = data_set(60, lambda i: i // 12)
    alone = bootstrap_ap(truth, detections)["bbox/AP"].std()
    together = bootstrap_ap(grouped, detections)["bbox/AP"].std()
    assert 0 < alone and 0 < together and alone != together


def test_nothing_detected_and_nothing_of_a_size():
    truth, _ = data_set(3)
    assert (bootstrap_ap(truth, [], num_resamples=2)["bbox/AP"] == 0).all()
    large = [{**a, "area": 50000.0} for a in truth.dataset["annotations"]]
    values = bootstrap_ap(as_coco(truth.dataset["images"], large), [], num_resamples=2)
    assert np.isnan(values["bbox/APvs"]).all() and (values["bbox/AP"] == 0).all()
