import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from tests.modeling.detectors import (  # noqa: E402
    DETECTORS,
    build,
    config,
    localization_layers,
    set_score_threshold,
)

ROOT = Path(__file__).parents[2]
SIZES = ((96, 128), (64, 200), (150, 110))

try:
    from detectron2.export import TracingAdapter
except ImportError as e:
    TracingAdapter = None
    reason = f"this Detectron2 cannot export: detectron2.export: {e}"
else:
    reason = ""
# Half of the time: `make test` exports one detector, with and without the command.
slow = pytest.mark.slow
needs_export = pytest.mark.skipif(TracingAdapter is None, reason=reason)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("export_model", ROOT / "tools/export_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def busy_model(name):
    """Random weights that find dozens of objects, of scores that differ."""
    model = build(name).eval()
    torch.manual_seed(0)
    for layer in localization_layers(name, model):
        torch.nn.init.normal_(layer.weight, std=0.05)
    for module_name, module in model.named_modules():
        if module_name.endswith("cls_score"):
            torch.nn.init.normal_(module.weight, std=0.03)  # with more, many scores would be 1
    set_score_threshold(model, 0.02 if name == "fcos" else 0.1)
    return model


def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) * 255 for size in SIZES]


@needs_export
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x == "faster" else slow) for x in DETECTORS]
)
def test_the_exported_model_finds_what_the_original_finds(tool, name):
    model, examples = busy_model(name), images()
    exported = torch.jit.load(io.BytesIO(tool.trace(TracingAdapter, model, examples[0])))
    num_objects = 0
    with torch.no_grad(), torch.jit.optimized_execution(False):  # optimizing takes seconds
        for image in examples:
            expected, found = tool.detect(model, image), exported(image)
            assert list(expected)[:3] == ["pred_boxes", "scores", "pred_classes"]
            assert ("pred_masks" in expected) == (name == "mask")
            assert ("pred_keypoints" in expected) == (name == "keypoint")
            # Otherwise their order, and what NMS chooses, would be arbitrary.
            assert expected["scores"].unique().numel() == len(expected["scores"])
            for a, b in zip(found, expected.values(), strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-3)
            num_objects += len(expected["scores"])
    assert num_objects > 40


@slow
@needs_export
@pytest.mark.filterwarnings("ignore")
def test_any_number_of_proposals(tool):
    """Not only as many as the image had that was traced."""
    model, examples = busy_model("faster_class_specific"), images()
    model.proposal_generator.post_nms_topk[False] = 10000  # never reached
    exported = torch.jit.load(io.BytesIO(tool.trace(TracingAdapter, model, examples[0])))
    with torch.no_grad(), torch.jit.optimized_execution(False):
        for image in examples:
            expected, found = tool.detect(model, image), exported(image)
            assert len(expected["scores"]) > 5
            assert torch.allclose(found[0], expected["pred_boxes"], rtol=0, atol=1e-3)


@slow
@needs_export
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_finds_nothing_in_the_traced_image(tool):
    """The way through the code is that of the traced image; it must lead to objects as well."""
    model, (_, image, _) = busy_model("mask"), images()
    nothing = torch.zeros(3, 96, 128)
    with torch.no_grad():
        set_score_threshold(model, tool.detect(model, nothing)["scores"].max().item())
        assert len(tool.detect(model, nothing)["scores"]) == 0
    exported = torch.jit.load(io.BytesIO(tool.trace(TracingAdapter, model, nothing)))
    assert tool.compare(model, exported, [nothing]) == (0, 0.0)
    num_objects, largest = tool.compare(model, exported, [image])
    assert num_objects > 5 and largest <= 1e-3


# -- the command -----------------------------------------------------------------------------------


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
        assert not list(tmp_path.glob("*.ts*"))
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
    assert "boxes, scores, classes = model(image)" in out and "BGR" in out

    script = f"""
import sys, torch, torchvision
model = torch.jit.load({str(tmp_path / "model.ts")!r})
with torch.no_grad(), torch.jit.optimized_execution(False):
    boxes, scores, classes = model(torch.rand(3, 88, 120) * 255)
assert boxes.shape == (len(scores), 4) and len(classes) == len(scores) > 10
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
    content = tool.trace(TracingAdapter, other, images()[0])
    monkeypatch.setattr(tool, "trace", lambda *args: content)
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
