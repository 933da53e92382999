#!/usr/bin/env python
"""
What a C-BBL head costs, against Detectron2's own head measured in the same run, alternating.

    python benchmarks/head.py                      # R-50-FPN at 800x1333
    python benchmarks/head.py --size 480 640 --rounds 3
    python benchmarks/head.py --images 4 --autocast float16    # on a GPU
    python benchmarks/head.py --pairs configs/COCO-Detection/{giou,cbbl}_fcos_R_50_FPN_1x.yaml

Prints ratios (C-BBL / stock): training step (forward and backward), peak memory, parameters,
inference. And the time of cross entropy + decoding for 512 boxes, forward and backward, against a
dense one-hot implementation of DFL (Generalized Focal Loss); also with the uncertainty loss, which
DFL lacks. Medians of the rounds, with their range. The default takes some 10 minutes on two CPU
cores.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import statistics
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import tqdm
from cbbl_d2.architectures import set_score_threshold
from cbbl_d2.distribution import cbbl_loss, expectation, exponential_grid
from cbbl_d2.engine import load_config, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.messages import count
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torch.utils.benchmark import Timer

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs", "COCO-Detection")
PAIRS = (("smooth_l1_faster_rcnn_R_50_FPN_1x", "cbbl_faster_rcnn_R_50_FPN_1x"),)


def add_pairs(parser: argparse.ArgumentParser, default: str) -> None:
    """
    Args:
        default: which configs are taken without ``--pairs``.
    """
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="CONFIG",
        help=f"stock and C-BBL config in turn (default: {default})",
    )


def read_pairs(
    files: Optional[Sequence[str]], folder: str, names: Sequence[Tuple[str, str]]
) -> List[Tuple[str, str]]:
    """
    Args:
        files: as ``--pairs`` has them.
        folder, names: the pairs without, names of YAML files in a folder.

    Raises:
        UserError: an odd number of files.
    """
    files = files or [os.path.join(folder, f"{name}.yaml") for pair in names for name in pair]
    if len(files) % 2 != 0:
        raise UserError(f"--pairs: need a stock and a C-BBL config in turn, got {len(files)} files")
    return list(zip(files[::2], files[1::2]))


def get_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """With the options that the benchmarks of detectors share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="timed rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s"
    )
    return parser


def add_autocast(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autocast",
        choices=("float16", "bfloat16"),
        help="mixed precision; SOLVER.AMP.ENABLED is float16 (default: none)",
    )


def autocast(model: torch.nn.Module, dtype: Optional[str]) -> torch.nn.Module:
    """The same model, in mixed precision if ``dtype`` is the name of one of torch's."""
    if dtype is not None:
        context = torch.autocast(model.device.type, getattr(torch, dtype))
        model.forward = context(model.forward)
    return model


def start(threads: int) -> str:
    """Sets the number of threads. Returns what it is run with, for the first line."""
    torch.set_num_threads(threads)
    where = platform.processor() or "CPU"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    version = platform.python_version()
    return f"{where}, threads: {threads}, torch {torch.__version__}, Python {version}"


def make_model(config_file: str, args: argparse.Namespace) -> torch.nn.Module:
    cfg = load_config(config_file)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = not args.class_specific
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        # An untrained dense detector is sure of nothing, and would decode no box.
        set_score_threshold(cfg, 0.0)
    torch.manual_seed(0)
    model = build_model(cfg)
    # From random weights the frozen batch norms of a ResNet blow up its features, and every
    # proposal would be lost as not finite: weigh each residual branch lightly.
    for name, buffer in model.named_buffers():
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.1)
    return autocast(model, args.autocast)


def make_inputs(num_images: int, height: int, width: int) -> List[Dict]:
    return [make_input(seed, height, width) for seed in range(num_images)]


def make_input(seed: int, height: int, width: int, num_objects: int = 30) -> Dict:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num_objects, 2, generator=generator) * torch.tensor([width, height]) * 0.9
    size = 8 + torch.rand(num_objects, 2, generator=generator) * 60
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat((low, low + size), dim=1))
    instances.gt_boxes.clip((height, width))
    instances.gt_classes = torch.randint(80, (num_objects,), generator=generator)
    image = torch.rand(3, height, width, generator=generator) * 255
    return {"image": image, "instances": instances, "height": height, "width": width}


def make_model_and_inputs(
    config_file: str, args: argparse.Namespace
) -> Tuple[torch.nn.Module, List[Dict]]:
    return make_model(config_file, args), make_inputs(args.images, *args.size)


def train_step(model: torch.nn.Module, inputs: List[Dict]) -> None:
    model.train()
    with EventStorage():
        sum(model(inputs).values()).backward()
    for p in model.parameters():
        p.grad = None


@torch.no_grad()
def inference(model: torch.nn.Module, inputs: List[Dict]) -> None:
    model.eval()
    model(inputs)


def seconds(function: Callable, *args) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(threads: int, make: Callable, *args) -> float:
    """
    MiB of one training step. On the CPU: peak resident size of this (fresh) process; Linux.

    Args:
        make: ``make(*args)`` returns the model and its inputs.
    """
    torch.set_num_threads(threads)
    train_step(*make(*args))
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its maximum is handed down from the process that started this one.
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**10


def peak_memories(makers: Dict[str, Tuple], rounds: int, threads: int) -> Dict[str, List[float]]:
    """
    Args:
        makers: name -> function and its arguments, see :func:`peak_memory`.
    """
    memory = {name: [] for name in makers}
    context = multiprocessing.get_context("spawn")
    for _ in tqdm.trange(rounds, desc="memory", leave=False, disable=None):
        for name in memory:
            with context.Pool(1) as pool:  # a process of its own: peaks do not mix
                memory[name].append(pool.apply(peak_memory, (threads, *makers[name])))
    return memory


def alternate(
    models: Dict[str, Tuple[torch.nn.Module, List[Dict]]], rounds: int
) -> Dict[Tuple[str, Callable], List[float]]:
    """
    Args:
        models: name -> model and its inputs.

    Returns:
        for each model and :func:`train_step` or :func:`inference`, the seconds in each round.
    """
    steps = [
        (round_, name, function)
        for round_ in range(rounds + 1)
        for name in list(models)[:: 1 if round_ % 2 else -1]  # which comes first changes each round
        for function in (train_step, inference)
    ]
    times = {(name, f): [] for name in models for f in (train_step, inference)}
    for round_, name, function in tqdm.tqdm(steps, "alternating", leave=False, disable=None):
        time_ = seconds(function, *models[name])
        if round_ > 0:  # the first warms up
            times[name, function].append(time_)
    return times


def ratio(stock: List[float], cbbl: List[float]) -> str:
    """Median of the ratios of each round, so that a slow spell of the machine hits both sides."""
    ratios = [b / a for a, b in zip(stock, cbbl)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def show_ratio(name: str, stock: List[float], cbbl: List[float], unit: str) -> None:
    print(
        f"{name:<18} stock {statistics.median(stock):10.3f} {unit:<4} "
        f"C-BBL {statistics.median(cbbl):10.3f} {unit:<4} ratio {ratio(stock, cbbl)}",
        flush=True,
    )


def compare_models(stock: str, cbbl: str, args: argparse.Namespace) -> None:
    models = {name: make_model_and_inputs(name, args) for name in (stock, cbbl)}
    times = alternate(models, args.rounds)
    for label, function in (("training step", train_step), ("inference", inference)):
        show_ratio(label, times[stock, function], times[cbbl, function], "s")
    counts = {n: [sum(p.numel() for p in m.parameters()) / 1e6] for n, (m, _) in models.items()}
    show_ratio("parameters", counts[stock], counts[cbbl], "M")
    del models
    gc.collect()

    if args.memory_rounds > 0:
        makers = {name: (make_model_and_inputs, name, args) for name in (stock, cbbl)}
        memory = peak_memories(makers, args.memory_rounds, args.threads)
        show_ratio("peak memory", memory[stock], memory[cbbl], "MiB")


def dense_dfl(logits: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """DFL on integer points, its label as a dense tensor: shapes (R, 4, B) and (R, 4)."""
    num_points = logits.shape[-1]
    left = distances.long().clamp(0, num_points - 2)
    right_weight = (distances - left).unsqueeze(-1)
    label = F.one_hot(left, num_points) * (1 - right_weight)
    label = label + F.one_hot(left + 1, num_points) * right_weight
    return -(label * F.log_softmax(logits, dim=-1)).sum()


def compare_losses(num_boxes: int, num_intervals: int, rounds: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = exponential_grid(5.0, 1.0, num_intervals).to(device)
    integers = torch.arange(num_intervals + 1.0, device=device)
    torch.manual_seed(0)
    logits = torch.randn(num_boxes, 4, num_intervals + 1, device=device, requires_grad=True)
    offsets = torch.randn(num_boxes, 4, device=device)
    distances = torch.rand(num_boxes, 4, device=device) * num_intervals * 0.999

    def run_cbbl(uncertainty: str):
        logits.grad = None
        sum(cbbl_loss(logits, offsets, grid, uncertainty=uncertainty)).backward()
        with torch.no_grad():
            expectation(logits, grid)

    def run_dfl():
        logits.grad = None
        dense_dfl(logits, distances).backward()
        with torch.no_grad():
            (logits.softmax(dim=-1) * integers).sum(dim=-1)

    def microseconds(function: Callable, *args) -> float:
        names, threads = {"function": function, "args": args}, torch.get_num_threads()
        return 1e6 * Timer("function(*args)", globals=names, num_threads=threads).timeit(50).mean

    for uncertainty in ("none", "entropy_gap"):
        times = [
            (microseconds(run_dfl), microseconds(run_cbbl, uncertainty)) for _ in range(rounds)
        ]
        show_ratio(f"n={num_intervals}, {uncertainty}", *zip(*times), "us")


@one_line_errors
def main() -> None:
    parser = get_parser(__doc__, rounds=5)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[800, 1333],
        metavar=("H", "W"),
        help="of the image, in pixels (default: 800 1333)",
    )
    add_autocast(parser)
    add_pairs(parser, "Faster R-CNN R-50-FPN")
    parser.add_argument("--images", type=int, default=1, help="of a batch (default: 1)")
    parser.add_argument(
        "--memory-rounds", type=int, default=2, help="processes per model (default: 2; 0: none)"
    )
    parser.add_argument(
        "--class-specific", action="store_true", help="K * 4 outputs, both box heads"
    )
    parser.add_argument("--boxes", type=int, default=512, help="of the loss (default: 512)")
    parser.add_argument("--loss-only", action="store_true", help="leave out the models")
    args = parser.parse_args()

    print(start(args.threads))
    for stock, cbbl in [] if args.loss_only else read_pairs(args.pairs, CONFIGS, PAIRS):
        images = f"{count(args.images, 'image', 'images')} of {args.size[0]}x{args.size[1]}"
        name = os.path.splitext(os.path.basename(cbbl))[0]
        kind = ", class-specific" if args.class_specific else ""
        print(f"{name}: {images}, {args.autocast or 'float32'}{kind}")
        compare_models(stock, cbbl, args)
    print(f"Loss + decoding of {args.boxes} boxes; 'stock' is dense one-hot DFL")
    for num_intervals in (5, 16):
        compare_losses(args.boxes, num_intervals, max(args.rounds, 11))


if __name__ == "__main__":
    main()
