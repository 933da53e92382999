import os

import pytest

pytest.importorskip("detectron2")

from cbbl_d2.architectures import detection_node  # noqa: E402
from cbbl_d2.engine import CBBLTrainer, load_config  # noqa: E402
from cbbl_d2.errors import ConfigError  # noqa: E402
from cbbl_d2.inference import BatchPredictor  # noqa: E402
from cbbl_d2.modeling.build import build_grid  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs", "SmallShapes")
NAMES = (
    *("cbbl", "cbbl_cascade_rcnn", "cbbl_rpn", "cbbl_retinanet", "cbbl_fcos"),
    *("smooth_l1", "smooth_l1_retinanet", "giou_fcos"),
)


@pytest.fixture(params=NAMES)
def cfg(request, tmp_path):
    cfg = load_config(os.path.join(CONFIGS, f"{request.param}.yaml"))
    cfg.MODEL[detection_node(cfg)].NUM_CLASSES = 0
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("small_shapes_mini_train",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_zero_classes_are_refused_where_the_data_are_not_asked(cfg):
    key = f"MODEL.{detection_node(cfg)}.NUM_CLASSES = 0"
    with pytest.raises(ConfigError, match=f"{key} .*set_num_classes"):
        CBBLTrainer.build_model(cfg)
    node = detection_node(cfg)
    part = cfg.MODEL.ROI_HEADS.NAME if node == "ROI_HEADS" else cfg.MODEL.META_ARCHITECTURE
    if "CBBL" in part or node == "FCOS":  # classes of this project
        with pytest.raises(ConfigError, match=key):
            build_model(cfg)


def test_trainer_and_predictor_ask_the_data(cfg, tmp_path):
    cfg.freeze()
    trainer = CBBLTrainer(cfg)
    node = detection_node(cfg)
    assert trainer.cfg.MODEL[node].NUM_CLASSES == 5 and cfg.MODEL[node].NUM_CLASSES == 0
    DetectionCheckpointer(trainer.model, str(tmp_path)).save("weights")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    BatchPredictor(cfg)  # it checks that they fit


def test_an_rpn_alone_has_no_classes(cfg):
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    build_grid(cfg, "RPN")
