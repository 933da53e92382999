import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.engine.cli import load_config  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/SmallShapes/cbbl.yaml")
WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/check_dataset.py")


@pytest.fixture
def mine(tmp_path):
    """A sound data set of two classes in ``mine.json`` and ``images``."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(4)
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 5, "name": "ship"}],
        "annotations": [
            {"id": i + 1, "image_id": i % 4, "category_id": 1 + i % 2 * 4, "bbox": [i, 3, 9, 4]}
            for i in range(24)
        ],
    }
    write(tmp_path, content)
    return content


def write(folder, content):
    (folder / "mine.json").write_text(json.dumps(content))


@pytest.fixture
def run(tool, tmp_path, capsys):
    """``run(arguments)``: what the tool prints; it runs in ``tmp_path``."""

    def run(*args):
        tool.main([str(arg) for arg in args])
        return capsys.readouterr().out

    return run


FILES = ("--json", "mine.json", "--images", "images")


def test_sound_files(run, mine, tmp_path):
    out = run(*FILES)
    assert "mine.json, images in images" in out
    assert "4 images (64x48), 24 boxes of 2 classes; boxes in an image: 6 to 6" in out
    assert "at the model's input, 1067x800" in out  # the default config's
    assert "Nothing wrong was found." in out and "warning" not in out
    picture = Image.open(tmp_path / "output" / "dataset_report" / "mine.png")
    assert picture.width > 600


def test_suggestions_can_be_pasted(run, mine, tmp_path):
    out = run(*FILES, "--config-file", CONFIG, "--output", "sizes.png")
    start = out.index("\nMODEL:")
    yaml = out[start : out.index("\nsizes.png shows")]
    (tmp_path / "pasted.yaml").write_text(f'_BASE_: "{CONFIG}"\n{yaml}')
    cfg = load_config(str(tmp_path / "pasted.yaml"))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    # 6 px of 48: at 128, 16 px; 160 is enough.
    assert cfg.INPUT.MIN_SIZE_TEST == 160
    assert (tmp_path / "sizes.png").stat().st_size > 5000
    assert not (tmp_path / "output").exists()


def test_data_set_of_a_config_and_overrides(run, mine, tmp_path):
    config = tmp_path / "mine.yaml"
    entry = '[["checked_by_a_test", "mine.json", "images"]]'
    config.write_text(f'_BASE_: "{CONFIG}"\nDATASETS:\n  COCO_FORMAT: {entry}\n')
    out = run(
        "--config-file", config, "--dataset", "checked_by_a_test", "--skip-images", "--opts",
        "INPUT.MIN_SIZE_TEST", "96", "OUTPUT_DIR", "elsewhere",
    )  # fmt: skip
    assert "checked_by_a_test: mine.json, images in images" in out
    assert "at the model's input, 128x96" in out
    assert "The images were not read" in out
    assert (tmp_path / "elsewhere/dataset_report/checked_by_a_test.png").is_file()


def test_data_set_of_this_project(run):
    out = run("--dataset", "small_shapes_mini_train", "--config-file", CONFIG)
    assert "24 images (160x160)" in out and "of 5 classes" in out


def test_warnings_are_no_error(run, mine, tmp_path):
    mine["annotations"] += [
        {"id": 90, "image_id": 0, "category_id": 1, "bbox": [5, 5, -1, 4]},
        {**mine["annotations"][0], "id": 91},
    ]
    write(tmp_path, mine)
    (tmp_path / "images/1.png").write_bytes((tmp_path / "images/2.png").read_bytes()[:300])
    (tmp_path / "images/3.png").unlink()
    out = run(*FILES)
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4
    for words in ("annotation id 90", "annotation ids 91", "images/1.png: ", "images/3.png"):
        assert any(words in line for line in warnings)


def test_input_size_can_be_kept(run, mine):
    small = ("--config-file", CONFIG, "--opts", "INPUT.MIN_SIZE_TEST", "48")
    assert "MIN_SIZE_TEST: 48\n" in run(*FILES, "--keep-input-size", *small)
    assert "MIN_SIZE_TEST: 96\n" in run(*FILES, *small)  # twice the pixels of the file, no more


@pytest.mark.parametrize(
    "args, words",
    [
        (["--json", "mine.json"], "--json and --images belong together"),
        (["--dataset", "small_shapes_val", "--images", "x"], "--json and --images belong together"),
        (["--json", "none.json", "--images", "images"], "none.json: no such annotation file"),
        (["--json", "mine.json", "--images", "nowhere"], "--images nowhere: no such folder"),
        (["--json", "images/0.png", "--images", "images"], "images/0.png: not a text file"),
        (["--dataset", "small_shape_val"], "--dataset: unknown data set small_shape_val"),
        ([*FILES, "--config-file", "none.yaml"], "none.yaml: no such config file"),
        ([*FILES, "--opts", "INPUT.MIN_SIZE_TEST", "-5"], "INPUT.MIN_SIZE_TEST = -5"),
        ([*FILES, "--output", "images"], "images: cannot be written"),
        ([*FILES, "--output", "mine.json/x.png"], "mine.json/x.png: cannot be written"),
    ],
)
def test_what_cannot_be_read_ends_in_one_line(error, mine, args, words):
    assert words in error(*args)


def test_no_argument(tool, capsys):
    with pytest.raises(SystemExit) as e:
        tool.main([])
    assert e.value.code == 2
    assert "--json --dataset is required" in capsys.readouterr().err
