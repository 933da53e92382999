#!/usr/bin/env python
"""
Draw what a detector finds, beside the ground truth where there is one, enlarged so that small
objects can be seen.

    python tools/visualize.py --config-file configs/SmallShapes/demo.yaml \\
        --weights output/demo/model_final.pth --dataset small_shapes_val
    python tools/visualize.py --config-file configs/SmallShapes/demo.yaml \\
        --weights output/demo/model_final.pth --input photo.jpg folder 'other/*.png'
"""

import argparse
import logging
import os
import sys
from collections import Counter

import cbbl_d2  # noqa: F401  isort: skip  (first: it hides a warning that Detectron2 causes)
import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from cbbl_d2.architectures import set_score_threshold
from cbbl_d2.data.coco_format import register_from_config
from cbbl_d2.data.dataset_checks import check_registered, load_dataset, set_num_classes
from cbbl_d2.engine.checkpoint import load_weights
from cbbl_d2.engine.cli import load_config, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_write
from cbbl_d2.inference.arguments import number
from cbbl_d2.inference.sources import IMAGE_TYPES, find_files, read_rgb
from cbbl_d2.visualization import contact_sheet, draw_pair, shrink

logger = logging.getLogger("cbbl_d2.visualize")

OVERVIEW = "overview"
# The pictures of the contact sheet are kept in memory until the end: at most 48, at this width.
MAX_OVERVIEW, OVERVIEW_WIDTH = 48, 1500


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("--weights", help="checkpoint of the model; default: MODEL.WEIGHTS")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="images, folders of images or glob patterns such as 'directory/*.jpg'",
    )
    source.add_argument("--dataset", metavar="NAME", help="registered data set, with ground truth")
    parser.add_argument(
        "--num-images",
        type=number(int, 1),
        metavar="N",
        help="draw at most N images, evenly spread; default: 12 of a data set, all of --input",
    )
    parser.add_argument(
        "--confidence-threshold",
        "--score-threshold",
        dest="confidence_threshold",
        type=number(float, 0, 1),
        default=0.5,
        metavar="SCORE",
        help="minimum score for predictions to be shown (default: 0.5)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the pictures; default: OUTPUT_DIR/pictures, or "
        "OUTPUT_DIR/pictures/NAME for --dataset NAME",
    )
    parser.add_argument(
        "--scale",
        type=_scale,
        default=None,
        metavar="auto|FACTOR",
        help="enlargement; auto (the default): the smallest whole factor that makes the short "
        "side 600 pixels or more",
    )
    parser.add_argument("--no-ground-truth", action="store_true", help="draw the predictions alone")
    parser.add_argument(
        "--opts",
        help="Modify config options using the command-line 'KEY VALUE' pairs",
        default=[],
        nargs=argparse.REMAINDER,
    )
    return parser


def _scale(text: str) -> float | None:
    return None if text == "auto" else number(float, 0.01, 100)(text)


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    set_score_threshold(cfg, args.confidence_threshold)
    register_from_config(cfg)
    if args.dataset is not None:
        check_registered(args.dataset, "--dataset")
        cfg.DATASETS.TEST = (args.dataset,)
    set_num_classes(cfg, eval_only=True)
    cfg.freeze()
    return cfg


def build_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Detectron2's predictor, with a check that the weights fit the model."""
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise UserError("no weights: give --weights, e.g. --weights OUTPUT_DIR/model_final.pth")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""  # it would load them without the check
    predictor = DefaultPredictor(cfg)
    load_weights(predictor.model, weights)
    return predictor


# -- what to draw ----------------------------------------------------------------------------------


def find_metadata(cfg: CfgNode) -> Metadata | None:
    """Of the data set that the model was made for, to name the classes of its predictions."""
    if not cfg.DATASETS.TEST:
        return None
    name = cfg.DATASETS.TEST[0]
    # Data sets in COCO format know their classes only once their file has been read.
    if not MetadataCatalog.get(name).get("thing_classes", None):
        try:
            check_registered(name, "DATASETS.TEST")
            load_dataset(name)
        except UserError as e:
            logger.info(f"No class names: {e}")
    return MetadataCatalog.get(name)


def spread(items: list, number: int | None) -> list:
    """``number`` items at equal distances: neighbours are often much alike, as in a video."""
    if number is None or number >= len(items):
        return items
    return [items[i * len(items) // number] for i in range(number)]


def picture_names(files: list[str]) -> list[str]:
    """
    A name without extension for the picture of every file: its own, or with as many of its
    folders as tell it from the others. They differ also where upper and lower case are the same.
    """
    names, taken = [], {OVERVIEW}
    stems = [os.path.splitext(os.path.basename(x))[0].lower() for x in files]
    shared = {stem for stem, count in Counter(stems).items() if count > 1}
    for file, stem in zip(files, stems, strict=True):
        parts = os.path.abspath(file).strip(os.sep).split(os.sep)
        name, depth = os.path.splitext(parts.pop())[0], 0
        # All that share a name get their folder, not just the second one.
        while parts and (name.lower() in taken or (depth == 0 and stem in shared)):
            name, depth = f"{parts.pop()}_{name}", depth + 1
        number, unique = 2, name
        while unique.lower() in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique.lower())
        names.append(unique)
    return names


# -- drawing ---------------------------------------------------------------------------------------


def draw_all(
    records: list[dict],
    predictor: DefaultPredictor,
    metadata: Metadata | None,
    folder: str,
    args: argparse.Namespace,
) -> tuple[int, int, int]:
    """
    Write one picture for each record, and the overview.

    Args:
        records: dataset dicts; those without "annotations" have no ground truth.

    Returns:
        numbers of images drawn, of images skipped because they cannot be read, of predictions
        drawn.
    """
    names = picture_names([r["file_name"] for r in records])
    drawn, skipped, num_predictions, overview = 0, 0, 0, []
    note = f"score \N{GREATER-THAN OR EQUAL TO} {args.confidence_threshold:g}"
    for record, name in zip(tqdm(records, unit="image"), names, strict=True):
        try:
            picture, num = draw_record(record, predictor, metadata, args, note)
        except UserError as e:
            skipped += 1
            tqdm.write(f"skipped: {e}", file=sys.stderr)
            continue
        write_png(os.path.join(folder, f"{name}.png"), picture)
        drawn += 1
        num_predictions += num
        if len(overview) < MAX_OVERVIEW:
            overview.append(shrink(picture, OVERVIEW_WIDTH))
    if len(overview) > 1:
        write_png(os.path.join(folder, f"{OVERVIEW}.png"), contact_sheet(overview))
        if drawn > len(overview):
            logger.info(f"{OVERVIEW}.png shows the first {len(overview)} pictures")
    return drawn, skipped, num_predictions


def make_folder(folder: str, records: list[dict]) -> None:
    """
    Raises:
        UserError: it cannot be made, or is where the images are: pictures might replace them.
    """
    sources = {os.path.dirname(r["file_name"]) for r in records}
    if os.path.realpath(folder) in {os.path.realpath(x) for x in sources}:
        raise UserError(f"{folder}: images to draw are in this folder, choose another --output")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made a folder ({e.strerror})") from e


def draw_record(
    record: dict,
    predictor: DefaultPredictor,
    metadata: Metadata | None,
    args: argparse.Namespace,
    note: str,
) -> tuple[np.ndarray, int]:
    """
    Returns:
        the picture, and the number of predictions in it.

    Raises:
        UserError: this image cannot be read or drawn.
    """
    path = record["file_name"]
    image = read_rgb(path, record)
    instances = predictor(image[:, :, ::-1])["instances"]  # DefaultPredictor takes BGR
    instances = instances[instances.scores >= args.confidence_threshold]
    picture = draw_pair(
        image,
        None if args.no_ground_truth else record.get("annotations"),
        instances,
        metadata,
        scale=args.scale,
        name=os.path.basename(path),
        note=note,
    )
    return picture, len(instances)


def write_png(path: str, picture: np.ndarray) -> None:
    data = cv2.imencode(".png", picture[:, :, ::-1])[1]
    try:
        with atomic_write(path, "wb") as f:
            f.write(data.tobytes())
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    cfg = setup(args)
    # All that can be wrong with the command line is found before the model is built.
    if args.dataset is not None:
        records = load_dataset(args.dataset)
        metadata = MetadataCatalog.get(args.dataset)
        num_images = args.num_images or 12
    else:
        records = [{"file_name": x} for x in find_files(args.input, IMAGE_TYPES)]
        metadata = find_metadata(cfg)
        num_images = args.num_images
    folder = args.output or os.path.join(cfg.OUTPUT_DIR, "pictures", args.dataset or "")
    predictor = build_predictor(cfg)
    make_folder(folder, records)
    records = spread(records, num_images)
    drawn, skipped, num_predictions = draw_all(records, predictor, metadata, folder, args)
    if not drawn:
        raise UserError(f"none of the {skipped} images could be drawn, see the lines above")
    note = f", {skipped} skipped" if skipped else ""
    print(f"{drawn} picture{'' if drawn == 1 else 's'} written to {folder}{note}")
    if not num_predictions:
        print(
            f"No prediction has a score of {args.confidence_threshold:g} or more: try a lower "
            "--confidence-threshold"
        )


if __name__ == "__main__":
    main()
