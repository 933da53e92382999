#!/usr/bin/env python
"""
Run a trained detector on images, folders, glob patterns and videos, or on a registered data set,
and write what it finds: pictures, COCO results, CSV, and labels that annotation tools import.

    python tools/predict.py --weights output/x/model_best.pth --input photo.jpg folder clip.mp4
    python tools/predict.py --weights output/x/model_best.pth --input 'scans/*.tif' --slice 320
    python tools/predict.py --weights output/x/model_best.pth --dataset my_val --slice 320

The config is the one that the training has stored beside the checkpoint. Written to --output:

    pictures/            the images with the boxes drawn; videos/ the same of videos
    predictions.json     COCO results: [{image_id, category_id, bbox, score}, ...]
    annotations.json     COCO annotations with images and categories, for CVAT and Label Studio
    predictions.csv      one line for each box
    yolo/                labels/*.txt, classes.txt and data.yaml

With --dataset, AP and APvs are computed as train_net.py does, and go to metrics.json.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable

import cbbl_d2  # noqa: F401  isort: skip  (first: it hides a warning that Detectron2 causes)
import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from detectron2.utils.logger import create_small_table, setup_logger
from tqdm import tqdm

from cbbl_d2.data.dataset_checks import check_registered, load_dataset, set_num_classes
from cbbl_d2.engine.cli import one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation import build_coco_evaluator
from cbbl_d2.evaluation.rules import AP_COLUMNS
from cbbl_d2.inference import (
    BatchPredictor,
    Classes,
    ImageResult,
    find_classes,
    load_inference_config,
    to_detections,
)
from cbbl_d2.inference.arguments import number
from cbbl_d2.inference.sources import (
    Frame,
    batches,
    count_frames,
    find_files,
    is_video,
    read_frames,
    relative_names,
    unique_stems,
)
from cbbl_d2.inference.video import VideoWriter, video_writers
from cbbl_d2.inference.writers import (
    open_whole,
    write_coco_annotations,
    write_coco_results,
    write_csv,
    write_json,
    write_yolo,
)
from cbbl_d2.messages import count, listed
from cbbl_d2.visualization import (
    ClassStyle,
    draw_boxes,
    draw_masks,
    draw_pair,
    enlarge,
    enlargement,
)

FORMATS = ("pictures", "results", "annotations", "csv", "yolo")
# More than any image has: the metric then counts every detection.
ALL_DETECTIONS = 10**6


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of the model")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="config of the model; default: config.yaml beside the checkpoint",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="images, videos, folders of them, or glob patterns such as 'folder/*.jpg'",
    )
    source.add_argument("--dataset", metavar="NAME", help="registered data set, to get its AP")
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
        help=f"of {', '.join(FORMATS)}; default: all, for --dataset all but pictures",
    )
    parser.add_argument(
        "--confidence-threshold",
        "--score-threshold",
        dest="confidence_threshold",
        type=number(float, 0, 1),
        metavar="SCORE",
        help="lowest score of a prediction (default: 0.5; for --dataset that of the config, which "
        "AP needs, and 0.5 in pictures)",
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
    parser.add_argument(
        "--scale",
        type=number(float, 0.01, 100),
        metavar="FACTOR",
        help="enlargement of the pictures; default: the smallest whole factor that makes the short "
        "side 600 pixels or more",
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
        help="of neighbouring slices (default: 0.2)",
    )
    slicing.add_argument(
        "--no-whole-image",
        action="store_true",
        help="predict on the slices alone, and not also on the whole image",
    )
    parser.add_argument(
        "--opts",
        help="Modify config options using the command-line 'KEY VALUE' pairs",
        default=[],
        nargs=argparse.REMAINDER,
    )
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    threshold = args.confidence_threshold
    if threshold is None and args.dataset is None:
        threshold = 0.5
    cfg = load_inference_config(args.weights, args.config_file, args.opts, threshold)
    set_num_classes(cfg, eval_only=True)
    if args.slice is None and (args.overlap is not None or args.no_whole_image):
        raise UserError("--overlap and --no-whole-image belong to --slice: give it, too")
    if args.slice is not None and cfg.MODEL.MASK_ON:
        print("--slice: boxes without masks, which are not put together across slices")
        cfg.MODEL.MASK_ON = False
    cfg.freeze()
    return cfg


def build_predictor(cfg: CfgNode, args: argparse.Namespace) -> Callable:
    """From a list of RGB images to a list of Instances."""
    if args.slice is None:
        return BatchPredictor(cfg)
    try:
        from cbbl_d2.inference.sliced import SlicedPredictor
    except ModuleNotFoundError as e:
        raise UserError(
            f"--slice needs the package sahi, but {e.name} is not installed: see "
            "docs/large_images.md, or pip install -e '.[sahi]'"
        ) from e
    short_side = cfg.INPUT.MIN_SIZE_TEST
    if short_side == 0 and not args.no_whole_image:
        print(
            "--slice with INPUT.MIN_SIZE_TEST 0: the whole image is predicted on at its full size, "
            "too, which takes its memory; --no-whole-image leaves that out"
        )
    if 0 < short_side < args.slice:
        print(
            f"--slice {args.slice}: the config shrinks each slice to {short_side} pixels; "
            f"--slice {short_side}, or --opts INPUT.MIN_SIZE_TEST 0, keeps small objects as they "
            "are"
        )
    return SlicedPredictor(
        BatchPredictor(cfg),
        args.slice,
        overlap=0.2 if args.overlap is None else args.overlap,
        batch_size=args.batch_size,
        whole_image=not args.no_whole_image,
    )


# -- predicting ------------------------------------------------------------------------------------


class Drawing:
    """Pictures of images and videos in the folder of the output."""

    def __init__(
        self,
        folder: str,
        names: list[str],
        classes: Classes,
        threshold: float,
        scale: float | None,
        writers: dict[str, VideoWriter],
    ):
        self._folder = folder
        self._stems = dict(zip(names, unique_stems(names), strict=True))
        self._metadata = classes.metadata
        self._style = ClassStyle(classes.metadata)
        self._threshold = threshold
        self._scale = scale
        self._writers = writers

    def draw(self, frame: Frame, instances: Instances) -> None:
        """
        Raises:
            UserError: the picture would be too large, or cannot be written.
        """
        instances = instances[instances.scores >= self._threshold]
        if frame.video is not None:
            self._draw_frame(frame, instances)
            return
        picture = draw_pair(
            frame.image,
            None,
            instances,
            self._metadata,
            scale=self._scale,
            name=os.path.basename(frame.file_name),
            note=f"score \N{GREATER-THAN OR EQUAL TO} {self._threshold:g}",
        )
        path = os.path.join(self._folder, "pictures", f"{self._stems[frame.file_name]}.png")
        with open_whole(path, "wb") as f:
            f.write(cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes())

    def _draw_frame(self, frame: Frame, instances: Instances) -> None:
        """Without the caption of a picture, whose height is not the same for all frames."""
        scale = enlargement(frame.image.shape) if self._scale is None else self._scale
        canvas = enlarge(frame.image, scale)
        factors = np.tile(np.divide(canvas.shape[1::-1], frame.image.shape[1::-1]), 2)
        classes = instances.pred_classes.tolist()
        colors = [self._style.color(c) for c in classes]
        keypoints = []
        if instances.has("pred_masks"):
            canvas = draw_masks(canvas, instances.pred_masks.numpy(), colors)
        if instances.has("pred_keypoints"):
            keypoints = [x * [*factors[:2], 1] for x in instances.pred_keypoints.numpy()]
        labels = [f"{self._style.name(c)} {s:.0%}" for c, s in zip(classes, instances.scores)]
        boxes = instances.pred_boxes.tensor.numpy() * factors
        canvas = draw_boxes(
            canvas, boxes, labels, colors, keypoints=keypoints, metadata=self._metadata
        )
        if frame.video not in self._writers:
            path = os.path.join(self._folder, "videos", f"{os.path.dirname(frame.file_name)}.mp4")
            self._writers[frame.video] = VideoWriter(path, frame.fps)
        self._writers[frame.video].write(canvas)


def predict_all(
    records: list[dict],
    names: list[str],
    predictor: Callable,
    batch_size: int,
    drawing: Drawing | None,
    take: Callable[[Frame, Instances], None],
) -> int:
    """
    Args:
        records: dataset dicts, of which only "file_name" must be there.
        names: their relative file names.
        take: gets each image with its predictions.

    Returns:
        how many files had to be skipped; each of them is named on stderr.
    """
    skipped = []

    def skip(line: str) -> None:
        skipped.append(line)
        tqdm.write(f"skipped: {line}", file=sys.stderr)

    files = [r["file_name"] for r in records]
    unit = "frame" if any(map(is_video, files)) else "image"
    with tqdm(total=count_frames(files), unit=unit) as bar:
        for batch in batches(read_frames(records, names, skip), batch_size):
            for frame, instances in zip(batch, predictor([f.image for f in batch]), strict=True):
                if drawing is not None:
                    drawing.draw(frame, instances)
                take(frame, instances)
                bar.update()
    return len(skipped)


def build_evaluator(cfg: CfgNode, name: str, sliced: bool, folder: str) -> COCOEvaluator:
    """That of train_net.py, for the AP and APvs of predictions for whole images."""
    if sliced:
        # Each slice has the model's limit, and an image any number of slices. The metric has to
        # count all the objects that it is given.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.DETECTIONS_PER_IMAGE = ALL_DETECTIONS
    has_file = MetadataCatalog.get(name).get("json_file", None) is not None
    evaluator = build_coco_evaluator(cfg, name, None if has_file else folder)
    evaluator.reset()
    return evaluator


def make_folder(folder: str, files: list[str]) -> None:
    """
    Raises:
        UserError: it cannot be made, or what is written there might replace the files.
    """
    folders = {os.path.realpath(os.path.dirname(x)) for x in files}
    for part in ("pictures", "videos"):
        written = os.path.realpath(os.path.join(folder, part))
        if any(os.path.commonpath([written, x]) == written for x in folders):
            raise UserError(f"{folder}: files to predict on are in it, choose another --output")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be made a folder ({e.strerror})") from e


def _has_files(folder: str) -> bool:
    return os.path.isdir(folder) and any(os.scandir(folder))


def write_files(
    folder: str, formats: list[str], results: list[ImageResult], classes: Classes
) -> None:
    writers = {
        "results": ("predictions.json", write_coco_results),
        "annotations": ("annotations.json", write_coco_annotations),
        "csv": ("predictions.csv", write_csv),
        "yolo": ("yolo", write_yolo),
    }
    for key, (name, write) in writers.items():
        if key in formats:
            write(os.path.join(folder, name), results, classes)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    cfg = setup(args)
    # All that can be wrong with the command line is found before the model is built.
    root = None
    if args.dataset is not None:
        check_registered(args.dataset, "--dataset")
        records = load_dataset(args.dataset)
        root = MetadataCatalog.get(args.dataset).get("image_root", None)
    else:
        records = [{"file_name": x} for x in find_files(args.input)]
    files = [r["file_name"] for r in records]
    names = relative_names(files, root)
    classes = find_classes(cfg, args.class_names, args.dataset)
    if classes.source:
        print(f"Class names: {classes.source}")
    else:
        print(
            "The names of the classes are neither beside the checkpoint nor with a data set on "
            'this machine: they are numbered "class 0", "class 1", ...; name them with '
            "--class-names"
        )
    formats = args.formats or [f for f in FORMATS if f != "pictures" or args.dataset is None]
    folder = args.output or os.path.join(os.path.dirname(args.weights), "predictions")
    predictor = build_predictor(cfg, args)
    make_folder(folder, files)
    left = [x for x in ("pictures", "videos", "yolo/labels") if _has_files(f"{folder}/{x}")]
    if left:
        print(
            f"{folder}: {listed(left)} {'has' if len(left) == 1 else 'have'} files of an earlier "
            "prediction, which stay unless this one writes files of the same names"
        )

    evaluator = None
    if args.dataset is not None:
        evaluator = build_evaluator(cfg, args.dataset, args.slice is not None, folder)
    results: dict[int, ImageResult] = {}

    def take(frame: Frame, instances: Instances) -> None:
        image_id = frame.index + 1 if frame.record is None else frame.record["image_id"]
        results[frame.index] = ImageResult(
            image_id, frame.file_name, *frame.image.shape[:2], to_detections(instances, image_id)
        )
        if evaluator is not None:
            evaluator.process([frame.record], [{"instances": instances}])

    threshold = 0.5 if args.confidence_threshold is None else args.confidence_threshold
    with video_writers() as writers:
        drawing = None
        if "pictures" in formats:
            drawing = Drawing(folder, names, classes, threshold, args.scale, writers)
        num_skipped = predict_all(records, names, predictor, args.batch_size, drawing, take)
    if not results:
        raise UserError(f"none of the {num_skipped} files could be read, see the lines above")
    ordered = [results[i] for i in sorted(results)]
    write_files(folder, formats, ordered, classes)
    num_boxes = sum(len(r.detections) for r in ordered)
    print(
        f"{count(num_boxes, 'object', 'objects')} in {count(len(ordered), 'image', 'images')}, "
        f"written to {folder}" + (f", {num_skipped} skipped" if num_skipped else "")
    )
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    full = sum(len(r.detections) >= limit for r in ordered) if args.slice is None else 0
    if full:
        print(
            f"{count(full, 'image has', 'images have')} {limit} objects, as many as "
            "TEST.DETECTIONS_PER_IMAGE allows: there may be more, raise it with --opts or use "
            "--slice"
        )
    if evaluator is not None:
        if num_skipped:
            raise UserError(
                f"{args.dataset}: no AP, because {num_skipped} of its images cannot be read: "
                "restore them"
            )
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = evaluator.evaluate()
        write_json(os.path.join(folder, "metrics.json"), metrics)
        for task, numbers in metrics.items():
            print(
                task
                + "\n"
                + create_small_table({k: numbers[k] for k in AP_COLUMNS if k in numbers})
            )
    elif not num_boxes:
        print(
            f"No prediction has a score of {threshold:g} or more: try a lower "
            "--confidence-threshold"
        )


if __name__ == "__main__":
    main()
