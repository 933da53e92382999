#!/usr/bin/env python
"""
Images per second of a detector on the CPU: eager PyTorch, TorchScript and ONNX, C-BBL and its stock
twin, all alternating in one run; and what C-BBL adds to the ONNX graph.

    python benchmarks/export.py --threads 1
    python benchmarks/export.py --pairs configs/HIT-UAV/{giou_fcos,cbbl_fcos}.yaml --sizes 256x320

The weights are random, and equal where both twins have them. Some hundred boxes reach NMS, which
drops none, so that both twins give all the detections that the config allows. With one thread the
time is the CPU's, which other processes disturb less. Prints Markdown: medians of the rounds, and
of the ratios within a round with their range.
"""

import io
import os
import statistics
import time
import warnings
from collections.abc import Callable

import onnx
import onnxruntime
import torch
import tqdm
from cbbl_d2.architectures import detection_node
from cbbl_d2.engine import load_config, one_line_errors
from cbbl_d2.export import detect, load_torchscript, to_onnx, to_torchscript
from detectron2.modeling import build_model
from head import add_pairs, get_parser, ratio, read_pairs, start

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs", "HIT-UAV")
PAIRS = (
    ("smooth_l1", "cbbl"),
    ("giou_fcos", "cbbl_fcos"),
    ("smooth_l1_retinanet", "cbbl_retinanet"),
)
SIZES = ("256x320", "512x640", "800x1333")
TWINS = ("stock", "C-BBL")
RUNTIMES = ("eager", "TorchScript", "ONNX")
# Scores of a dense detector that count in the smallest image, and in a level of any image.
CANDIDATES, CANDIDATES_PER_LEVEL = 300, 100

Model = Callable[[torch.Tensor], object]


def build_twins(files: tuple[str, str], image: torch.Tensor) -> list[torch.nn.Module]:
    """The stock model and the C-BBL one, with equal weights where both have them."""
    models = [build(file) for file in files]
    stock, cbbl = (model.state_dict() for model in models)
    same = {k: v for k, v in stock.items() if k in cbbl and cbbl[k].shape == v.shape}
    models[1].load_state_dict(same, strict=False)
    if hasattr(models[0], "max_detections_per_image"):  # a dense detector: most scores are too low
        allowed = models[0].max_detections_per_image
        models[0].max_detections_per_image = CANDIDATES
        with torch.no_grad():
            threshold = detect(models[0], image)["scores"].min().item()
        models[0].max_detections_per_image = allowed
        for model in models:
            model.test_score_thresh = threshold
    return models


def build(config_file: str) -> torch.nn.Module:
    cfg = load_config(config_file)
    cfg.MODEL.DEVICE = "cpu"
    node = cfg.MODEL[detection_node(cfg)]
    node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST = 0.0, 1.0
    if "TOPK_CANDIDATES_TEST" in node:
        node.TOPK_CANDIDATES_TEST = CANDIDATES_PER_LEVEL
    torch.manual_seed(0)
    return build_model(cfg).eval()


def noise(height: int, width: int) -> torch.Tensor:
    """Blobs of 16 px, float of shape ``(3, height, width)``."""
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randint(0, 256, (3, height // 16 + 1, width // 16 + 1), generator=generator)
    blobs = blobs.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    return blobs[:, :height, :width].float().contiguous()


def onnx_model(content: bytes, threads: int) -> Model:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.to(torch.uint8).numpy()})


def export(model: torch.nn.Module, image: torch.Tensor, threads: int) -> tuple[dict, bytes]:
    """The model in each of :data:`RUNTIMES`, and the content of its ONNX file."""
    script = load_torchscript(to_torchscript(model, image), torch.device("cpu"))
    content = to_onnx(model, image, {})
    functions = (lambda x: detect(model, x), script, onnx_model(content, threads))
    return dict(zip(RUNTIMES, functions)), content


def num_nodes(graph: onnx.GraphProto) -> int:
    inner = (a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    return len(graph.node) + sum(map(num_nodes, inner))


@torch.no_grad()
def alternate(models: dict, image: torch.Tensor, rounds: int, clock: Callable) -> dict:
    """
    Args:
        models: (twin, runtime) -> model.

    Returns:
        for each model, the seconds of each round.
    """
    times = {key: [] for key in models}
    for round_ in tqdm.trange(rounds + 3, desc="rounds", leave=False, disable=None):
        for key in list(models)[:: 1 if round_ % 2 else -1]:  # which comes first changes
            start = clock()
            models[key](image)
            if round_ >= 3:  # the first ones warm up; TorchScript optimizes in two
                times[key].append(clock() - start)
    return times


def rows(name: str, models: dict, size: str, rounds: int, clock: Callable) -> list[str]:
    """Of the table: one for each runtime."""
    times = alternate(models, noise(*map(int, size.split("x"))), rounds, clock)
    lines = []
    for runtime in RUNTIMES:
        stock, cbbl = (times[twin, runtime] for twin in TWINS)
        speedup = ratio(cbbl, times["C-BBL", "eager"])
        per_second = [f"{1 / statistics.median(x):.2f}" for x in (stock, cbbl)]
        more = statistics.median(1e3 * (b - a) for a, b in zip(stock, cbbl))
        cells = (name, size, runtime, *per_second, ratio(stock, cbbl), f"{more:+.1f} ms", speedup)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@one_line_errors
def main() -> None:
    parser = get_parser(__doc__, rounds=21)
    add_pairs(parser, "Faster R-CNN, FCOS and RetinaNet of configs/HIT-UAV")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxW", help="of the images")
    args = parser.parse_args()
    pairs = read_pairs(args.pairs, CONFIGS, PAIRS)
    warnings.simplefilter("ignore")
    clock = time.process_time if args.threads == 1 else time.perf_counter

    print(f"{start(args.threads)}, onnxruntime {onnxruntime.__version__}, {args.rounds} rounds")
    print(
        "| config | image | runtime | stock, images/s | C-BBL, images/s | time C-BBL / stock",
        end="",
    )
    print(" | C-BBL adds | C-BBL: eager / this |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    graphs = []
    for pair in pairs:
        name = os.path.splitext(os.path.basename(pair[1]))[0]
        image, models, contents = noise(256, 320), {}, []
        for twin, model in zip(TWINS, build_twins(pair, image)):
            functions, content = export(model, image, args.threads)
            models |= {(twin, runtime): function for runtime, function in functions.items()}
            contents.append(content)
        for size in args.sizes:
            print(*rows(name, models, size, args.rounds, clock), sep="\n", flush=True)
        nodes = [num_nodes(onnx.load(io.BytesIO(x)).graph) for x in contents]
        sizes = [len(x) for x in contents]
        graphs.append(f"| {name} | {nodes[0]} | {nodes[1]} | {sizes[0]} | {sizes[1]} |")
    print("\n| config | nodes, stock | nodes, C-BBL | bytes, stock | bytes, C-BBL |")
    print("|---|---|---|---|---|", *graphs, sep="\n")


if __name__ == "__main__":
    main()
