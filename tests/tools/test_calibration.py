import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.data.coco_format import register_coco_format  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

SIDES = ("x1", "y1", "x2", "y2")
ROOT = Path(__file__).parents[2]
NAME, NUM_IMAGES, SIZE = "cbbl_test_calibration", 60, 200
STD, SCALE = 0.03, (1.5, 2.0, 2.5, 3.0)


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/calibration.py")


def boxes_of(number):
    """Nine boxes on a lattice, XYXY."""
    rng = np.random.default_rng(number)
    corners = np.stack(np.meshgrid([10, 70, 130], [10, 70, 130]), -1).reshape(9, 2) + 0.0
    return np.concatenate((corners, corners + rng.uniform(10, 40, (9, 2))), axis=1)


@pytest.fixture
def dataset(tmp_path):
    """Images whose only gray level is their number; the class of every object is the second."""
    (tmp_path / "set").mkdir()
    images, annotations = [], []
    for i in range(NUM_IMAGES):
        assert cv2.imwrite(str(tmp_path / f"set/{i}.png"), np.full((SIZE, SIZE, 3), i, np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE})
        for x0, y0, x1, y1 in boxes_of(i).tolist():
            box = [x0, y0, x1 - x0, y1 - y0]
            annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": 9}
            annotations.append({**annotation, "bbox": box, "area": box[2] * box[3]})
    categories = [{"id": i, "name": f"name {i}"} for i in (4, 9, 11, 12, 13)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "set.json").write_text(json.dumps(content))
    register_coco_format(NAME, str(tmp_path / "set.json"), str(tmp_path / "set"))
    yield NAME
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME)


class Detector:
    """Finds every object, with Gaussian errors of ``SCALE`` times the deviations that it tells."""

    def __init__(self, cfg):
        pass

    def __call__(self, images):
        return [self.detect(int(image[0, 0, 0])) for image in images]

    def detect(self, number):
        boxes = boxes_of(number)
        std = STD * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        noise = np.random.default_rng(1000 + number).normal(size=(9, 4))
        return Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(torch.tensor(boxes + noise * std * SCALE, dtype=torch.float32)),
            scores=torch.linspace(0.9, 0.1, 9),
            pred_classes=torch.ones(9, dtype=torch.int64),
            pred_boxes_std=torch.full((9, 4), STD),
        )


class Stock(Detector):
    def detect(self, number):
        instances = super().detect(number)
        instances.remove("pred_boxes_std")
        return instances


@pytest.fixture
def run(tool, dataset, tmp_path, monkeypatch):
    def run(*args, detector=Detector):
        monkeypatch.setattr(tool, "BatchPredictor", detector)
        (tmp_path / "model.pth").touch()
        config = str(ROOT / "configs/SmallShapes/cbbl.yaml")
        command = ["--config-file", config, "--weights", str(tmp_path / "model.pth")]
        tool.main([*command, "--dataset", dataset, *args])
        return json.loads((tmp_path / "calibration/calibration.json").read_text())

    return run


def test_the_key_that_makes_deviations_right(run, tmp_path, capsys):
    numbers = run()
    # The width that the deviation is relative to has an error of its own.
    assert numbers["std_scale"] == pytest.approx(SCALE, rel=0.15)
    assert numbers["scaled"]["coverage of 68 % intervals"] == pytest.approx(0.683, abs=0.04)
    assert numbers["as it is"]["expected calibration error"] > 0.1
    assert numbers["scaled"]["expected calibration error"] < 0.04
    out = capsys.readouterr().out
    assert f"{NAME}: 540 of 540 detections match" in out
    assert f"MODEL.CBBL.STD_SCALE: {tuple(numbers['std_scale'])}" in out
    text = (tmp_path / "calibration/calibration.md").read_text()
    assert text in out
    # The scale was fitted on the other half: refitted on this one, it would be another.
    half = [numbers["scaled"]["by side"][x]["coverage of 68 % intervals"] for x in SIDES]
    assert half != pytest.approx([0.683] * 4, abs=0.002)
    for name in ("as it is", "scaled"):
        tables = numbers[name]["by side"], numbers[name]["by size"]
        assert [set(x) for x in tables] == [set(SIDES), {"8 to 16", "16 to 32", "32 to 96"}]
        for of_part in (numbers[name], *tables[0].values(), *tables[1].values()):
            for key, value in of_part.items():
                assert key.startswith("by ") or f"{value:.3f}" in text
        # Deviations that are too small by other factors on other sides, and not by size.
        coverage = [x["coverage of 68 % intervals"] for x in tables[0].values()]
        assert (coverage == sorted(coverage, reverse=True)) == (name == "as it is")
    assert cv2.imread(str(tmp_path / "calibration/calibration.png")) is not None


def test_goes_on_from_the_scale_of_the_config(run):
    once = run()["std_scale"]
    twice = run("--opts", "MODEL.CBBL.STD_SCALE", "(2.0, 2.0, 2.0, 1.0)")["std_scale"]
    # The detector here does not apply it; a C-BBL head does.
    assert twice == pytest.approx(np.multiply(once, (2, 2, 2, 1)), abs=0.002)


@pytest.mark.parametrize(
    "args, detector, message",
    (
        ((), Stock, "no pred_boxes_std"),
        (
            ("--config-file", str(ROOT / "configs/SmallShapes/smooth_l1.yaml")),
            Detector,
            "MODEL.ROI_HEADS.NAME StandardROIHeads: its boxes have no deviations",
        ),
        (("--dataset", "nowhere"), Detector, "nowhere"),
        (("--iou", "2"), Detector, "--iou"),
    ),
)
def test_errors_are_one_line(run, args, detector, message, capsys):
    with pytest.raises(SystemExit):
        run(*args, detector=detector)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
