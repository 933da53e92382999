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
import os

from cbbl_d2.analysis.markdown import markdown_table
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
    summaries = [calibration.summary(x) for x in versions.values()]
    rows = [[key, *(f"{s[key]:.3f}" for s in summaries)] for key in summaries[0]]
    means = [calibration.mean_errors(x) for x in versions.values()]
    rows += [
        [f"mean error [px], {s}", *(f"{m[i]:.2f}" for m in means)] for i, s in enumerate(SIDES)
    ]
    ranks = [calibration.spearman(x) for x in versions.values()]
    rows += [[f"Spearman, {s}", *(f"{r[i]:.3f}" for r in ranks)] for i, s in enumerate(SIDES)]
    text = markdown_table(["all sizes", *versions], rows) + "\n"
    header, rows = ["size [px]", "detections"], []
    for share in ("68 %", "95 %"):
        header += [f"{share}, {name}" for name in versions]
    for parts in zip(*map(calibration.size_classes, versions.values())):
        cells = [f"{calibration.coverage(part, z):.3f}" for z in (1.0, 1.96) for _, part in parts]
        rows.append([parts[0][0], str(len(parts[0][1])), *cells])
    return text + markdown_table(header, rows)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    cfg = load_inference_config(args.weights, args.config_file, args.opts, None, args.dataset)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False  # boxes are all that is looked at
    cfg.freeze()
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
        {
            "std_scale": key,
            **{name: calibration.summary(x) for name, x in versions.items()},
        },
    )
    print(f"\n{text}\nWritten to {folder}")


if __name__ == "__main__":
    main()
