"""
The refinement of the paper's second version ("UR"): the localization loss once more, on feature
maps that were moved to where the boxes are less certain.

    P' = P + rho * g / ||g||,  g = dL_UM / dP

where P is a level of the feature pyramid in one image and L_UM the uncertainty loss. The paper
leaves details open; docs/method.md says how this project reads it. In training alone: a model with
and one without it have the same parameters and detect the same.
"""

import contextlib
import dataclasses
import functools
from typing import Any, Callable, Iterator, List, NamedTuple

import torch
from torch import nn

from .localization_loss import LocalizationLoss

"""
Shape shorthand in this module:

    N: number of images
    C, H, W: of a feature map
    P: number of foreground boxes, which alone have a localization loss
    G: number of grid points
"""


class Localized(NamedTuple):
    """
    What a part of a detector predicts for its foreground, and should predict.

    Attributes:
        loss: of this part.
        transform: a C-BBL transform.
        logits: shape ``(P, 4 * G)``.
        source_boxes, target_boxes: shape ``(P, 4)``, see :class:`LocalizationLoss`.
    """

    loss: LocalizationLoss
    transform: Any
    logits: torch.Tensor
    source_boxes: torch.Tensor
    target_boxes: torch.Tensor

    def uncertainty(self) -> torch.Tensor:
        """The uncertainty loss, unweighted; entropy where the loss has none. A scalar."""
        kind = "entropy" if self.loss.uncertainty == "none" else self.loss.uncertainty
        loss = dataclasses.replace(
            self.loss, uncertainty=kind, uncertainty_weight=1.0, giou_weight=0.0
        )
        return loss(*self[1:], prefix=None)[1]

    def total(self) -> torch.Tensor:
        """The localization loss, the sum of its terms with their relative weights. A scalar."""
        return self.loss(*self[1:], prefix=None).sum()


Localize = Callable[[List[torch.Tensor]], List[Localized]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """
    Attributes:
        gamma: weight of the loss on the moved feature maps relative to the localization loss.
        rho: how far a feature map of one image is moved, in the L2 norm over ``(C, H, W)``.
    """

    gamma: float
    rho: float = 0.5

    def __call__(
        self, features: List[torch.Tensor], localize: Localize, module: nn.Module
    ) -> List[torch.Tensor]:
        """
        Args:
            features: for each level, shape ``(N, C, H, W)``.
            localize: what the detector's parts predict from such feature maps for the foreground of
                the first pass. Is called twice.
            module: that predicts it.

        Returns:
            for each of the parts a scalar, not normalized. For P = 0 zero with a live gradient.
        """
        # In half precision most of the movement, some 1e-3 in each number, would be rounded away,
        # and the gradient would vanish.
        features = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in features]
        autocast = torch.autocast(features[0].device.type, enabled=False)
        with autocast, unchanged_statistics(module):
            moved = [
                # The movement is a constant; P stays connected to the backbone.
                torch.addcmul(x, direction, direction.new_tensor(self.rho))
                for x, direction in zip(features, uncertain_directions(features, localize))
            ]
            return [self.gamma * part.total() for part in localize(moved)]


def uncertain_directions(features: List[torch.Tensor], localize: Localize) -> List[torch.Tensor]:
    """
    Args:
        features, localize: see :meth:`Refinement.__call__`.

    Returns:
        for each level, shape ``(N, C, H, W)``: the gradient of the uncertainty in each image, of
        norm 1; zero where there is no foreground on that level, or the uncertainty is flat.
    """
    # Copies that are leaves, so that a backbone without gradients will do, and that the backward
    # pass stops at them. Also where a training loss is computed without gradients.
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in features]
        uncertainty = sum(part.uncertainty() for part in localize(leaves))
    gradients = [torch.zeros_like(x) for x in leaves]
    if uncertainty.requires_grad:  # not so without foreground in a head that is not trained
        gradients = torch.autograd.grad(
            uncertainty, leaves, allow_unused=True, materialize_grads=True
        )
    norms = [torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True) for g in gradients]
    return [g / norm.clamp(min=1e-12) for g, norm in zip(gradients, norms)]


@contextlib.contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """
    In this context batch norms normalize as they do in training, and keep their running statistics
    as they are: inference sees no moved feature map.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.track_running_stats, norm.momentum) for norm in norms]
    for norm in norms:
        # The second one for Detectron2's NaiveSyncBatchNorm, which does not ask for the first.
        norm.track_running_stats, norm.momentum = False, 0.0
    try:
        yield
    finally:
        for norm, (tracks, momentum) in zip(norms, before):
            norm.track_running_stats, norm.momentum = tracks, momentum


@contextlib.contextmanager
def results_of(module: nn.Module, method: str) -> Iterator[List[Any]]:
    """In this context, the list gets what each call of the method returns."""
    original, before, results = getattr(module, method), dict(vars(module)), []

    @functools.wraps(original)
    def keep(*args, **kwargs):
        results.append(original(*args, **kwargs))
        return results[-1]

    setattr(module, method, keep)  # an attribute of the instance hides the method of its class
    try:
        yield results
    finally:
        delattr(module, method)
        if method in before:
            setattr(module, method, before[method])
