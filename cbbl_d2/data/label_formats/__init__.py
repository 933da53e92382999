"""
Labels that other tools write, converted to COCO format by ``tools/convert_dataset.py``: a file for
each format. What they share, and what is reported or refused, is in
:mod:`cbbl_d2.data.label_formats.labeled_images`.
"""

from .voc import convert_voc
from .yolo import convert_yolo

__all__ = ["convert_voc", "convert_yolo"]
