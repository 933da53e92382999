"""
Using a trained detector: :mod:`.sources` and :mod:`.frames` say what on, :mod:`.predictor` finds
the objects, :mod:`.pictures`, :mod:`.writers` and :mod:`.metrics` say what becomes of them, and
:mod:`.run` takes each image from one to the other. Sliced inference, which needs the package sahi,
is in :mod:`cbbl_d2.inference.sliced`, and is not imported here.
"""

from .classes import Classes, find_classes
from .config import find_config, load_inference_config
from .predictor import BatchPredictor
from .results import ImageResult, to_detections

__all__ = [
    "BatchPredictor",
    "Classes",
    "ImageResult",
    "find_classes",
    "find_config",
    "load_inference_config",
    "to_detections",
]
