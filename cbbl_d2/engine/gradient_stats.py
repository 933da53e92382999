"""
The localization gradient of small and large objects while a detector trains, by a training hook.

For each foreground region or anchor, of stock and of C-BBL detectors alike, the hook measures

    ``v = g W``

where ``g`` is the gradient of the whole training loss with respect to the region's outputs of the
last layer of localization (4 offsets, or ``4 * G`` logits) and ``W`` are the rows of this layer's
weight that compute them. It is the gradient that the region sends back to its features through its
localization: how hard, and whereto, it pulls at the network. Unlike ``g`` itself it does not depend
on what the outputs stand for, so that heads with 4 and with ``4 * G`` outputs can be compared. Of a
convolution, the features are those under its kernel. It is the gradient as it acts: the weight of
the loss and the number that the loss is divided by are in it. The relative statistics are those
from which such a factor drops out.

Two kinds of variance, as one alone misleads. The variance of the length ``||v||`` is next to
nothing for Smooth-L1, whose gradient has the same length however large the error is, while its
signs flip from region to region. This shows in the variance of the vectors, ``E||v - E v||^2``.

In several processes, each has a loss of its own, and the gradient is that of this loss.
"""

import functools
import inspect
from typing import Dict, Iterator, List, NamedTuple, Tuple

import torch
from cbbl_d2.compat import box_tensors
from detectron2.engine import HookBase
from detectron2.layers import cat, nonzero_tuple
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes
from detectron2.utils import comm
from torch import nn

"""
Shape shorthand in this module:

    P: number of foreground regions or anchors
    R: number of regions
    N: number of images
    A: number of anchors on one feature level
    K: number of groups of outputs of the last layer: classes, or anchors at a place
    C: number of outputs in a group: 4, or 4 * G
"""

# Of objects, in pixels: where one range of sizes ends and the next one begins.
BOUNDS = (16.0, 32.0, 96.0)
SIZES = ("0-16px", "16-32px", "32-96px", "over-96px")


class GradientStats(HookBase):
    """
    Puts statistics of the localization gradient, as described above, into the event storage, for
    each head and each range of object sizes, the root of the area of the matched ground-truth box
    in pixels of the network's input (0-16, 16-32, 32-96, over 96):

    * ``gradients/{head}/{size}/count``: number of foreground regions, in all processes;
    * ``.../mean`` of the length ``||v||``;
    * ``.../variance`` of the length, and ``.../relative_variance``: ``variance / mean^2``;
    * ``.../total_variance``: ``E||v - E v||^2``, the trace of the covariance of the vectors, and
      ``.../relative_total_variance``: the same over ``E||v||^2``. 0: all pull alike; about 1:
      their pulls cancel out.

    The variances, unbiased, are those of two regions or more.

    The head is ``box`` (Fast R-CNN, RetinaNet, FCOS), ``box_stage0`` and so on (Cascade R-CNN) or
    ``rpn``. Regions whose gradient is not finite, as may be in mixed precision, are left out. The
    numbers are those of one iteration, not smoothed.

    At the iterations that are measured, ``losses`` of each head is wrapped to see the predictions
    and what they are matched to, and a tensor hook on the predictions sees their gradient. Losses
    and gradients stay what they are. To be registered on all processes, before the writers.
    """

    def __init__(self, period: int):
        """
        Args:
            period: measure each iteration whose number, from 1, is a multiple of it; >= 1.
        """
        self._period = period
        self._wrapped: List[nn.Module] = []
        # By head, call of its losses, feature level. If a loss takes a gradient of its own with
        # respect to the predictions, that of the backward pass comes last and stays.
        self._measured: Dict[Tuple[str, int, int], _Gradients] = {}

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self._period != 0:
            return
        scaler = getattr(getattr(self.trainer, "_trainer", None), "grad_scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, head in _localization_heads(self.trainer.model):
            self._wrap(name, head, scale)

    def after_step(self) -> None:
        if not self._wrapped:
            return
        by_head: Dict[str, List[_Gradients]] = {}
        for (name, _, _), gradients in self._unwrap().items():
            by_head.setdefault(name, []).append(gradients)
        local = {name: _merge(levels).cpu() for name, levels in by_head.items()}
        processes = comm.gather(local)  # empty on all but the main one
        for name in dict.fromkeys(name for process in processes for name in process):
            parts = [process[name] for process in processes if name in process]
            self._log(f"gradients/{name}", _merge(parts))

    def after_train(self) -> None:
        # If a step has raised, it had no after_step().
        self._unwrap()

    def _unwrap(self) -> Dict[Tuple[str, int, int], "_Gradients"]:
        """Returns what was measured since the heads were wrapped."""
        while self._wrapped:
            del self._wrapped.pop().losses
        measured, self._measured = self._measured, {}
        return measured

    def _wrap(self, name: str, head: nn.Module, scale: float) -> None:
        original = head.losses
        signature = inspect.signature(original)
        num_calls = 0

        @functools.wraps(original)
        def losses(*args, **kwargs):
            nonlocal num_calls
            arguments = signature.bind(*args, **kwargs).arguments
            layer, levels = _foreground(head, arguments)
            for level, foreground in enumerate(levels):
                if len(foreground.sizes) > 0 and foreground.predictions.requires_grad:
                    key = (name, num_calls, level)
                    foreground.predictions.register_hook(
                        functools.partial(self._measure, key, foreground, layer.weight, scale)
                    )
            num_calls += 1
            return original(*args, **kwargs)

        # An attribute of the instance hides the method of its class, and deleting it undoes that.
        head.losses = losses
        self._wrapped.append(head)

    def _measure(self, key, foreground: "_Foreground", weight, scale, gradient) -> None:
        """A tensor hook; as it returns nothing, the gradient goes on as it is."""
        rows = foreground.pick(gradient).float() / scale
        finite = torch.isfinite(rows).all(dim=1) & torch.isfinite(foreground.sizes)
        self._measured[key] = feature_gradients(
            rows[finite], weight.detach(), foreground.second[finite], foreground.sizes[finite]
        )

    def _log(self, prefix: str, gradients: "_Gradients") -> None:
        for i, name in enumerate(SIZES):
            norms = gradients.norms[gradients.ranges == i].double()
            for statistic, value in _statistics(norms, gradients.sums[i].double()).items():
                self.trainer.storage.put_scalar(
                    f"{prefix}/{name}/{statistic}", value, smoothing_hint=False
                )


class _Gradients(NamedTuple):
    """
    What is kept of the vectors ``v``.

    Attributes:
        norms: their lengths, shape ``(P,)``.
        ranges: index into :data:`SIZES` of the object of each, shape ``(P,)``.
        sums: of the vectors of each range, shape ``(len(SIZES), features)``.
    """

    norms: torch.Tensor
    ranges: torch.Tensor
    sums: torch.Tensor

    def cpu(self) -> "_Gradients":
        return _Gradients(*(x.cpu() for x in self))


def _merge(parts: List[_Gradients]) -> _Gradients:
    norms, ranges, sums = zip(*parts)
    return _Gradients(torch.cat(norms), torch.cat(ranges), torch.stack(sums).sum(dim=0))


def feature_gradients(
    gradients: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor
) -> _Gradients:
    """
    Lengths and sums of ``v = g W``. The vectors themselves are as many times larger than ``g`` as
    there are features for an output, and not computed: ``||v||^2 = g (W W^T) g^T``.

    Args:
        gradients: ``g``, shape ``(P, C)``, float32.
        weight: of the last layer, shape ``(K * C, ...)``, group-major; a convolution's kernel is
            flattened.
        index: shape ``(P,)``, whose remainder modulo K is the group of the region.
        sizes: of the objects, in pixels, shape ``(P,)``.
    """
    weight = weight.float().flatten(1)
    rows = weight.unflatten(0, (-1, gradients.shape[1]))  # (K, C, features)
    num_groups = len(rows)
    group = index % num_groups
    ranges = torch.bucketize(sizes, sizes.new_tensor(BOUNDS), right=True)

    gram = rows @ rows.transpose(1, 2)
    products = (gradients[:, None] @ gram[group])[:, 0]  # (P, C)
    norms = (products * gradients).sum(dim=1).clamp(min=0).sqrt()  # rounding may make it < 0

    summed = gradients.new_zeros(len(SIZES) * num_groups, gradients.shape[1])
    summed.index_add_(0, ranges * num_groups + group, gradients)
    return _Gradients(norms, ranges, summed.view(len(SIZES), -1) @ weight)


def _statistics(norms: torch.Tensor, vector_sum: torch.Tensor) -> Dict[str, float]:
    """Those of :class:`GradientStats` that exist for this many vectors."""
    count = len(norms)
    stats = {"count": count}
    if count > 0:
        stats["mean"] = norms.mean().item()
    if count > 1:
        square_sum = (norms**2).sum().item()
        scatter = square_sum - (vector_sum**2).sum().item() / count
        stats["variance"] = norms.var().item()
        stats["total_variance"] = max(scatter, 0.0) / (count - 1)
        if square_sum > 0:
            stats["relative_variance"] = stats["variance"] / stats["mean"] ** 2
            stats["relative_total_variance"] = stats["total_variance"] / (square_sum / count)
    return stats


# -- where the heads of Detectron2 have their predictions and what these are matched to ------------


class _Foreground(NamedTuple):
    """
    Of one call of ``losses`` and one feature level.

    Attributes:
        predictions: of the last layer, shape ``(N, A, C)`` or ``(R, K * C)``.
        shape: the same as ``(N, A, C)`` or ``(R, K, C)``.
        first, second: indices of the foreground in it, shape ``(P,)``.
        sizes: of the matched objects, in pixels, shape ``(P,)``.
    """

    predictions: torch.Tensor
    shape: Tuple[int, int, int]
    first: torch.Tensor
    second: torch.Tensor
    sizes: torch.Tensor

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the foreground, shape ``(P, C)``, of a tensor like ``predictions``."""
        return tensor.reshape(self.shape)[self.first, self.second]


def _localization_heads(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Name and module of each head of a model, which may be a parallel one."""
    modules = list(model.modules())
    predictors = [m for m in modules if isinstance(m, FastRCNNOutputLayers)]
    for stage, predictor in enumerate(predictors):
        yield ("box" if len(predictors) == 1 else f"box_stage{stage}"), predictor
    for module in modules:
        if isinstance(module, RPN):
            yield "rpn", module
        elif isinstance(module, (RetinaNet, FCOS)):
            yield "box", module


@torch.no_grad()
def _foreground(head: nn.Module, arguments: Dict) -> Tuple[nn.Module, List[_Foreground]]:
    """
    Args:
        arguments: of a call of ``head.losses``, by name.

    Returns:
        the last layer of localization, and the foreground on each feature level.
    """
    if isinstance(head, FastRCNNOutputLayers):
        return head.bbox_pred, _foreground_regions(head, **arguments)
    labels = torch.stack(arguments["gt_labels"])
    if isinstance(head, RPN):
        layer, foreground = head.rpn_head.anchor_deltas, labels == 1
    else:
        layer, foreground = head.head.bbox_pred, (labels >= 0) & (labels != head.num_classes)
    predictions = arguments["pred_anchor_deltas"]
    boxes = box_tensors(arguments["gt_boxes"])
    num_anchors = [x.shape[1] for x in predictions]
    boxes, foreground = (x.split(num_anchors, dim=1) for x in (torch.stack(boxes), foreground))
    levels = []
    for level, boxes_l, foreground_l in zip(predictions, boxes, foreground):
        image, anchor = nonzero_tuple(foreground_l)
        sizes = _sizes(boxes_l[image, anchor])
        levels.append(_Foreground(level, level.shape, image, anchor, sizes))
    return layer, levels


def _foreground_regions(head: FastRCNNOutputLayers, predictions, proposals) -> List[_Foreground]:
    if not proposals:
        return []
    deltas = predictions[1]
    classes = cat([x.gt_classes for x in proposals])
    # Without ground truth in an image, its regions are background and have no such field.
    boxes = cat([(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes).tensor for x in proposals])
    (region,) = nonzero_tuple((classes >= 0) & (classes < head.num_classes))
    num_outputs = 4 * getattr(head.box2box_transform, "num_points", 1)
    shape = (deltas.shape[0], deltas.shape[1] // num_outputs, num_outputs)
    group = classes[region] if shape[1] > 1 else torch.zeros_like(region)
    return [_Foreground(deltas, shape, region, group, _sizes(boxes[region]))]


def _sizes(boxes: torch.Tensor) -> torch.Tensor:
    return Boxes(boxes).area().sqrt()
