import json
import os

import numpy as np
import pytest
from PIL import ExifTags, Image

pytest.importorskip("detectron2")

from cbbl_d2.data.label_formats import convert_yolo  # noqa: E402
from cbbl_d2.data.label_formats.yolo import parse_yolo_line  # noqa: E402
from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.inference import Classes, ImageResult  # noqa: E402
from cbbl_d2.inference.writers import write_yolo  # noqa: E402
from detectron2.data.catalog import Metadata  # noqa: E402

BOX = "1 .5 .5 .2 .4\n"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "my"


def image(path, size=(100, 50), orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def labels(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make(root, text=BOX, name="a.jpg", yaml="train: images\nnames: [x, y]\n", **kwargs):
    """A data set of one image."""
    image(root / "images" / name, **kwargs)
    labels((root / "labels" / name).with_suffix(".txt"), text)
    labels(root / "data.yaml", yaml)


def read(root, split="train"):
    return json.loads((root / "coco" / f"instances_{split}.json").read_text())


def boxes(content):
    return [a["bbox"] for a in content["annotations"]]


def error(root, **kwargs):
    """The one line of a conversion that writes nothing."""
    with pytest.raises(UserError) as info:
        convert_yolo(str(root), **kwargs)
    assert not (root / "coco").exists() and "\n" not in str(info.value)
    return str(info.value)


# -- laws ------------------------------------------------------------------------------------------


def test_what_the_project_writes_it_reads_back(root):
    """Predictions in YOLO's format, which has six digits, come back to 1e-6 of the image."""
    rng = np.random.default_rng(0)
    results = []
    for i in range(6):
        width, height = (int(x) for x in rng.integers(20, 2000, size=2))
        start = rng.uniform(0, 0.7, size=(5, 2))
        sides = rng.uniform(0.001, 0.3, size=(5, 2))
        found = [
            {"category_id": int(k), "score": 1.0, "bbox": (box * ([width, height] * 2)).tolist()}
            for k, box in zip(rng.integers(0, 3, size=5), np.hstack([start, sides]))
        ]
        name = f"{'ab'[i % 2]}/{i}.png"
        image(root / "images" / name, size=(width, height))
        results.append(ImageResult(i, name, height, width, found, {}))
    names = ("no", "01", "ä: b")
    write_yolo(str(root), results, Classes(names, (1, 2, 3), "", Metadata()))
    convert_yolo(str(root))
    content = read(root)
    assert [c["name"] for c in content["categories"]] == list(names)
    by_name = {i["file_name"]: i for i in content["images"]}
    assert list(by_name) == sorted(by_name)
    for result in results:
        entry = by_name[f"images/{result.file_name}"]
        assert (entry["width"], entry["height"]) == (result.width, result.height)
        found = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
        assert [a["category_id"] - 1 for a in found] == [
            d["category_id"] for d in result.detections
        ]
        expected = [d["bbox"] for d in result.detections]
        np.testing.assert_allclose(boxes({"annotations": found}), expected, atol=1.1e-6 * 2000)


def test_a_box_its_polygon_and_its_corners_are_one_box(root):
    lines = (BOX, "1 .4 .3 .6 .3 .6 .7 .4 .7\n", "1 .5 .3 .6 .5 .5 .7 .4 .5 .5 .4\n")
    make(root, "".join(lines))
    convert_yolo(str(root))
    np.testing.assert_allclose(boxes(read(root)), [[40, 15, 20, 20]] * 3)
    a, b, _ = read(root)["annotations"]
    assert "segmentation" not in a and [a["area"], b["area"]] == pytest.approx([400, 400])
    np.testing.assert_allclose(b["segmentation"], [[40, 15, 60, 15, 60, 35, 40, 35]])


def test_the_same_folder_gives_the_same_file(root):
    for name in ("b.png", "a.JPG", "sub/a.png", "c.jpeg"):
        make(root, name=name)
    convert_yolo(str(root))
    first = (root / "coco" / "instances_train.json").read_bytes()
    convert_yolo(str(root))
    assert (root / "coco" / "instances_train.json").read_bytes() == first
    files = [i["file_name"] for i in read(root)["images"]]
    assert files == ["images/a.JPG", "images/b.png", "images/c.jpeg", "images/sub/a.png"]
    assert len(boxes(read(root))) == 4  # those of one name in two folders keep their own


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fractions_are_those_of_the_image_as_detectron2_turns_it(root, orientation):
    from detectron2.data.detection_utils import read_image

    make(root, orientation=orientation)
    (line, *_) = convert_yolo(str(root))
    (entry,) = read(root)["images"]
    assert read_image(root / entry["file_name"]).shape[:2] == (entry["height"], entry["width"])
    center = [0.4 * entry["width"], 0.3 * entry["height"]]
    np.testing.assert_allclose(boxes(read(root))[0][:2], center)
    assert ("EXIF" in line) == (orientation > 1)


# -- what is counted -------------------------------------------------------------------------------


def test_images_without_objects_are_kept_and_counted(root):
    make(root)
    make(root, text="", name="empty.jpg")
    make(root, text="\ufeff\r\n \n", name="blank.jpg")
    image(root / "images" / "none.jpg")
    labels(root / "labels" / "gone.txt", BOX)
    labels(root / "labels" / "classes.txt", "x\ny\n")
    line, names, entry = convert_yolo(str(root))
    assert len(read(root)["images"]) == 4 and len(boxes(read(root))) == 1
    assert "4 images, 1 object of 2 classes" in line
    assert "images without objects: 3" in line and "images without a label file: 1" in line
    assert "label files without an image: 1" in line
    assert names == "classes: x, y"
    (name, json_file, image_root) = json.loads(entry.partition(": DATASETS.COCO_FORMAT: ")[2])[0]
    assert name == "my_train" and os.path.isfile(json_file) and image_root == str(root)


def test_what_is_left_out_or_over_the_edge_is_counted(root):
    make(root, "0 .5 .5 0 .1\n1 .4 .4 .4 .4 .4 .4\n0 1 .5 .1 .1\n0 1e0 5e-1 .01 .01\n")
    (line, *_) = convert_yolo(str(root))
    assert "boxes of no size, left out: 2" in line
    assert "boxes over the edge of their image: 1" in line  # the other by half a pixel
    np.testing.assert_allclose(boxes(read(root)), [[95, 22.5, 10, 5], [99.5, 24.75, 1, 0.5]])


def test_polygons_and_repeated_lines_are_counted(root):
    polygon = "0 .1 .1 .5 .1 .5 .5\n"
    make(root, BOX + polygon + BOX + " " + BOX + polygon + "0" + BOX[1:])
    (line, *_) = convert_yolo(str(root))
    assert "polygons, taken as the box around them: 1" in line
    assert "repeated lines, left out: 3" in line
    assert len(boxes(read(root))) == 3  # two classes may have one box


def test_keypoints_are_left_out(root):
    yaml = "train: images\nkpt_shape: [2, 3]\nnames: [x, y]\n"
    make(root, "1 .5 .5 .2 .4 .5 .5 2 .5 .5 0\n", yaml=yaml)
    (line, *_) = convert_yolo(str(root))
    assert "objects whose keypoints were left out: 1" in line
    np.testing.assert_allclose(boxes(read(root)), [[40, 15, 20, 20]])


def test_an_unused_class_keeps_its_place(root):
    make(root, "2 .5 .5 .2 .4\n", yaml="train: images\nnames: {0: x, 2: z, 1: y}\n")
    convert_yolo(str(root))
    assert [c["name"] for c in read(root)["categories"]] == ["x", "y", "z"]
    assert read(root)["annotations"][0]["category_id"] == 3


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 .5 .5 .2", "has 4 values"),
        ("1 .5 .5 .2 .4 .9", "a file of detections?"),
        ("1 .1 .1 .5 .1 .5 .5 .1", "has 8 values"),
        ("1,.5,.5,.2,.4", "has 1 value"),
        ("x .5 .5 .2 .4", "must be numbers"),
        ("1 .5 .5 .2 b", "must be numbers"),
        ("2 .5 .5 .2 .4", "the class must be 0 to 1"),
        ("-1 .5 .5 .2 .4", "the class"),
        ("0.5 .5 .5 .2 .4", "the class"),
        ("nan .5 .5 .2 .4", "the class"),
        ("inf .5 .5 .2 .4", "the class"),
        ("1 nan .5 .2 .4", "must be fractions"),
        ("1 50 20 10 5", "must be fractions"),
        ("1 -.2 .5 .2 .4", "must be fractions"),
        ("1 .5 .5 -.005 .4", "must not be negative"),
        ("1 .1 .1 .5 1.2 .5 .5", "must be fractions"),
    ],
)
def test_a_line_that_cannot_be_meant(root, line, message):
    make(root, f"{BOX}\n{line}\n")
    text = error(root)
    assert f"{root / 'labels' / 'a.txt'}, line 3: {line!r}: " in text and message in text


def test_all_that_is_wrong_is_counted(root):
    make(root, "9 .5 .5 .1 .1\n1 2 3 4 5\n" + BOX)
    (root / "images" / "b.jpg").write_text("no image")
    text = error(root)
    assert "a.txt, line 1" in text and "(3 images and lines in all that cannot be used)" in text


def test_whole_numbers_may_be_written_as_numpy_does():
    number, values, _ = parse_yolo_line("1.000e+00 5e-1 .5 .2 .4", num_classes=2)
    assert number == 1 and isinstance(number, int) and values == [0.5, 0.5, 0.2, 0.4]


def test_no_label_file_at_all(root):
    image(root / "images" / "a.jpg")
    labels(root / "data.yaml", "train: images\nnames: [x]\n")
    assert "none of the 1 image has a label file" in error(root)


def test_two_images_of_one_label_file(root):
    make(root)
    image(root / "images" / "a.png")
    assert "share" in error(root)


@pytest.mark.parametrize(
    "yaml, message",
    [
        ("", "it is empty"),
        ("- x\n", "at the top it has a sequence"),
        ("names: [x\n", "not valid YAML"),
        ("train: images\n", "names must be a list"),
        ("train: images\nnames: x\n", "names must be a list"),
        ("train: images\nnames: []\n", "names no class"),
        ("train: images\nnames: [x, '']\n", "a class without name"),
        ("train: images\nnames: [x, x]\n", "the class x twice"),
        ("train: images\nnames: {0: x, 2: y}\n", "must be 0 to 1"),
        ("train: images\nnames: {0: x, 0: y}\n", "stands in line"),
        ("train: images\nnames: [[x], y]\n", "names must be a list"),
        ("train: images\nnc: 3\nnames: [x, y]\n", "nc is 3, but names has 2"),
        ("train: images\nkpt_shape: 17\nnames: [x, y]\n", "kpt_shape"),
        ("train: {a: b}\nnames: [x, y]\n", "train must be text or a list"),
        ("path: [a]\ntrain: images\nnames: [x, y]\n", "path must be text"),
        ("train: [[images]]\nnames: [x, y]\n", "train must be text or a list"),
        ("names: [x, y]\n", "has none of train, val, valid, test"),
        ("train: pictures\nnames: [x, y]\n", "no such folder or file as 'pictures'"),
        ("train: labels\nnames: [x, y]\n", "no images in labels"),
        ("train: list.txt\nnames: [x, y]\n", "the image images/none.jpg is not there"),
    ],
)
def test_yaml_that_cannot_be_meant(root, yaml, message):
    make(root, yaml=yaml)
    labels(root / "list.txt", "images/a.jpg\nimages/none.jpg\n")
    assert message in error(root)


# -- layouts ---------------------------------------------------------------------------------------


def layout(root, *pairs):
    for picture, text in pairs:
        image(root / picture)
        labels(root / text, BOX)


def names(root, split):
    return [i["file_name"] for i in read(root, split)["images"]]


@pytest.mark.parametrize("path", ["", "path: .\n", "path: ../my\n", "path: /elsewhere/my\n"])
def test_ultralytics(root, path):
    for split in ("train", "val"):
        layout(root, (f"images/{split}/1.jpg", f"labels/{split}/1.txt"))
    yaml = f"{path}train: images/train\nval: [images/val]\ntest: # none\nnames: [x, y]\n"
    labels(root / "data.yaml", yaml)
    convert_yolo(str(root))
    assert names(root, "train") == ["images/train/1.jpg"]
    assert names(root, "val") == ["images/val/1.jpg"]
    assert len(boxes(read(root, "val"))) == 1 and not (root / "coco/instances_test.json").exists()


def test_roboflow(root):
    layout(root, ("train/images/1.jpg", "train/labels/1.txt"))
    layout(root, ("valid/images/1.jpg", "valid/labels/1.txt"))
    yaml = "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['x', 'y']\n"
    labels(root / "data.yaml", yaml)
    convert_yolo(str(root))
    assert names(root, "val") == ["valid/images/1.jpg"] and len(boxes(read(root, "val"))) == 1


def test_valid_is_a_split(root):
    layout(root, *((f"images/{s}/1.jpg", f"labels/{s}/1.txt") for s in ("train", "valid")))
    labels(root / "data.yaml", "train: images/train\nvalid: images/valid\nnames: [x, y]\n")
    convert_yolo(str(root))
    assert names(root, "train") == ["images/train/1.jpg"]
    assert names(root, "valid") == ["images/valid/1.jpg"]
    (root / "images" / "valid" / "1.jpg").unlink()
    with pytest.raises(UserError, match="no images in images/valid .*--split"):
        convert_yolo(str(root))


def test_lists_of_images(root, tmp_path):
    layout(root, *((f"images/{i}.jpg", f"labels/{i}.txt") for i in range(3)))
    layout(tmp_path / "images", ("far.jpg", "../labels/far.txt"))
    far = tmp_path / "images" / "far.jpg"
    labels(root / "train.txt", f"./images/2.jpg\nimages/0.jpg\nimages/0.jpg\n\n{far}\n")
    labels(root / "my.yaml", "train: train.txt\nnames: [x, y]\n")
    (line, *_) = convert_yolo(str(root))
    assert sorted(names(root, "train")) == sorted(["images/0.jpg", "images/2.jpg", str(far)])
    assert len(boxes(read(root))) == 3
    assert "label files without" not in line  # 1.txt has an image, of another split


def test_no_yaml(root):
    for split in ("train", "val"):
        layout(root, (f"images/{split}/1.jpg", f"labels/{split}/1.txt"))
    labels(root / "classes.txt", "\ufeffx\ny\n\n")
    convert_yolo(str(root), splits=["val"])
    assert (
        names(root, "val") == ["images/val/1.jpg"]
        and not (root / "coco/instances_train.json").exists()
    )
    assert [c["name"] for c in read(root, "val")["categories"]] == ["x", "y"]


def test_labels_beside_the_images(tmp_path):
    root = tmp_path / "images" / "my"  # a folder of that name above does not mislead
    layout(root, ("1.jpg", "1.txt"))
    labels(root / "classes.txt", "x\ny\n")
    (line, *_) = convert_yolo(str(root))
    assert names(root, "all") == ["1.jpg"] and len(boxes(read(root, "all"))) == 1
    assert "without" not in line


def test_from_the_working_directory(root, monkeypatch):
    layout(root, ("images/1.jpg", "labels/1.txt"))
    labels(root / "classes.txt", "x\ny\n")
    monkeypatch.chdir(root)
    convert_yolo(".")
    assert names(root, "all") == ["images/1.jpg"] and len(boxes(read(root, "all"))) == 1


def test_what_to_convert_has_to_be_there(root):
    make(root)
    assert "has no split val" in error(root, splits=["val"])
    labels(root / "other.yaml", "names: [x]\n")
    convert_yolo(str(root))  # data.yaml is the usual one
    (root / "data.yaml").rename(root / "third.yaml")
    (root / "coco" / "instances_train.json").unlink()
    (root / "coco").rmdir()
    assert "choose one with --data" in error(root)
    assert "cannot be read" in error(root, classes=str(root / "none.txt"))
    assert "does not exist" in error(root, data=str(root / "none.yaml"))
    for name in ("third.yaml", "other.yaml"):
        (root / name).unlink()
    assert "has no data.yaml and no classes.txt" in error(root)
