"""
The losses of a detector on a data set that it is evaluated on (``TEST.LOSS``). Beside those of the
training they show when it begins to learn its images by heart.

They are computed as in training: with the same matching and sampling of anchors and proposals, on
images that have annotations where the training leaves out the others, crowds left out. But

* images are resized as for the evaluation, and not augmented;
* BatchNorm takes its running statistics, as the evaluation does, and nothing is dropped out;
* each image is a batch of its own, and draws from the same random numbers at every evaluation and
  in any number of processes;
* RetinaNet and FCOS divide by the number of positive anchors in the whole data set, in the place of
  a moving average that depends on the batches before.
"""

import copy
import logging
import math
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from cbbl_d2.compat import skipped_keypoints_not_counted
from cbbl_d2.data.broken_images import NameBrokenImage
from cbbl_d2.data.train_loader import with_masks
from cbbl_d2.messages import listed
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from .rng import preserve_rng

logger = logging.getLogger(__name__)

_SEED = 0


def validation_losses(cfg: CfgNode, model: torch.nn.Module, name: str) -> Dict[str, float]:
    """
    The mean of each loss over the images of one of ``cfg.DATASETS.TEST``. Model, random numbers and
    event storage stay as they are.

    Args:
        model: in training or evaluation mode, also a parallel one.
        name: of the data set.

    Returns:
        ``total_loss``, the sum, and the losses of the model; not finite where the model gives no
        finite loss for an image, which is logged. Empty on all processes but the main one.

    Raises:
        UserError: an image is broken.
    """
    logger.info(f"Losses on {name}:")
    # TorchScript optimizes a function, here the focal loss, for the calls that it sees, by which
    # its last digits change: these calls are not to be among them.
    unoptimized = torch.jit.optimized_execution(False)
    with preserve_rng(), EventStorage(), unoptimized, skipped_keypoints_not_counted():
        losses_of_image = _LossesOfImage(model, cfg.SOLVER.AMP.ENABLED)
        loader = build_annotated_loader(cfg, name)
        losses = inference_on_dataset(losses_of_image, loader, _Means(name))
    if losses:
        text = ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
        logger.info(f"Losses on {name}: {text}")
    return losses


def build_annotated_loader(cfg: CfgNode, name: str, max_images: Optional[int] = None):
    """
    Images one by one, resized as for the evaluation, with their annotations.

    Args:
        name: of a data set.
        max_images: that many, evenly spaced over the data set; None: all.
    """
    proposals = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST))
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    dataset = get_detection_dataset_dicts(
        name,
        filter_empty=filter_empty,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=[proposals[name]] if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if cfg.MODEL.MASK_ON and isinstance(dataset, list):
        dataset = with_masks(dataset, filter_empty)
    if max_images is not None and max_images < len(dataset):
        dataset = [dataset[i * len(dataset) // max_images] for i in range(max_images)]
    mapper = DatasetMapper(cfg, is_train=False)
    mapper.is_train = True  # it keeps the annotations; its augmentations stay those of the test
    return build_detection_test_loader(
        dataset, mapper=NameBrokenImage(mapper), num_workers=cfg.DATALOADER.NUM_WORKERS
    )


class _Row(NamedTuple):
    """
    Attributes:
        file_name: of the image.
        losses: None if the predictions are not finite, for which R-CNN has no losses.
        weight: what a mean over images is divided by counts this for the image.
    """

    file_name: str
    losses: Optional[Dict[str, float]]
    weight: float

    @property
    def is_finite(self) -> bool:
        return self.losses is not None and all(map(math.isfinite, self.losses.values()))


class _LossesOfImage:
    """From a batch of one image to its :class:`_Row`, by a copy of a model."""

    def __init__(self, model: torch.nn.Module, amp: bool):
        """
        Args:
            amp: mixed precision, as Detectron2's ``AMPTrainer``.
        """
        # A copy, lest anything of it remains in the model, also if a signal ends it.
        self._model = copy.deepcopy(getattr(model, "module", model)).train()
        self._autocast = torch.autocast(next(self._model.parameters()).device.type, enabled=amp)
        for module in self._model.modules():
            if next(module.children(), None) is None:  # a layer: BatchNorm, Dropout, DropPath ...
                module.eval()
            if hasattr(module, "vis_period"):
                module.vis_period = 0
        self._positives: Optional[float] = None
        if hasattr(self._model, "_ema_update"):
            self._model._ema_update = self._note_positives

    def _note_positives(self, name: str, value: float, *_: Any, **__: Any) -> float:
        """In the place of ``DenseDetector._ema_update``: losses are not divided yet."""
        self._positives = value
        setattr(self._model, name, 1.0)
        return 1.0

    def __call__(self, batch: List[Dict[str, Any]]) -> _Row:
        (image,) = batch
        torch.manual_seed(_SEED)
        try:
            with self._autocast:
                losses = self._model(batch)
            # One transfer from the device for all.
            values = torch.stack([loss.float() for loss in losses.values()]).tolist()
            losses = dict(zip(losses, values))
        except (AssertionError, FloatingPointError) as e:
            # fvcore's GIoU loss ends boxes of NaN in an assertion about their corners.
            if isinstance(e, AssertionError) and "bad box" not in str(e):
                raise
            losses = None
        weight = 1
        if self._positives is not None:
            weight = self._positives if len(image["instances"]) else 0  # it counts one at least
        return _Row(str(image.get("file_name", "?")), losses, weight)


class _Means(DatasetEvaluator):
    """Of the losses of all images of all processes, the same in whatever order."""

    def __init__(self, name: str):
        self._name = name

    def reset(self) -> None:
        self._rows: List[_Row] = []

    def process(self, inputs, outputs: _Row) -> None:
        self._rows.append(outputs)

    def evaluate(self) -> Optional[Dict[str, float]]:
        rows = [row for rows in comm.gather(self._rows) for row in rows]
        if not comm.is_main_process():
            return None
        bad = [row.file_name for row in rows if not row.is_finite]
        if bad:
            logger.warning(
                f"{self._name}: the losses are not finite on {len(bad)} of {len(rows)} images, "
                f"{listed(bad, limit=3)}, and neither are their means"
            )
        weight = max(1, sum(row.weight for row in rows))
        names = dict.fromkeys(name for row in rows for name in row.losses or ())
        means = {}
        for name in names:
            values = [math.nan if row.losses is None else row.losses[name] for row in rows]
            means[name] = (sum(values) if bad else math.fsum(values)) / weight
        return {"total_loss": sum(means.values()) if means else math.nan, **means}
