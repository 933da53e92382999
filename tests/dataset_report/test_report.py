import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.data import register_coco_format  # noqa: E402
from cbbl_d2.dataset_report.report import (  # noqa: E402
    check_images,
    format_report,
    read_dataset,
    report_on,
)
from cbbl_d2.engine import load_config  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402


def report(content, **kwargs):
    return report_on(content, "mine.json", "images", **kwargs)


def add(content, id, bbox, **fields):
    annotation = {"id": id, "image_id": 4, "category_id": 7, "bbox": bbox, **fields}
    content["annotations"].append(annotation)


def many(content):
    """Enough boxes of both classes for no word on it."""
    for i in range(20):
        add(content, 100 + i, [2 * i, i, 6, 7], category_id=7 * (i % 2))


# -- boxes and classes -----------------------------------------------------------------------------


def test_nothing_wrong(content):
    many(content)
    found = report(content, name="mine")
    assert found.warnings == []
    assert found.class_names == ["car", "ship"] and found.num_crowds == 1
    assert len(found.objects) == 23
    assert found.title == "mine: mine.json, images in images"


def of_no_size(content):
    add(content, 30, [5, 5, 0, 4])
    add(content, 31, [500, 5, 3, 4])


def over_the_edge(content):
    add(content, 30, [60, 5, 20, 4])


def tiny(content):
    add(content, 30, [5, 5, 1.5, 40])
    add(content, 31, [5, 5, 2, 40])


def repeated(content):
    add(content, 30, [1, 2, 10, 12], image_id=9)
    add(content, 31, [1, 2, 10, 12])  # in another image: fine


def of_two_classes(content):
    add(content, 30, [1, 2, 10, 12], image_id=9, category_id=0)


def crowd_on_a_box(content):
    add(content, 30, [1, 2, 10, 12], image_id=9, iscrowd=1)


def class_without_a_box(content):
    content["categories"].append({"id": 3, "name": "train"})


def rare_class(content):
    content["categories"].append({"id": 3, "name": "train"})
    add(content, 30, [5, 5, 7, 7], category_id=3)


def listed_twice(content):
    content["images"][1]["file_name"] = "./b.png"


def no_boxes(content):
    content["images"].append({"id": 1, "file_name": "c.png", "width": 9, "height": 9})


@pytest.mark.parametrize(
    "change, expected",
    [
        (of_no_size, "2 boxes that cannot be used and will be left out: 1 of no size .* id 30"),
        (over_the_edge, "1 box reaches over the edge"),
        (tiny, "1 box has a side under 2 px .*annotation ids 30"),
        (repeated, "1 box repeats another one of the same image and class: .* ids 30"),
        (of_two_classes, "1 box lies exactly on one of another class: .* ids 30"),
        (crowd_on_a_box, None),
        (class_without_a_box, "1 class has no box here, .*: train"),
        (rare_class, "1 class has fewer than 10 boxes, .*: train"),
        (listed_twice, "1 image file is listed more than once, .*b.png"),
        (no_boxes, "1 image without boxes: .*FILTER_EMPTY_ANNOTATIONS"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(content, change, expected):
    many(content)
    change(content)
    before = copy.deepcopy(content)
    warnings = report(content).warnings
    assert content == before
    assert len(warnings) == (expected is not None)
    if expected:
        assert re.match(expected, warnings[0]) and "\n" not in warnings[0]


def test_corners_and_fractions(content, error_of):
    content["annotations"] = []
    for i in range(6):
        add(content, i, [30, 20, 40 + i, 30 + i])
    assert any("[x0, y0, x1, y1]" in line for line in report(content).warnings)
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.5, 0.5, 0.1, 0.1]
    assert "mine.json: all boxes lie between 0 and 1" in error_of(report, content)
    for annotation in content["annotations"]:
        annotation["bbox"] = [5, 5, 0, 1]
    assert "mine.json: no box that can be used, of 6" in error_of(report, content)


# -- text ------------------------------------------------------------------------------------------


def test_numbers_of_the_text(content):
    cfg = load_config("", ["INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "1000"])  # twice
    text = format_report(report(content), cfg)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert "2 images (64x48), 3 boxes and 1 crowd of 2 classes" in text
    assert "boxes in an image: 1 to 2, 1.5 on average" in text
    # Two ships of sqrt(120) = 11.0 and 6 px on two images, a car of sqrt(13) = 3.6 px.
    assert rows["ship"] == ["ship", "2", "66.7%", "2", "8.5"]
    assert rows["car"] == ["car", "1", "33.3%", "1", "3.6"]
    assert "at the model's input, 128x96" in text
    assert "At the input: 33.3% under 8 px, 66.7% under 16 px, 100.0% under 32 px" in text
    assert "warning: 2 classes have fewer than 10 boxes" in text


def test_text_of_sound_data(content):
    many(content)
    assert "Nothing wrong was found." in format_report(report(content), load_config(""))


def test_sizes_of_different_images(content):
    content["images"][0].update(width=640, height=480)
    assert "2 images (64x48 to 640x480)" in format_report(report(content), load_config(""))


# -- images ----------------------------------------------------------------------------------------


@pytest.fixture
def images(folder):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / name)
    return folder / "images"


def test_sound_images(content, images):
    assert check_images(content, str(images)) == []


def test_what_is_wrong_with_images(content, images):
    sound = (images / "a.png").read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (64, 48))
    turned.save(images / "turned.jpg", exif=exif)
    Image.fromarray(np.full((48, 64), 3000, np.uint16)).save(images / "deep.png")
    Image.new("RGB", (63, 48)).save(images / "size.png")
    (images / "cut.png").write_bytes(sound[:500])
    (images / "empty.png").write_bytes(b"")
    (images / "copy of a.png").write_bytes(sound)
    names = [
        "turned.jpg",
        "deep.png",
        "size.png",
        "cut.png",
        "empty.png",
        "copy of a.png",
        "no.png",
    ]
    content["images"] += [
        {"id": 100 + i, "file_name": name, "width": 64, "height": 48}
        for i, name in enumerate(names)
    ]
    missing, broken, deep, copies = check_images(content, str(images))
    assert missing.startswith("1 image file is missing") and str(images / "no.png") in missing
    assert broken.startswith("4 images cannot be used")
    for name in ("turned.jpg", "size.png", "cut.png", "empty.png"):
        assert f"{images / name}: " in broken
    assert "EXIF" in broken and "not an image" in broken and "\n" not in broken
    assert deep.startswith("1 image has values over 255") and str(images / "deep.png") in deep
    assert copies == "1 image file is a copy of another one: a.png = copy of a.png"


def test_a_file_under_two_ids_is_no_copy(content, images):
    content["images"][1]["file_name"] = "b.png"
    assert check_images(content, str(images)) == []


# -- registered data sets --------------------------------------------------------------------------


def test_data_set_in_coco_format(register, content, folder):
    name = register(content)
    expected = json.loads((folder / "annotations.json").read_text())
    assert read_dataset(name) == (
        expected,
        str(folder / "annotations.json"),
        str(folder / "images"),
    )


def test_data_set_that_is_made_on_first_use():
    content, json_file, image_root = read_dataset("small_shapes_mini_val")
    assert len(content["images"]) == 12
    found = report_on(content, json_file, image_root)
    assert len(found.class_names) == 5 and len(found.objects) == len(content["annotations"])
    assert check_images(content, image_root) == []


def test_data_set_without_an_annotation_file(new_name, images):
    name = new_name()
    objects = [{"bbox": [1, 2, 11, 22], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}]
    record = {"file_name": str(images / "a.png"), "image_id": 5, "height": 48, "width": 64}
    DatasetCatalog.register(name, lambda: [{**record, "annotations": objects}])
    MetadataCatalog.get(name).set(thing_classes=["car", "ship"])
    content, json_file, image_root = read_dataset(name)
    found = report_on(content, json_file, image_root, name)
    assert found.title == name and found.class_names == ["car", "ship"]
    assert found.objects.boxes.tolist() == [[1, 2, 11, 22]]
    assert found.objects.classes.tolist() == [1]
    assert check_images(content, image_root) == []


def test_missing_files_of_a_data_set(error_of, new_name, tmp_path):
    name = new_name()
    register_coco_format(name, str(tmp_path / "none.json"), str(tmp_path))
    assert error_of(read_dataset, name).startswith(f"{tmp_path / 'none.json'}: no such")


def test_pages_and_images_turned_in_place_are_named(content, images):
    exif = Image.Exif()
    exif[0x0112] = 3
    blank = Image.new("RGB", (64, 48), (9, 9, 9))
    blank.save(images / "turned.jpg", exif=exif)
    blank.save(images / "pages.tif", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    content["images"] += [
        {"id": 100 + i, "file_name": name, "width": 64, "height": 48}
        for i, name in enumerate(("turned.jpg", "pages.tif"))
    ]
    pages, turned, *_ = check_images(content, str(images))
    assert pages.startswith("1 file has several pages") and "pages.tif" in pages
    assert turned.startswith("1 image is turned by 180 degrees") and "turned.jpg" in turned
