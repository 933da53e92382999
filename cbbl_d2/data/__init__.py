"""Data sets. Importing this package registers ``small_shapes_{train,val,test}``."""

from .coco_format import register_coco_format
from .small_shapes import SmallShapesSpec, generate_small_shapes, register_small_shapes

__all__ = [
    "SmallShapesSpec",
    "generate_small_shapes",
    "register_coco_format",
    "register_small_shapes",
]
