"""
Loading data sets in COCO format: validation, broken images, the training loader, augmentation.
Importing this package registers the data sets of :mod:`cbbl_d2.data.datasets`.
"""

from . import datasets  # noqa: F401
from .coco_format import register_coco_format
from .datasets.small_shapes import SmallShapesSpec, generate_small_shapes, register_small_shapes

__all__ = [
    "SmallShapesSpec",
    "generate_small_shapes",
    "register_coco_format",
    "register_small_shapes",
]
