"""What an ONNX file knows besides its graph: all that a program needs to use it rightly."""

import json

import cbbl_d2
from cbbl_d2.architectures import detection_node
from cbbl_d2.inference.classes import Classes
from cbbl_d2.inference.predictor import check_input_format
from detectron2.config import CfgNode


def make_metadata(cfg: CfgNode, classes: Classes) -> dict[str, str]:
    """
    The keys and values of ONNX's ``metadata_props``: texts; lists are JSON. ``cbbl_onnx.py`` reads
    them.

    Args:
        cfg: of a detector.

    Raises:
        ConfigError: another ``INPUT.FORMAT`` than RGB or BGR.
    """
    check_input_format(cfg)
    model, node = cfg.MODEL, cfg.MODEL[detection_node(cfg)]
    architecture = model.META_ARCHITECTURE
    if architecture == "GeneralizedRCNN":
        architecture += f", {model.PROPOSAL_GENERATOR.NAME}, {model.ROI_HEADS.NAME}"
    return {
        "class_names": json.dumps(classes.names),
        "category_ids": json.dumps(classes.ids),  # in the COCO files of the data set
        "input_format": cfg.INPUT.FORMAT,
        "min_size": str(cfg.INPUT.MIN_SIZE_TEST),
        "max_size": str(cfg.INPUT.MAX_SIZE_TEST),
        "score_threshold": str(node.SCORE_THRESH_TEST),
        "nms_threshold": str(node.NMS_THRESH_TEST),
        "max_detections": str(cfg.TEST.DETECTIONS_PER_IMAGE),
        "architecture": architecture,
        "cbbl_d2_version": cbbl_d2.__version__,
    }
