import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.data.datasets.visdrone import (  # noqa: E402
    VISDRONE_CLASSES,
    convert_visdrone,
    read_visdrone_boxes,
)
from cbbl_d2.errors import UserError  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts  # noqa: E402
from detectron2.engine import default_argument_parser  # noqa: E402

import train_net  # noqa: E402

WIDTH, HEIGHT = 96, 64
# One line of each kind: the ignored region covers x from 60 to 96 and y from 0 to 40.
LINES = """\
60,0,36,40,0,0,0,0
10,10,8,12,1,1,0,0
20,30,9,7,1,10,0,2,
70,10,6,6,1,4,0,0
55,10,10,10,1,4,1,1
56,20,10,10,1,4,0,0
30,5,5,5,0,5,0,0
5,40,20,10,0,11,0,0
11,44,6,0,1,4,0,0

40,50,12,8,1,4,0,0
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Folder of the data set; the training and the validation set have two images each."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for folder in ("VisDrone2019-DET-train", "VisDrone2019-DET-val"):
        folder = tmp_path / "VisDrone" / folder
        (folder / "images").mkdir(parents=True)
        (folder / "annotations").mkdir()
        rng = np.random.default_rng(0)
        for name, lines in (("0000002_a", "7,7,10,10,1,9,0,0\n"), ("0000001_b", LINES)):
            pixels = rng.integers(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
            (folder / "annotations" / f"{name}.txt").write_text(lines)
    return tmp_path / "VisDrone"


def convert(root, split="train", **kwargs):
    convert_visdrone(str(root), split, **kwargs)
    return json.loads((root / "coco" / f"instances_{split}.json").read_text())


def annotations(coco, image_id):
    return [
        (coco["categories"][a["category_id"] - 1]["name"], a["iscrowd"], a["bbox"])
        for a in coco["annotations"]
        if a["image_id"] == image_id
    ]


def test_each_kind_of_line(root):
    coco = convert(root)
    assert [(i["id"], os.path.basename(i["file_name"])) for i in coco["images"]] == [
        (1, "0000001_b.jpg"),
        (2, "0000002_a.jpg"),
    ]
    assert {(i["width"], i["height"]) for i in coco["images"]} == {(WIDTH, HEIGHT)}
    assert [c["name"] for c in coco["categories"]] == list(VISDRONE_CLASSES)
    found = annotations(coco, 1)
    assert found[:7] == [
        ("pedestrian", 0, [10, 10, 8, 12]),
        ("motor", 0, [20, 30, 9, 7]),
        ("car", 1, [70, 10, 6, 6]),  # in the ignored region
        ("car", 1, [55, 10, 10, 10]),  # half of it
        ("car", 1, [56, 20, 10, 10]),  # six tenths
        ("van", 1, [30, 5, 5, 5]),  # score 0
        ("car", 0, [40, 50, 12, 8]),
    ]
    region, others = [60, 0, 36, 40], [5, 40, 20, 10]
    expected = [(name, 1, box) for box in (region, others) for name in VISDRONE_CLASSES]
    assert found[7:] == expected  # the box of no height is gone
    assert annotations(coco, 2) == [("bus", 0, [7, 7, 10, 10])]
    assert [i["ignored_regions"] for i in coco["images"]] == [[region], []]


def test_less_than_half_in_an_ignored_region_is_an_object(root):
    path = root / "VisDrone2019-DET-train" / "annotations" / "0000002_a.txt"
    path.write_text("60,0,36,40,0,0,0,0\n56,20,9,10,1,4,0,0\n55,20,9,10,1,4,0,0\n")
    # 5 and 4 of 9 columns of pixels
    assert annotations(convert(root), 2)[:2] == [
        ("car", 1, [56, 20, 9, 10]),
        ("car", 0, [55, 20, 9, 10]),
    ]


def test_the_file_is_what_coco_tools_need(root):
    coco = convert(root)
    ids = [a["id"] for a in coco["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in coco["annotations"])


def test_training_sees_objects_alone(root):
    convert(root)
    dicts = get_detection_dataset_dicts("visdrone_train")
    classes = MetadataCatalog.get("visdrone_train").thing_classes
    objects = [
        [classes[a["category_id"]] for a in d["annotations"] if not a["iscrowd"]] for d in dicts
    ]
    assert objects == [["pedestrian", "motor", "car"], ["bus"]]
    assert all(os.path.isfile(d["file_name"]) for d in dicts)


def test_the_summary_counts(root):
    line = convert_visdrone(str(root), "train")
    assert "2 images, 4 objects" in line
    assert "1 region and 5 boxes" in line and "1 box of no size" in line


def test_erased_copies(root):
    coco = convert(root, erase_ignored=True)
    first, second = (root / i["file_name"] for i in coco["images"])
    assert first.parent.name == "images_erased" and second.parent.name == "images"
    erased = np.asarray(Image.open(first)).astype(int)
    original = np.asarray(Image.open(first.parent.parent / "images" / first.name)).astype(int)
    # Inside, by more than a block of JPEG from the edges, one color; outside nothing new.
    assert erased[4:36, 68:92].std(axis=(0, 1)).max() < 3 < original[4:36, 68:92].std()
    assert np.abs(erased[:, :48] - original[:, :48]).mean() < 4


@pytest.mark.parametrize(
    "line, problem",
    [
        ("1,2,3,4,1,4,0", "7 values"),
        ("1,2,3,4,1,4,0,0,9", "9 values"),
        ("1,2,x,4,1,4,0,0", "whole numbers"),
        ("1,2,3,4,0.87,4,-1,-1", "whole numbers"),
        ("1,2,3,4,2,4,0,0", "score must be 0 or 1"),
        ("1,2,3,4,1,12,0,0", "category must be 0 to 11"),
        ("\x00\xff", "1 value"),
    ],
)
def test_a_malformed_line_is_named(root, error_of, line, problem):
    path = root / "VisDrone2019-DET-train" / "annotations" / "0000002_a.txt"
    path.write_bytes(b"7,7,10,10,1,9,0,0\n" + line.encode("latin-1") + b"\n")
    message = error_of(convert_visdrone, str(root), "train")
    assert f"{path}, line 2" in message and problem in message
    assert not (root / "coco").exists()


def test_an_empty_file_has_no_boxes_and_windows_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert read_visdrone_boxes(str(tmp_path / "a.txt")) == []
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf1,2,3,4,1,4,0,0\r\n")
    assert [b.box for b in read_visdrone_boxes(str(tmp_path / "b.txt"))] == [(1, 2, 3, 4)]


def test_missing_files_are_named(root, error_of):
    train = root / "VisDrone2019-DET-train"
    os.remove(train / "annotations" / "0000002_a.txt")
    message = error_of(convert_visdrone, str(root), "train")
    assert "1 of the images have no file of their name in annotations" in message
    assert "0000002_a" in message
    os.rename(train / "images" / "0000002_a.jpg", train / "annotations" / "0000002_a.txt")
    message = error_of(convert_visdrone, str(root), "train")
    assert "1 of the annotations have no file of their name in images" in message
    message = error_of(convert_visdrone, str(root), "test_dev")
    assert "VisDrone2019-DET-test-dev" in message and "no such folder" in message


def test_a_broken_image_is_named(root, error_of):
    path = root / "VisDrone2019-DET-train" / "images" / "0000002_a.jpg"
    path.write_text("<html>")
    assert str(path) in error_of(convert_visdrone, str(root), "train")


@pytest.mark.parametrize("split", ["train", "val", "test_dev"])
def test_missing_data_say_what_to_do(tmp_path, monkeypatch, error_of, split):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    message = error_of(DatasetCatalog.get, f"visdrone_{split}")
    assert f"tools/convert_dataset.py visdrone --split {split}" in message
    assert "https://github.com/VisDrone" in message and str(tmp_path / "elsewhere") in message


@pytest.fixture
def log_as_before():
    """Detectron2 takes its loggers out of the hierarchy: tests after this one would see no log."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "cbbl_d2")]
    before = [(logger.propagate, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (propagate, level, handlers) in zip(loggers, before):
        logger.propagate, logger.handlers = propagate, handlers
        logger.setLevel(level)


def test_trains_and_evaluates(log_as_before, root, repository, tmp_path):
    for split in ("train", "val"):
        convert(root, split)
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    overrides = {
        "DATASETS.TRAIN": "('visdrone_train',)",
        "DATASETS.TEST": "('visdrone_val',)",
        "MODEL.ROI_HEADS.NUM_CLASSES": "10",
        "TEST.DETECTIONS_PER_IMAGE": "500",
        "OUTPUT_DIR": str(tmp_path / "output"),
    }
    words = [word for pair in overrides.items() for word in pair]
    train_net.run(default_argument_parser().parse_args(["--config-file", config, *words]))
    rows = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    last = json.loads(rows[-1])
    assert last["iteration"] == 10 and np.isfinite(json.loads(rows[0])["total_loss"])
    assert {"bbox/AP", "bbox/APvs", "bbox/AP-awning-tricycle"} <= set(last)


def test_data_in_the_way_of_another_program_are_refused(root, error_of):
    """A COCO file of another converter, with other classes, in the place of ours."""
    coco = convert(root)
    coco["categories"][0]["name"] = "ignored regions"
    (root / "coco" / "instances_train.json").write_text(json.dumps(coco))
    with pytest.raises(UserError, match="are not those that data set visdrone_train"):
        DatasetCatalog.get("visdrone_train")
