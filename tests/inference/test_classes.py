import json
import os
import shutil

import pytest

pytest.importorskip("detectron2")

from cbbl_d2.data.class_names import save_class_names  # noqa: E402
from cbbl_d2.data.coco_format import register_coco_format  # noqa: E402
from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.inference import find_classes, load_inference_config  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

NAME = "cbbl_test_find_classes"


@pytest.fixture
def cfg(checkpoint, tmp_path):
    """Of two classes, without a data set, in a folder of its own."""
    for name in ("model.pth", "config.yaml"):
        shutil.copy(os.path.join(os.path.dirname(checkpoint), name), tmp_path)
    cfg = load_inference_config(str(tmp_path / "model.pth"))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg


@pytest.fixture
def dataset(tmp_path, write_coco):
    """Registered; its annotation file is there, its images are not."""
    register_coco_format(NAME, write_coco(tmp_path / "x.json", [], []), str(tmp_path / "nowhere"))
    yield NAME
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME)


def test_names_that_are_nowhere_are_numbered(cfg):
    classes = find_classes(cfg)
    assert classes.names == ("class 0", "class 1")
    assert classes.ids == (1, 2)
    assert classes.source == ""


def test_names_of_a_data_set_without_its_images(cfg, dataset):
    cfg.DATASETS.TEST = ("unknown", dataset)
    classes = find_classes(cfg)
    assert classes.names == ("a", "b")
    assert classes.ids == (3, 7)
    assert dataset in classes.source
    assert classes.categories() == [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]


def test_names_of_a_data_set_without_files(cfg):
    cfg.DATASETS.TRAIN = ("small_shapes_train",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    assert find_classes(cfg).names[0] == "disk"
    assert find_classes(cfg).ids == (1, 2, 3, 4, 5)


def test_a_data_set_with_another_number_of_classes_names_nothing(cfg, dataset):
    cfg.DATASETS.TEST = ("small_shapes_val",)
    assert find_classes(cfg).names == ("class 0", "class 1")
    with pytest.raises(UserError, match="5 classes"):
        find_classes(cfg, dataset="small_shapes_val")


def test_a_damaged_annotation_file_names_nothing(cfg, dataset, tmp_path):
    cfg.DATASETS.TEST = (dataset,)
    (tmp_path / "x.json").write_text("[")
    assert find_classes(cfg).names == ("class 0", "class 1")
    (tmp_path / "x.json").write_text(json.dumps({"categories": [1]}))
    assert find_classes(cfg).names == ("class 0", "class 1")


def test_the_order_of_the_sources(cfg, dataset, tmp_path):
    cfg.DATASETS.TEST = (dataset,)
    (tmp_path / "classes.txt").write_text("first\n second \n\n")
    classes = find_classes(cfg)
    assert classes.names == ("first", "second")
    assert classes.ids == (3, 7)  # a name of one's own, the id of the annotation files
    assert classes.metadata.thing_classes == ["first", "second"]

    assert find_classes(cfg, ["x", "y"]).names == ("x", "y")
    (tmp_path / "other.txt").write_text("p\nq")
    assert find_classes(cfg, [str(tmp_path / "other.txt")]).names == ("p", "q")


@pytest.mark.parametrize("names, message", [(["x"], "2 classes"), (["x", "x"], "twice")])
def test_wrong_names(cfg, names, message):
    with pytest.raises(UserError, match=message):
        find_classes(cfg, names)


def test_names_that_a_training_leaves_beside_its_checkpoints(cfg, tmp_path):
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TRAIN = ("cbbl_test_two_classes",)
    metadata = MetadataCatalog.get("cbbl_test_two_classes")
    metadata.set(thing_classes=["röd cell", "2"])
    save_class_names(cfg)
    MetadataCatalog.pop("cbbl_test_two_classes")
    cfg.DATASETS.TRAIN = ()
    classes = find_classes(cfg)
    assert classes.names == ("röd cell", "2")
    assert classes.source == str(tmp_path / "classes.txt")


def test_a_data_set_with_the_classes_in_another_order_is_refused(cfg, dataset, tmp_path, caplog):
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert find_classes(cfg, dataset=dataset).ids == (3, 7)
    (tmp_path / "classes.txt").write_text("b\na\n")
    with pytest.raises(UserError, match=f"{dataset} has its classes in another order .a, b.* b, a"):
        find_classes(cfg, dataset=dataset)
    assert find_classes(cfg, ["x", "y"], dataset).names == ("x", "y")  # the user knows better
    assert not caplog.records
    (tmp_path / "classes.txt").write_text("a\nc\n")
    assert find_classes(cfg, dataset=dataset).names == ("a", "c")
    assert "other names" in caplog.text


def test_names_and_keypoints_reach_pictures_and_files(cfg, dataset, tmp_path):
    """With names beside the checkpoint or without, of a data set that is not loaded."""
    MetadataCatalog.get(dataset).set(keypoint_names=["tip"])
    cfg.DATASETS.TEST = (dataset,)
    for beside in (False, True):
        if beside:
            (tmp_path / "classes.txt").write_text("a\nb\n")
        classes = find_classes(cfg)
        assert classes.metadata.thing_classes == ["a", "b"]
        assert classes.categories()[0] == {
            "id": 3,
            "name": "a",
            "keypoints": ["tip"],
            "skeleton": [],
        }
