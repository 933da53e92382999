import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from cbbl_d2.engine import load_config
from detectron2.modeling import build_model

TINY = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.RPN.CONV_DIMS", "[8]"]
TINY += ["MODEL.ROI_BOX_HEAD.FC_DIM", "8", "INPUT.MIN_SIZE_TEST", "64"]


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/analyze_gradients.py")


@pytest.fixture
def config(repository):
    return lambda name: os.path.join(repository, "configs", "SmallShapes", f"{name}.yaml")


@pytest.fixture
def weights(config, tmp_path):
    """``weights(config name, seed)``: file of an untrained model."""

    def write(name, seed=0):
        torch.manual_seed(seed)
        path = str(tmp_path / f"{name}_{seed}.pth")
        torch.save({"model": build_model(load_config(config(name), TINY)).state_dict()}, path)
        return path

    return write


@pytest.fixture
def error(tool, capsys):
    """``error(arguments)``: the one line that the tool ends with, once it has failed."""

    def error(*args):
        with pytest.raises(SystemExit) as e:
            tool.main([*args, "--opts", *TINY])
        assert e.value.code == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    return error


def test_curves(tool, tmp_path, capsys):
    tool.main(["curves", "--output", "folder/curves.png"])
    assert capsys.readouterr().out == "Written to folder/curves.png\n"
    first = cv2.imread("folder/curves.png")
    tool.main(["curves", "--output", "folder/other.png", "--opts", "MODEL.CBBL.ALPHA", "2.0"])
    assert (cv2.imread("folder/other.png") != first).any()


def test_maps(tool, config, weights):
    command = ["maps", "--dataset", "small_shapes_mini_val", "--num-images", "2"]
    command += ["--config-file", config("cbbl"), "--weights", weights("cbbl"), weights("cbbl", 1)]
    tool.main([*command, "--output", "a.png", "--opts", *TINY])
    first = cv2.imread("a.png")
    tool.main([*command, "--output", "b.png", "--opts", *TINY])
    assert np.array_equal(first, cv2.imread("b.png"))
    more = ["--config-file", config("smooth_l1"), "--weights", weights("smooth_l1")]
    tool.main([*command, *more, "--output", "c.png", "--opts", *TINY])
    assert cv2.imread("c.png").shape[1] > 1.2 * first.shape[1]


def test_errors(error, config, weights, tmp_path):
    maps = ["maps", "--dataset", "small_shapes_mini_val", "--config-file", config("cbbl")]
    assert "nothing.pth" in error(*maps, "--weights", "nothing.pth")
    twice = [*maps, "--config-file", config("smooth_l1"), "--weights", "x"]
    assert "2 --config-file and 1 --weights" in error(*twice)
    assert "unknown data set" in error(
        *("maps", "--config-file", config("cbbl"), "--weights", "x", "--dataset", "shapes")
    )
    assert "bbox_pred" in error(*maps, "--weights", weights("smooth_l1"))
    (tmp_path / "folder").mkdir()
    line = error("curves", "--output", "folder")
    assert "folder: cannot be written (Is a directory): give --output a file name" in line
    shutil.copy(config("cbbl"), tmp_path / "cbbl.txt")
    line = error("curves", "--output", "cbbl.txt/curves.png")
    assert "cbbl.txt/curves.png: cannot be written (File exists)" in line
    assert sorted(os.listdir(tmp_path)) == ["cbbl.txt", "folder", "smooth_l1_0.pth"]


@pytest.mark.parametrize("words", (["--std", "-1"], ["--std", "x"], ["--largest-error", "inf"]))
def test_impossible_options(tool, capsys, words):
    with pytest.raises(SystemExit) as e:
        tool.main(["curves", *words])
    assert e.value.code == 2 and "must be a number" in capsys.readouterr().err
