import copy
import itertools
import json
import logging
import math

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import load_coco_json  # noqa: E402
from detectron2.evaluation import COCOEvaluator  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from PIL import Image  # noqa: E402

from cbbl_d2.config import add_cbbl_config  # noqa: E402
from cbbl_d2.data.coco_format import (  # noqa: E402
    check_datasets,
    check_num_classes,
    clean_ground_truth,
    load_coco_format,
    register_coco_format,
    register_from_config,
)
from cbbl_d2.errors import ConfigError, UserError  # noqa: E402

WIDTH, HEIGHT = 64, 48
LOGGER = "cbbl_d2.data.coco_format"
_names = (f"coco_format_test_{i}" for i in itertools.count())


@pytest.fixture
def name():
    """A data set name that nobody has used: Detectron2 never forgets metadata."""
    name = next(_names)
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)


@pytest.fixture
def log(caplog, monkeypatch):
    """The messages of the module under test. Detectron2's set-up of loggers stops propagation."""
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    caplog.set_level(logging.INFO, logger=LOGGER)
    return lambda: [r for r in caplog.records if r.name == LOGGER]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for file_name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / file_name)
    return tmp_path


def clean():
    """A sound file: ids with gaps that do not start at 1, a crowd, a polygon, unsorted classes."""
    return {
        "images": [
            {"id": 9, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
            {"id": 4, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 7, "name": "ship"}, {"id": 0, "name": "car"}],
        "annotations": [
            _box(11, [1, 2, 10, 12], image_id=9, category_id=7),
            _box(12, [30.5, 20, 4, 3.25], image_id=4, category_id=0),
            _box(13, [0, 0, 64, 48], image_id=4, category_id=0, iscrowd=1),
            _box(
                14,
                [5, 5, 6, 6],
                image_id=4,
                category_id=7,
                segmentation=[[5, 5, 11, 5, 11, 11]],
                keypoints=[5, 5, 2],
            ),
        ],
    }


def _box(id, bbox, image_id=9, category_id=7, **more):
    area = bbox[2] * bbox[3]
    fields = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox}
    return {**fields, "area": area, "iscrowd": 0, **more}


def write(folder, content):
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def load(folder, content, name):
    return load_coco_format(write(folder, content), str(folder / "images"), name)


def error_of(call, *args):
    with pytest.raises(UserError) as info:
        call(*args)
    message = str(info.value)
    assert "\n" not in message
    return message


# -- loading ---------------------------------------------------------------------------------------


def test_clean_file_loads_as_with_detectron2(folder, name, log):
    other_name = next(_names)
    dicts = load(folder, clean(), name)
    expected = load_coco_json(str(folder / "annotations.json"), str(folder / "images"), other_name)
    assert dicts == expected
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert getattr(MetadataCatalog.get(name), key) == getattr(
            MetadataCatalog.get(other_name), key
        )
    assert MetadataCatalog.get(name).thing_classes == ["car", "ship"]
    (record,) = log()
    assert record.getMessage() == f"{name}: 2 images, 4 boxes"
    assert record.levelno == logging.INFO


@pytest.mark.parametrize(
    "bbox, fault",
    [
        ([5, 5, 0, 3], "of no size"),
        ([5, 5, 3, 0], "of no size"),
        ([5, 5, -4, 3], "of no size"),
        ([5, 5, 3, -4], "of no size"),
        ([math.nan, 5, 3, 3], "with NaN or infinity"),
        ([5, 5, math.nan, 3], "with NaN or infinity"),
        ([5, 5, 3, math.inf], "with NaN or infinity"),
        ([5, 10**400, 3, 3], "with NaN or infinity"),
        ([WIDTH, 5, 3, 3], "outside its image"),
        ([5, HEIGHT + 2, 3, 3], "outside its image"),
        ([-3, 5, 3, 3], "outside its image"),
        ([5, -9, 3, 3], "outside its image"),
    ],
)
def test_unusable_box_is_dropped_and_counted(folder, name, log, bbox, fault):
    expected = load(folder, clean(), name)
    content = clean()
    content["annotations"].insert(1, dict(_box(30, [0, 0, 0, 0]), bbox=bbox))
    assert load(folder, content, name) == expected
    record = log()[-1]
    assert record.getMessage() == (
        f"{name}: 2 images, 4 boxes; dropped 1 box: 1 {fault} (annotation id 30)"
    )
    assert record.levelno == logging.WARNING


def test_all_counts_come_in_one_line(folder, name, log):
    content = clean()
    content["annotations"] += [_box(20 + i, [1, 1, 0, 5]) for i in range(7)]
    content["annotations"] += [
        _box(40, [70, 1, 3, 3]),
        _box(41, [1, 1, 3, 3], image_id=1234),
        _box(42, [60, 1, 8, 3]),  # partly outside: kept
        _box(43, [61, 1, 4, 3]),  # one pixel over: rounding
        _box(45, [-1, 1, 4, 3]),
        _box(44, [1, 1, 3, 3], segmentation=[[1, 1, 3, 3]]),  # no polygon: Detectron2 drops it
    ]
    (folder / "images" / "b.png").unlink()
    dicts = load(folder, content, name)
    assert sum(len(d["annotations"]) for d in dicts) == 7
    (record,) = log()
    assert record.getMessage() == (
        f"{name}: 2 images, 7 boxes; dropped 9 boxes: 7 of no size (annotation ids 20, 21, 22, 23, "
        "24 and 2 more), 1 outside its image (annotation id 40), 1 of an image that is not listed "
        "(annotation id 41); 1 box left out of training for an invalid segmentation; 1 image file "
        f"is missing and will be skipped, the first is {folder / 'images' / 'b.png'}; 1 box "
        "reaches over the edge of the image and will be clipped"
    )


def test_image_without_boxes_stays(folder, name):
    content = clean()
    content["annotations"] = content["annotations"][1:]
    assert [len(d["annotations"]) for d in load(folder, content, name)] == [3, 0]


def _set(*path_and_value):
    """A change of the clean file: the entry at a path gets a value."""
    *path, last, value = path_and_value

    def change(content):
        for step in path:
            content = content[step]
        content[last] = value

    return change


def _delete(*path):
    *path, last = path

    def change(content):
        for step in path:
            content = content[step]
        del content[last]

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (_delete("images"), 'no "images"'),
        (_delete("annotations"), 'no "annotations"'),
        (_delete("categories"), 'no "categories"'),
        (_set("images", {}), '"images" must be a list, not a object'),
        (_set("images", []), "no images"),
        (_set("categories", []), "no categories"),
        (_set("annotations", []), "no box that can be used"),
        (_set("annotations", 0, None), '"annotations"[0] must be an object, not None'),
        (_delete("annotations", 1, "id"), '"annotations"[1] has no id'),
        (_set("annotations", 1, "id", "12"), "\"annotations\"[1] has the id '12'"),
        (_set("annotations", 1, "id", 11), 'the id 11 comes twice in "annotations"'),
        (_delete("images", 1, "id"), '"images"[1] has no id'),
        (_set("images", 1, "id", 9), 'the id 9 comes twice in "images"'),
        (_set("images", 1, "id", "9"), "use one kind"),
        (_delete("images", 1, "file_name"), "image 4 has no file_name"),
        (_delete("images", 1, "width"), "image 4 (a.png) has no width"),
        (_set("images", 1, "height", 0), "image 4 (a.png) has the height 0"),
        (_set("images", 1, "height", "48"), "image 4 (a.png) has the height '48'"),
        (_delete("categories", 0, "name"), "category 7 has no name"),
        (_set("categories", 0, "name", ""), "category 7 has no name"),
        (_set("categories", 0, "name", "car"), "two categories have the name 'car'"),
        (_set("categories", 0, "id", 0), 'the id 0 comes twice in "categories"'),
        (_delete("annotations", 0, "bbox"), "annotation 11 has no bbox"),
        (_delete("annotations", 0, "image_id"), "annotation 11 has no image_id"),
        (_delete("annotations", 0, "category_id"), "annotation 11 has no category_id"),
        (
            _set("annotations", 0, "category_id", 3),
            'annotation 11 has the category_id 3, which "categories" lacks (ids there: 0, 7)',
        ),
        (_set("annotations", 0, "category_id", [7]), "annotation 11 has the category_id [7]"),
        (_set("annotations", 0, "image_id", {}), "annotation 11 has the image_id {}"),
        (_set("annotations", 0, "bbox", []), "annotation 11 has the bbox []"),
        (_set("annotations", 0, "bbox", None), "annotation 11 has the bbox None"),
        (_set("annotations", 0, "bbox", [1, 2, 3]), "four numbers, [x, y, width, height]"),
        (_set("annotations", 0, "bbox", [1, 2, 3, "4"]), "annotation 11 has the bbox"),
        (_set("annotations", 0, "bbox", [1, 2, 3, True]), "annotation 11 has the bbox"),
        (_set("annotations", 0, "iscrowd", "0"), "annotation 11 has the iscrowd '0'"),
        (_set("annotations", 0, "ignore", 1), 'annotation 11 has "ignore": 1'),
        (_set("annotations", 0, "segmentation", [1, 2, 3]), "annotation 11 has a malformed segm"),
        (_set("annotations", 0, "segmentation", {"counts": [1]}), "annotation 11 has a malformed"),
        (_set("annotations", 0, "keypoints", ["x"]), "annotation 11 has malformed keypoints"),
    ],
)
def test_broken_structure_is_one_line_with_file_and_place(folder, name, change, words):
    content = clean()
    change(content)
    message = error_of(load, folder, content, name)
    assert message.startswith(f"{folder / 'annotations.json'}: ")
    assert words in message


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
def test_not_a_coco_file(folder, name, text, words):
    message = error_of(load, folder, text, name)
    assert message.startswith(f"{folder / 'annotations.json'}: ")
    assert words in message


def test_file_that_cannot_be_read(folder, name):
    missing = str(folder / "missing.json")
    assert error_of(load_coco_format, missing, str(folder), name) == (
        f"{missing}: no such annotation file: correct the path"
    )
    assert str(folder) in error_of(load_coco_format, str(folder), str(folder), name)
    image = str(folder / "images" / "a.png")
    assert "not a text file in UTF-8" in error_of(load_coco_format, image, str(folder), name)


def test_no_usable_box(folder, name):
    content = clean()
    content["annotations"] = [_box(1, [1, 1, 0, 3]), _box(2, [1, 1, 3, 3], iscrowd=1)]
    message = error_of(load, folder, content, name)
    assert "no box that can be used, of 1: 1 of no size (annotation id 1)" in message


def test_no_image_exists(folder, name):
    json_file = write(folder, clean())
    message = error_of(load_coco_format, json_file, str(folder), name)
    assert "probably the wrong folder" in message and json_file in message
    assert str(folder / "a.png") in message
    message = error_of(load_coco_format, json_file, str(folder / "nowhere"), name)
    assert message.startswith(f"{folder / 'nowhere'}: no such folder")


def test_classes_changed_under_the_same_name(folder, name):
    load(folder, clean(), name)
    content = clean()
    content["categories"][0]["name"] = "boat"
    message = error_of(load, folder, content, name)
    assert "(car, boat)" in message and "(car, ship)" in message


# -- registration ----------------------------------------------------------------------------------


def test_registration_touches_no_file(tmp_path, name):
    json_file, images = str(tmp_path / "none.json"), str(tmp_path / "none")
    register_coco_format(name, json_file, images)
    register_coco_format(name, json_file, images)
    metadata = MetadataCatalog.get(name)
    assert (metadata.json_file, metadata.image_root) == (json_file, images)
    assert metadata.evaluator_type == "coco"
    assert name in error_of(register_coco_format, name, json_file, str(tmp_path))
    assert "coco_2017_val" in error_of(register_coco_format, "coco_2017_val", json_file, images)
    assert json_file in error_of(DatasetCatalog.get, name)


def make_cfg(train=(), test=(), num_classes=2, entries=()):
    cfg = get_cfg()
    add_cbbl_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.DATASETS.COCO_FORMAT = list(entries)
    return cfg


def test_registration_from_config(folder, name):
    cfg = make_cfg()
    images = folder / "images"
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", f"[['{name}', '{folder}/x.json', '{images}']]"])
    register_from_config(cfg)
    register_from_config(cfg)
    (folder / "x.json").write_text(json.dumps(clean()))
    assert len(DatasetCatalog.get(name)) == 2


@pytest.mark.parametrize("entry", ["abc", ["a", "b"], ["a", "b", 3], ["a", "", "c"], 5])
def test_malformed_entry_in_config(entry):
    with pytest.raises(ConfigError, match=r"DATASETS.COCO_FORMAT: .*\[name, annotation_json, "):
        register_from_config(make_cfg(entries=[entry]))


# -- checks ----------------------------------------------------------------------------------------


@pytest.fixture
def registered(folder, name):
    """``registered(content)``: the name of a registered data set."""

    def register(content):
        register_coco_format(name, write(folder, content), str(folder / "images"))
        return name

    return register


def test_sound_data_sets_pass(registered):
    name = registered(clean())
    check_datasets(make_cfg([name], [name]))
    check_datasets(make_cfg(["coco_2017_train"], [name]), eval_only=True)


def test_number_of_classes(registered):
    name = registered(clean())
    with pytest.raises(ConfigError) as info:
        check_datasets(make_cfg([name], num_classes=80))
    assert str(info.value) == (
        f"MODEL.ROI_HEADS.NUM_CLASSES = 80, but data set {name} has 2 classes (car, ship): "
        "set MODEL.ROI_HEADS.NUM_CLASSES 2"
    )
    cfg = make_cfg([name])
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    with pytest.raises(ConfigError, match="MODEL.RETINANET.NUM_CLASSES = 3, but .* 2 classes"):
        check_num_classes(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80  # not read by this architecture
    check_num_classes(cfg)


def test_same_number_but_other_classes(registered, folder):
    name, other = registered(clean()), next(_names)
    content = clean()
    content["categories"] = [{"id": 0, "name": "ship"}, {"id": 7, "name": "car"}]
    (folder / "other.json").write_text(json.dumps(content))
    register_coco_format(other, str(folder / "other.json"), str(folder / "images"))
    with pytest.raises(ConfigError, match=r"\(car, ship\) and \(ship, car\)"):
        check_datasets(make_cfg([name], [other]))


def test_unknown_and_missing_data_sets(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="TEST: unknown data set coco_2017_vall, did you mean"):
        check_datasets(make_cfg(test=["coco_2017_vall"]), eval_only=True)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        check_datasets(make_cfg(test=["coco_2017_val"]))
    # The folder of Detectron2's own data sets is chosen at import; here it is missing.
    metadata = MetadataCatalog.get("coco_2014_train")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(tmp_path / "none.json"))
    for cfg in (make_cfg(["coco_2014_train"]), make_cfg(["coco_2014_train"], ["coco_2014_train"])):
        message = error_of(check_datasets, cfg)
        assert "data set coco_2014_train: " in message and "DETECTRON2_DATASETS" in message
        assert ".json does not exist" in message


def test_missing_image_stops_an_evaluation_only(registered, folder):
    name = registered(clean())
    (folder / "images" / "b.png").unlink()
    check_datasets(make_cfg([name]))
    message = error_of(check_datasets, make_cfg([name], [name]))
    assert "1 of its 2 images are missing" in message
    assert str(folder / "images" / "b.png") in message and "annotations.json" in message


# -- evaluation ------------------------------------------------------------------------------------


def evaluate(name, ground_truth, output_dir, predictions):
    """Box results of COCOEvaluator; predictions: image id -> list of [x, y, w, h], class."""
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(output_dir), use_fast_impl=False)
    clean_ground_truth(name, evaluator._coco_api)
    evaluator.reset()
    for image_id, boxes in predictions.items():
        instances = Instances((HEIGHT, WIDTH))
        xywh = torch.tensor([box for box, _ in boxes], dtype=torch.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
        instances.pred_classes = torch.tensor([label for _, label in boxes]).long()
        instances.scores = torch.full((len(boxes),), 0.9)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


PERFECT = {
    9: [([1, 2, 10, 12], 1)],
    4: [([30.5, 20, 4, 3.25], 0), ([5, 5, 6, 6], 1)],
}


def test_perfect_detector_has_ap_100_on_repaired_ground_truth(registered, folder, log):
    content = clean()
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
        _box(20, [5, 5, 0, 9]),
        _box(21, [math.nan, 5, 9, 9]),
        _box(22, [500, 5, 9, 9]),
    ]
    before = copy.deepcopy(content)
    name = registered(content)
    results = evaluate(name, content, folder / "out", PERFECT)
    assert results["AP"] == pytest.approx(100)
    assert results["APs"] == pytest.approx(100)
    messages = [r.getMessage() for r in log()]
    assert any("3 boxes of the ground truth not counted" in m and "22" in m for m in messages)
    assert any("4 boxes without a usable area" in m for m in messages)
    # The user's file is as it was.
    assert (folder / "annotations.json").read_text() == json.dumps(before)


def test_missed_object_still_counts(registered, folder):
    name = registered(clean())
    half = {9: PERFECT[9], 4: PERFECT[4][:1]}
    results = evaluate(name, clean(), folder / "out", half)
    assert results["AP-car"] == pytest.approx(100)
    assert results["AP-ship"] == pytest.approx(100 * 51 / 101)  # recall 1/2 of 101 levels


def test_clean_ground_truth_changes_nothing_in_a_sound_file(registered, folder, log):
    content = clean()
    name = registered(content)
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(folder / "out"))
    before = copy.deepcopy(evaluator._coco_api.dataset)
    clean_ground_truth(name, evaluator._coco_api)
    assert evaluator._coco_api.dataset == before
    assert len(log()) == 1  # that of loading


def test_ground_truth_of_other_data_sets_is_left_alone(folder, name):
    content = clean()
    content["annotations"].append(_box(20, [5, 5, 0, 9]))
    MetadataCatalog.get(name).set(json_file=write(folder, content), thing_classes=["car", "ship"])
    evaluator = COCOEvaluator(name, output_dir=str(folder / "out"))
    clean_ground_truth(name, evaluator._coco_api)
    assert len(evaluator._coco_api.dataset["annotations"]) == 5


def test_boxes_over_the_edge_are_clipped_in_training(registered):
    content = clean()
    content["annotations"] = [_box(1, [60, -4, 20, 20])]
    name = registered(content)
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR")
    record = next(d for d in DatasetCatalog.get(name) if d["annotations"])
    assert mapper(record)["instances"].gt_boxes.tensor.tolist() == [[60, 0, WIDTH, 16]]
