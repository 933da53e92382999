#!/usr/bin/env python
"""
Which grid localizes best on your data, within minutes, on a Faster R-CNN that is trained already:

    python tools/compare_grids.py --config-file configs/HIT-UAV/cbbl.yaml \\
        --weights output/hit_uav_cbbl/model_final.pth --grids 5,5,1 5,3.5,1 10,3.5,0

A grid is MODEL.CBBL.NUM_INTERVALS,ALPHA,BETA. For each one, and for Smooth-L1, a branch of its own
(the layers of the box head and a last one) learns localization alone, from the proposals that match
an object; the rest of the detector stays as it is. Printed are the offsets that a grid has to cover
and the IoU of the predicted boxes with the objects, by object size: mean and standard deviation
over seeds. Then train with the best two or three: what a loss does to classification is seen only
there. See docs/tuning.md.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import tqdm
from cbbl_d2.analysis.localization_branch import (
    LocalizationBranch,
    Regions,
    foreground_regions,
    iou_by_size,
    train_branch,
)
from cbbl_d2.analysis.markdown import markdown_table
from cbbl_d2.data.dataset_checks import check_registered
from cbbl_d2.distribution import exponential_grid
from cbbl_d2.engine.checkpoint import load_weights
from cbbl_d2.engine.cli import add_opts, number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.inference import load_inference_config
from cbbl_d2.modeling.build import build_localization_loss
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.logger import setup_logger

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
        "--max-images", type=number(int, 1), default=1000, metavar="N", help="of each data set"
    )
    parser.add_argument("--seeds", type=number(int, 1), default=3, metavar="N")
    parser.add_argument("--steps", type=number(int, 1), default=800, metavar="N")
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


def compare(cfg: CfgNode, grids: dict[str, torch.Tensor | None], args) -> str:
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    train = foreground_regions(cfg, model, args.train, args.max_images)
    val = foreground_regions(cfg, model, args.dataset, args.max_images)
    head = cfg.MODEL.ROI_BOX_HEAD
    loss = build_localization_loss(cfg)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in grids}
    with tqdm.tqdm(total=len(grids) * args.seeds, desc="branches") as progress:
        for name, grid in grids.items():
            for seed in range(1, args.seeds + 1):
                torch.manual_seed(seed)
                branch = LocalizationBranch(
                    model.roi_heads.box_head,
                    head.BBOX_REG_WEIGHTS,
                    grid,
                    loss,
                    head.SMOOTH_L1_BETA,
                ).to(model.device)
                train_branch(branch, train, args.steps, seed)
                results[name].append(iou_by_size(branch.predict(val), val))
                progress.update()
    columns = list(results["Smooth-L1"][0])
    rows = [
        [name, *(cell([of_seed[column] for of_seed in of_grid]) for column in columns)]
        for name, of_grid in results.items()
    ]
    return (
        f"{args.train}: {len(train.targets)} proposals match an object; {args.dataset}: "
        f"{len(val.targets)}. After the weights {tuple(head.BBOX_REG_WEIGHTS)}:\n\n"
        f"{table_of_offsets(train, head.BBOX_REG_WEIGHTS)}\n"
        f"{markdown_table(['n, alpha, beta', *columns], rows)}"
    )


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    cfg = load_inference_config(args.weights, args.config_file, args.opts, None, args.dataset)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False  # boxes are all that is looked at
    cfg.freeze()
    for option, names in (("train", cfg.DATASETS.TRAIN), ("dataset", cfg.DATASETS.TEST)):
        name = getattr(args, option) or next(iter(names), None)
        if name is None:
            raise UserError(f"no data set: give --{option}")
        check_registered(name, f"--{option}")
        setattr(args, option, name)
    c = cfg.MODEL.CBBL
    texts = args.grids or [f"{c.NUM_INTERVALS},{c.ALPHA:g},{c.BETA:g}"]
    print(compare(cfg, {"Smooth-L1": None, **{text: read_grid(text) for text in texts}}, args))


if __name__ == "__main__":
    main()
