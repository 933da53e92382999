"""
How well one grid or another localizes, within minutes: a branch of localization is trained on the
foreground regions of a detector that is trained already, and nothing else is. What differs between
two branches is then their localization alone, and with much less noise than between two trainings.

It starts from the weights of the detector's box head, which were learned with one loss and one
grid, and it cannot tell what a localization loss does to classification, with which it shares the
layers of the detector. Boxes are of no class; other losses of Detectron2 than Smooth-L1, and the
refinement, are not among what is compared.
"""

import copy
import math
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
import tqdm
from cbbl_d2.distribution import all_finite
from cbbl_d2.engine.validation_loss import build_annotated_loader
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation.calibration import occurring_sizes
from cbbl_d2.modeling import CBBLBox2BoxTransform, LocalizationLoss
from cbbl_d2.modeling.output_layer import distribution_layer
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from torch import nn

BATCH_SIZE, BASE_LR, WARMUP = 256, 1e-3, 50


class Regions(NamedTuple):
    """Foreground regions of a data set. R: their number. Boxes are absolute XYXY."""

    features: torch.Tensor
    """Pooled for the box head: shape ``(R, C, H, W)``, float16."""
    proposals: torch.Tensor
    """Shape ``(R, 4)``, in pixels of the network's input."""
    targets: torch.Tensor
    """The objects that they match, as ``proposals``."""
    sizes: torch.Tensor
    """Of the objects, the square root of the area in the image: shape ``(R,)``, pixels."""

    def pick(self, chosen: torch.Tensor) -> "Regions":
        return Regions(*(x[chosen] for x in self))


@torch.no_grad()
def foreground_regions(
    cfg: CfgNode, model: nn.Module, name: str, max_images: Optional[int] = None
) -> Regions:
    """
    Proposals that match an object, by ``MODEL.ROI_HEADS.IOU_THRESHOLDS``. Of each image at most as
    many as a training would take, drawn at random.

    Args:
        model: a Faster R-CNN with FPN, in evaluation mode.
        name: of the data set.
        max_images: that many, evenly spaced; None: all.

    Raises:
        UserError: another kind of model; its features are not finite; the data set has no objects,
            or no proposal matches one.
    """
    heads = getattr(model, "roi_heads", None)
    if (
        not isinstance(model, GeneralizedRCNN)
        or not isinstance(heads, StandardROIHeads)
        or isinstance(heads, CascadeROIHeads)
        or cfg.MODEL.LOAD_PROPOSALS
    ):
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}, MODEL.ROI_HEADS.NAME "
            f"{cfg.MODEL.ROI_HEADS.NAME}: needs a Faster, Mask or Keypoint R-CNN with FPN and a "
            "proposal network, stock or C-BBL"
        )
    limit = math.ceil(heads.batch_size_per_image * heads.positive_fraction)
    generator = torch.Generator().manual_seed(0)
    parts: List[Regions] = []
    for (image,) in tqdm.tqdm(build_annotated_loader(cfg, name, max_images), desc=name):
        images = model.preprocess_image([image])
        features = model.backbone(images.tensor)
        (proposals,), _ = model.proposal_generator(images, features)
        objects = image["instances"].gt_boxes.to(model.device)
        boxes = proposals.proposal_boxes
        if len(objects) == 0 or len(boxes) == 0:
            continue
        matches, labels = heads.proposal_matcher(pairwise_iou(objects, boxes))
        (foreground,) = torch.nonzero(labels.cpu() == 1, as_tuple=True)
        order = torch.randperm(len(foreground), generator=generator)
        chosen = foreground[order[:limit]].to(model.device)
        boxes, targets = boxes[chosen], objects[matches[chosen]]
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [boxes]).half()
        if not all_finite(pooled):
            raise UserError(
                f"{name}: the features of the model are not finite: its weights are bad"
            )
        scale = image["height"] / images.image_sizes[0][0]
        tensors = (pooled, boxes.tensor, targets.tensor, targets.area().sqrt() * scale)
        parts.append(Regions(*(x.cpu() for x in tensors)))
    regions = Regions(*(torch.cat(x) for x in zip(*parts))) if parts else None
    if regions is None or len(regions.targets) == 0:
        raise UserError(f"{name}: no proposal of this detector matches an object: train it first")
    return regions


class LocalizationBranch(nn.Module):
    """
    A copy of the layers of a box head, in evaluation mode (BatchNorm stays as it is), and a last
    layer that predicts boxes of no class.
    """

    def __init__(
        self,
        box_head: nn.Module,
        weights: Tuple[float, ...],
        grid: Optional[torch.Tensor] = None,
        loss: Optional[LocalizationLoss] = None,
        init_std: float = 0.0,
        smooth_l1_beta: float = 0.0,
    ):
        """
        Args:
            box_head: starts from its weights.
            weights: ``MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS``.
            grid: shape ``(G,)``; None: offsets with Detectron2's Smooth-L1 loss.
            loss: of a grid; None: the default of :class:`LocalizationLoss`.
            init_std: of a grid, see :class:`cbbl_d2.modeling.CBBLFastRCNNOutputLayers`.
            smooth_l1_beta: without a grid, ``MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA``.
        """
        super().__init__()
        self.box_head = copy.deepcopy(box_head).eval()
        shape = box_head.output_shape
        width = shape.channels * (shape.width or 1) * (shape.height or 1)
        self.last = nn.Linear(width, 4)
        nn.init.normal_(self.last.weight, std=0.001)
        nn.init.zeros_(self.last.bias)
        self.loss, self.smooth_l1_beta = loss or LocalizationLoss(), smooth_l1_beta
        self.transform = Box2BoxTransform(weights)
        if grid is not None:
            self.transform = CBBLBox2BoxTransform(weights, grid)
            self.last = distribution_layer(
                self.last, self.transform, weight_std=0.001, init_std=init_std
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(self.box_head(features.to(self.last.weight)).flatten(1))

    def losses(self, regions: Regions) -> torch.Tensor:
        """Mean over the regions, as a scalar."""
        predictions = self(regions.features)
        boxes = [x.to(predictions) for x in (regions.proposals, regions.targets)]
        if isinstance(self.transform, CBBLBox2BoxTransform):
            terms = self.loss(self.transform, predictions, *boxes, prefix=None)
            return terms.sum() / len(predictions)
        deltas = self.transform.get_deltas(*boxes)
        loss = F.smooth_l1_loss(predictions, deltas, reduction="sum", beta=self.smooth_l1_beta)
        return loss / len(predictions)

    @torch.no_grad()
    def predict(self, regions: Regions) -> torch.Tensor:
        """Boxes in pixels of the network's input, not clipped to the image: shape ``(R, 4)``."""
        boxes = []
        for features, proposals in zip(regions.features.split(4096), regions.proposals.split(4096)):
            predictions = self(features)
            boxes.append(self.transform.apply_deltas(predictions, proposals.to(predictions)))
        return torch.cat(boxes).to(regions.proposals)


def train_branch(branch: LocalizationBranch, regions: Regions, steps: int, seed: int) -> None:
    """
    AdamW on random regions with a short warmup and a cosine schedule. The order depends on the seed
    alone: two branches see the same regions.

    Args:
        steps: each of ``BATCH_SIZE`` regions.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(branch.parameters(), BASE_LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / WARMUP) * (1 + math.cos(math.pi * i / steps)) / 2,
    )
    for _ in range(steps):
        chosen = torch.randint(len(regions.targets), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        branch.losses(regions.pick(chosen)).backward()
        optimizer.step()
        schedule.step()


def size_classes(sizes: torch.Tensor) -> Dict[str, torch.Tensor]:
    """
    Args:
        sizes: shape ``(R,)``, pixels.

    Returns:
        the classes of size that occur -> which they are, bool, shape ``(R,)``.
    """
    return {
        f"{low}-{high} px" if high < math.inf else f"over {low} px": chosen
        for low, high, chosen in occurring_sizes(sizes)
    }


def iou_by_size(boxes: torch.Tensor, regions: Regions) -> Dict[str, float]:
    """
    Args:
        boxes: predicted for the regions, shape ``(R, 4)``.

    Returns:
        in percent, over the regions: the mean IoU with the objects, the share of boxes with an IoU
        of 0.75 or more, and the mean IoU for each of :func:`size_classes`.
    """
    iou = 100 * matched_pairwise_iou(Boxes(boxes), Boxes(regions.targets))
    values = {"IoU": float(iou.mean()), "IoU >= 0.75": float(100 * (iou >= 75).float().mean())}
    for name, chosen in size_classes(regions.sizes).items():
        values[name] = float(iou[chosen].mean())
    return values
