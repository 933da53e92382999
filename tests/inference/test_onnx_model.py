"""tools/predict.py with an ONNX file does what it does with the checkpoint."""

import csv
import json
import re
import sys

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("onnxruntime")

from cbbl_d2.data.coco_format import register_coco_format  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from tests.export.models import busy_model, needs_export  # noqa: E402
from tests.modeling.detectors import config  # noqa: E402

NAME = "cbbl_test_onnx_model"
NAMES = ["one", "two", "three", "four", "five"]

pytestmark = needs_export


@pytest.fixture(scope="module", params=["faster", pytest.param("mask", marks=pytest.mark.slow)])
def training(request, tmp_path_factory, load_script):
    """A folder with model.pth and what is beside it, and its model.onnx."""
    folder = tmp_path_factory.mktemp("training")
    cfg = config(request.param)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.1
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "classes.txt").write_text("\n".join(NAMES))
    torch.save({"model": busy_model(request.param).state_dict()}, folder / "model.pth")
    command = ["--config-file", folder / "config.yaml", "--weights", folder / "model.pth"]
    command += ["--output", folder / "model.onnx"]
    load_script("tools/export_model.py").main([str(x) for x in command])
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A wide one, a tall one and a square one."""
    folder = tmp_path_factory.mktemp("photos")
    for name, size in (("a.png", (70, 100)), ("b.png", (120, 90)), ("c.jpg", (80, 80))):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / name), image)
    return folder


@pytest.fixture
def predict(training, tmp_path, load_script):
    """``predict(file, arguments)``: the folder that tools/predict.py has written with it."""
    tool = load_script("tools/predict.py")

    def predict(file, *args):
        folder = tmp_path / file
        command = ["--weights", training / file, "--output", folder, *args]
        tool.main([str(x) for x in command])
        return folder

    return predict


def read_csv(folder):
    with open(folder / "predictions.csv", newline="") as f:
        return list(csv.DictReader(f))


def assert_same(ours, theirs):
    """The same rows, but for rounding; where scores are nearly equal, in another order."""
    assert list(ours[0]) == list(theirs[0])
    assert len(ours) == len(theirs) > 20
    numbers = [x for x in ours[0] if x not in ("file_name", "class")]
    a, b = (np.array([[float(row[x]) for x in numbers] for row in rows]) for rows in (ours, theirs))
    close = np.isclose(a[:, None], b[None], rtol=1e-3, atol=0.011).all(axis=2)
    assert close.any(axis=0).all() and close.any(axis=1).all()
    for key in ("file_name", "class"):
        assert sorted(row[key] for row in ours) == sorted(row[key] for row in theirs)


def test_the_same_predictions(predict, photos, training, capsys):
    args = ["--input", photos, "--score-threshold", "0.1"]
    folders = [predict(x, *args) for x in ("model.onnx", "model.pth")]
    ours, theirs = map(read_csv, folders)
    assert {"pred_boxes_std_0", "x_min"} <= set(ours[0])
    assert_same(ours, theirs)
    names = [sorted(str(x.relative_to(f)) for x in f.rglob("*")) for f in folders]
    assert names[0] == names[1]
    results = [json.loads((f / "predictions.json").read_text()) for f in folders]
    has_masks = "MASK_ON: true" in (training / "config.yaml").read_text()
    assert all(("segmentation" in x) == has_masks for x in results[0])
    if has_masks:
        sizes = [[x["segmentation"]["size"] for x in r] for r in results]
        assert sizes[0] == sizes[1]
    assert f"Class names: {training / 'model.onnx'}" in capsys.readouterr().out


def test_the_same_predictions_on_slices(predict, photos):
    pytest.importorskip("sahi")
    args = ["--input", photos, "--score-threshold", "0.1", "--slice", "64", "--formats", "csv"]
    assert_same(*(read_csv(predict(x, *args)) for x in ("model.onnx", "model.pth")))


def test_a_data_set(predict, photos, tmp_path):
    categories = [{"id": 2 * i + 2, "name": name} for i, name in enumerate(NAMES)]
    image = {"id": 5, "file_name": "a.png", "height": 70, "width": 100}
    box = {"id": 1, "image_id": 5, "category_id": 4, "bbox": [5, 5, 30, 20], "area": 600}
    content = {"images": [image], "annotations": [box], "categories": categories}
    (tmp_path / "set.json").write_text(json.dumps(content))
    register_coco_format(NAME, str(tmp_path / "set.json"), str(photos))
    try:
        folder = predict("model.onnx", "--dataset", NAME)
        other = predict("model.pth", "--dataset", NAME)
    finally:
        DatasetCatalog.pop(NAME)
        MetadataCatalog.pop(NAME)
    metrics = [json.loads((x / "metrics.json").read_text())["bbox"] for x in (folder, other)]
    assert metrics[0]["AP"] == pytest.approx(metrics[1]["AP"], nan_ok=True)  # masks: none to find
    found = json.loads((folder / "predictions.json").read_text())
    assert {x["image_id"] for x in found} == {5} and all(x["category_id"] % 2 == 0 for x in found)
    assert len(found) > 5


def test_a_higher_threshold_than_that_of_the_file(predict, photos):
    args = ["--input", photos, "--formats", "csv", "--score-threshold"]
    low, high = (read_csv(predict("model.onnx", *args, x)) for x in ("0.1", "0.2"))
    assert 5 < len(high) < len(low)
    assert [x for x in low if float(x["score"]) >= 0.2] == high


@pytest.mark.parametrize(
    "args, message",
    [
        (["--config-file", "x.yaml"], "--config-file: .*model.onnx has its config in it"),
        (["--confidence-threshold", "0.05"], "0.05: .*model.onnx was exported with 0.1"),
        (["--class-names", "a", "b"], "2 names .a, b., but the model has 5 classes"),
        (["--opts", "MODEL.MASK_ON", "False"], "--opts MODEL.MASK_ON: settled in .*model.onnx"),
        (["--opts", "DATASETS.TESTS", "()"], "unknown config key DATASETS.TESTS"),
    ],
)
def test_what_the_file_has_settled(predict, photos, args, message, capsys):
    with pytest.raises(SystemExit):
        predict("model.onnx", "--input", photos, *args)
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert re.search(message, line), line


def test_without_onnxruntime(predict, photos, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cbbl_onnx", None)
    with pytest.raises(SystemExit):
        predict("model.onnx", "--input", photos)
    assert "not installed: pip install -e '.[onnx]'" in capsys.readouterr().err
