import copy
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.data.datasets.ai_tod import AI_TOD_CLASSES, convert_ai_tod  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.engine import default_argument_parser  # noqa: E402

import train_net  # noqa: E402

SIZE = 96


@pytest.fixture
def content():
    """As published; the ids start at 0 and the classes come in another order than in v2."""
    boxes = [[10.0, 10, 5, 5], [30, 30, 10, 12], [50, 40, 22, 20], [5, 50, 40, 40]]
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in (0, 1)
        ],
        "categories": [{"id": i, "name": n} for i, n in enumerate(AI_TOD_CLASSES[::-1])],
        "annotations": [
            {
                "id": 4 * image_id + i,
                "image_id": image_id,
                "category_id": 7 - i,  # airplane, bridge, storage-tank, ship
                "bbox": box,
                "area": 1.0,
                "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]],
            }
            for image_id in (0, 1)
            for i, box in enumerate(boxes)
        ],
    }


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = tmp_path / "AI-TOD"
    (root / "annotations").mkdir(parents=True)
    return root


def add_images(root, folder, names=("0.png", "1.png")):
    (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        pixels = rng.integers(0, 256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / folder / name)


def write(root, name, content):
    (root / "annotations" / name).write_text(json.dumps(content))


def convert(root, split, version=1, name=None, **kwargs):
    convert_ai_tod(str(root), split, version, **kwargs)
    name = name or (split if version == 1 else f"v2_{split}")
    return json.loads((root / "coco" / f"instances_{name}.json").read_text())


def test_ids_classes_and_areas(root, content):
    add_images(root, "test")
    content["annotations"][1]["ignore"] = 1
    content["annotations"][2]["bbox"][3] = 0
    write(root, "aitod_test_v1.json", content)
    coco = convert(root, "test")
    assert [c["name"] for c in coco["categories"]] == list(AI_TOD_CLASSES)
    assert [i["id"] for i in coco["images"]] == [1, 2]
    first = [a for a in coco["annotations"] if a["image_id"] == 1]
    found = [(a["id"], a["category_id"], a["iscrowd"], a["bbox"], a["area"]) for a in first]
    assert found == [
        (1, 1, 0, [10.0, 10, 5, 5], 25.0),
        (2, 2, 1, [30, 30, 10, 12], 120),
        (3, 4, 0, [5, 50, 40, 40], 1600),
    ]
    assert "segmentation" not in coco["annotations"][0]
    assert len(DatasetCatalog.get("aitod_test")) == 2


@pytest.mark.parametrize(
    "version, name",
    [(1, "aitod_val_v1.json"), (1, "small_val_v1_1.0.json"), (2, "aitodv2_val.json")],
)
@pytest.mark.parametrize("folder", ["val/images", "val", "images/val", "images/trainval", "images"])
def test_archives_unpacked_in_several_ways(root, content, version, name, folder):
    add_images(root, folder)
    write(root, name, content)
    files = [i["file_name"] for i in convert(root, "val", version)["images"]]
    assert files == [f"{folder}/0.png", f"{folder}/1.png"]


def test_images_of_trainval_in_two_folders(root, content):
    add_images(root, "train/images", ["0.png"])
    add_images(root, "val/images", ["1.png"])
    write(root, "aitodv2_trainval.json", content)
    files = [i["file_name"] for i in convert(root, "trainval", 2)["images"]]
    assert files == ["train/images/0.png", "val/images/1.png"]
    assert len(DatasetCatalog.get("aitod_v2_trainval")) == 2


def test_versions_do_not_mix(root, content):
    add_images(root, "test")
    write(root, "aitod_test_v1.json", content)
    content["annotations"] = content["annotations"][:1]
    write(root, "aitodv2_test.json", content)
    assert len(convert(root, "test")["annotations"]) == 8
    assert len(convert(root, "test", version=2)["annotations"]) == 1
    assert MetadataCatalog.get("aitod_test").json_file != (
        MetadataCatalog.get("aitod_v2_test").json_file
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["annotations"][1].update(category_id=99), "annotation 1 has the category_id"),
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 1 has the image_id 77"),
        (lambda c: c["annotations"][1].update(bbox="x"), "annotation 1 has the bbox"),
        (lambda c: c["categories"][0].update(name="cat"), "not those of AI-TOD"),
        (lambda c: c["images"][0].pop("width"), "has no width"),
        (lambda c: c["images"][0].update(file_name="none.png"), "1 of the 2 images"),
    ],
)
def test_what_is_wrong_is_named(root, content, error_of, change, words):
    add_images(root, "test")
    content = copy.deepcopy(content)
    change(content)
    write(root, "aitod_test_v1.json", content)
    message = error_of(convert_ai_tod, str(root), "test", 1, None, None)
    assert words in message and str(root) in message
    assert not (root / "coco").exists()


def test_broken_json_names_the_line(root, error_of):
    (root / "annotations" / "aitod_test_v1.json").write_text('{"images": [],\n "annotations": [}')
    message = error_of(convert_ai_tod, str(root), "test", 1, None, None)
    assert "aitod_test_v1.json: not valid JSON at line 2" in message


def test_missing_data_say_what_to_do(root, error_of):
    message = error_of(DatasetCatalog.get, "aitod_v2_trainval")
    assert "tools/convert_dataset.py aitod --split trainval --version 2" in message
    message = error_of(convert_ai_tod, str(root), "val", 2, None, None)
    assert "aitodv2_val.json" in message


@pytest.fixture
def log_as_before():
    """Detectron2 takes its loggers out of the hierarchy: tests after this one would see no log."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "cbbl_d2")]
    before = [(logger.propagate, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (propagate, level, handlers) in zip(loggers, before):
        logger.propagate, logger.handlers = propagate, handlers
        logger.setLevel(level)


@pytest.mark.slow
def test_trains_and_evaluates(log_as_before, root, content, repository, tmp_path):
    add_images(root, "trainval")
    add_images(root, "test")
    for split in ("trainval", "test"):
        write(root, f"aitod_{split}_v1.json", content)
        convert(root, split)
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    overrides = {
        "DATASETS.TRAIN": "('aitod_trainval',)",
        "DATASETS.TEST": "('aitod_test',)",
        "MODEL.ROI_HEADS.NUM_CLASSES": "8",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",  # untrained: all that it has
        "OUTPUT_DIR": str(tmp_path / "output"),
    }
    words = [word for pair in overrides.items() for word in pair]
    train_net.run(default_argument_parser().parse_args(["--config-file", config, *words]))
    rows = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    last = json.loads(rows[-1])
    assert last["iteration"] == 10 and np.isfinite(json.loads(rows[0])["total_loss"])
    sizes = {last[f"bbox/{key}"] for key in ("APvt", "APt", "APs", "APm")}
    assert all(0 <= value <= 100 for value in sizes)  # no NaN: each size has an object
