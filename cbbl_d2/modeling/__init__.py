"""C-BBL heads for Detectron2. Importing this package registers them."""

from .box_regression import CBBLBox2BoxTransform, CBBLBox2BoxTransformLinear
from .fast_rcnn import CBBLFastRCNNOutputLayers
from .fcos import CBBLFCOS, ConfigurableFCOS
from .iterated_boxes import IteratedROIHeads
from .localization_loss import LocalizationLoss
from .refinement import Refinement
from .retinanet import CBBLRetinaNet
from .roi_heads import CBBLCascadeROIHeads, CBBLRes5ROIHeads, CBBLROIHeads
from .rpn import CBBLRPN
from .test_time_augmentation import CBBLGeneralizedRCNNWithTTA
from .torchvision_backbone import TorchvisionNetwork
from .uncertainty import keep_distributions

__all__ = [
    "CBBLBox2BoxTransform",
    "CBBLBox2BoxTransformLinear",
    "CBBLCascadeROIHeads",
    "CBBLFCOS",
    "CBBLFastRCNNOutputLayers",
    "CBBLGeneralizedRCNNWithTTA",
    "CBBLROIHeads",
    "CBBLRPN",
    "CBBLRes5ROIHeads",
    "CBBLRetinaNet",
    "ConfigurableFCOS",
    "IteratedROIHeads",
    "LocalizationLoss",
    "Refinement",
    "TorchvisionNetwork",
    "keep_distributions",
]
