"""
Data sets. Importing this package registers ``small_shapes_{train,val,test}`` and the public data
sets of docs/public_data.md.
"""

# The public ones register themselves.
from . import ai_tod, hit_uav, tiny_person, visdrone  # noqa: F401
from .coco_format import register_coco_format
from .small_shapes import SmallShapesSpec, generate_small_shapes, register_small_shapes

__all__ = [
    "SmallShapesSpec",
    "generate_small_shapes",
    "register_coco_format",
    "register_small_shapes",
]
