"""Whether an exported model finds what the original finds."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from cbbl_d2.errors import UserError
from cbbl_d2.messages import listed
from torch import nn
from torch.nn import functional as F

from .outputs import OUTPUTS, detect

# From an image (3, H, W) to the tensors of detect(); raises RuntimeError where it cannot run.
Exported = Callable[[torch.Tensor], Sequence[torch.Tensor]]

# The largest difference, by the fields of detect(): pixels of the boxes, and so on.
TOLERANCES = {
    "pred_boxes": 0.01,
    "scores": 1e-4,
    "pred_masks": 1e-3,
    "pred_keypoints": 0.01,
    "pred_boxes_std": 0.01,
}
# By what objects are recognized.
_PAIRED = ("pred_boxes", "scores", "pred_boxes_std")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """
    Attributes:
        num_objects: that both find, in all images.
        boxes: the largest difference of their boxes, pixels.
        scores: that of their scores.
    """

    num_objects: int
    boxes: float
    scores: float


def compare(model: nn.Module, exported: Exported, examples: Sequence[torch.Tensor]) -> Agreement:
    """
    Args:
        model: the original, in evaluation mode.
        examples: images, on its device; of several sizes, since tracing can make a constant of
            what depends on the image.

    Raises:
        UserError: one finds an object that the other does not, or the exported one fails.
    """
    num_objects, largest = 0, dict.fromkeys(TOLERANCES, 0.0)
    for image in examples:
        size = f"{image.shape[1]}x{image.shape[2]}"
        with torch.no_grad():
            expected = detect(model, image)
            try:
                found = dict(zip(expected, exported(image), strict=True))
            except RuntimeError as e:  # something became a constant in tracing
                raise UserError(
                    f"nothing written: the exported model fails on an image of {size} px: "
                    f"{str(e).strip().splitlines()[-1]}"
                ) from e
        # Objects of equal scores may come in another order: each is compared with its nearest.
        pairwise = {x: _pairwise(found[x], expected[x]) for x in _PAIRED if x in expected}
        apart = torch.stack([d / TOLERANCES[x] for x, d in pairwise.items()]).amax(dim=0)
        apart[found["pred_classes"][:, None] != expected["pred_classes"][None]] = float("inf")
        apart = F.pad(apart, (0, 1, 0, 1), value=float("inf"))  # one may find none at all
        nearest = torch.cat((apart.amin(dim=1)[:-1], apart.amin(dim=0)[:-1]))
        unmatched = int((nearest > 1).sum())
        if unmatched:
            within = listed(
                f"{TOLERANCES[x]:g}{'' if x == 'scores' else ' px'} of {OUTPUTS[x]}"
                for x in pairwise
            )
            raise UserError(
                f"nothing written: on an image of {size} px {unmatched} of {len(nearest)} objects "
                f"of the exported and the original model have no counterpart within {within}; "
                "where many scores are equal, NMS may choose others: try another --image"
            )
        matches = apart.argmin(dim=1)[:-1]
        num_objects += len(matches)
        for name, tolerance in TOLERANCES.items():
            if name not in expected or not len(matches):
                continue
            difference = (found[name] - expected[name][matches]).abs().max().item()
            if not difference <= tolerance:
                raise UserError(
                    f"nothing written: on an image of {size} px the {OUTPUTS[name]} of the "
                    f"exported model differ by {difference:.2g}, more than {tolerance}"
                )
            largest[name] = max(largest[name], difference)
    return Agreement(num_objects, largest["pred_boxes"], largest["scores"])


def _pairwise(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """
    From tensors of F and E rows to ``(F, E)``: the largest difference of any two of them. NaN,
    which no comparison would find, becomes infinite.
    """
    difference = (found[:, None] - expected[None]).abs()
    if difference.dim() > 2:
        difference = difference.amax(dim=2)
    return difference.nan_to_num(nan=float("inf"))
