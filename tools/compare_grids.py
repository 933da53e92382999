#!/usr/bin/env python
"""
Which grid localizes best on your data, within minutes, on a Faster R-CNN that is trained already:

    python tools/compare_grids.py --config-file configs/HIT-UAV/cbbl.yaml \\
        --weights output/hit_uav_cbbl/model_final.pth --grids 5,5,1 5,3.5,1 10,3.5,0

A grid is MODEL.CBBL.NUM_INTERVALS,ALPHA,BETA. For each one, and for Smooth-L1, a branch of its own
(the layers of the box head and a last one) learns localization alone, from the proposals that match
an object; the rest of the detector stays as it is. Printed are the offsets that a grid has to cover
and the IoU of the predicted boxes with the objects of --dataset, by object size in the image: mean
and standard deviation over seeds. Then train with the best two or three: what a loss does to
classification is seen only there. See docs/tuning.md.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import tqdm
from cbbl_d2.analysis.localization_branch import (
    BATCH_SIZE,
    LocalizationBranch,
    Regions,
    foreground_regions,
    iou_by_size,
    size_classes,
    train_branch,
)
from cbbl_d2.analysis.markdown import markdown_table
from cbbl_d2.data.dataset_checks import check_registered, load_dataset
from cbbl_d2.distribution import exponential_grid
from cbbl_d2.engine.checkpoint import load_weights
from cbbl_d2.engine.cli import add_opts, number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.inference import load_inference_config
from cbbl_d2.modeling.build import build_grid, build_localization_loss
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.logger import setup_logger
from torch import nn

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: that beside the checkpoint")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of the model")
    parser.add_argument(
        "--grids", nargs="+", default=[], metavar="N,ALPHA,BETA", help="default: the config's"
    )
    parser.add_argument("--train", metavar="NAME", help="default: the first of DATASETS.TRAIN")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument(
        "--max-images",
        type=number(int, 1),
        default=1000,
        metavar="N",
        help="of each data set (default: 1000)",
    )
    parser.add_argument(
        "--seeds", type=number(int, 1), default=3, metavar="N", help="1 to N (default: 3)"
    )
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        default=800,
        metavar="N",
        help=f"of training, each of {BATCH_SIZE} proposals (default: 800)",
    )
    add_opts(parser)
    return parser


def read_grid(text: str) -> torch.Tensor:
    """
    Raises:
        UserError: not N,ALPHA,BETA, or impossible together.
    """
    try:
        num_intervals, alpha, beta = text.split(",")
        return exponential_grid(float(alpha), float(beta), int(num_intervals))
    except ValueError as e:
        raise UserError(f"--grids {text}: must be N,ALPHA,BETA such as 5,5,1 ({e})") from e


def table_of_offsets(regions: Regions, weights: tuple[float, ...]) -> str:
    offsets = Box2BoxTransform(weights).get_deltas(regions.proposals, regions.targets).abs()
    rows = [
        [name, *(f"{x:.2f}" for x in column.quantile(column.new_tensor(QUANTILES)))]
        for name, column in zip(("dx", "dy", "dw", "dh"), offsets.unbind(dim=1))
    ]
    return markdown_table(["length of the offset", "median", "90 %", "99 %", "largest"], rows)


def cell(values: Sequence[float]) -> str:
    """Of one number of each seed."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def compare(
    model: nn.Module,
    cfg: CfgNode,
    grids: dict[str, torch.Tensor | None],
    train: Regions,
    val: Regions,
    num_seeds: int,
    steps: int,
) -> dict[str, list[dict[str, float]]]:
    """
    Args:
        grids: name -> points; None: offsets with a Smooth-L1 loss.

    Returns:
        name -> for each seed what :func:`iou_by_size` measures on ``val``.
    """
    head, loss = cfg.MODEL.ROI_BOX_HEAD, build_localization_loss(cfg)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in grids}
    with tqdm.tqdm(total=len(grids) * num_seeds, desc="branches") as progress:
        for name, grid in grids.items():
            for seed in range(1, num_seeds + 1):
                torch.manual_seed(seed)
                branch = LocalizationBranch(
                    model.roi_heads.box_head,
                    head.BBOX_REG_WEIGHTS,
                    grid,
                    loss,
                    cfg.MODEL.CBBL.INIT_STD,
                    head.SMOOTH_L1_BETA,
                ).to(model.device)
                train_branch(branch, train, steps, seed)
                results[name].append(iou_by_size(branch.predict(val), val))
                progress.update()
    return results


def table_of_results(results: dict[str, list[dict[str, float]]], val: Regions) -> str:
    columns = list(results["Smooth-L1"][0])
    counts = [str(int(x.sum())) for x in size_classes(val.sizes).values()]
    rows = [
        [name, *(cell([of_seed[column] for of_seed in of_grid]) for column in columns)]
        for name, of_grid in results.items()
    ]
    rows.append(["proposals", *[str(len(val.sizes))] * 2, *counts])
    return markdown_table(["n, alpha, beta", *columns], rows)


def find_data_sets(args: argparse.Namespace, cfg: CfgNode) -> list[str]:
    """
    Returns:
        the data sets to train on and to measure on.

    Raises:
        UserError: one is not named, not there or without objects, or it is the same one.
    """
    names = []
    for option, named in (("train", cfg.DATASETS.TRAIN), ("dataset", cfg.DATASETS.TEST)):
        name = getattr(args, option) or next(iter(named), None)
        if name is None:
            raise UserError(f"no data set: give --{option}")
        check_registered(name, f"--{option}")
        if not any(record.get("annotations") for record in load_dataset(name, used_again=True)):
            raise UserError(f"{name}: has no annotated object: choose another one with --{option}")
        names.append(name)
    if names[0] == names[1]:
        raise UserError(f"{names[0]} is to be trained and measured on: choose another --dataset")
    return names


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    cfg = load_inference_config(args.weights, args.config_file, args.opts, None, args.dataset)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False  # boxes are all that is looked at
    cfg.freeze()
    c, head = cfg.MODEL.CBBL, cfg.MODEL.ROI_BOX_HEAD
    grids = {f"{c.NUM_INTERVALS},{c.ALPHA:g},{c.BETA:g}": build_grid(cfg)}
    if args.grids:
        grids = {text: read_grid(text) for text in args.grids}
    names = find_data_sets(args, cfg)
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    train, val = (foreground_regions(cfg, model, name, args.max_images) for name in names)
    results = compare(model, cfg, {"Smooth-L1": None, **grids}, train, val, args.seeds, args.steps)
    print(
        f"{len(train.targets)} proposals of {names[0]} match an object, {len(val.targets)} of "
        f"{names[1]}.\nOffsets of the former, after BBOX_REG_WEIGHTS "
        f"{tuple(head.BBOX_REG_WEIGHTS)}, for a grid from -alpha to alpha:\n\n"
        f"{table_of_offsets(train, head.BBOX_REG_WEIGHTS)}\n"
        f"Boxes on {names[1]}, percent:\n\n{table_of_results(results, val)}"
    )


if __name__ == "__main__":
    main()
