"""Images on which an exported model is compared with the original."""

from collections.abc import Sequence

import numpy as np
import torch
from cbbl_d2.errors import UserError
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image

# Of height and width of the images, relative to those of the image that is traced.
SCALES = ((1.0, 1.0), (0.75, 1.25), (1.25, 0.75))


def make_examples(
    cfg: CfgNode, files: Sequence[str] = (), size: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """
    Args:
        cfg: ``INPUT`` and ``MODEL.PIXEL_MEAN`` are read.
        files: images; none: colored noise.
        size: height and width; None: as the config says.

    Returns:
        four or more float tensors of whole numbers, shape ``(3, H, W)``, of three sizes: the one to
        trace first, and last one of a single color, in which there is nothing.

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
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN, dtype=torch.float32).round().clamp(0, 255)
    return [*examples, mean[:, None, None].expand_as(examples[0]).contiguous()]


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
