#!/usr/bin/env python
"""
Export a detector as TorchScript, to run it with PyTorch alone: neither Detectron2 nor this project
is needed then. The file is checked against the model on images of several sizes before it is
written.

    python tools/export_model.py --config-file configs/SmallShapes/demo.yaml \\
        --weights output/demo/model_final.pth --output model.ts --image photo.jpg

The model is traced, as Detectron2's own tools/deploy/export_model.py does; of Detectron2, that
needs the main branch or the v0.6 of tools/install_detectron2.py. Thresholds, the number of
detections and the device (MODEL.DEVICE) are those of the config, for ever.
"""

import argparse
import io
import os
import re
import warnings

import numpy as np
import torch
from cbbl_d2.engine.checkpoint import load_weights
from cbbl_d2.engine.cli import add_opts, number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.files import open_whole
from cbbl_d2.inference import load_inference_config
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn import functional as F

# Of height and width of the check's images, relative to those of the image that is traced.
SCALES = ((1.0, 1.0), (0.75, 1.25), (1.25, 0.75))
TOLERANCE = 0.01  # pixels
# The outputs, as fields of Detectron2's Instances; those that the model has.
FIELDS = ("pred_boxes", "scores", "pred_classes", "pred_masks", "pred_keypoints")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("--weights", help="checkpoint of the model; default: MODEL.WEIGHTS")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images with objects, on which the exported model is compared with the original; "
        "default: colored noise, in which a good detector finds little",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=number(int, 32),
        metavar=("HEIGHT", "WIDTH"),
        help="of these images in the comparison, in pixels; default: as INPUT.MIN_SIZE_TEST and "
        "INPUT.MAX_SIZE_TEST say. The exported model takes images of any size.",
    )
    add_opts(parser)
    return parser


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


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = load_inference_config(args.weights, args.config_file, args.opts)
    folder = os.path.dirname(os.path.abspath(args.output))
    if os.path.isdir(args.output) or not os.path.isdir(folder):
        raise UserError(f"{args.output}: --output must be a file in a folder that exists")
    cfg.freeze()
    return cfg


# -- images for the comparison ---------------------------------------------------------------------


def make_examples(cfg: CfgNode, files: list[str], size: list[int] | None) -> list[torch.Tensor]:
    """
    Args:
        files: images; none: colored noise.
        size: height and width; None: as the config says.

    Returns:
        three or more float tensors of shape ``(3, H, W)`` and of different sizes.

    Raises:
        UserError: an image cannot be read.
    """
    default = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    pictures = [_read(cfg, file) for file in files] or [_noise(cfg)]
    examples = []
    for i in range(max(len(SCALES), len(pictures))):
        picture = pictures[i % len(pictures)]
        height, width = size or _resized(picture, default).shape[:2]
        scale_y, scale_x = SCALES[i % len(SCALES)]
        picture = _resized(picture, T.Resize((round(height * scale_y), round(width * scale_x))))
        examples.append(torch.as_tensor(picture.astype("float32").transpose(2, 0, 1)))
    return examples


def _read(cfg: CfgNode, file: str) -> np.ndarray:
    try:
        return read_image(file, format=cfg.INPUT.FORMAT)
    except Exception as e:  # a damaged file can make a decoder raise anything
        raise UserError(f"{file}: {e}".replace("\n", " ")) from e


def _noise(cfg: CfgNode) -> np.ndarray:
    """Blobs of 16 px."""
    height = cfg.INPUT.MIN_SIZE_TEST or 480
    size = (max(height // 16, 1), max(height // 12, 1), 3)
    blobs = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return _resized(blobs, T.Resize((size[0] * 16, size[1] * 16)))


def _resized(image: np.ndarray, resize: T.Augmentation) -> np.ndarray:
    return resize.get_transform(image).apply_image(image)


# -- model to file ---------------------------------------------------------------------------------


def detect(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Returns:
        the tensors of :data:`FIELDS` that the model has: boxes and keypoints in pixels of this
        image, masks as probabilities within their boxes.

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
    fields = {name: result.get(name) for name in FIELDS if result.has(name)}
    return {**fields, "pred_boxes": result.pred_boxes.tensor}


def trace(tracing_adapter: type, model: nn.Module, image: torch.Tensor) -> bytes:
    """
    Returns:
        content of the TorchScript file.

    Raises:
        UserError: the model cannot be traced.
    """
    adapter = tracing_adapter(model, image, lambda *inputs: tuple(detect(*inputs).values()))
    content = io.BytesIO()
    try:
        # torch's own check compares tensors one by one, which equal scores make fail.
        torch.jit.save(torch.jit.trace(adapter, (image,), check_trace=False), content)
    except RuntimeError as e:
        lines = [x for x in str(e).strip().splitlines() if not re.search(r"\(\d+\): \S+$", x)]
        reason = lines[-1] if lines else type(e).__name__  # without `file(line): function`
        raise UserError(
            f"MODEL.META_ARCHITECTURE {type(model).__name__} cannot be traced: {reason}"
        ) from e
    return content.getvalue()


def compare(
    model: nn.Module, exported: torch.jit.ScriptModule, examples: list[torch.Tensor]
) -> tuple[int, float]:
    """
    Returns:
        number of objects that both find, and the largest difference of their boxes in pixels.

    Raises:
        UserError: one finds an object that the other does not.
    """
    num_objects, largest = 0, 0.0
    for image in examples:
        with torch.no_grad():
            expected = list(detect(model, image).values())
            try:
                found = exported(image)
            except RuntimeError as e:  # something became a constant in tracing
                raise UserError(
                    f"nothing written: the exported model fails on an image of {image.shape[1]}x"
                    f"{image.shape[2]} px: {str(e).strip().splitlines()[-1]}"
                ) from e
        # Objects of equal scores may come in another order: each is compared with its nearest.
        distance = (found[0][:, None] - expected[0][None]).abs().amax(dim=2)
        distance[found[2][:, None] != expected[2][None]] = float("inf")
        distance = F.pad(distance, (0, 1, 0, 1), value=float("inf"))  # one may find none at all
        nearest = torch.cat((distance.amin(dim=1)[:-1], distance.amin(dim=0)[:-1]))
        unmatched = int((nearest > TOLERANCE).sum())
        if unmatched:
            raise UserError(
                f"nothing written: on an image of {image.shape[1]}x{image.shape[2]} px "
                f"{unmatched} of {len(nearest)} boxes of the exported and the original model have "
                f"no counterpart within {TOLERANCE} px; where many scores are equal, NMS may "
                "choose others: try another --image"
            )
        largest = max([largest, *nearest.tolist()])
        num_objects += len(expected[0])
    return num_objects, largest


USE = """Use it, with torch and torchvision alone:

    import torch, torchvision  # the latter has operators that the file needs

    model = torch.jit.load({path!r})
    # image: float tensor (3, height, width), {format}, values from 0 to 255, on {device};
    # resized as the config says: short side {short} px, long side at most {long}
    with torch.no_grad():
        {outputs} = model(image)
"""


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    tracing_adapter = get_tracing_adapter()
    cfg = setup(args)
    examples = make_examples(cfg, args.image, args.size)
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    examples = [x.to(model.device) for x in examples]

    with torch.no_grad():
        names = list(detect(model, examples[0]))
    with warnings.catch_warnings():
        # Deprecations, and shapes that become numbers: what matters shows in the comparison.
        warnings.simplefilter("ignore")
        content = trace(tracing_adapter, model, examples[0])
        exported = torch.jit.load(io.BytesIO(content), map_location=model.device)
        num_objects, largest = compare(model, exported, examples)
    with open_whole(args.output, "wb") as f:
        f.write(content)

    sizes = ", ".join(f"{x.shape[1]}x{x.shape[2]}" for x in examples)
    print(f"{args.output} written ({len(content) / 2**20:.1f} MB)")
    if num_objects:
        print(
            f"Compared with the original model on images of {sizes} px: the same {num_objects} "
            f"objects, boxes within {largest:.2g} px"
        )
    else:
        print(
            f"Neither it nor the original model finds anything in images of {sizes} px, which "
            "proves little: give an --image with objects"
        )
    print(
        USE.format(
            path=args.output,
            format=cfg.INPUT.FORMAT,
            device=model.device.type,
            short=cfg.INPUT.MIN_SIZE_TEST or "any number of",
            long=cfg.INPUT.MAX_SIZE_TEST,
            outputs=", ".join(x.removeprefix("pred_") for x in names),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
