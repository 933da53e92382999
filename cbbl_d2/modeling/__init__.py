"""C-BBL heads for Detectron2. Importing this package registers them."""

from .box_regression import CBBLBox2BoxTransform
from .fast_rcnn import CBBLFastRCNNOutputLayers
from .roi_heads import CBBLROIHeads

__all__ = ["CBBLBox2BoxTransform", "CBBLFastRCNNOutputLayers", "CBBLROIHeads"]
