import copy
import json
import os

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.data.datasets.tiny_person import convert_tiny_person  # noqa: E402
from cbbl_d2.engine import load_config  # noqa: E402
from detectron2.data import (  # noqa: E402
    DatasetCatalog,
    DatasetMapper,
    get_detection_dataset_dicts,
)

WIDTH, HEIGHT = 80, 48
TRAIN_FILE = (
    "erase_with_uncertain_dataset/annotations/corner/task/tiny_set_train_sw640_sh512_all.json"
)
TEST_FILE = "annotations/task/tiny_set_test_all.json"
SEA_AND_EARTH = [
    {"id": 1, "name": "sea_person", "supercategory": "person"},
    {"id": 2, "name": "earth_person", "supercategory": "person"},
]


def annotation(id, image_id, box, category_id=1, **flags):
    """As published, with each box once more as a polygon in a list of lists of points."""
    x, y, w, h = box
    return {
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        "bbox": box,
        "category_id": category_id,
        "area": w * h,
        "iscrowd": 0,
        "image_id": image_id,
        "id": id,
        **dict.fromkeys(("ignore", "uncertain", "logo", "in_dense_image"), False),
        **flags,
    }


def pixels():
    """An image that says at each pixel where it is."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 2, y * 2, x * 0], axis=2).astype(np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = tmp_path / "tiny_set"
    for folder in ("erase_with_uncertain_dataset/train", "test"):
        images = root / folder / "labeled_images"
        images.mkdir(parents=True)
        for name in ("a.jpg", "b.jpg"):
            Image.fromarray(pixels()).save(images / name, quality=100, subsampling=0)
    return root


def write(root, path, content):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(content))


def image(id, name, width=WIDTH, height=HEIGHT, **fields):
    file_name = f"labeled_images/{name}"
    return {"file_name": file_name, "height": height, "width": width, "id": id, **fields}


@pytest.fixture
def test_content():
    return {
        "type": "instance",
        "images": [image(0, "a.jpg"), image(1, "b.jpg")],
        "categories": SEA_AND_EARTH,
        "annotations": [
            annotation(0, 0, [1.5, 2.25, 6.5, 10.0]),
            annotation(1, 0, [20, 5, 8, 8], category_id=2),
            annotation(2, 0, [30, 5, 20, 20], ignore=True),
            annotation(3, 0, [60, 5, 4, 4], uncertain=True, category_id=2),
            annotation(4, 0, [60, 40, 15, 5], logo=True),
            annotation(5, 0, [60, 20, 0.0, 5]),
            annotation(6, 1, [5, 5, 5, 5], in_dense_image=True),
        ],
    }


def convert(root, split, **kwargs):
    line = convert_tiny_person(str(root), split, **kwargs)
    return json.loads((root / "coco" / f"instances_{split}.json").read_text()), line


def test_flags_classes_and_dense_images(root, test_content):
    write(root, TEST_FILE, test_content)
    coco, line = convert(root, "test")
    assert [c["name"] for c in coco["categories"]] == ["person"]
    # The dense image is gone, and the box of no width.
    assert [i["file_name"] for i in coco["images"]] == ["test/labeled_images/a.jpg"]
    found = [(a["id"], a["image_id"], a["iscrowd"], a["bbox"]) for a in coco["annotations"]]
    assert found == [
        (1, 1, 0, [1.5, 2.25, 6.5, 10.0]),
        (2, 1, 0, [20, 5, 8, 8]),
        (3, 1, 1, [30, 5, 20, 20]),
        (4, 1, 1, [60, 5, 4, 4]),
        (5, 1, 1, [60, 40, 15, 5]),
    ]
    assert {a["category_id"] for a in coco["annotations"]} == {1}
    assert "1 image, 2 objects" in line and "ignored: 3 boxes" in line
    assert "1 dense image and 1 box of no size" in line
    assert len(DatasetCatalog.get("tiny_person_test")) == 1


def test_tiles_are_cut_out(root):
    content = {
        "images": [
            image(0, "a.jpg", 40, 32, corner=[0, 0, 40, 32]),
            image(1, "b.jpg", 40, 32, corner=[40, 16, 80, 48]),
            image(2, "a.jpg", 40, 32, corner=[40, 16, 80, 48]),
        ],
        "categories": [{"id": 1, "name": "person", "supercategory": "none"}],
        "annotations": [annotation(0, 0, [1, 2, 6, 6]), annotation(1, 2, [3, 4, 5, 6])],
    }
    write(root, TRAIN_FILE, content)
    coco, _ = convert(root, "train")
    assert [i["file_name"] for i in coco["images"]] == [
        "coco/tiles_train/labeled_images_a_0_0.jpg",
        "coco/tiles_train/labeled_images_a_40_16.jpg",
        "coco/tiles_train/labeled_images_b_40_16.jpg",
    ]
    tile = np.asarray(Image.open(root / coco["images"][1]["file_name"])).astype(int)
    assert np.abs(tile - pixels()[16:48, 40:80]).max() <= 6  # JPEG
    # Each box stays with its tile.
    assert [(a["image_id"], a["bbox"]) for a in coco["annotations"]] == [
        (1, [1, 2, 6, 6]),
        (2, [3, 4, 5, 6]),
    ]
    # Detectron2 trains on the tiles that have an object.
    assert len(get_detection_dataset_dicts("tiny_person_train")) == 2
    assert sorted(os.listdir(root / "coco")) == ["instances_train.json", "tiles_train"]


@pytest.mark.parametrize("is_train", [True, False])
def test_the_configs_take_images_as_they_are(root, test_content, repository, is_train):
    write(root, TEST_FILE, test_content)
    convert(root, "test")
    (record,) = DatasetCatalog.get("tiny_person_test")
    for name in ("cbbl_faster_rcnn", "giou_fcos"):
        config = os.path.join(repository, "configs", "TinyPerson", f"{name}_R_50_FPN_1x.yaml")
        mapped = DatasetMapper(load_config(config), is_train=is_train)(record)
        assert mapped["image"].shape == (3, HEIGHT, WIDTH)
        if is_train:
            assert len(mapped["instances"]) == 2  # of 5 boxes; 3 are ignored


def test_other_files_than_the_usual(root, test_content):
    write(root, "mine/some.json", test_content)
    coco, _ = convert(root, "train", annotations="mine/some.json", images="test")
    assert coco["images"][0]["file_name"] == "test/labeled_images/a.jpg"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "annotation 1 has the bbox"),
        (lambda c: c["annotations"][1].pop("image_id"), "annotation 1 has no image_id"),
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 1 has the image_id 77"),
        (lambda c: c["categories"][0].update(name="cat"), "not those of TinyPerson"),
        (lambda c: c["images"][0].update(file_name="c.jpg"), "no such image"),
        (lambda c: c["images"][0].update(corner=[0, 0, 9, 9]), "image 0 has the corner"),
        (
            lambda c: c["images"][0].update(corner=[9, 0, WIDTH + 9, HEIGHT]),
            "is 80x48 pixels, but a tile reaches to 89x48",
        ),
        (lambda c: c.pop("annotations"), 'has no "annotations"'),
    ],
)
def test_what_is_wrong_is_named(root, test_content, error_of, change, words):
    content = copy.deepcopy(test_content)
    change(content)
    write(root, TEST_FILE, content)
    message = error_of(convert_tiny_person, str(root), "test", None, None)
    assert words in message and str(root) in message
    assert not (root / "coco" / "instances_test.json").exists()


def test_no_annotations_say_where_they_should_be(root, error_of):
    message = error_of(convert_tiny_person, str(root), "test", None, None)
    assert TEST_FILE in message
    message = error_of(DatasetCatalog.get, "tiny_person_test")
    assert "tools/convert_dataset.py tinyperson --split test" in message
