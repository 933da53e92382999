#!/usr/bin/env python
"""
What variance voting (MODEL.CBBL.VOTING_SIGMA) gains, and how much of it any detector would gain by
voting without variances: the control. Evaluates one checkpoint of a Faster R-CNN, stock or C-BBL,
several times; trains nothing.

    python benchmarks/box_voting.py --config-file configs/SmallShapes/cbbl.yaml \\
        --weights output/small_shapes_cbbl/model_final.pth
"""

import argparse

import torch
from cbbl_d2.analysis.markdown import markdown_table
from cbbl_d2.data.dataset_checks import check_datasets
from cbbl_d2.engine import CBBLCheckpointer, CBBLTrainer, one_line_errors
from cbbl_d2.engine.cli import add_opts
from cbbl_d2.errors import UserError
from cbbl_d2.inference import load_inference_config
from cbbl_d2.modeling import CBBLFastRCNNOutputLayers
from cbbl_d2.modeling.box_voting import variance_voting
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes

METRICS = ("AP", "AP50", "AP75", "APvs")


def vote(predictor: FastRCNNOutputLayers, predictions, proposals, results, sigma):
    """Let the candidates vote on the boxes of ``results``, in place, all variances being equal."""
    scores = predictor.predict_probs(predictions, proposals)
    boxes = predictor.predict_boxes(predictions, proposals)
    for result, scores_i, boxes_i in zip(results, scores, boxes):
        region, class_ = torch.nonzero(
            scores_i[:, :-1] > predictor.test_score_thresh, as_tuple=True
        )
        candidates = boxes_i.view(len(boxes_i), -1, 4)
        candidates = candidates[region, class_ if candidates.shape[1] > 1 else 0]
        clipped = Boxes(candidates)
        clipped.clip(result.image_size)
        result.pred_boxes = Boxes(
            variance_voting(
                result.pred_boxes.tensor,
                result.pred_classes,
                clipped.tensor,
                class_,
                scores_i[region, class_],
                torch.ones_like(candidates),
                sigma,
            )
        )


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True, help="checkpoint")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2])
    add_opts(parser)
    args = parser.parse_args()

    opts = ["OUTPUT_DIR", "output/box_voting", *args.opts]
    cfg = load_inference_config(args.weights, args.config_file, opts)
    cfg.MODEL.CBBL.VOTING_SIGMA = 0.0  # the votes are counted here
    check_datasets(cfg, eval_only=True)
    model = CBBLTrainer.build_model(cfg)
    CBBLCheckpointer(model, require_all=True).resume_or_load(args.weights, resume=False)
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    if not isinstance(predictor, FastRCNNOutputLayers):
        raise UserError(f"{args.config_file}: no Faster R-CNN")
    knows_variances = isinstance(predictor, CBBLFastRCNNOutputLayers)
    plain = predictor.inference

    def evaluate(sigma: float, by_variance: bool):
        def inference(predictions, proposals):
            results, kept = plain(predictions, proposals)
            if sigma > 0 and not by_variance:
                vote(predictor, predictions, proposals, results, sigma)
            return results, kept

        predictor.inference = inference
        if knows_variances:
            predictor.voting_sigma = sigma if by_variance else 0.0
        results = CBBLTrainer.test(cfg, model)["bbox"]
        return [f"{results[m]:.2f}" for m in METRICS]

    rows = [["no voting", *evaluate(0.0, False)]]
    for sigma in args.sigma:
        rows.append([f"voting, sigma {sigma:g}", *evaluate(sigma, False)])
        if knows_variances:
            rows.append([f"variance voting, sigma {sigma:g}", *evaluate(sigma, True)])
    print("\n" + markdown_table([args.weights, *METRICS], rows), end="")


if __name__ == "__main__":
    main()
