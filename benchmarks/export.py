#!/usr/bin/env python
"""
Images per second of a detector on the CPU: eager PyTorch, TorchScript and ONNX, C-BBL and its stock
twin, all alternating in one run; and what C-BBL adds to the ONNX graph.

    python benchmarks/export.py
    python benchmarks/export.py --pairs configs/HIT-UAV/{giou_fcos,cbbl_fcos}.yaml --sizes 256x320

The weights are random, and equal where both twins have them. No score is too low and NMS drops no
box, so that both have equally many candidates and give all the detections that the config allows.
Prints Markdown: medians of the rounds, and of the ratios within a round with their range.
"""

import argparse
import io
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable

import onnx
import onnxruntime
import torch
import tqdm
from cbbl_d2.architectures import detection_node, set_score_threshold
from cbbl_d2.engine import load_config, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.export import detect, to_onnx, to_torchscript
from detectron2.modeling import build_model
from head import get_parser, ratio, seconds, start

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs", "HIT-UAV")
PAIRS = (("smooth_l1", "cbbl"), ("giou_fcos", "cbbl_fcos"))
SIZES = ((256, 320), (512, 640), (800, 1333))
RUNTIMES = ("eager", "TorchScript", "ONNX")
# Of a dense detector, for each level: some hundred boxes reach NMS, as with a trained detector.
CANDIDATES = 100


def build_twins(files: tuple[str, str]) -> list[torch.nn.Module]:
    """The stock model and the C-BBL one, with equal weights where both have them."""
    models = []
    for file in files:
        cfg = load_config(file)
        cfg.MODEL.DEVICE = "cpu"
        set_score_threshold(cfg, 0.0)
        node = cfg.MODEL[detection_node(cfg)]
        node.NMS_THRESH_TEST = 1.0
        if "TOPK_CANDIDATES_TEST" in node:
            node.TOPK_CANDIDATES_TEST = CANDIDATES
        torch.manual_seed(0)
        models.append(build_model(cfg).eval())
    stock, cbbl = (model.state_dict() for model in models)
    same = {k: v for k, v in stock.items() if k in cbbl and cbbl[k].shape == v.shape}
    models[1].load_state_dict(same, strict=False)
    return models


def noise(height: int, width: int) -> torch.Tensor:
    """Blobs of 16 px, float of shape ``(3, height, width)``."""
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randint(0, 256, (3, height // 16 + 1, width // 16 + 1), generator=generator)
    blobs = blobs.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    return blobs[:, :height, :width].float().contiguous()


def onnx_session(content: bytes, threads: int) -> Callable:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.to(torch.uint8).numpy()})
