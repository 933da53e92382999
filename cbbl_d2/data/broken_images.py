"""
Images that are missing, truncated, no images at all, or not of the size that their annotation says.

Training goes on without them and counts them (:class:`SkipBrokenImages`). An evaluation stops and
names the file (:class:`NameBrokenImage`): without the image its objects would count as missed, and
without its objects the result would be that of another data set.
"""

import errno
import logging
import os
from collections.abc import Callable

import torch
from cbbl_d2.errors import UserError
from detectron2.data import detection_utils
from PIL import Image

__all__ = [
    "BROKEN_IMAGE_ERRORS",
    "NameBrokenImage",
    "SkipBrokenImages",
    "check_depth",
    "is_too_deep",
    "missing_images",
    "why_broken",
]

logger = logging.getLogger(__name__)

# What Detectron2's DatasetMapper raises for a broken image. OSError: missing, a folder, truncated,
# not an image (PIL.UnidentifiedImageError). SyntaxError: Pillow's for a PNG with a damaged chunk.
# DecompressionBombError: a damaged header that claims gigapixels. Some rare formats end in other
# errors, which bugs raise as well: for these the file is read once more, see why_broken.
BROKEN_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
    detection_utils.SizeMismatchError,
)

# The machine's trouble, not the image's: to skip images for it would hide it.
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)

_MAX_CONSECUTIVE_FAILURES = 100

# Of a data set, to find out whether it has 16 bits: a camera or a scanner writes them all alike.
_NUM_SAMPLES = 8

_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)


def missing_images(dicts: list[dict]) -> list[str]:
    """
    The image files of a data set that do not exist; none of them is opened.

    Args:
        dicts: Detectron2's dataset dicts. Those without a ``file_name`` are passed over.
    """
    names = [d["file_name"] for d in dicts if "file_name" in d]
    return [name for name in names if not os.path.isfile(name or "")]


def is_too_deep(image: Image.Image) -> bool:
    """
    Whether an image of one channel has values over 255, which become 255 when Detectron2 reads it:
    an image of 16 bits turns white, without an error. (Pillow reads those of three channels as 8
    bits, in proportion.)
    """
    return image.mode.startswith(("I", "F")) and image.getextrema()[1] > 255


def check_depth(dicts: list[dict]) -> None:
    """
    Look at a few images of a data set.

    Args:
        dicts: Detectron2's dataset dicts.

    Raises:
        UserError: :func:`is_too_deep`.
    """
    for record in dicts[:: max(1, len(dicts) // _NUM_SAMPLES)]:
        file_name = record.get("file_name")
        try:
            with Image.open(file_name) as image:
                too_deep = is_too_deep(image)
        except Exception:  # missing or broken: said elsewhere, where it matters
            continue
        if too_deep:
            raise UserError(
                f"{file_name}: has values over 255, which Detectron2 would all read as 255, white: "
                "convert the images to 8 bits"
            )


class SkipBrokenImages(torch.utils.data.Dataset):
    """
    Maps the items of a data set; in place of one whose image is broken it gives the next one of the
    same orientation (wide or tall: Detectron2 makes batches of one of them).

    The next one, not a random one: a resumed run then sees the same images as one that was never
    interrupted. (Detectron2's ``MapDataset`` can replace items for which the mapper returns None,
    at random, and in v0.6 with a call that Python >= 3.11 has removed.)

    Every broken file is logged once, with the number of them so far, also across the workers of
    a data loader.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, mapper: Callable[[dict], dict | None]):
        """
        Args:
            dataset: a map-style data set of Detectron2's dataset dicts.
            mapper: from a dataset dict to the input of a model, for example ``DatasetMapper``.
                Returns None to have the item skipped.
        """
        self._dataset = dataset
        self._mapper = mapper
        # In shared memory: the workers of a data loader, which are other processes, add to it.
        self._is_broken = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            UserError: many images in a row are broken: this is not the odd damaged file.
        """
        is_wide = _is_wide(self._dataset[int(index)])
        failures = 0
        for step in range(len(self)):
            current = (int(index) + step) % len(self)
            record = self._dataset[current]
            if _is_wide(record) != is_wide:
                continue
            file_name = record.get("file_name")
            try:
                item = self._mapper(record)
                if item is not None:
                    return item
                reason = "the mapper leaves it out"
            except Exception as e:
                reason = why_broken(e, file_name)
                if not reason:
                    raise
                self._report(current, file_name, reason)
            failures += 1
            if failures == _MAX_CONSECUTIVE_FAILURES:
                break
        raise UserError(
            f"{failures} images in a row cannot be used, the last is {file_name} ({reason}): check "
            "the image folder of the data set"
        )

    def _report(self, index: int, file_name: str, reason: str) -> None:
        if not self._is_broken[index]:
            self._is_broken[index] = True
            logger.warning(
                f"Skipping the image {file_name}: {reason} "
                f"(broken images so far: {int(self._is_broken.sum())})"
            )


class NameBrokenImage:
    """A mapper that turns the error of another one over a broken image into a UserError."""

    def __init__(self, mapper: Callable[[dict], dict]):
        """
        Args:
            mapper: from a dataset dict to the input of a model, for example ``DatasetMapper``.
        """
        self._mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            UserError: the image is broken.
        """
        file_name = dataset_dict.get("file_name")
        try:
            return self._mapper(dataset_dict)
        except Exception as e:
            reason = why_broken(e, file_name)
            if not reason:
                raise
            raise UserError(
                f"cannot evaluate without the image {file_name} ({reason}): restore the file or "
                "take it out of the annotation file"
            ) from e


def _is_wide(record: dict) -> bool:
    return record.get("width", 0) > record.get("height", 0)


def why_broken(error: Exception, file_name: str | None) -> str:
    """
    One line on what is wrong with an image; "" if the error has another cause.

    Args:
        error: what reading or mapping the image has raised.
        file_name: of the image.
    """
    if file_name is None or isinstance(error, UserError):
        return ""
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        return ""
    if not isinstance(error, BROKEN_IMAGE_ERRORS):
        try:
            detection_utils.read_image(file_name)
            return ""
        except Exception as again:
            error = again
    # Pillow's message ends in the representation of a file object; the file is named already.
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, detection_utils.SizeMismatchError) and _is_turned(file_name):
        reason += (
            " The EXIF data of the file turn it by 90 degrees, as Detectron2 does, too: annotate "
            "the turned image, or remove the EXIF data"
        )
    return " ".join(reason.split())


def _is_turned(file_name: str) -> bool:
    with Image.open(file_name) as image:
        return image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
