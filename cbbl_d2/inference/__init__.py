"""
Using a trained detector on images that have no ground truth. Sliced inference, which needs the
package sahi, is in :mod:`cbbl_d2.inference.sliced`, and is not imported here.
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
