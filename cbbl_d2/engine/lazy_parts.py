"""What the Lazy configs of this project name beside models: data, evaluation and schedule."""

from detectron2.config import get_cfg
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from cbbl_d2.evaluation import SmallObjectCOCOEvaluator, build_coco_evaluator

__all__ = ["coco_evaluator", "warmup_cosine"]


def coco_evaluator(
    *,
    dataset_name: str,
    output_folder: str | None = None,
    detections_per_image: int = 100,
    masks: bool = False,
    num_keypoints: int = 0,
    keypoint_oks_sigmas: list[float] | tuple[float, ...] = (),
) -> SmallObjectCOCOEvaluator:
    """
    :func:`cbbl_d2.evaluation.build_coco_evaluator` by arguments instead of a config.

    Args:
        dataset_name: a registered data set.
        output_folder: gets the predictions as COCO JSON; None writes none.
        detections_per_image: how many the model may return; from 101 on the metric counts them.
        masks: whether the model predicts masks.
        num_keypoints: that the model predicts for each object; 0: it predicts none.
        keypoint_oks_sigmas: one for each keypoint; empty: COCO's own.

    Raises:
        UserError: see :func:`cbbl_d2.evaluation.build_coco_evaluator`.
    """
    cfg = get_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE = detections_per_image
    cfg.TEST.KEYPOINT_OKS_SIGMAS = list(keypoint_oks_sigmas)
    cfg.MODEL.MASK_ON = masks
    cfg.MODEL.KEYPOINT_ON = num_keypoints > 0
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = num_keypoints
    return build_coco_evaluator(cfg, dataset_name, output_folder)


def warmup_cosine(
    *, max_iter: int, warmup_iters: int, warmup_factor: float = 0.001
) -> WarmupParamScheduler:
    """
    Detectron2's ``WarmupCosineLR``: the learning rate rises linearly, then falls like a cosine to
    zero.

    Args:
        max_iter: in a Lazy config ``"${train.max_iter}"``.
        warmup_iters: also in iterations, so that a shorter training keeps its warm-up.
        warmup_factor: at the first iteration, relative to the full rate.
    """
    return WarmupParamScheduler(
        CosineParamScheduler(1.0, 0.0),
        warmup_factor=warmup_factor,
        warmup_length=min(warmup_iters / max_iter, 1.0),
        warmup_method="linear",
    )
