#!/usr/bin/env python
"""
Run a trained detector on images, folders, glob patterns and videos, or on a registered data set,
and write what it finds: pictures, COCO results, CSV, and labels that annotation tools import.

    python tools/predict.py --weights output/x/model_best.pth --input photo.jpg folder clip.mp4
    python tools/predict.py --weights output/x/model_best.pth --input 'scans/*.tif' --slice 320
    python tools/predict.py --weights output/x/model_best.pth --dataset my_val --slice 320
    python tools/predict.py --weights output/x/model_best.pth --dataset my_val --num-images 20

The config is the one that the training has stored beside the checkpoint. An ONNX file of
tools/export_model.py (--weights model.onnx) needs none. Written to --output:

    pictures/            the images with the boxes drawn, beside the ground truth of a data set;
                         videos/ the same of videos
    predictions.json     COCO results: [{image_id, category_id, bbox, score}, ...]
    annotations.json     COCO annotations with images and categories, for CVAT and Label Studio
    predictions.csv      one line for each box
    yolo/                labels/*.txt, classes.txt and data.yaml
    explained/           a figure for each --explain

With --dataset, AP and APvs are computed as train_net.py does, and go to metrics.json, unless
--num-images leaves images out.
"""

import argparse
import contextlib
import io
import os

from cbbl_d2.config import stock_boxes
from cbbl_d2.data.broken_images import large_images
from cbbl_d2.data.dataset_checks import warn_of_many_objects
from cbbl_d2.engine.cli import add_opts, number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.rules import AP_COLUMNS
from cbbl_d2.evaluation.slices import build_prediction_evaluator
from cbbl_d2.inference import BatchPredictor, find_classes, load_inference_config
from cbbl_d2.inference.arguments import add_pictures, add_source, add_threshold
from cbbl_d2.inference.classes import Classes, say_class_names
from cbbl_d2.inference.explanation import Explanations, Target, check_targets
from cbbl_d2.inference.folder import make_folder
from cbbl_d2.inference.onnx_model import OnnxPredictor
from cbbl_d2.inference.pictures import Pictures
from cbbl_d2.inference.results import ImageResult, Results
from cbbl_d2.inference.run import Predictor, predict_all
from cbbl_d2.inference.slicing import build_sliced_predictor
from cbbl_d2.inference.sources import Source, find_source
from cbbl_d2.inference.writers import WRITERS, write_json
from cbbl_d2.messages import count, listed
from cbbl_d2.modeling import keep_distributions
from cbbl_d2.visualization import ClassStyle
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import create_small_table, setup_logger

FORMATS = ("pictures", *WRITERS)
# The lowest score, unless AP needs them all.
THRESHOLD = 0.5


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="checkpoint of the model, or an ONNX file"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="config of the model; default: config.yaml beside the checkpoint",
    )
    add_source(parser, "images, videos, folders of them, or glob patterns such as 'folder/*.jpg'")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the results; default: predictions beside the checkpoint",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"of {', '.join(FORMATS)}; default: all, for a whole --dataset all but pictures",
    )
    add_threshold(
        parser,
        f"lowest score of a prediction (default: {THRESHOLD}; for a whole --dataset that of the "
        f"config, which AP needs, and {THRESHOLD} in pictures)",
    )
    parser.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=4,
        metavar="N",
        help="images, or slices, that the model gets at once (default: 4)",
    )
    parser.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="names of the classes in the order of training, or one text file with a name in each "
        "line; default: those of the data set of the training",
    )
    add_pictures(
        parser, "predict on at most N files, evenly spread; default: all. No AP for a data set"
    )
    slicing = parser.add_argument_group("large images (needs the package sahi)")
    slicing.add_argument(
        "--slice",
        type=number(int, 16),
        metavar="PIXELS",
        help="cut the images into squares of this size; choose that of the images of the training",
    )
    slicing.add_argument(
        "--overlap",
        type=number(float, 0, 0.9),
        metavar="SHARE",
        help="of neighboring slices (default: 0.2)",
    )
    slicing.add_argument(
        "--no-whole-image",
        action="store_true",
        help="predict on the slices alone, and not also on the whole image",
    )
    parser.add_argument(
        "--explain",
        nargs="+",
        type=explained_detection,
        default=[],
        metavar="IMAGE:INDEX",
        help="also write a figure of this detection and the distributions that its box is made of; "
        "INDEX counts the detections of an image from 0, the best score first",
    )
    add_opts(parser)
    return parser


def explained_detection(text: str) -> Target:
    """A ``type`` for argparse."""
    try:
        return Target.parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not IMAGE:INDEX, such as a.jpg:0") from e


def has_metrics(args: argparse.Namespace) -> bool:
    return args.dataset is not None and args.num_images is None


def setup(args: argparse.Namespace) -> tuple[CfgNode, OnnxPredictor | None]:
    """The config, and of an ONNX file its predictor."""
    if args.slice is None and (args.overlap is not None or args.no_whole_image):
        raise UserError("--overlap and --no-whole-image belong to --slice: give it, too")
    if args.uncertainty and args.formats and "pictures" not in args.formats:
        raise UserError("--uncertainty is drawn into pictures: add pictures to --formats")
    if args.slice is not None and args.explain:
        raise UserError("--explain: not with --slice, whose boxes come from many slices")
    threshold = args.confidence_threshold
    if threshold is None and not has_metrics(args):
        threshold = THRESHOLD
    onnx = None
    if args.weights.endswith(".onnx"):
        if args.config_file is not None:
            raise UserError(f"--config-file: {args.weights} has its config in it: leave it out")
        if args.explain:
            raise UserError("--explain: an exported model has no distributions: give a checkpoint")
        onnx = OnnxPredictor(args.weights)
        if args.confidence_threshold is None and threshold is not None:
            threshold = max(threshold, onnx.score_threshold)
        cfg = onnx.config(args.opts, threshold, args.dataset)
    else:
        cfg = load_inference_config(
            args.weights, args.config_file, args.opts, threshold, args.dataset
        )
    if args.slice is not None and cfg.MODEL.MASK_ON:
        print("--slice: boxes without masks, which are not put together across slices")
        cfg.MODEL.MASK_ON = False
        if onnx is not None:
            onnx.has_masks = False
    cfg.freeze()
    return cfg, onnx


def build_predictor(
    cfg: CfgNode, onnx: OnnxPredictor | None, args: argparse.Namespace
) -> Predictor:
    if args.slice is None:
        return onnx or BatchPredictor(cfg)
    overlap = 0.2 if args.overlap is None else args.overlap
    return build_sliced_predictor(
        cfg, args.slice, overlap, not args.no_whole_image, args.batch_size, onnx
    )


def build_pictures(
    folder: str, source: Source, classes: Classes, args: argparse.Namespace
) -> Pictures:
    threshold = args.confidence_threshold
    return Pictures(
        folder=os.path.join(folder, "pictures"),
        files=source.files,
        metadata=classes.metadata,
        threshold=THRESHOLD if threshold is None else threshold,
        above=THRESHOLD if threshold is None and has_metrics(args) else None,
        scale=args.scale,
        ground_truth=not args.no_ground_truth,
        uncertainty=args.uncertainty,
        video_folder=os.path.join(folder, "videos"),
    )


def build_explanations(
    folder: str,
    source: Source,
    classes: Classes,
    predictor: Predictor,
    cfg: CfgNode,
    args: argparse.Namespace,
) -> Explanations:
    """
    Raises:
        UserError: the detector has no distributions.
    """
    names = keep_distributions(predictor.model)
    if not names:
        raise UserError(
            f"--explain: {stock_boxes(cfg)} has no distributions: leave it out, or give a detector "
            "whose boxes are C-BBL's"
        )
    folder, style = os.path.join(folder, "explained"), ClassStyle(classes.metadata)
    label = "detection, after voting" if cfg.MODEL.CBBL.VOTING_SIGMA > 0 else "detection"
    return Explanations(folder, args.explain, source, names, style, label)


# -- what is printed -------------------------------------------------------------------------------


def say_earlier_files(folder: str) -> None:
    parts = {x: os.path.join(folder, x) for x in ("pictures", "videos", "yolo/labels")}
    left = [part for part, path in parts.items() if os.path.isdir(path) and os.listdir(path)]
    if left:
        print(
            f"{folder}: {listed(left)} {'has' if len(left) == 1 else 'have'} files of an earlier "
            "prediction, which stay unless this one writes files of the same names"
        )


def say_what_is_found(
    results: list[ImageResult],
    folder: str,
    skipped: int,
    pictures: Pictures,
    limit: int,
    where: str,
) -> None:
    """
    Args:
        limit: objects that the model reports for an image at most; -1: any number.
        where: to set another one.
    """
    objects = sum(len(r.detections) for r in results)
    notes = {"skipped": skipped, "not drawn": pictures.skipped.count}
    print(
        f"{count(objects, 'object', 'objects')} in {count(len(results), 'image', 'images')}, "
        f"written to {folder}" + "".join(f", {n} {what}" for what, n in notes.items() if n)
    )
    full = sum(len(r.detections) >= limit for r in results) if limit >= 0 else 0
    if full:
        print(
            f"{count(full, 'image has', 'images have')} {limit} objects, as many as "
            f"TEST.DETECTIONS_PER_IMAGE allows: there may be more, raise it {where} or use --slice"
        )


def finish_metrics(evaluator: COCOEvaluator, folder: str, dataset: str, skipped: int) -> None:
    """
    Raises:
        UserError: images are missing, or the file cannot be written.
    """
    if skipped:
        raise UserError(
            f"{dataset}: no AP, because {skipped} of its images cannot be read: restore them"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = evaluator.evaluate()
    write_json(os.path.join(folder, "metrics.json"), metrics)
    for task, numbers in metrics.items():
        table = create_small_table({k: numbers[k] for k in AP_COLUMNS if k in numbers})
        print(f"{task}\n{table}")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    with contextlib.nullcontext() if args.slice is None else large_images():
        run(args)


def run(args: argparse.Namespace) -> None:
    cfg, onnx = setup(args)
    # All that can be wrong with the command line is found before the model is built.
    source = find_source(args.input, args.dataset)
    check_targets(args.explain, source.spread(args.num_images))
    classes = find_classes(cfg, args.class_names, args.dataset, onnx and onnx.classes)
    say_class_names(classes)
    folder = args.output or os.path.join(os.path.dirname(args.weights), "predictions")
    predictor = build_predictor(cfg, onnx, args)
    make_folder(folder, source.files, ("pictures", "videos"))
    say_earlier_files(folder)

    is_sliced = args.slice is not None
    if args.dataset is not None and not is_sliced:
        warn_of_many_objects(cfg, args.dataset, source.records)
    source = source.spread(args.num_images)
    results, evaluator = Results(), None
    pictures = build_pictures(folder, source, classes, args)
    draws = args.uncertainty or not has_metrics(args)
    formats = args.formats or [x for x in FORMATS if x != "pictures" or draws]
    explanations = None
    if args.explain:
        explanations = build_explanations(folder, source, classes, predictor, cfg, args)
    takers = [explanations.take] if explanations else []
    takers += [pictures.take] if "pictures" in formats else []
    takers.append(results.take)
    if has_metrics(args):
        evaluator = build_prediction_evaluator(cfg, args.dataset, folder, is_sliced)
        # Last of all: it shifts keypoints in place.
        takers.append(lambda frame, x: evaluator.process([frame.record], [{"instances": x}]))
    with pictures:
        skipped = predict_all(source, predictor, takers, args.batch_size)

    found = results.in_order()
    if not found:
        raise UserError(f"none of the {skipped} files could be read, see the lines above")
    for name, write in (WRITERS[x] for x in formats if x in WRITERS):
        write(os.path.join(folder, name), found, classes)
    if explanations and explanations.written:
        print(f"Explained: {', '.join(explanations.written)}")
    limit = -1 if is_sliced else cfg.TEST.DETECTIONS_PER_IMAGE
    where = "with --opts" if onnx is None else "in the export"
    say_what_is_found(found, folder, skipped, pictures, limit, where)
    if evaluator is not None:
        finish_metrics(evaluator, folder, args.dataset, skipped)
    elif args.dataset is not None:
        print(f"{args.dataset}: no AP, which needs all its images: leave out --num-images")
    if evaluator is None and not any(r.detections for r in found):
        print(pictures.nothing_found())
    if explanations:
        explanations.finish()


if __name__ == "__main__":
    main()
