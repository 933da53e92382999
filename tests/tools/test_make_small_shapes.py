import json

import pytest

pytest.importorskip("detectron2")


@pytest.fixture
def main(load_script):
    return load_script("tools/make_small_shapes.py").main


def test_makes_a_coco_folder_of_the_wanted_size(main, tmp_path, capsys):
    folder = tmp_path / "new" / "shapes"
    sizes = ["--num-train", "2", "--num-val", "1", "--num-test", "1", "--image-size", "96"]
    main(["--output", str(folder), *sizes])
    assert str(folder) in capsys.readouterr().out
    coco = json.loads((folder / "annotations" / "instances_train.json").read_text())
    assert [(i["file_name"], i["width"]) for i in coco["images"]] == [
        ("000000.png", 96),
        ("000001.png", 96),
    ]
    assert sorted(p.name for p in (folder / "train").iterdir()) == ["000000.png", "000001.png"]


def test_an_existing_folder_is_left_alone(main, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["--output", str(tmp_path)])
    assert "exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_one_line(main, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["--output", str(tmp_path / "x"), "--image-size", "20"])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "image_size 20" in error and error.count("\n") == 1
