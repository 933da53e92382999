import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.data.datasets import hit_uav  # noqa: E402
from cbbl_d2.data.datasets.hit_uav import (  # noqa: E402
    HIT_UAV_CLASSES,
    HIT_UAV_SPLITS,
    convert_hit_uav,
    sequence_of,
)
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

WIDTH, HEIGHT = 64, 48
CATEGORIES = ("Person", "Car", "Bicycle", "OtherVehicle", "DontCare")
# Image -> (published split, boxes: class and x, y, width, height). Neighboring frames of a sequence
# are in different splits, as in the published one.
SAMPLE = {
    "0_100_30_0_00001.jpg": ("train", [("Person", [3, 5, 7, 10]), ("DontCare", [0, 0, 9, 9])]),
    "0_100_30_0_00002.jpg": ("test", [("Car", [10, 12, 20, 9])]),
    "1_80_90_0_00007.jpg": ("val", [("OtherVehicle", [1, 1, 31, 15]), ("Bicycle", [40, 30, 5, 5])]),
    "1_80_90_0_00008.jpg": ("test", [("Person", [30, 20, 0, 6])]),
    "0_60_30_0_00003.jpg": ("train", []),
    "0_120_50_0_00004.jpg": ("val", [("Bicycle", [2, 2, 11, 13])]),
    "0_120_50_0_00005.jpg": ("train", [("Car", [2, 2, 11, 13])]),
    "0_120_50_0_00006.jpg": ("test", [("Car", [4, 4, 10, 12]), ("Person", [20, 20, 3, 4])]),
}
# By `printf 0_100_30_0 | sha256sum`, modulo 100: 19, 33, 45 and 5. 0_120_50_0 would be of the test
# set, too, but the tests take sequences of over two frames for long ones.
SPLIT_OF = {
    "0_100_30_0": "test",
    "1_80_90_0": "val",
    "0_60_30_0": "train",
    "0_120_50_0": "train",
}


def pixels(number):
    """Plain squares of 16 px under a checkerboard of 1 px, which the mean of 2x2 px takes away."""
    rng = np.random.default_rng(number)
    squares = rng.integers(60, 200, size=(HEIGHT // 16, WIDTH // 16)).repeat(16, 0).repeat(16, 1)
    y, x = np.indices(squares.shape)
    return squares, (squares + 40 * (-1) ** (x + y)).astype(np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The sample with its images; sequences of over two frames are long."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(hit_uav, "_LONG_SEQUENCE", 2)
    root = tmp_path / "HIT-UAV"
    for split in HIT_UAV_SPLITS:
        (root / "normal_json" / split).mkdir(parents=True)
    for number, (name, (split, _)) in enumerate(SAMPLE.items()):
        path = root / "normal_json" / split / name
        Image.fromarray(pixels(number)[1]).save(path, quality=100)
    return root


@pytest.fixture
def content():
    """``content[split]``: a file as published; its ids go on from file to file, from 0."""
    contents, num_images, num_boxes = {}, 0, 0
    for split in HIT_UAV_SPLITS:
        images, annotations = [], []
        for name, (_, boxes) in sorted((n, s) for n, s in SAMPLE.items() if s[0] == split):
            images.append({"filename": name, "height": HEIGHT, "width": WIDTH, "id": num_images})
            for category, (x, y, w, h) in boxes:
                annotations.append(
                    {
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                        "area": w * h,
                        "image_id": num_images,
                        "bbox": [x, y, w, h],
                        "category_id": CATEGORIES.index(category),
                        "id": num_boxes,
                    }
                )
                num_boxes += 1
            num_images += 1
        contents[split] = {
            "info": {},
            "licenses": [],
            "images": images,
            "categories": [{"id": i, "name": name} for i, name in enumerate(CATEGORIES)],
            "annotation": annotations,
        }
    return contents


def write(root, content):
    folder = root / "normal_json" / "annotations"
    folder.mkdir(exist_ok=True)
    for split, of_split in content.items():
        (folder / f"{split}.json").write_text(json.dumps(of_split))


def convert(root, half=False):
    """The lines of the converter, and the content of the files by the part of their name."""
    lines = convert_hit_uav(str(root), half)
    files = {p.stem.removeprefix("instances_"): p for p in (root / "coco").glob("*.json")}
    return lines, {name: json.loads(path.read_text()) for name, path in files.items()}


def by_image(coco):
    """{file name: [(class, box), ...]}"""
    names = {c["id"]: c["name"] for c in coco["categories"]}
    boxes = {image["id"]: [] for image in coco["images"]}
    for a in coco["annotations"]:
        assert a["area"] == a["bbox"][2] * a["bbox"][3] and a["iscrowd"] == 0
        boxes[a["image_id"]].append((names[a["category_id"]], a["bbox"]))
    return {image["file_name"]: boxes[image["id"]] for image in coco["images"]}


def test_published_split_classes_and_what_is_left_out(root, content):
    write(root, content)
    lines, files = convert(root)
    joined = {"Car": "Vehicle", "OtherVehicle": "Vehicle"}
    for split in HIT_UAV_SPLITS:
        assert by_image(files[f"published_{split}"]) == {
            f"normal_json/{split}/{name}": [
                (joined.get(category, category), box)
                for category, box in boxes
                if category != "DontCare" and box[2] > 0
            ]
            for name, (of_image, boxes) in SAMPLE.items()
            if of_image == split
        }
    for coco in files.values():
        assert [c["name"] for c in coco["categories"]] == list(HIT_UAV_CLASSES)
        for key in ("images", "annotations", "categories"):  # pycocotools takes 0 for no match
            assert [entry["id"] for entry in coco[key]] == list(range(1, len(coco[key]) + 1))
    assert len(lines) == len(files) + 1 == 7
    assert lines[-1] == (
        "left out: 2 boxes of DontCare or of no size, on 2 images: 0_100_30_0_00001.jpg, "
        "1_80_90_0_00008.jpg"
    )
    for line in lines[:-1]:
        coco = json.loads(Path(line.partition(": ")[0]).read_text())
        numbers = [int(word) for word in line.partition(": ")[2].split() if word.isdigit()]
        assert numbers == [len(coco["images"]), len(coco["annotations"])]


def test_each_sequence_is_in_one_split(root, content):
    write(root, content)
    _, files = convert(root)
    found = {
        split: {by["file_name"]: by["sequence"] for by in files[split]["images"]}
        for split in HIT_UAV_SPLITS
    }
    assert {name: s for split in found.values() for name, s in split.items()} == {
        f"normal_json/{published}/{name}": "_".join(name.split("_")[:4])
        for name, (published, _) in SAMPLE.items()
    }
    for split, images in found.items():
        assert {SPLIT_OF[sequence] for sequence in images.values()} == {split}
    # Split by sequence or as published, the same objects.
    for prefix in ("", "published_"):
        assert sum(len(files[prefix + split]["annotations"]) for split in HIT_UAV_SPLITS) == 8


def test_only_long_sequences_leave_their_share(root, content, monkeypatch):
    monkeypatch.setattr(hit_uav, "_LONG_SEQUENCE", 3)
    write(root, content)
    _, files = convert(root)
    tested = {image["sequence"] for image in files["test"]["images"]}
    assert tested == {"0_100_30_0", "0_120_50_0"}


@pytest.mark.parametrize(
    "sequence, split",
    # by sha256sum modulo 100: 27, 28, 44 and 45
    [("0_110_40_0", "test"), ("1_120_50_1", "val"), ("1_130_30_1", "val"), ("0_60_30_0", "train")],
)
def test_limits_of_the_splits(sequence, split):
    name = f"{sequence}_00001.jpg"
    assert hit_uav._split_by_sequence([name]) == {name: split}


def test_over_a_hundred_frames_are_long():
    def splits(num_frames):
        names = [f"0_100_30_0_{i:05}.jpg" for i in range(num_frames)]
        return set(hit_uav._split_by_sequence(names).values())

    assert splits(100) == {"test"} and splits(101) == {"train"}


def test_half_size(root, content):
    write(root, content)
    _, files = convert(root, half=True)
    assert len(files) == 12
    for name in (*HIT_UAV_SPLITS, *(f"published_{split}" for split in HIT_UAV_SPLITS)):
        whole, half = by_image(files[name]), by_image(files[f"half_{name}"])
        assert half == {
            "coco/half/" + path.rpartition("/")[2]: [(c, [x / 2 for x in box]) for c, box in boxes]
            for path, boxes in whole.items()
        }
        sequences = [[i["sequence"] for i in files[x]["images"]] for x in (name, f"half_{name}")]
        assert sequences[0] == sequences[1]
    for number, name in enumerate(SAMPLE):
        with Image.open(root / "coco" / "half" / name) as image:
            assert image.mode == "L" and image.size == (WIDTH // 2, HEIGHT // 2)
            found = np.asarray(image).astype(int)
        assert abs(found - pixels(number)[0][::2, ::2]).max() <= 3


def test_sizes_of_the_entries_are_those_of_the_files(root, content):
    name = "0_60_30_0_00003.jpg"
    Image.new("L", (WIDTH - 1, HEIGHT - 1)).save(root / "normal_json" / "train" / name)
    (entry,) = [image for image in content["train"]["images"] if image["filename"] == name]
    entry.update(width=WIDTH - 1, height=HEIGHT - 1)
    write(root, content)
    for coco in convert(root, half=True)[1].values():
        for image in coco["images"]:
            with Image.open(root / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])


def test_running_again_writes_the_same_and_changes_nothing_published(root, content):
    write(root, content)
    published = {p: p.read_bytes() for p in (root / "normal_json").rglob("*.*")}
    convert(root, half=True)
    written = {p: p.read_bytes() for p in (root / "coco").rglob("*.*")}
    convert(root, half=True)
    assert {p: p.read_bytes() for p in (root / "coco").rglob("*.*")} == written
    assert {p: p.read_bytes() for p in (root / "normal_json").rglob("*.*")} == published


def test_registered_names(root, content, error_of):
    message = error_of(DatasetCatalog.get, "hit_uav_half_train")
    assert "tools/convert_dataset.py hituav --half" in message and str(root) in message
    write(root, content)
    convert(root)
    assert "hituav --half" in error_of(DatasetCatalog.get, "hit_uav_half_published_val")
    _, files = convert(root, half=True)
    for name, coco in files.items():
        dicts = DatasetCatalog.get(f"hit_uav_{name}")
        assert [d["file_name"] for d in dicts] == [
            str(root / image["file_name"]) for image in coco["images"]
        ]
        assert sum(len(d["annotations"]) for d in dicts) == len(coco["annotations"])
        metadata = MetadataCatalog.get(f"hit_uav_{name}")
        assert metadata.thing_classes == list(HIT_UAV_CLASSES)
        assert metadata.json_file == str(root / "coco" / f"instances_{name}.json")


def test_sequence_of():
    assert sequence_of("normal_json/train/0_100_30_0_03307.jpg") == "0_100_30_0"
    assert sequence_of("coco/half/1_130_90_1_04077.jpg") == "1_130_90_1"


def repeat_image(content):
    content["test"]["images"].append({**content["train"]["images"][0], "id": 99})


@pytest.mark.parametrize(
    "change, words",
    [
        (repeat_image, "test.json: image 0_100_30_0_00001.jpg is listed twice"),
        (
            lambda c: c["val"]["images"][0].update(filename="0_1_1_0_1.jpg"),
            "val.json: image 0_1_1_0_1.jpg is not at normal_json/val/0_1_1_0_1.jpg",
        ),
        (
            lambda c: c["test"]["categories"][1].update(name="Boat"),
            "test.json: has the class Boat, not those of HIT-UAV (Person, Car,",
        ),
        (
            lambda c: c["test"]["annotation"][-1].update(image_id=77),
            "test.json: annotation 9 has the image_id 77, which no image has",
        ),
        (
            lambda c: c["test"]["annotation"][-1].update(category_id=77),
            "annotation 9 has the category_id 77",
        ),
        (lambda c: c["val"].pop("annotation"), 'not a COCO file: it has no "annotations"'),
        (lambda c: c["val"].update(annotation=5), 'val.json: "annotations" must be a list'),
        (lambda c: c["val"].update(images={}), 'val.json: "images" must be a list'),
        (lambda c: c["train"]["images"][0].pop("width"), "train.json: image 0"),
        (lambda c: c.pop("test"), "test.json: no such annotation file"),
    ],
)
def test_what_is_wrong_is_named(root, content, error_of, change, words):
    change(content)
    write(root, content)
    message = error_of(convert_hit_uav, str(root), True)
    assert words in message and message.startswith(str(root))
    assert not (root / "coco").exists()


def test_a_damaged_image_is_named(root, content, error_of):
    write(root, content)
    path = root / "normal_json" / "test" / "0_120_50_0_00006.jpg"
    path.write_bytes(path.read_bytes()[:200])
    message = error_of(convert_hit_uav, str(root), True)
    assert message.startswith(f"{path}: cannot be converted to")
    coco = root / "coco"
    assert not (coco / "half" / path.name).exists() and not list(coco.glob("*half*.json"))
    assert not list(coco.rglob(".*"))  # nothing unfinished


def test_a_missing_image_is_named(root, content, error_of):
    write(root, content)
    (root / "normal_json" / "test" / "1_80_90_0_00008.jpg").unlink()
    message = error_of(convert_hit_uav, str(root))
    assert "1_80_90_0_00008.jpg is not at normal_json/test/" in message
    assert not (root / "coco").exists()
