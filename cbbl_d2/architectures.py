"""
What an architecture reads of a config, and where: Detectron2 keeps the number of classes of a
Faster R-CNN in ``MODEL.ROI_HEADS``, of a RetinaNet in ``MODEL.RETINANET``.

Subclasses keep the names of Detectron2's architectures at the end of their own.
"""

from cbbl_d2.errors import ConfigError
from detectron2.config import CfgNode

# The node with NUM_CLASSES and SCORE_THRESH_TEST
_DETECTION_NODES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",  # of its things, the classes with boxes
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
}


def detection_node(cfg: CfgNode) -> str | None:
    """
    The node of ``cfg.MODEL`` with ``NUM_CLASSES`` and ``SCORE_THRESH_TEST``; None for a model that
    detects nothing, such as an RPN alone.
    """
    for architecture, node in _DETECTION_NODES.items():
        if cfg.MODEL.META_ARCHITECTURE.endswith(architecture) and node in cfg.MODEL:
            return node
    return None


def check_has_classes(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: the number of classes is still 0, "from the data": such a detector finds
            nothing, without a word.
    """
    node = detection_node(cfg)
    if node is not None and cfg.MODEL[node].NUM_CLASSES == 0:
        raise ConfigError(
            f"MODEL.{node}.NUM_CLASSES = 0 stands for the number of classes of the data, which is "
            "not known here: set it, or first call "
            "cbbl_d2.data.dataset_checks.set_num_classes(cfg)"
        )


def anchor_node(cfg: CfgNode) -> str | None:
    """The node of ``cfg.MODEL`` that describes what anchors learn; None for a model without any."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture.endswith("RetinaNet"):
        return "RETINANET"
    has_rpn = cfg.MODEL.PROPOSAL_GENERATOR.NAME.endswith("RPN")
    two_stages = architecture.endswith(("RCNN", "ProposalNetwork", "PanopticFPN"))
    return "RPN" if has_rpn and two_stages else None


def set_score_threshold(cfg: CfgNode, threshold: float) -> None:
    """
    The lowest score of a detection, in place, for every architecture: one that the config does not
    use is of no consequence.
    """
    for node in _DETECTION_NODES.values():
        if node in cfg.MODEL:
            cfg.MODEL[node].SCORE_THRESH_TEST = threshold
