"""What an exported detector gives for an image."""

import torch
from cbbl_d2.errors import UserError
from cbbl_d2.modeling.uncertainty import std_in_pixels
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import nn

# Field of Detectron2's Instances -> name of the output, in their order; those that the model has.
OUTPUTS = {
    "pred_boxes": "boxes",
    "scores": "scores",
    "pred_classes": "classes",
    "pred_masks": "masks",
    "pred_keypoints": "keypoints",
    "pred_boxes_std": "deviations",
}


def get_tracing_adapter() -> type:
    """
    Raises:
        UserError: this Detectron2 cannot export.
    """
    try:
        from detectron2.export import TracingAdapter
    except ImportError as e:  # an unchanged v0.6 wants caffe2, which torch has dropped
        raise UserError(
            f"this Detectron2 cannot export (detectron2.export: {e}): install the main branch of "
            "https://github.com/facebookresearch/detectron2, or replace it by a v0.6 without "
            "compiled operations (python tools/install_detectron2.py --force)"
        ) from e
    return TracingAdapter


def detect(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Args:
        image: shape ``(3, H, W)``, in the format of the model, values from 0 to 255.

    Returns:
        the tensors of N objects, by the fields of :data:`OUTPUTS` that the model has: boxes
        ``(N, 4)`` and keypoints in pixels of this image, masks as probabilities within their boxes,
        ``pred_boxes_std`` ``(N, 4)`` as the standard deviations of the sides x1, y1, x2, y2 in
        pixels of this image.

    Raises:
        UserError: the model predicts something else.
    """
    inputs = [{"image": image}]
    if isinstance(model, GeneralizedRCNN):
        # Without postprocessing, which would paste the masks into the image.
        result = model.inference(inputs, do_postprocess=False)[0]
    else:
        result = model(inputs)[0].get("instances")
    if not isinstance(result, Instances) or not result.has("pred_boxes"):
        raise UserError(
            f"MODEL.META_ARCHITECTURE {type(model).__name__}: only models that find objects, and "
            "nothing else, can be exported"
        )
    fields = {name: result.get(name) for name in OUTPUTS if result.has(name)}
    fields["pred_boxes"] = boxes = result.pred_boxes.tensor
    if "pred_boxes_std" in fields:
        fields["pred_boxes_std"] = std_in_pixels(fields["pred_boxes_std"], boxes)
    return fields


def output_names(model: nn.Module, image: torch.Tensor) -> list[str]:
    """The names of what :func:`detect` returns, in its order."""
    with torch.no_grad():
        return [OUTPUTS[name] for name in detect(model, image)]


def traceable(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """From an image to the tensors of :func:`detect`, as a module for torch's tracing."""

    def detected(model, image):
        return tuple(detect(model, image.float()).values())

    # A module of its own starts in training mode, and an exporter hands that on.
    return get_tracing_adapter()(model, image, detected).eval()
