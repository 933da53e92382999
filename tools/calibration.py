#!/usr/bin/env python
"""
How far the deviations that C-BBL's detections carry, pred_boxes_std, are those of their errors; and
the scale for each side, MODEL.CBBL.STD_SCALE, that makes them so.

    python tools/calibration.py --config-file configs/HIT-UAV/cbbl.yaml \\
        --weights output/hit_uav_cbbl/model_final.pth --dataset hit_uav_half_val

Detections that match an object at --iou are compared with it, side by side. The scale is fitted on
one half of the data set and judged on the other; the images of one sequence, where the data set
names it, are in the same half. Written to --output: calibration.md with the tables, calibration.png
with the reliability plot, calibration.json with the numbers. See docs/uncertainty.md.
"""

import argparse
import math
import os
from typing import Any

from cbbl_d2.analysis.markdown import markdown_table
from cbbl_d2.config import stock_boxes
from cbbl_d2.engine.cli import add_opts, number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation import calibration
from cbbl_d2.evaluation.calibration import SIDES, MatchedSides
from cbbl_d2.evaluation.calibration_plot import plot_calibration
from cbbl_d2.evaluation.slices import build_prediction_evaluator
from cbbl_d2.files import open_whole
from cbbl_d2.inference import BatchPredictor, find_classes, load_inference_config
from cbbl_d2.inference.folder import make_folder
from cbbl_d2.inference.results import Results
from cbbl_d2.inference.run import predict_all
from cbbl_d2.inference.sources import find_source
from cbbl_d2.inference.writers import write_json
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from pycocotools.coco import COCO


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="default: that beside the checkpoint")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of the model")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="not that of the training")
    parser.add_argument(
        "--iou",
        type=number(float, 0.1, 0.95),
        default=0.5,
        help="from which on a detection matches an object (default: 0.5)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="default: calibration beside the checkpoint"
    )
    parser.add_argument("--batch-size", type=number(int, 1), default=4, metavar="N")
    add_opts(parser)
    return parser


def detect_all(cfg: CfgNode, dataset: str, batch_size: int, folder: str) -> tuple[COCO, list[dict]]:
    """
    Returns:
        the ground truth, and the detections as COCO results.

    Raises:
        UserError: images cannot be read.
    """
    source, classes = find_source(None, dataset), find_classes(cfg, dataset=dataset)
    truth = build_prediction_evaluator(cfg, dataset, folder).ground_truth
    predictor, results = BatchPredictor(cfg), Results()
    skipped = predict_all(source, predictor, [results.take], batch_size)
    if skipped:
        raise UserError(f"{dataset}: {skipped} of its images cannot be read: restore them")
    found = [d for result in results.in_order() for d in result.detections]
    return truth, [{**d, "category_id": classes.ids[d["category_id"]]} for d in found]


def tables(versions: dict[str, MatchedSides]) -> str:
    """
    Args:
        versions: what the deviations are called -> the same detections with them.
    """
    columns = {name: calibration.summary(x) for name, x in versions.items()}
    text = _table("all sides and sizes", columns)
    for name, matched in versions.items():
        columns = {x: calibration.summary(matched.side(i)) for i, x in enumerate(SIDES)}
        text += "\n" + _table(f"by side, {name}", columns)
    for name, matched in versions.items():
        classes = calibration.size_classes(matched)
        columns = {f"{x} px ({len(part)})": calibration.summary(part) for x, part in classes}
        text += "\n" + _table(f"by size, {name}", columns)
    return text


def _table(title: str, columns: dict[str, dict[str, float]]) -> str:
    keys = next(iter(columns.values()))
    rows = [[key, *(f"{column[key]:.3f}" for column in columns.values())] for key in keys]
    return markdown_table([title, *columns], rows)


def numbers(matched: MatchedSides) -> dict[str, Any]:
    """For a JSON file, which has no NaN."""

    def summary(part: MatchedSides) -> dict[str, float | None]:
        values = calibration.summary(part).items()
        return {key: value if math.isfinite(value) else None for key, value in values}

    return {
        **summary(matched),
        "by side": {x: summary(matched.side(i)) for i, x in enumerate(SIDES)},
        "by size": {x: summary(part) for x, part in calibration.size_classes(matched)},
    }


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    cfg = load_inference_config(args.weights, args.config_file, args.opts, None, args.dataset)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False  # boxes are all that is looked at
    cfg.freeze()
    if stock := stock_boxes(cfg):
        raise UserError(
            f"{stock}: its boxes have no deviations: give a detector whose boxes are C-BBL's"
        )
    if args.dataset in cfg.DATASETS.TRAIN:
        print(
            f"{args.dataset} is in DATASETS.TRAIN: on the images that it was trained on a detector "
            "has smaller errors; the scale would be too small"
        )
    folder = args.output or os.path.join(os.path.dirname(args.weights), "calibration")
    make_folder(folder, [])
    truth, detections = detect_all(cfg, args.dataset, args.batch_size, folder)
    matched = calibration.match_sides(truth, detections, args.iou)
    first, second = calibration.halves(matched)
    scale = calibration.fit_scale(first)
    versions = {"as it is": second, "scaled": second.scaled(scale)}

    title = (
        f"{args.dataset}: {len(matched)} of {matched.num_detections} detections match an object at "
        f"IoU {args.iou:g}; scale fitted on {len(first)}, judged on {len(second)}"
    )
    key = [round(float(old * new), 3) for old, new in zip(cfg.MODEL.CBBL.STD_SCALE, scale)]
    text = (
        f"{title}\n\n{tables(versions)}\nMODEL.CBBL.STD_SCALE: {tuple(key)}\n"
        f'With this checkpoint: tools/predict.py --opts MODEL.CBBL.STD_SCALE "{tuple(key)}"\n'
    )
    with open_whole(os.path.join(folder, "calibration.md")) as f:
        f.write(text)
    with open_whole(os.path.join(folder, "calibration.png"), "wb") as f:
        plot_calibration(f, title, versions)
    write_json(
        os.path.join(folder, "calibration.json"),
        {"std_scale": key, **{name: numbers(x) for name, x in versions.items()}},
    )
    print(f"\n{text}\nWritten to {folder}")


if __name__ == "__main__":
    main()
