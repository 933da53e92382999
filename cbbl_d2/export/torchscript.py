"""TorchScript by tracing: a file that torch and torchvision run."""

import io
import re
import warnings

import torch
from cbbl_d2.errors import UserError
from torch import nn

from .comparison import Exported
from .outputs import traceable


def to_torchscript(model: nn.Module, image: torch.Tensor) -> bytes:
    """
    Args:
        model: in evaluation mode.
        image: shape ``(3, H, W)``, on the device of the model; what is in it has no influence.

    Returns:
        content of the file.

    Raises:
        UserError: the model cannot be traced, or this Detectron2 cannot export.
    """
    module, content = traceable(model, image), io.BytesIO()
    with warnings.catch_warnings():
        # Deprecations, and shapes that become numbers: what matters shows in the comparison.
        warnings.simplefilter("ignore")
        try:
            # torch's own check compares tensors one by one, which equal scores make fail.
            torch.jit.save(torch.jit.trace(module, (image,), check_trace=False), content)
        except RuntimeError as e:
            lines = [x for x in str(e).strip().splitlines() if not re.search(r"\(\d+\): \S+$", x)]
            reason = lines[-1] if lines else type(e).__name__  # without `file(line): function`
            raise UserError(
                f"MODEL.META_ARCHITECTURE {type(model).__name__} cannot be traced: {reason}"
            ) from e
    return content.getvalue()


def load_torchscript(content: bytes, device: torch.device) -> Exported:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(io.BytesIO(content), map_location=device)
