#!/usr/bin/env python
"""
The gradient of the localization loss: pictures and a table.

curves: against the error of the box, for L2, Smooth-L1, IoU, GIoU and C-BBL, boxes of several sizes

    python tools/analyze_gradients.py curves --output curves.png

maps: over images, for checkpoints of a training, the earliest first; --config-file and --weights
can be given several times, to compare methods. Checkpoints on the way are written every
SOLVER.CHECKPOINT_PERIOD iterations.

    python tools/analyze_gradients.py maps --config-file configs/SmallShapes/cbbl.yaml \\
        --weights output/small_shapes_cbbl/model_0000199.pth \\
        output/small_shapes_cbbl/model_final.pth --dataset small_shapes_val --output maps.png

While a detector trains, SOLVER.GRADIENT_STATS_PERIOD 20 logs its gradients by object size.
table: these, early and late in training, for the runs of a study (see tools/run_study.py)

    python tools/analyze_gradients.py table tools/studies/faster_rcnn.yaml
"""

import argparse
import os

from cbbl_d2.analysis.gradient_curves import STD, plot_gradient_curves
from cbbl_d2.analysis.gradient_maps import (
    MapColumn,
    localization_gradient_map,
    plot_gradient_maps,
)
from cbbl_d2.analysis.gradient_table import gradients_as_markdown, summarize_gradients
from cbbl_d2.analysis.study import load_study
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.data.broken_images import NameBrokenImage
from cbbl_d2.data.dataset_checks import check_registered, load_dataset
from cbbl_d2.engine import check_model_config, load_config, load_weights, one_line_errors
from cbbl_d2.engine.cli import add_opts, number
from cbbl_d2.errors import UserError
from cbbl_d2.files import open_whole
from cbbl_d2.inference import load_inference_config
from cbbl_d2.inference.sources import spread
from cbbl_d2.modeling.build import build_grid
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model

OUTPUT_CURE = "give --output a file name, in a folder"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="curves|maps|table")

    curves = commands.add_parser("curves", help="gradient against the error of the box")
    curves.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="grid and weights of the offsets are those of its box head; default: the defaults",
    )
    curves.add_argument(
        "--std",
        type=number(float, 0),
        default=STD,
        metavar="WIDTH",
        help="how exactly the head of C-BBL knows the offset, in the unit of the grid "
        f"(default: {STD})",
    )
    curves.add_argument(
        "--largest-error",
        type=number(float, 0.1),
        default=8.0,
        metavar="PIXELS",
        help="where the curves end (default: 8)",
    )

    maps = commands.add_parser("maps", help="gradient over images, checkpoint by checkpoint")
    maps.add_argument(
        "--config-file",
        action="append",
        required=True,
        metavar="FILE",
        help="path to config file; each is followed by its --weights",
    )
    maps.add_argument(
        "--weights",
        action="append",
        nargs="+",
        required=True,
        metavar="FILE",
        help="checkpoints, one column each",
    )
    maps.add_argument("--dataset", required=True, metavar="NAME", help="registered data set")
    maps.add_argument(
        "--num-images",
        type=number(int, 1),
        default=4,
        metavar="N",
        help="images with objects, evenly spread over the data set (default: 4)",
    )
    maps.add_argument(
        "--seed", type=number(int, 0), default=0, help="of the sampling of regions (default: 0)"
    )

    table = commands.add_parser("table", help="gradients by object size, for the runs of a study")
    table.add_argument("study", help="YAML file")
    table.add_argument(
        "--head",
        default="box",
        help="box, rpn, or a stage of a cascade, such as box_stage0 (default: box)",
    )
    for command, default in ((curves, "curves.png"), (maps, "maps.png")):
        command.add_argument(
            "--output", default=default, metavar="FILE", help=f"PNG (default: {default})"
        )
        add_opts(command)
    return parser


def write_curves(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    grid, weights = build_grid(cfg), tuple(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    with open_whole(args.output, "wb", OUTPUT_CURE) as f:
        plot_gradient_curves(f, grid, args.largest_error, weights=weights, std=args.std)


def write_maps(args: argparse.Namespace) -> None:
    if len(args.config_file) != len(args.weights):
        raise UserError(
            f"{len(args.config_file)} --config-file and {len(args.weights)} --weights: give one "
            "--weights, with one or more files, after each --config-file"
        )
    cfgs = []
    for path, (weights, *_) in zip(args.config_file, args.weights):
        cfgs.append(load_inference_config(weights, path, args.opts))
        check_cbbl_config(cfgs[-1])
        check_model_config(cfgs[-1])
    check_registered(args.dataset, "--dataset")
    records = [x for x in load_dataset(args.dataset) if x.get("annotations")]
    if not records:
        raise UserError(f"--dataset {args.dataset}: none of its images has an object")
    records = spread(records, args.num_images)

    columns, drawn = [], [_mapper(cfgs[0])(record) for record in records]
    for path, cfg, weights in zip(args.config_file, cfgs, args.weights):
        inputs = [_mapper(cfg)(record) for record in records]
        if any(a["image"].shape != b["image"].shape for a, b in zip(inputs, drawn)):
            raise UserError(
                f"{path}: resizes images to another size than {args.config_file[0]}: give both the "
                "same INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST, after --opts"
            )
        model = build_model(cfg)
        for file in weights:
            load_weights(model, file)
            maps = [localization_gradient_map(model, x, args.seed) for x in inputs]
            names = [path, file] if len(cfgs) > 1 else [file]
            title = "\n".join(os.path.splitext(os.path.basename(x))[0] for x in names)
            columns.append(MapColumn(title, path, maps))
    with open_whole(args.output, "wb", OUTPUT_CURE) as f:
        plot_gradient_maps(f, drawn, columns, cfgs[0].INPUT.FORMAT)


def _mapper(cfg: CfgNode) -> NameBrokenImage:
    """Images as they are tested on, annotations as they are trained on."""
    options = DatasetMapper.from_config(cfg, is_train=True)
    options["augmentations"] = build_augmentation(cfg, is_train=False)
    return NameBrokenImage(DatasetMapper(**options))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.command == "table":
        print(gradients_as_markdown(summarize_gradients(load_study(args.study), args.head)))
        return
    (write_curves if args.command == "curves" else write_maps)(args)
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
