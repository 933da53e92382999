"""
ONNX by tracing: a file that onnxruntime runs, with dynamic height and width and with NMS, softmax
and expectation in its graph.

torch has two exporters. The newer one starts from ``torch.export``, which takes no code whose
shapes depend on values: of Detectron2's models that is already the padding of the image. The older
one, by tracing, is what Detectron2's models are written for (``TracingAdapter``).
"""

import contextlib
import io
import warnings
from collections.abc import Mapping
from unittest import mock

import torch
from cbbl_d2.errors import UserError
from torch import nn

from .comparison import Exported
from .outputs import output_names, traceable

INSTALL = "pip install -e '.[onnx]'"
# 16 has the RoIAlign of Detectron2 (aligned=True).
_OPSET = 17


def to_onnx(model: nn.Module, image: torch.Tensor, metadata: Mapping[str, str]) -> bytes:
    """
    Args:
        model: in evaluation mode.
        image: shape ``(3, H, W)``, on the device of the model; what is in it has no influence.
        metadata: goes with the file, see :func:`cbbl_d2.export.make_metadata`.

    Returns:
        content of the file: from "image", uint8 of shape ``(3, height, width)``, to the outputs of
        :func:`output_names`.

    Raises:
        UserError: the model cannot be exported, or a package is missing.
    """
    onnx = _onnx()
    names = output_names(model, image)
    if "keypoints" in names:
        raise UserError(
            "MODEL.KEYPOINT_ON: Detectron2's keypoints come out of a loop that cannot be exported "
            "as ONNX: use --format torchscript, or --opts MODEL.KEYPOINT_ON False for boxes alone"
        )
    image = image.to(torch.uint8)
    content = io.BytesIO()
    with warnings.catch_warnings(), _without_graphs():
        # Deprecations, and shapes that become numbers: what matters shows in the comparison.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                traceable(model, image),
                (image,),
                content,
                dynamo=False,
                opset_version=_OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes={
                    "image": {1: "height", 2: "width"},
                    **{name: {0: "objects"} for name in names},
                },
            )
        except RuntimeError as e:
            raise UserError(
                f"MODEL.META_ARCHITECTURE {type(model).__name__} cannot be exported as ONNX: "
                f"{str(e).strip().splitlines()[0]}"
            ) from e
    file = onnx.load_from_string(content.getvalue())
    file.producer_name = "cbbl_d2"
    onnx.helper.set_model_props(file, dict(metadata))
    onnx.checker.check_model(file)
    return file.SerializeToString()


def load_onnx(content: bytes) -> Exported:
    """
    Raises:
        UserError: onnxruntime is missing, or does not take the file.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise _is_missing(e) from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the exception says it, too
    try:
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's errors have no class in common
        raise UserError(
            f"nothing written: onnxruntime does not take the exported model: {e}"
        ) from e

    def run(image: torch.Tensor) -> list[torch.Tensor]:
        try:
            outputs = session.run(None, {"image": image.to("cpu", torch.uint8).numpy()})
        except Exception as e:
            raise RuntimeError(str(e)) from e
        return [torch.from_numpy(x).to(image.device) for x in outputs]

    return run


def _onnx():
    try:
        import onnx
    except ModuleNotFoundError as e:
        raise _is_missing(e) from e
    return onnx


def _is_missing(error: ModuleNotFoundError) -> UserError:
    return UserError(
        f"ONNX needs the packages onnx and onnxruntime, but {error.name} is not installed: "
        f"{INSTALL}"
    )


def _without_graphs() -> contextlib.AbstractContextManager:
    """An exporter that fails prints the model as thousands of lines first, whatever one asks."""
    return mock.patch.object(torch._C, "_jit_onnx_log", lambda *_: None, create=True)
