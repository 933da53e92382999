import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("detectron2")


@pytest.fixture
def main(load_script):
    return load_script("tools/convert_dataset.py").main


@pytest.fixture
def visdrone(tmp_path):
    """One image of training and one of validation."""
    for split in ("train", "val"):
        folder = tmp_path / "VisDrone" / f"VisDrone2019-DET-{split}"
        for kind in ("images", "annotations"):
            (folder / kind).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(folder / "images" / "1.jpg")
        (folder / "annotations" / "1.txt").write_text("0,0,9,9,0,0,0,0\n20,20,8,8,1,4,0,0\n")
    return tmp_path / "VisDrone"


@pytest.fixture
def hit_uav(tmp_path):
    """One image of each published split, with one box."""
    root = tmp_path / "HIT-UAV"
    (root / "normal_json" / "annotations").mkdir(parents=True)
    for i, split in enumerate(("train", "val", "test")):
        name = f"0_60_30_0_0000{i}.jpg"
        (root / "normal_json" / split).mkdir()
        Image.new("L", (64, 48)).save(root / "normal_json" / split / name)
        content = {
            "images": [{"id": i, "filename": name, "width": 64, "height": 48}],
            "categories": [{"id": 1, "name": "Car"}],
            "annotation": [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 4, 10, 6]}],
        }
        path = root / "normal_json" / "annotations" / f"{split}.json"
        path.write_text(json.dumps(content))
    return root


@pytest.fixture
def yolo(tmp_path):
    """Two images and a box."""
    root = tmp_path / "my"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (64, 48)).save(root / "images" / f"{name}.jpg")
    (root / "labels" / "a.txt").write_text("0 .5 .5 .25 .25\n")
    (root / "classes.txt").write_text("ship\n")
    return root


@pytest.fixture
def voc(tmp_path):
    """An image and a box."""
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "voc" / "JPEGImages" / "a.jpg")
    (tmp_path / "voc" / "Annotations" / "a.xml").write_text(
        "<annotation><object><name>ship</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>"
        "<ymax>9</ymax></bndbox></object></annotation>"
    )
    return tmp_path / "voc"


def failure(main, capsys, *arguments):
    """The one line on stderr of a run that ends with the status 1."""
    with pytest.raises(SystemExit) as info:
        main(list(arguments))
    assert info.value.code == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0])  # after a progress bar at most
    return lines[0]


def test_converts_what_is_there_in_the_registered_place(main, visdrone, monkeypatch, capsys):
    from detectron2.data import DatasetCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(visdrone.parent))
    assert main(["visdrone"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert sorted(p.name for p in (visdrone / "coco").iterdir()) == [
        "instances_train.json",
        "instances_val.json",
    ]
    assert len(DatasetCatalog.get("visdrone_val")) == 1


def test_one_split_and_erasing(main, visdrone):
    assert main(["visdrone", "--root", str(visdrone), "--split", "train", "--erase-ignored"]) == 0
    coco = json.loads((visdrone / "coco" / "instances_train.json").read_text())
    assert coco["images"][0]["file_name"] == "VisDrone2019-DET-train/images_erased/1.jpg"
    assert not (visdrone / "coco" / "instances_val.json").exists()


def test_hit_uav_at_both_sizes(main, hit_uav, monkeypatch, capsys):
    from detectron2.data import DatasetCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(hit_uav.parent))
    assert main(["hituav"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7  # 2 x 3 files, what is left out
    assert len(list((hit_uav / "coco").iterdir())) == 6
    assert main(["hituav", "--half"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13
    (image,) = DatasetCatalog.get("hit_uav_half_published_val")
    assert image["annotations"][0]["bbox"] == [1, 2, 5, 3]
    assert Image.open(image["file_name"]).size == (image["width"], image["height"]) == (32, 24)


def test_hit_uav_needs_all_splits(main, hit_uav, capsys):
    (hit_uav / "normal_json" / "annotations" / "val.json").unlink()
    error = failure(main, capsys, "hituav", "--root", str(hit_uav))
    assert "val.json: no such annotation file" in error and not (hit_uav / "coco").exists()


def check(capsys):
    """Run ``tools/check_dataset.py`` on what the last line of a conversion says."""
    path = Path(__file__).parents[2] / "tools" / "check_dataset.py"
    entry = capsys.readouterr().out.rpartition("DATASETS.COCO_FORMAT: ")[2]
    (name, json_file, images) = json.loads(entry.splitlines()[0])[0]
    output = str(Path(images) / f"{name}.png")
    arguments = ["--json", json_file, "--images", images, "--output", output]
    runpy.run_path(str(path))["main"](arguments)
    return capsys.readouterr().out


def test_yolo_passes_the_check(main, yolo, capsys):
    assert main(["yolo", "--root", str(yolo)]) == 0
    assert "2 images (64x48), 1 box of 1 class" in check(capsys)


def test_voc_passes_the_check(main, voc, capsys):
    for coordinates, width in (("pixels", 9), ("corners", 8)):
        assert main(["voc", "--root", str(voc), "--coordinates", coordinates]) == 0
        coco = json.loads((voc / "coco" / "instances_all.json").read_text())
        assert coco["annotations"][0]["bbox"][2] == width
        assert "1 image (64x48), 1 box of 1 class" in check(capsys)


def test_errors_of_labels_are_one_line(main, yolo, voc, capsys, tmp_path):
    (yolo / "labels" / "b.txt").write_text("0 10 10 5 5\n")
    error = failure(main, capsys, "yolo", "--root", str(yolo))
    assert f"{yolo / 'labels' / 'b.txt'}, line 1: '0 10 10 5 5'" in error
    assert "has no split val" in failure(main, capsys, "voc", "--root", str(voc), "--split", "val")
    assert "no such folder" in failure(main, capsys, "voc", "--root", str(tmp_path / "none"))


def test_errors_are_one_line(main, visdrone, capsys, tmp_path):
    bad = visdrone / "VisDrone2019-DET-val" / "annotations" / "1.txt"
    bad.write_text("1,2,3\n")
    error = failure(main, capsys, "visdrone", "--root", str(visdrone), "--split", "val")
    assert f"{bad}, line 1: '1,2,3' has 3 values" in error
    assert "no such folder" in failure(main, capsys, "aitod", "--root", str(tmp_path / "none"))
    error = failure(main, capsys, "aitod", "--root", str(visdrone), "--version", "2")
    assert "nothing to convert" in error and "aitodv2_train.json" in error
    assert "nothing to convert" in failure(main, capsys, "tinyperson", "--root", str(visdrone))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["coco"],
        ["visdrone", "--split", "test"],
        ["visdrone", "--erase-ignored"],
        ["visdrone", "--split", "train", "val", "--erase-ignored"],
        ["aitod", "--annotations", "a.json"],
        ["tinyperson", "--images", "test", "--split", "train", "test"],
        ["hituav", "--split", "train"],  # its own split needs them all
        ["aitod", "--half"],
        ["yolo"],
        ["yolo", "--root", "my", "--data", "data.yaml", "--classes", "classes.txt"],
        ["voc", "--root", "my", "--coordinates", "zero"],
    ],
)
def test_wrong_words_are_refused(main, arguments, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
