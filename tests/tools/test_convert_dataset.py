import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("detectron2")


@pytest.fixture
def main():
    path = Path(__file__).parents[2] / "tools" / "convert_dataset.py"
    spec = importlib.util.spec_from_file_location("convert_dataset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


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
    ],
)
def test_wrong_words_are_refused(main, arguments, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
