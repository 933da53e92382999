#!/usr/bin/env python
"""
Draw what a detector finds, beside the ground truth where there is one, enlarged so that small
objects can be seen.

    python tools/visualize.py --config-file configs/SmallShapes/demo.yaml \\
        --weights output/demo/model_final.pth --dataset small_shapes_val
    python tools/visualize.py --config-file configs/SmallShapes/demo.yaml \\
        --weights output/demo/model_final.pth --input photo.jpg folder 'other/*.png'

tools/predict.py draws the same pictures, and writes the boxes to files, too.
"""

import argparse
import os

from cbbl_d2.engine.cli import add_opts, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.inference import BatchPredictor, find_classes, load_inference_config
from cbbl_d2.inference.arguments import add_pictures, add_source, add_threshold
from cbbl_d2.inference.folder import make_folder
from cbbl_d2.inference.pictures import Pictures
from cbbl_d2.inference.run import predict_all
from cbbl_d2.inference.sources import IMAGE_TYPES, find_source
from cbbl_d2.messages import count
from detectron2.utils.logger import setup_logger


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("--weights", help="checkpoint of the model; default: MODEL.WEIGHTS")
    add_source(parser, "images, folders of images or glob patterns such as 'directory/*.jpg'")
    add_threshold(parser, "minimum score for predictions to be shown (default: 0.5)", 0.5)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the pictures; default: OUTPUT_DIR/pictures, or "
        "OUTPUT_DIR/pictures/NAME for --dataset NAME",
    )
    add_pictures(
        parser,
        "draw at most N images, evenly spread; default: 12 of a data set, all of --input",
    )
    add_opts(parser)
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    threshold = args.confidence_threshold
    cfg = load_inference_config(args.weights, args.config_file, args.opts, threshold, args.dataset)
    cfg.freeze()
    # All that can be wrong with the command line is found before the model is built.
    source = find_source(args.input, args.dataset, IMAGE_TYPES)
    classes = find_classes(cfg, dataset=args.dataset)
    folder = args.output or os.path.join(cfg.OUTPUT_DIR, "pictures", args.dataset or "")
    predictor = BatchPredictor(cfg)
    make_folder(folder, source.files)

    source = source.spread(args.num_images or (12 if args.dataset else None))
    pictures = Pictures(
        folder=folder,
        files=source.files,
        metadata=classes.metadata,
        threshold=threshold,
        scale=args.scale,
        ground_truth=not args.no_ground_truth,
        uncertainty=args.uncertainty,
        overview=True,
    )
    with pictures:
        skipped = predict_all(source, predictor, [pictures.take])
    skipped += pictures.skipped.count
    if not pictures.drawn:
        raise UserError(f"none of the {skipped} images could be drawn, see the lines above")
    note = f", {skipped} skipped" if skipped else ""
    print(f"{count(pictures.drawn, 'picture', 'pictures')} written to {folder}{note}")
    if not pictures.num_objects:
        print(pictures.nothing_found())


if __name__ == "__main__":
    main()
