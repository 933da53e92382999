#!/usr/bin/env python
"""
Export a detector to one file that runs without Detectron2 and this project: as ONNX, which
onnxruntime alone runs, or as TorchScript for torch and torchvision. The file is checked against the
model on images of several sizes before it is written.

    python tools/export_model.py --config-file configs/SmallShapes/demo.yaml \\
        --weights output/demo/model_final.pth --output model.onnx --image photo.jpg
    python tools/export_model.py --config-file configs/SmallShapes/demo.yaml \\
        --weights output/demo/model_final.pth --output model.ts --image photo.jpg

The model is traced, as Detectron2's own tools/deploy/export_model.py does; of Detectron2, that
needs the main branch or the v0.6 of tools/install_detectron2.py. Thresholds, the number of
detections and, of TorchScript, the device (MODEL.DEVICE) are those of the config, for ever.
"""

import argparse
import os

import torch
from cbbl_d2.engine.checkpoint import load_weights
from cbbl_d2.engine.cli import add_opts, number, one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.export import (
    Agreement,
    compare,
    get_tracing_adapter,
    load_onnx,
    load_torchscript,
    make_examples,
    make_metadata,
    output_names,
    to_onnx,
    to_torchscript,
)
from cbbl_d2.files import open_whole
from cbbl_d2.inference import find_classes, load_inference_config
from cbbl_d2.inference.classes import say_class_names
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

FORMATS = ("torchscript", "onnx")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path to config file")
    parser.add_argument("--weights", help="checkpoint of the model; default: MODEL.WEIGHTS")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: onnx for an --output that ends in .onnx, else torchscript",
    )
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
    parser.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="for ONNX: names of the classes in the order of training, or one text file with a "
        "name in each line; default: those of the data set of the training",
    )
    add_opts(parser)
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = load_inference_config(args.weights, args.config_file, args.opts)
    folder = os.path.dirname(os.path.abspath(args.output))
    if os.path.isdir(args.output) or not os.path.isdir(folder):
        raise UserError(f"{args.output}: --output must be a file in a folder that exists")
    cfg.freeze()
    return cfg


USE_TORCHSCRIPT = """Use it, with torch and torchvision alone:

    import torch, torchvision  # the latter has operators that the file needs

    model = torch.jit.load({path!r})
    # image: float tensor (3, height, width), {format}, values from 0 to 255, on {device};
    # resized as the config says: short side {short} px, long side at most {long}
    with torch.no_grad():
        {outputs} = model(image)
"""

USE_ONNX = """Use it, with onnxruntime, NumPy and Pillow alone (and a copy of cbbl_onnx.py):

    python -m cbbl_onnx {path} photo.jpg

    from cbbl_onnx import Detector
    found = Detector({path!r})("photo.jpg")  # {outputs}, names
"""


def say_agreement(agreement: Agreement, examples: list[torch.Tensor]) -> None:
    *pictures, _ = examples
    sizes = ", ".join(f"{x.shape[1]}x{x.shape[2]}" for x in pictures)
    if agreement.num_objects:
        print(
            f"Compared with the original model on images of {sizes} px: the same "
            f"{agreement.num_objects} objects, boxes within {agreement.boxes:.2g} px, scores "
            f"within {agreement.scores:.2g}; and on one of a single color"
        )
    else:
        print(
            f"Neither it nor the original model finds anything in images of {sizes} px, which "
            "proves little: give an --image with objects"
        )


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logger(name="cbbl_d2")
    is_onnx = (args.format or ("onnx" if args.output.endswith(".onnx") else "")) == "onnx"
    if args.class_names and not is_onnx:
        raise UserError("--class-names: TorchScript has no place for them: give --format onnx")
    get_tracing_adapter()
    cfg = setup(args)
    examples = make_examples(cfg, args.image, args.size)
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    examples = [x.to(model.device) for x in examples]

    names = output_names(model, examples[0])
    if is_onnx:
        classes = find_classes(cfg, args.class_names)
        say_class_names(classes)
        content = to_onnx(model, examples[0], make_metadata(cfg, classes))
        exported = load_onnx(content)
    else:
        content = to_torchscript(model, examples[0])
        exported = load_torchscript(content, model.device)
    agreement = compare(model, exported, examples)
    with open_whole(args.output, "wb") as f:
        f.write(content)

    print(f"{args.output} written ({len(content) / 2**20:.1f} MB)")
    say_agreement(agreement, examples)
    print(
        (USE_ONNX if is_onnx else USE_TORCHSCRIPT).format(
            path=args.output,
            format=cfg.INPUT.FORMAT,
            device=model.device.type,
            short=cfg.INPUT.MIN_SIZE_TEST or "any number of",
            long=cfg.INPUT.MAX_SIZE_TEST,
            outputs=", ".join(names),
        ),
        end="",
    )


if __name__ == "__main__":
    main()
