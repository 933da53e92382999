import copy
import json
import logging
import math

import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.config import add_cbbl_config  # noqa: E402
from cbbl_d2.data.coco_format import (  # noqa: E402
    is_coco_format,
    load_coco_format,
    register_coco_format,
    register_from_config,
)
from cbbl_d2.errors import ConfigError  # noqa: E402
from cbbl_d2.evaluation.coco import prepare_ground_truth  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import load_coco_json  # noqa: E402
from detectron2.evaluation import COCOEvaluator  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

WIDTH, HEIGHT = 64, 48  # of the images of the fixture ``content``
LOGGERS = ("cbbl_d2.data.coco_format", "cbbl_d2.evaluation.coco")


@pytest.fixture
def log(caplog, monkeypatch):
    """The messages of the module under test. Detectron2's set-up of loggers stops propagation."""
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    for logger in LOGGERS:
        caplog.set_level(logging.INFO, logger=logger)
    return lambda: [r for r in caplog.records if r.name in LOGGERS]


@pytest.fixture
def name(new_name):
    return new_name()


@pytest.fixture
def load(folder, write, name):
    """``load(content)``: the dataset dicts of a file with this content."""
    return lambda content: load_coco_format(write(content), str(folder / "images"), name)


def box(id, bbox, **more):
    fields = {"id": id, "image_id": 9, "category_id": 7, "bbox": bbox}
    return {**fields, "area": bbox[2] * bbox[3], "iscrowd": 0, **more}


# -- loading ---------------------------------------------------------------------------------------


def test_clean_file_loads_as_with_detectron2(folder, content, load, name, new_name, log):
    other_name = new_name()
    dicts = load(content)
    expected = load_coco_json(str(folder / "annotations.json"), str(folder / "images"), other_name)
    assert dicts == expected
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert getattr(MetadataCatalog.get(name), key) == getattr(
            MetadataCatalog.get(other_name), key
        )
    assert MetadataCatalog.get(name).thing_classes == ["car", "ship"]
    (record,) = log()
    assert record.getMessage() == f"{name}: 2 images, 3 boxes and 1 crowd"
    assert record.levelno == logging.INFO


@pytest.mark.parametrize(
    "bbox, fault",
    [
        ([5, 5, 0, 3], "of no size"),
        ([math.nan, 5, 3, 3], "with NaN or infinity"),
        ([5, 5, 3, math.inf], "with NaN or infinity"),
        ([5, 10**400, 3, 3], "with NaN or infinity"),
        ([WIDTH, 5, 3, 3], "outside its image"),
    ],
)
def test_unusable_box_is_dropped_and_counted(content, load, name, log, bbox, fault):
    expected = load(content)
    content["annotations"].insert(1, {**box(30, [0, 0, 0, 0]), "bbox": bbox})
    assert load(content) == expected
    record = log()[-1]
    assert record.getMessage() == (
        f"{name}: 2 images, 3 boxes and 1 crowd; dropped 1 box: 1 {fault} (annotation id 30)"
    )
    assert record.levelno == logging.WARNING


def test_all_counts_come_in_one_line(folder, content, load, name, log):
    content["annotations"] += [box(20 + i, [1, 1, 0, 5]) for i in range(7)]
    content["annotations"] += [
        box(40, [70, 1, 3, 3]),
        box(41, [1, 1, 3, 3], image_id=1234),
        box(42, [60, 1, 8, 3]),  # partly outside: kept
        box(43, [61, 1, 4, 3]),  # one pixel over: rounding
        box(45, [-1, 1, 4, 3]),
        box(44, [1, 1, 3, 3], segmentation=[[1, 1, 3, 3]]),  # no polygon: only masks need one
    ]
    (folder / "images" / "b.png").unlink()
    dicts = load(content)
    assert sum(len(d["annotations"]) for d in dicts) == 8
    (record,) = log()
    assert record.getMessage() == (
        f"{name}: 2 images, 7 boxes and 1 crowd; dropped 9 boxes: 7 of no size (annotation ids 20, "
        "21, 22, 23, 24 and 2 more), 1 outside its image (annotation id 40), 1 of an image that is "
        "not listed (annotation id 41); 1 image file is missing and will be skipped, the first is "
        f"{folder / 'images' / 'b.png'}; 1 box reaches over the edge of the image and will be "
        "clipped"
    )


def test_image_without_boxes_stays(content, load):
    del content["annotations"][0]
    assert [len(d["annotations"]) for d in load(content)] == [3, 0]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"images": [,]}', "not valid JSON at line 1, column 13"),
        ('{\n"images": [', "not valid JSON at line 2"),
        ("", "not valid JSON at line 1, column 1"),
        ("[]", "the top level must be an object"),
        ("null", "the top level must be an object"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_not_a_coco_file(folder, load, error_of, text, words):
    message = error_of(load, text)
    assert message.startswith(f"{folder / 'annotations.json'}: ")
    assert words in message


def test_file_that_cannot_be_read(folder, name, error_of):
    missing = str(folder / "missing.json")
    assert error_of(load_coco_format, missing, str(folder), name) == (
        f"{missing}: no such annotation file: correct the path"
    )
    assert str(folder) in error_of(load_coco_format, str(folder), str(folder), name)
    image = str(folder / "images" / "a.png")
    assert "not a text file in UTF-8" in error_of(load_coco_format, image, str(folder), name)


def test_no_usable_box(content, load, error_of):
    content["annotations"] = [box(1, [1, 1, 0, 3]), box(2, [1, 1, 3, 3], iscrowd=1)]
    message = error_of(load, content)
    assert "no box that can be used, of 1: 1 of no size (annotation id 1)" in message
    content["annotations"] = []
    assert "no box that can be used: nothing to learn" in error_of(load, content)


def test_no_image_exists(folder, content, write, name, error_of):
    json_file = write(content)
    message = error_of(load_coco_format, json_file, str(folder), name)
    assert "probably the wrong folder" in message and json_file in message
    assert str(folder / "a.png") in message
    message = error_of(load_coco_format, json_file, str(folder / "nowhere"), name)
    assert message.startswith(f"{folder / 'nowhere'}: no such folder")


def test_classes_changed_under_the_same_name(content, load, error_of):
    load(content)
    content["categories"][0]["name"] = "boat"
    message = error_of(load, content)
    assert "(car, boat)" in message and "(car, ship)" in message


# -- registration ----------------------------------------------------------------------------------


def test_registration_touches_no_file(tmp_path, name, error_of):
    json_file, images = str(tmp_path / "none.json"), str(tmp_path / "none")
    assert not is_coco_format(name)
    register_coco_format(name, json_file, images)
    register_coco_format(name, json_file, images)
    assert is_coco_format(name) and not is_coco_format("coco_2017_val")
    metadata = MetadataCatalog.get(name)
    assert (metadata.json_file, metadata.image_root) == (json_file, images)
    assert metadata.evaluator_type == "coco"
    assert name in error_of(register_coco_format, name, json_file, str(tmp_path))
    assert "coco_2017_val" in error_of(register_coco_format, "coco_2017_val", json_file, images)
    assert json_file in error_of(DatasetCatalog.get, name)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_cbbl_config(cfg)
    return cfg


def test_registration_from_config(cfg, folder, content, name):
    images = folder / "images"
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", f"[['{name}', '{folder}/x.json', '{images}']]"])
    register_from_config(cfg)
    register_from_config(cfg)
    (folder / "x.json").write_text(json.dumps(content))
    assert len(DatasetCatalog.get(name)) == 2


@pytest.mark.parametrize("entry", ["abc", ["a", "b"], ["a", "b", 3], ["a", "", "c"], 5])
def test_malformed_entry_in_config(cfg, entry):
    cfg.DATASETS.COCO_FORMAT = [entry]
    with pytest.raises(ConfigError, match=r"DATASETS.COCO_FORMAT: .*\[name, annotation_json, "):
        register_from_config(cfg)


# -- evaluation ------------------------------------------------------------------------------------


def evaluate(name, output_dir, predictions):
    """Box results of COCOEvaluator; predictions: image id -> list of [x, y, w, h], class."""
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(output_dir), use_fast_impl=False)
    prepare_ground_truth(name, evaluator._coco_api)
    evaluator.reset()
    for image_id, boxes in predictions.items():
        instances = Instances((HEIGHT, WIDTH))
        xywh = torch.tensor([bbox for bbox, _ in boxes], dtype=torch.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        instances.pred_classes = torch.tensor([label for _, label in boxes]).long()
        instances.scores = torch.full((len(boxes),), 0.9)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


PERFECT = {
    9: [([1, 2, 10, 12], 1)],
    4: [([30.5, 20, 4, 3.25], 0), ([5, 5, 6, 6], 1)],
}


def test_perfect_detector_has_ap_100_on_repaired_ground_truth(register, folder, content, log):
    for annotation in content["annotations"]:
        annotation.pop("area")
        annotation.pop("segmentation", None)
        annotation.pop("keypoints", None)
        if not annotation["iscrowd"]:
            annotation.pop("iscrowd")
    content["annotations"][0]["id"] = 0  # COCO's metric would count its detection as false
    content["annotations"][1]["area"] = math.nan
    content["annotations"][3]["area"] = math.inf
    content["annotations"] += [
        box(20, [5, 5, 0, 9]),
        box(21, [math.nan, 5, 9, 9]),
        box(22, [500, 5, 9, 9]),
    ]
    before = json.dumps(content)
    results = evaluate(register(content), folder / "out", PERFECT)
    assert results["AP"] == pytest.approx(100)
    assert results["APs"] == pytest.approx(100)
    messages = [r.getMessage() for r in log()]
    assert any("3 boxes of the ground truth not counted" in m and "22" in m for m in messages)
    assert any("4 boxes without a usable area" in m for m in messages)
    # The user's file is as it was.
    assert (folder / "annotations.json").read_text() == before


def test_missed_object_still_counts(register, folder, content):
    half = {9: PERFECT[9], 4: PERFECT[4][:1]}
    results = evaluate(register(content), folder / "out", half)
    assert results["AP-car"] == pytest.approx(100)
    assert results["AP-ship"] == pytest.approx(100 * 51 / 101)  # recall 1/2 of 101 levels


def test_clean_ground_truth_changes_nothing_in_a_sound_file(register, folder, content, log):
    name = register(content)
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(folder / "out"))
    before = copy.deepcopy(evaluator._coco_api.dataset)
    prepare_ground_truth(name, evaluator._coco_api)
    assert evaluator._coco_api.dataset == before
    assert len(log()) == 1  # that of loading


def test_ground_truth_of_other_data_sets_is_left_alone(folder, content, write, name):
    content["annotations"].append(box(20, [5, 5, 0, 9]))
    MetadataCatalog.get(name).set(json_file=write(content), thing_classes=["car", "ship"])
    evaluator = COCOEvaluator(name, output_dir=str(folder / "out"))
    prepare_ground_truth(name, evaluator._coco_api)
    assert len(evaluator._coco_api.dataset["annotations"]) == 5


def test_boxes_over_the_edge_are_clipped_in_training(register, content):
    content["annotations"] = [box(1, [60, -4, 20, 20])]
    name = register(content)
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR")
    record = next(d for d in DatasetCatalog.get(name) if d["annotations"])
    assert mapper(record)["instances"].gt_boxes.tensor.tolist() == [[60, 0, WIDTH, 16]]
