"""
From a detector to one file that runs without Detectron2: :mod:`.outputs` says what it gives,
:mod:`.torchscript` and :mod:`.onnx_file` write and read it, :mod:`.metadata` says what an ONNX file
knows besides, and :mod:`.comparison` checks it on the images of :mod:`.examples`.
"""

from .comparison import Agreement, compare
from .examples import make_examples
from .metadata import make_metadata
from .onnx_file import load_onnx, to_onnx
from .outputs import detect, get_tracing_adapter, output_names
from .torchscript import load_torchscript, to_torchscript

__all__ = [
    "Agreement",
    "compare",
    "detect",
    "get_tracing_adapter",
    "load_onnx",
    "load_torchscript",
    "make_examples",
    "make_metadata",
    "output_names",
    "to_onnx",
    "to_torchscript",
]
