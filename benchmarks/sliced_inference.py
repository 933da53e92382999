#!/usr/bin/env python
"""
What slicing a large image does for small objects: mosaics of SmallShapes images, 2000 x 2000 pixels
with some thousand objects, predicted on whole and in slices.

    python benchmarks/sliced_inference.py --weights output/small_shapes_cbbl/model_best.pth

Prints for each way of prediction: AP and APvs; the recall of objects under 16 pixels (sqrt of the
area) at IoU 0.5, at the lowest score threshold where the precision of all detections is still
--precision; and seconds for an image. Recall at a fixed score would favor the way with more false
detections.
"""

import argparse
import contextlib
import functools
import io
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from cbbl_d2.data.coco_format import register_coco_format
from cbbl_d2.data.coco_writer import CocoWriter, numbered_categories
from cbbl_d2.engine.cli import number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation import build_coco_evaluator
from cbbl_d2.inference import BatchPredictor, load_inference_config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

SMALL = 16  # pixels
NAME = "sliced_inference_mosaics"
MANY = 10**5


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="trained on SmallShapes")
    parser.add_argument("--config-file", metavar="FILE", help="default: that beside the checkpoint")
    parser.add_argument("--dataset", default="small_shapes_test", help="of the images")
    parser.add_argument("--mosaics", type=number(int, 1), default=2, help="default: 2")
    parser.add_argument("--size", type=number(int, 160), default=2000, help="default: 2000 pixels")
    parser.add_argument("--slice", type=number(int, 16), nargs="+", default=[160, 320])
    parser.add_argument("--overlap", type=number(float, 0, 0.9), default=0.2)
    parser.add_argument("--precision", type=number(float, 0.01, 0.99), default=0.8)
    parser.add_argument("--batch-size", type=number(int, 1), default=4)
    parser.add_argument(
        "--merging",
        action="store_true",
        help="also compare the ways to remove duplicates at the edges of the slices",
    )
    return parser


def make_mosaics(dataset: str, number_of: int, size: int, folder: str) -> str:
    """
    Images beside each other, as many as fit, in the middle of a gray canvas.

    Returns:
        the annotation file.
    """
    records = DatasetCatalog.get(dataset)
    tile = max(max(r["height"], r["width"]) for r in records)
    per_side = size // tile
    per_mosaic = per_side**2
    if per_mosaic == 0 or number_of * per_mosaic > len(records):
        raise UserError(
            f"{number_of} mosaics of {size} pixels take {number_of * per_mosaic} images of {tile} "
            f"pixels, and {dataset} has {len(records)}: take fewer with --mosaics, or a --size "
            f"of {tile} or more"
        )
    margin = (size - per_side * tile) // 2
    num_classes = 1 + max(a["category_id"] for r in records for a in r["annotations"])
    coco = CocoWriter(numbered_categories([str(i) for i in range(num_classes)]))
    for i in range(number_of):
        canvas = np.full((size, size, 3), 128, dtype=np.uint8)
        image_id = coco.add_image(f"{i}.png", size, size)
        for j, record in enumerate(records[i * per_mosaic : (i + 1) * per_mosaic]):
            y, x = (margin + tile * k for k in divmod(j, per_side))
            image = cv2.imread(record["file_name"])
            canvas[y : y + record["height"], x : x + record["width"]] = image
            for a in record["annotations"]:
                box = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS)
                left, top, width, height = box
                coco.add_object(image_id, a["category_id"] + 1, (left + x, top + y, width, height))
        cv2.imwrite(os.path.join(folder, f"{i}.png"), canvas)
    path = os.path.join(folder, "annotations.json")
    coco.write(path)
    return path


def recall_at_precision(
    json_file: str, detections: list[dict], precision: float, side: float
) -> tuple[float, float]:
    """
    Args:
        detections: COCO results, with the category ids of the file.
        precision: of all detections at or above a score, at IoU 0.5.
        side: objects with an area below its square count in the recall.

    Returns:
        recall of these objects at the lowest score whose precision is at least ``precision``, and
        this score; 0 and infinity where there is none.
    """
    nothing = 0.0, float("inf")
    if not detections:
        return nothing
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.params.iouThrs = [0.5]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MANY]
        evaluation.evaluate()
    found = [x for x in evaluation.evalImgs if x is not None]
    scores = np.concatenate([x["dtScores"] for x in found])
    matches = np.concatenate([x["dtMatches"][0] for x in found]).astype(int)  # 0: none
    order = np.argsort(-scores, kind="stable")
    scores, matches = scores[order], matches[order]
    good = np.flatnonzero((matches > 0).cumsum() >= precision * np.arange(1, len(matches) + 1))
    if not len(good):
        return nothing
    small = {id for id, a in truth.anns.items() if a["area"] < side**2}
    num_found = len(small.intersection(matches[: good[-1] + 1].tolist()))
    return num_found / len(small), float(scores[good[-1]])


def measure(cfg: CfgNode, predictor: Callable, json_file: str, precision: float) -> list[str]:
    """Of a row of the table: what stands beside the name of the predictor."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = build_coco_evaluator(changed(cfg, "TEST.DETECTIONS_PER_IMAGE", MANY), NAME)
    evaluator.reset()
    seconds = 0.0
    records = DatasetCatalog.get(NAME)
    for record in tqdm(records, unit="mosaic", leave=False):
        image = np.ascontiguousarray(cv2.imread(record["file_name"])[:, :, ::-1])
        start = time.perf_counter()
        instances = predictor([image])[0]
        seconds += time.perf_counter() - start
        evaluator.process([record], [{"instances": instances}])
    detections = [
        {**d, "category_id": d["category_id"] + 1}
        for p in evaluator._predictions
        for d in p["instances"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        results = evaluator.evaluate()["bbox"]
    recall, score = recall_at_precision(json_file, detections, precision, SMALL)
    values = [f"{results[key]:.1f}" for key in ("AP", "AP50", "APvs")]
    values += [f"{100 * recall:.1f}", f"{score:.2f}", f"{len(detections)}"]
    return [*values, f"{seconds / len(records):.1f}"]


def merging_predictor(cfg: CfgNode, size: int, args: argparse.Namespace) -> Callable:
    """sahi's own way to put slices together: overlapping boxes become their union."""
    from cbbl_d2.inference.sliced import CBBLDetectionModel
    from sahi.predict import get_sliced_prediction

    model = CBBLDetectionModel(
        model=BatchPredictor(cfg), device=cfg.MODEL.DEVICE, confidence_threshold=0.0
    )

    def predict(images: list[np.ndarray]) -> list[Instances]:
        found = get_sliced_prediction(
            images[0],
            model,
            *(size, size),
            *(args.overlap, args.overlap),
            perform_standard_pred=False,
            force_postprocess_type=True,
            batch_size=args.batch_size,
            verbose=0,
        ).object_prediction_list
        instances = Instances(images[0].shape[:2])
        instances.pred_boxes = Boxes(torch.tensor([x.bbox.to_xyxy() for x in found]))
        instances.scores = torch.tensor([x.score.value for x in found])
        instances.pred_classes = torch.tensor([x.category.id for x in found])
        return [instances]

    return predict


def changed(cfg: CfgNode, *options) -> CfgNode:
    """A copy with ``KEY, value, KEY, value ...``."""
    cfg = cfg.clone()
    cfg.merge_from_list(list(options))
    return cfg


def ways(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Callable[[], Callable]]:
    """What is compared: name -> function that builds the predictor."""
    from cbbl_d2.inference.sliced import SlicedPredictor

    def sliced(cfg: CfgNode, size: int, **options) -> Callable[[], Callable]:
        return lambda: SlicedPredictor(
            BatchPredictor(cfg), size, args.overlap, args.batch_size, **options
        )

    # A whole mosaic has a hundred times the objects of an image of the training. The limits of the
    # model must not be what is measured.
    limits = ["TEST.DETECTIONS_PER_IMAGE", MANY]
    limits += ["MODEL.RPN.PRE_NMS_TOPK_TEST", 20000, "MODEL.RPN.POST_NMS_TOPK_TEST", 20000]
    all_pixels = ["INPUT.MIN_SIZE_TEST", 0]
    own_size = changed(cfg, *all_pixels)
    result = {
        f"whole, {cfg.INPUT.MIN_SIZE_TEST} px as configured": changed(cfg, *limits),
        "whole, all pixels, limits of the config": own_size,
        "whole, all pixels, limits raised": changed(cfg, *limits, *all_pixels),
    }
    result = {name: functools.partial(BatchPredictor, whole) for name, whole in result.items()}
    for size in args.slice:
        name = f"slices of {size} px"
        result[name] = sliced(own_size, size, whole_image=False)
        if not args.merging:
            continue
        for metric, threshold, drop in itertools.product(("IOU", "IOS"), (0.5, 0.7), (True, False)):
            pieces = f"{'without' if drop else 'with'} pieces"
            result[f"{name}, NMS {metric} {threshold}, {pieces}"] = sliced(
                own_size,
                size,
                whole_image=False,
                match_metric=metric,
                match_threshold=threshold,
                drop_pieces=drop,
            )
        result[f"{name}, GREEDYNMM as sahi's default"] = functools.partial(
            merging_predictor, own_size, size, args
        )
        # Here the whole image must be resized: to the size of a slice, which is then as it is.
        small = changed(cfg, "INPUT.MIN_SIZE_TEST", size)
        result[f"{name} and the whole image"] = sliced(small, size, whole_image=True)
    return result


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    cfg = load_inference_config(args.weights, args.config_file)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    with tempfile.TemporaryDirectory() as folder:
        json_file = make_mosaics(args.dataset, args.mosaics, args.size, folder)
        register_coco_format(NAME, json_file, folder)
        print(f"| prediction | AP | AP50 | APvs | recall < {SMALL} px | at score | boxes | s |")
        print("|---|---|---|---|---|---|---|---|")
        for name, build in ways(cfg, args).items():
            values = measure(cfg, build(), json_file, args.precision)
            print(f"| {name} | {' | '.join(values)} |", flush=True)


if __name__ == "__main__":
    main()
