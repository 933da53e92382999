#!/usr/bin/env python
"""
What C-BBL costs in each detector: a training step, an inference and the parameters, against the
stock twin measured in the same run, alternating.

    python benchmarks/detectors.py
    python benchmarks/detectors.py --pairs configs/SmallShapes/{smooth_l1,cbbl}.yaml

Each model trains on one batch of its own config's data. Prints a Markdown table with the median of
the ratios C-BBL / stock and their range. With --overrides, what keys cost: the second config of
each pair gets them, and may be the first one's file.

    python benchmarks/detectors.py --memory-rounds 3 \
        --pairs configs/HIT-UAV/cbbl.yaml configs/HIT-UAV/cbbl.yaml \
        --overrides MODEL.CBBL.REFINEMENT.GAMMA 0.1
"""

import argparse
import os
import statistics
from typing import Dict, List, Optional, Tuple

import torch
import tqdm
from cbbl_d2.architectures import set_score_threshold
from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.engine import load_config, one_line_errors
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from head import (
    add_autocast,
    add_pairs,
    alternate,
    autocast,
    get_parser,
    inference,
    peak_memories,
    ratio,
    read_pairs,
    start,
    train_step,
)

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs", "SmallShapes")
PAIRS = (
    ("smooth_l1", "cbbl"),
    ("smooth_l1", "cbbl_rpn"),
    ("smooth_l1_cascade_rcnn", "cbbl_cascade_rcnn"),
    ("smooth_l1_retinanet", "cbbl_retinanet"),
    ("giou_fcos", "cbbl_fcos"),
    ("smooth_l1_mask_rcnn", "cbbl_mask_rcnn"),
    ("smooth_l1_keypoint_rcnn", "cbbl_keypoint_rcnn"),
)


def make_model(
    config_file: str, overrides: List[str], dtype: Optional[str]
) -> Tuple[torch.nn.Module, List[Dict]]:
    """The model, and a batch that is the same for all configs of one data set."""
    cfg = load_config(config_file, overrides)
    # An untrained dense detector is sure of nothing, and would decode no box.
    set_score_threshold(cfg, 0.0)
    seed_all_rng(1)
    model = autocast(build_model(cfg), dtype)
    seed_all_rng(1)
    return model, next(iter(ResumableTrainLoader(cfg)))


def compare(stock: str, cbbl: str, args: argparse.Namespace) -> str:
    """A row of the table."""
    makers = {
        name: (make_model, config, overrides, args.autocast)
        for name, config, overrides in (("stock", stock, []), ("cbbl", cbbl, args.overrides))
    }
    models = {name: make(*rest) for name, (make, *rest) in makers.items()}
    times = alternate(models, args.rounds)
    cells = [os.path.splitext(os.path.basename(cbbl))[0]]
    cells += [ratio(times["stock", f], times["cbbl", f]) for f in (train_step, inference)]
    counts = [sum(p.numel() for p in model.parameters()) for model, _ in models.values()]
    cells.append(f"{counts[0] / 1e6:.3f} M")
    cells.append(f"{counts[1] / 1e6:.3f} M ({counts[1] / counts[0]:.3f})")
    if args.memory_rounds > 0:
        del models
        memory = peak_memories(makers, args.memory_rounds, args.threads)
        cells.append(ratio(*memory.values()))
        cells.append(" / ".join(f"{statistics.median(x):.0f} MiB" for x in memory.values()))
    return "| " + " | ".join(cells) + " |"


@one_line_errors
def main() -> None:
    parser = get_parser(__doc__, rounds=9)
    add_autocast(parser)
    add_pairs(parser, "all detectors of configs/SmallShapes")
    parser.add_argument(
        "--overrides",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="of the second config of each pair",
    )
    parser.add_argument(
        "--memory-rounds",
        type=int,
        default=0,
        help="processes per model that measure the peak of a training step (default: 0, none)",
    )
    args = parser.parse_args()
    pairs = read_pairs(args.pairs, CONFIGS, PAIRS)

    print(f"{start(args.threads)}, {args.rounds} rounds, {args.autocast or 'float32'}")
    columns = ["C-BBL config", "training step", "inference", "parameters, stock"]
    columns.append("parameters, C-BBL")
    if args.memory_rounds > 0:
        columns += ["peak memory of the process", "stock / C-BBL"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for stock, cbbl in tqdm.tqdm(pairs, desc="detectors", leave=False, disable=None):
        tqdm.tqdm.write(compare(stock, cbbl, args))


if __name__ == "__main__":
    main()
