import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.engine import load_config  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "8"]
TINY += ["MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.RPN.CONV_DIMS", "[8]"]
TINY += ["INPUT.MIN_SIZE_TEST", "64", "TEST.DETECTIONS_PER_IMAGE", "5"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder as a training leaves it: an untrained model.pth, and config.yaml beside it."""
    folder = tmp_path_factory.mktemp("training")
    cfg = load_config(str(ROOT / "configs/SmallShapes/cbbl.yaml"), TINY)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "model.pth")


@pytest.fixture
def make_image():
    """``make_image(path, height, width)``: noise, always the same."""

    def make(path, height=40, width=60):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert cv2.imwrite(str(path), image)
        return path

    return make


@pytest.fixture
def write_coco():
    """``write_coco(path, images, annotations)``: a COCO file with the classes "a" and "b"."""

    def write(path, images, annotations):
        categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def make_instances():
    """``make_instances(boxes, scores, classes, size, **fields)``: predictions for an image."""

    def make(boxes, scores, classes, size=(40, 60), **fields):
        return Instances(
            size,
            pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
            scores=torch.tensor(scores, dtype=torch.float32),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
            **fields,
        )

    return make
