import json

import numpy as np
import pytest
from PIL import ExifTags, Image

pytest.importorskip("detectron2")

from cbbl_d2.data.label_formats import convert_voc  # noqa: E402
from cbbl_d2.errors import UserError  # noqa: E402

SIZE = (100, 50)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "my"


def image(path, size=SIZE, orientation=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def box(*corners):
    names = ("xmin", "ymin", "xmax", "ymax")
    return f"<bndbox>{''.join(f'<{k}>{v}</{k}>' for k, v in zip(names, corners))}</bndbox>"


def thing(*corners, name="dog", more=""):
    return f"<object><name>{name}</name>{more}{box(*corners)}</object>"


def xml(path, *objects, database="Unknown", size=SIZE, file_name="a.jpg"):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size or ("", "")
    path.write_text(
        f"<annotation><filename>{file_name}</filename><source><database>{database}</database>"
        f"</source><size><width>{width}</width><height>{height}</height></size>"
        f"{''.join(objects)}</annotation>"
    )


def make(root, *objects, name="a", **kwargs):
    image(root / "JPEGImages" / f"{name}.jpg")
    xml(root / "Annotations" / f"{name}.xml", *objects, **kwargs)


def read(root, split="all"):
    return json.loads((root / "coco" / f"instances_{split}.json").read_text())


def boxes(content):
    return [a["bbox"] for a in content["annotations"]]


def error(root, **kwargs):
    """The one line of a conversion that writes nothing."""
    with pytest.raises(UserError) as info:
        convert_voc(str(root), **kwargs)
    assert not (root / "coco").exists() and "\n" not in str(info.value)
    return str(info.value)


# -- corners or pixels -----------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", ["pixels", "corners"])
def test_boxes_come_back(root, coordinates):
    """A box of whole pixels, written either way, is read back as it was."""
    rng = np.random.default_rng(0)
    start = np.vstack([rng.integers(0, [90, 40], size=(20, 2)), [[0, 0]]])
    end = np.vstack([rng.integers(start[:-1] + 1, [101, 51]), [SIZE]])
    first = start + 1 if coordinates == "pixels" else start
    make(root, *(thing(*a, *b) for a, b in zip(first, end)))
    convert_voc(str(root), coordinates=coordinates)
    assert boxes(read(root)) == np.hstack([start, end - start]).tolist()


@pytest.mark.parametrize(
    "database, least, is_pixels",
    [
        ("The VOC2007 Database", 1, True),
        ("The VOC2007 Database", 0, False),  # there is no pixel 0
        ("Unknown", 1, False),
        ("roboflow.com", 1, False),
    ],
)
def test_files_of_voc_hold_pixels(root, database, least, is_pixels):
    make(root, thing(5, 6, 20.5, 30), database=database)
    make(root, thing(least, 1, 9, 9), name="b", database=database)
    lines = convert_voc(str(root))
    assert boxes(read(root))[0] == ([4, 5, 16.5, 25] if is_pixels else [5, 6, 15.5, 24])
    assert f"pixels from 1, as in VOC, in {2 if is_pixels else 0} files" in lines[-1]
    assert (f"{root / 'Annotations' / 'b.xml'} calls itself VOC's" in lines[-1]) == (least == 0)


def test_one_pixel_is_a_size_and_none_is_not(root):
    make(root, thing(5, 5, 5, 5))
    convert_voc(str(root), coordinates="pixels")
    assert boxes(read(root)) == [[4, 4, 1, 1]]
    line, *_ = convert_voc(str(root), coordinates="corners")
    assert boxes(read(root)) == [] and "boxes of no size, left out: 1" in line


# -- what is read ----------------------------------------------------------------------------------


def test_difficult_objects_are_ignored_and_parts_are_none(root):
    parts = f"<part><name>head</name>{box(1, 1, 3, 3)}</part>"
    make(
        root,
        thing(10, 10, 20, 20, more="<difficult>1</difficult>"),
        thing(30, 10, 40, 20, name="person", more=f"<truncated>1</truncated>{parts}"),
    )
    line, names, *_ = convert_voc(str(root))
    assert boxes(read(root)) == [[10, 10, 10, 10], [30, 10, 10, 10]]
    assert [a["iscrowd"] for a in read(root)["annotations"]] == [1, 0]
    assert "1 object of 2 classes" in line and "ignored boxes: 1" in line
    assert names == "classes: dog, person"


def test_the_splits_have_the_same_classes(root):
    for name, kind in (("1", "dog"), ("2", "cat"), ("3", "ant")):
        make(root, thing(1, 1, 9, 9, name=kind), name=name)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2\n1\n\n")
    (lists / "val.txt").write_text("3\n")
    (lists / "dog_train.txt").write_text("1  1\n2 -1\n")
    convert_voc(str(root), splits=["train"])
    assert [c["name"] for c in read(root, "train")["categories"]] == ["ant", "cat", "dog"]
    assert [i["file_name"] for i in read(root, "train")["images"]] == [
        "JPEGImages/1.jpg",
        "JPEGImages/2.jpg",
    ]
    assert not (root / "coco" / "instances_val.json").exists()
    convert_voc(str(root))
    assert sorted(p.name for p in (root / "coco").iterdir()) == [
        "instances_train.json",
        "instances_val.json",
    ]
    classes = root / "names.txt"
    classes.write_text("dog\nunused\nant\ncat\n")
    convert_voc(str(root), classes=str(classes))
    assert [c["name"] for c in read(root, "val")["categories"]] == ["dog", "unused", "ant", "cat"]
    assert read(root, "val")["annotations"][0]["category_id"] == 3


def test_images_without_objects_are_kept_and_counted(root):
    make(root, thing(1, 1, 9, 9))
    make(root, name="empty")
    make(root, name="none", size=None)
    image(root / "JPEGImages" / "b.PNG")
    line, *_ = convert_voc(str(root))
    assert len(read(root)["images"]) == 4 and len(boxes(read(root))) == 1
    assert "images without objects: 3" in line and "images without a label file: 1" in line
    assert "XML files without the size of their image: 1" in line


def test_the_folders_of_roboflow_and_kaggle(root, tmp_path):
    for split in ("train", "valid"):
        image(root / split / "a.jpg")
        xml(root / split / "a.xml", thing(1, 1, 9, 9))
    convert_voc(str(root))
    assert [i["file_name"] for i in read(root, "valid")["images"]] == ["valid/a.jpg"]
    other = tmp_path / "other"
    for name in ("images/1/a.jpg", "images/2/a.jpg"):  # of one name in two folders
        image(other / name)
    xml(other / "annotations" / "1" / "a.xml", thing(1, 1, 9, 9))
    xml(other / "annotations" / "2" / "a.xml", thing(2, 2, 9, 9))
    convert_voc(str(other))
    assert boxes(read(other)) == [[1, 1, 8, 8], [2, 2, 7, 7]]
    image(other / "images" / "3" / "b.jpg")
    xml(other / "annotations" / "b.xml", thing(3, 3, 9, 9))
    (other / "train").mkdir()  # is none of the splits: there are annotations
    convert_voc(str(other))
    assert boxes(read(other)) == [[1, 1, 8, 8], [2, 2, 7, 7], [3, 3, 6, 6]]
    convert_voc(str(other), images="images/2", annotations="annotations/2")
    assert boxes(read(other)) == [[2, 2, 7, 7]]


def test_every_list_is_a_split_but_those_of_classes(root):
    for name in "12345":
        make(root, thing(1, 1, 9, 9), name=name)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for number, name in enumerate(("train", "valid", "minival", "small_train"), start=1):
        (lists / f"{name}.txt").write_text(f"{number}\n")
    (lists / "dog_minival.txt").write_text("1  1\n2 -1\n3  0\n")
    (lists / "dog_val.txt").write_text("")
    text = "\n".join(convert_voc(str(root)))
    assert {p.name for p in (root / "coco").iterdir()} == {
        f"instances_{name}.json" for name in ("train", "valid", "minival", "small_train")
    }
    assert f"passed over: {lists / 'dog_minival.txt'}, {lists / 'dog_val.txt'}\n" in text
    (root / "coco" / "instances_valid.json").unlink()
    convert_voc(str(root), splits=["valid"])
    assert [i["file_name"] for i in read(root, "valid")["images"]] == ["JPEGImages/2.jpg"]


@pytest.mark.parametrize("is_flat", [False, True])
def test_folders_of_splits_within_images(root, is_flat):
    for split, start in (("train", 1), ("val", 2)):
        image(root / "images" / split / f"{split}.jpg")
        folder = root / "annotations" / ("" if is_flat else split)
        xml(folder / f"{split}.xml", thing(start, 1, 9, 9))
    image(root / "images" / "test" / "c.jpg")
    image(root / "images" / "more" / "d.jpg")
    assert "--split" in error(root)  # the labels of test are not there
    lines = convert_voc(str(root), splits=["train", "val"])
    assert boxes(read(root, "train")) == [[1, 1, 8, 8]]
    assert boxes(read(root, "val")) == [[2, 1, 7, 8]]
    assert [i["file_name"] for i in read(root, "val")["images"]] == ["images/val/val.jpg"]
    assert f"passed over: {root / 'images' / 'more' / 'd.jpg'}" in lines


def test_an_unlabeled_split_does_not_stop_the_others(root):
    for split in ("train", "test"):
        image(root / split / "a.jpg")
    xml(root / "train" / "a.xml", thing(1, 1, 9, 9))
    text = error(root)
    assert f"{root / 'test'}: no XML files" in text and "--split" in text
    convert_voc(str(root), splits=["train"])
    assert boxes(read(root, "train")) == [[1, 1, 8, 8]]


def test_a_stale_file_name_does_not_count_and_a_true_one_helps(root):
    make(root, thing(1, 1, 9, 9), file_name="c.jpg")
    make(root, thing(2, 2, 9, 9), name="b", file_name="b.png")
    image(root / "JPEGImages" / "b.png")  # beside b.jpg
    convert_voc(str(root))
    names = {i["id"]: i["file_name"] for i in read(root)["images"]}
    found = {names[a["image_id"]]: a["bbox"][0] for a in read(root)["annotations"]}
    assert found == {"JPEGImages/a.jpg": 1, "JPEGImages/b.png": 2}


def test_a_turned_image_is_annotated_as_it_is_seen(root):
    make(root, thing(1, 1, 9, 9), size=SIZE[::-1])
    image(root / "JPEGImages" / "a.jpg", orientation=6)
    line, *_ = convert_voc(str(root))
    (entry,) = read(root)["images"]
    assert (entry["width"], entry["height"]) == SIZE[::-1] and "EXIF" in line


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        ("<annotation><object>", "not valid XML"),
        ("", "not valid XML"),
        ("<a/>", "not an <annotation>"),
        (thing(1, 1, 9, 9, name=" "), "object 1 (without name)"),
        ("<object><name>dog</name></object>", "object 1 (dog): its <bndbox> must have"),
        ("<object><name>dog</name><robndbox/></object>", "oriented boxes are not converted"),
        (thing(1, 1, 9), "its <bndbox> must have"),
        (thing(1, 1, 9, "x"), "must be four numbers"),
        (thing(1, 1, 9, ""), "must be four numbers"),
        (thing(1, 1, 9, "nan"), "must be four numbers"),
        (thing(1, 1, 9, "inf"), "must be four numbers"),
        (thing(9, 1, 1, 9), "ends before it begins"),
        (thing(1, 1, 9, 9) + thing(100, 1, 110, 9), "object 2 (dog): lies outside its image"),
        (thing(-9, 1, 0, 9), "lies outside its image"),
        ("<size><width>9.5</width><height>50</height></size>", "must be whole numbers"),
        ("<size><width>50</width><height>100</height></size>", "says 50x100, but"),
    ],
)
def test_a_file_that_cannot_be_meant(root, content, message):
    make(root, thing(1, 1, 9, 9), name="good")
    make(root)
    path = root / "Annotations" / "a.xml"
    path.write_text(
        content if "<a" in content or not content else f"<annotation>{content}</annotation>"
    )
    text = error(root)
    assert str(path) in text and message in text


def test_a_size_from_before_turning_names_the_cause(root):
    make(root, thing(1, 1, 9, 9))
    image(root / "JPEGImages" / "a.jpg", orientation=6)
    assert "says 100x50" in error(root) and "EXIF" in error(root)


def test_entities_that_would_fill_the_memory(root):
    make(root)
    lines = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(12))
    path = root / "Annotations" / "a.xml"
    path.write_text(f'<!DOCTYPE x [<!ENTITY e0 "x">{lines}]><annotation>&e12;</annotation>')
    assert "not valid XML" in error(root)


def test_images_and_files_that_are_missing(root):
    make(root, thing(1, 1, 9, 9))
    xml(root / "Annotations" / "gone.xml", thing(1, 1, 9, 9), file_name="gone.jpg")
    assert "the image gone is not in" in error(root)
    (root / "Annotations" / "gone.xml").unlink()
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\nc\n")
    text = error(root)
    assert "train.txt: the image b is not in" in text and "(2 files in all" in text
    (lists / "train.txt").write_text("\n")
    assert "train.txt: no images" in error(root) and "--split" in error(root)
    image(root / "JPEGImages" / "b.jpg")
    (lists / "train.txt").write_text("b\n")
    assert "train: none of the 1 image has a label file, the first should be" in error(root)
    assert "has no split test; --split can be train" in error(root, splits=["test"])
    assert "none: no such folder" in error(root, images="none")
    (root / "JPEGImages" / "a.jpg").write_text("no image")
    (lists / "train.txt").write_text("a\n")
    assert "it is not an image" in error(root)


def test_nothing_there(root):
    root.mkdir()
    assert "no XML files" in error(root)
    make(root)
    assert "no object in any of 1 XML file" in error(root)
    classes = root / "names.txt"
    classes.write_text("cat\n")
    make(root, thing(1, 1, 9, 9))
    assert "object 1 (dog): not one of the classes" in error(root, classes=str(classes))
