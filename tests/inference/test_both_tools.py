"""tools/predict.py and tools/visualize.py are two ways to the same predictions."""

import json

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

import cbbl_d2.inference.pictures  # noqa: E402
from cbbl_d2.inference import BatchPredictor, load_inference_config  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402

from tests.modeling.detectors import build, config  # noqa: E402

NAMES = ["faster", "cascade", "retinanet", "fcos", "mask", "keypoint"]


@pytest.fixture(scope="module")
def tools(load_script):
    """``main`` of either tool."""
    return {name: load_script(f"tools/{name}.py").main for name in ("predict", "visualize")}


@pytest.fixture
def shown(monkeypatch):
    """A list that gets the predictions in each picture."""
    taken, draw_pair = [], cbbl_d2.inference.pictures.draw_pair

    def spy(image, truth, instances, *args, **kwargs):
        taken.append(instances)
        return draw_pair(image, truth, instances, *args, **kwargs)

    monkeypatch.setattr(cbbl_d2.inference.pictures, "draw_pair", spy)
    return taken


@pytest.mark.parametrize("detector", NAMES)
def test_both_tools_find_the_same(detector, tools, shown, make_image, tmp_path):
    cfg = config(detector)
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    weights, config_file = tmp_path / "model.pth", tmp_path / "config.yaml"
    torch.save({"model": build(detector).state_dict()}, weights)
    config_file.write_text(cfg.dump())
    path = make_image(tmp_path / "in/a.png", 60, 80)
    image = np.ascontiguousarray(cv2.imread(str(path))[:, :, ::-1])
    (everything,) = BatchPredictor(load_inference_config(str(weights), None, [], 0.0))([image])
    threshold = f"{everything.scores.median().item():.5f}"

    common = ["--weights", str(weights), "--input", str(path), "--scale", "2"]
    common += ["--score-threshold", threshold]
    tools["predict"]([*common, "--output", str(tmp_path / "predict")])
    visualize = ["--config-file", str(config_file), "--output", str(tmp_path / "visualize")]
    tools["visualize"](common + visualize)

    first, second = shown
    assert 0 < len(first) < len(everything) and first.scores.min() > float(threshold)
    assert first.get_fields().keys() == second.get_fields().keys()
    for name, value in first.get_fields().items():
        value, other = (getattr(x, "tensor", x) for x in (value, second.get(name)))
        torch.testing.assert_close(value, other, rtol=0, atol=0)
    assert first.has("pred_masks") == (detector == "mask")
    assert first.has("pred_keypoints") == (detector == "keypoint")

    # What is written is what is drawn, and the pictures are the same to the last pixel.
    found = json.loads((tmp_path / "predict/predictions.json").read_text())
    assert [x["score"] for x in found] == first.scores.tolist()
    boxes = BoxMode.convert(
        torch.tensor([x["bbox"] for x in found]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS
    )
    torch.testing.assert_close(boxes, first.pred_boxes.tensor)
    pictures = [tmp_path / "predict/pictures/a.png", tmp_path / "visualize/a.png"]
    assert np.array_equal(*(cv2.imread(str(x)) for x in pictures))
