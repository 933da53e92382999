#!/usr/bin/env python
"""
What to know about a data set in COCO format before training on it: numbers, sizes of the objects in
the files and at the model's input, what is wrong with boxes and images, and settings that suit it,
as YAML to paste into a config file.

    python tools/check_dataset.py --json my/train.json --images my/images
    python tools/check_dataset.py --config-file configs/my.yaml --dataset my_train
    python tools/check_dataset.py --config-file configs/my.yaml --dataset my_train \\
        --opts INPUT.MIN_SIZE_TEST 1200

What is wrong is printed as warnings; the exit status is 1 only where the data cannot be read.
"""

import argparse
import os
from pathlib import Path

from cbbl_d2.config import check_cbbl_config
from cbbl_d2.data.coco_format import read_coco_json, register_from_config
from cbbl_d2.data.dataset_checks import check_registered
from cbbl_d2.dataset_report.report import (
    DatasetReport,
    check_images,
    format_report,
    read_dataset,
    report_on,
)
from cbbl_d2.dataset_report.size_histogram import plot_sizes
from cbbl_d2.dataset_report.suggestions import anchor_levels, format_yaml, suggest_settings
from cbbl_d2.engine import check_engine_config, check_model_config
from cbbl_d2.engine.cli import add_opts, load_config, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.files import open_whole
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "Base-CBBL-RCNN-FPN.yaml"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", metavar="FILE", help="annotation file, with --images")
    source.add_argument(
        "--dataset",
        metavar="NAME",
        help="registered data set, for example one of DATASETS.COCO_FORMAT in the config file",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images, with --json")
    parser.add_argument(
        "--config-file",
        default=str(DEFAULT_CONFIG),
        metavar="FILE",
        help="config of the detector: its input size and anchors are compared with the data; "
        f"default: configs/{DEFAULT_CONFIG.name}",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="picture of the sizes, PNG; default: OUTPUT_DIR/dataset_report/NAME.png",
    )
    parser.add_argument(
        "--keep-input-size",
        action="store_true",
        help="suggest anchors for the input size of the config, and no other size",
    )
    parser.add_argument(
        "--skip-images", action="store_true", help="do not read the images, which takes longest"
    )
    add_opts(parser)
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    if (args.json is None) != (args.images is None):
        raise UserError("--json and --images belong together: give both, or --dataset")
    cfg = load_config(args.config_file, args.opts)
    register_from_config(cfg)
    check_cbbl_config(cfg)
    check_engine_config(cfg, eval_only=True)
    check_model_config(cfg)
    cfg.freeze()
    return cfg


def read(args: argparse.Namespace) -> tuple[dict, str, str]:
    """
    Returns:
        content in COCO's format, annotation file, image folder.
    """
    if args.dataset is not None:
        check_registered(args.dataset, "--dataset")
        return read_dataset(args.dataset)
    content = read_coco_json(args.json)
    if not os.path.isdir(args.images):
        raise UserError(f"--images {args.images}: no such folder: correct the path")
    return content, args.json, args.images


def write_picture(path: str, report: DatasetReport, cfg: CfgNode, title: str) -> None:
    at_input = report.objects.resized(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    levels = anchor_levels(cfg)
    anchors = sorted({size for level in levels.sizes for size in level}) if levels else []
    columns = {
        "in the image file": report.objects.sizes,
        f"at the model's input (short side {cfg.INPUT.MIN_SIZE_TEST})": at_input.sizes,
    }
    with open_whole(path, "wb") as f:
        plot_sizes(f, title, columns, report.objects.classes, report.class_names, anchors)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    cfg = setup(args)
    content, json_file, image_root = read(args)
    report = report_on(content, json_file, image_root, args.dataset or "")
    suggestions = suggest_settings(cfg, report.objects, report.class_names, args.keep_input_size)
    name = args.dataset or os.path.splitext(os.path.basename(args.json))[0]
    path = args.output or os.path.join(cfg.OUTPUT_DIR, "dataset_report", f"{name}.png")
    if not args.skip_images:
        report.warnings.extend(check_images(content, image_root, cfg.INPUT.FORMAT))
    write_picture(path, report, cfg, name)

    print(format_report(report, cfg))
    if args.skip_images:
        print("The images were not read (--skip-images).")
    print(f"\nSuggested settings, for {args.config_file}:\n")
    print(format_yaml(suggestions))
    print(f"\n{path} shows the sizes")


if __name__ == "__main__":
    main()
