import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.export import to_torchscript  # noqa: E402

from tests.export.models import TracingAdapter, busy_model, images, needs_export  # noqa: E402
from tests.modeling.detectors import config  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/export_model.py")


@pytest.fixture
def run(tool, tmp_path):
    """``run(arguments)``: the tool with a small Faster R-CNN, to ``tmp_path/model.ts``."""
    config_file, weights = tmp_path / "config.yaml", tmp_path / "model.pth"
    cfg = config("faster")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.1
    config_file.write_text(cfg.dump())
    torch.save({"model": busy_model("faster").state_dict()}, weights)

    def run(*args):
        command = ["--config-file", config_file, "--weights", weights]
        tool.main([str(x) for x in (*command, "--output", tmp_path / "model.ts", *args)])

    return run


@pytest.fixture
def error(run, capsys, tmp_path):
    """``error(arguments)``: the one line that the tool ends with, once it has failed."""

    def error(*args):
        with pytest.raises(SystemExit) as e:
            run(*args)
        assert e.value.code == 1
        assert not list(tmp_path.glob("*.ts*")) and not list(tmp_path.glob("*.onnx*"))
        lines = capsys.readouterr().err.strip().splitlines()
        assert sum(x.startswith("error: ") for x in lines) == 1
        return lines[-1]

    return error


@needs_export
def test_the_file_runs_without_detectron2(run, tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / "photo.png"), picture)
    run("--image", tmp_path / "photo.png")
    out = capsys.readouterr().out
    assert "images of 96x128, 72x160, 120x96 px: the same " in out
    assert "boxes, scores, classes, deviations = model(image)" in out and "BGR" in out

    script = f"""
import sys, torch, torchvision
model = torch.jit.load({str(tmp_path / "model.ts")!r})
with torch.no_grad(), torch.jit.optimized_execution(False):
    boxes, scores, classes, deviations = model(torch.rand(3, 88, 120) * 255)
assert boxes.shape == deviations.shape == (len(scores), 4) and len(classes) == len(scores) > 10
assert not any(x.startswith(("detectron2", "cbbl_d2")) for x in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=tmp_path)


@needs_export
def test_sizes_and_noise(run, capsys):
    run("--size", "64", "100", "--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    out = capsys.readouterr().out
    assert "anything in images of 64x100, 48x125, 80x75 px" in out and "--image" in out
    with pytest.raises(SystemExit) as e:
        run("--size", "64", "0")
    assert e.value.code == 2


@needs_export
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_differs_from_the_model_is_not_written(tool, error, monkeypatch):
    other = busy_model("faster")
    torch.nn.init.normal_(other.roi_heads.box_predictor.bbox_pred.bias, std=1.0)
    content = to_torchscript(other, images()[0])
    monkeypatch.setattr(tool, "to_torchscript", lambda *args: content)
    assert "nothing written: on an image of 96x128 px" in error()


@needs_export
def test_what_cannot_be_exported_says_so(tool, error, monkeypatch):
    opts = ["--opts", "MODEL.META_ARCHITECTURE"]
    assert "ProposalNetwork: only models that find objects" in error(*opts, "ProposalNetwork")

    def fail(*args, **kwargs):
        raise RuntimeError("Tracing failed\nno such operator\n/a/b.py(273): f\n<runpy>(8): _run")

    monkeypatch.setattr(torch.jit, "trace", fail)
    assert error().endswith("GeneralizedRCNN cannot be traced: no such operator")


@needs_export
def test_wrong_arguments(error, tmp_path):
    assert "no weights" in error("--weights", "")
    assert "nowhere" in error("--weights", tmp_path / "nowhere.pth")
    assert "--output must be a file" in error("--output", tmp_path / "nowhere" / "model.ts")
    assert "--output must be a file" in error("--output", tmp_path)
    (tmp_path / "broken.jpg").write_text("no image")
    assert "broken.jpg" in error("--image", tmp_path / "broken.jpg")


def test_a_detectron2_that_cannot_export(error, monkeypatch):
    if TracingAdapter is not None:
        monkeypatch.setitem(sys.modules, "detectron2.export", None)
    line = error()
    assert "this Detectron2 cannot export" in line and "main branch" in line


# -- ONNX ------------------------------------------------------------------------------------------


@needs_export
def test_the_onnx_file_runs_without_torch(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / "photo.png"), picture)
    names = ["one", "two", "three", "four", "five"]
    output = ["--output", tmp_path / "model.onnx"]
    run(*output, "--image", tmp_path / "photo.png", "--class-names", *names)
    out = capsys.readouterr().out
    assert "Class names: --class-names" in out
    assert "images of 96x128, 72x160, 120x96 px: the same " in out and "scores within" in out
    assert f"python -m cbbl_onnx {tmp_path / 'model.onnx'} photo.jpg" in out
    assert "boxes, scores, classes, deviations, names" in out

    (tmp_path / "cbbl_onnx.py").write_bytes((ROOT / "cbbl_onnx.py").read_bytes())
    script = f"""
import sys
others = ("torch", "torchvision", "cv2", "onnx", "detectron2", "cbbl_d2")
sys.modules.update(dict.fromkeys(others))
import cbbl_onnx
assert cbbl_onnx.__file__ == {str(tmp_path / "cbbl_onnx.py")!r}
cbbl_onnx.main(["model.onnx", "photo.png", "--json", "--score-threshold", "0.1"])
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(printed.stdout)
    assert found["image"] == "photo.png" and len(found["detections"]) > 10
    assert {x["name"] for x in found["detections"]} <= set(names)

    output = ["--output", tmp_path / "model.bin", "--format", "onnx"]
    run(*output, "--size", "64", "64", "--class-names", *names)
    assert (tmp_path / "model.bin").stat().st_size > 10**5


@needs_export
def test_class_names_for_a_format_that_has_none(error):
    assert "--class-names" in error("--class-names", "a", "b")


@needs_export
def test_wrong_arguments_for_onnx(error, tmp_path):
    output = ["--output", tmp_path / "model.onnx"]
    assert "2 names (a, b), but the model has 5" in error(*output, "--class-names", "a", "b")
    opts = ["--opts", "INPUT.FORMAT", "L"]
    assert "INPUT.FORMAT = 'L': must be RGB or BGR" in error(*output, *opts)
    opts = ["--opts", "MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    assert "ProposalNetwork: only models that find objects" in error(*output, *opts)
