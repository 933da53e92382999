"""
Images that are missing, truncated, no images at all, or not of the size that their annotation says.

Training goes on without them and counts them (:class:`SkipBrokenImages`). An evaluation stops and
names the file (:class:`NameBrokenImage`): without the image its objects would count as missed, and
without its objects the result would be that of another data set.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from cbbl_d2.errors import UserError
from cbbl_d2.messages import count, listed
from detectron2.data import detection_utils
from PIL import ExifTags, Image, TiffImagePlugin

__all__ = [
    "TO_8_BITS",
    "BROKEN_IMAGE_ERRORS",
    "NameBrokenImage",
    "SkipBrokenImages",
    "check_depth",
    "check_some_exist",
    "large_images",
    "misread",
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

# Long side over short side: at Detectron2's default of at most 1333 pixels, half a pixel is left.
_ELONGATED = 500

_MAX_CONSECUTIVE_FAILURES = 100

_READ_AS = ", which Detectron2 reads as"
TO_8_BITS = "convert the images to 8 bits, values from 0 to 255"
# Of 255: a photograph at night has brighter pixels.
_DARK = 16

# Of a data set, to find out whether it has 16 bits: a camera or a scanner writes them all alike.
_NUM_SAMPLES = 8

_QUARTER_TURNS = (5, 6, 7, 8)


def missing_images(dicts: list[dict]) -> list[str]:
    """
    The image files of a data set that do not exist; none of them is opened.

    Args:
        dicts: Detectron2's dataset dicts. Those without a ``file_name`` are passed over.
    """
    names = [d["file_name"] for d in dicts if "file_name" in d]
    return [name for name in names if not os.path.isfile(name or "")]


def misread(image: Image.Image) -> str:
    """
    What an image has that Detectron2, for which 0 is black and 255 white in any file, would not
    see; "" where it sees the image as it is. An image of 16 bits turns white, one of 0 to 1 black,
    without an error. (Of three channels with 16 bits Pillow hands on the upper 8.)

    Args:
        image: opened and not read yet.
    """
    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        if high > 255:
            return f"values over 255{_READ_AS} 255, white"
        if not low >= 0:  # or NaN
            return f"negative values{_READ_AS} 0, black"
        if image.mode == "F" and 0 < high < _DARK:
            return f"no value over {1 if high <= 1 else _DARK}, where 255 is white{_READ_AS} black"
    elif ";16" in str(image.tile):
        high = max(band[1] for band in image.convert("RGB").getextrema())
        if 0 < high < _DARK:  # values of 12 bits, for example
            return f"16 bits, but no value over {256 * _DARK - 1} of 65535{_READ_AS} black"
    return ""


def check_some_exist(
    missing: Sequence[str], number: int, image_root: str, annotations: str
) -> None:
    """
    Args:
        missing: see :func:`missing_images`.
        number: of images in all.
        annotations: what names them, for the message.

    Raises:
        UserError: all are missing.
    """
    if len(missing) < number:
        return
    raise UserError(
        f"{image_root}: "
        + ("no such folder" if not os.path.isdir(image_root) else "probably the wrong folder")
        + f", none of the {number} images of {annotations} is there, for example {missing[0]}"
        + ": correct the image folder or the file_name entries"
        + (", with / in the place of \\" if "\\" in missing[0] and os.sep == "/" else "")
    )


def check_depth(dicts: list[dict]) -> None:
    """
    Look at a few images of a data set.

    Args:
        dicts: Detectron2's dataset dicts.

    Raises:
        UserError: :func:`misread`.
    """
    for record in dicts[:: max(1, len(dicts) // _NUM_SAMPLES)]:
        file_name = record.get("file_name")
        try:
            with Image.open(file_name) as image:
                reason = misread(image)
        except Exception:  # missing or broken: said elsewhere, where it matters
            continue
        if reason:
            raise UserError(f"{file_name}: has {reason}: {TO_8_BITS}")


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
            height, width = detection_utils.read_image(file_name).shape[:2]
            if max(height, width) >= _ELONGATED * min(height, width):
                return f"{width}x{height} pixels, so narrow that resizing leaves nothing of it"
            return ""
        except Exception as again:
            error = again
    # Pillow's message ends in the representation of a file object; the file is named already.
    if isinstance(error, Image.UnidentifiedImageError):
        return _kind_of_tiff(file_name) or "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"over Pillow's limit of {2 * Image.MAX_IMAGE_PIXELS} pixels: cut the images with "
            "tools/slice_dataset.py, or predict with --slice"
        )
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, detection_utils.SizeMismatchError) and _is_turned(file_name):
        reason += (
            " The EXIF data of the file turn it by 90 degrees, as Detectron2 does, too: annotate "
            "the turned image, or remove the EXIF data"
        )
    return " ".join(reason.split())


def _kind_of_tiff(file_name: str) -> str:
    """Of a TIFF file that Pillow cannot identify: what it holds; "" for another file."""
    try:
        with open(file_name, "rb") as f:
            header = f.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(
                header + (f.read(8) if 43 in header[2:4] else b"")  # BigTIFF
            )
            f.seek(tags.next)
            tags.load(f)
    except Exception:  # no TIFF, or a damaged one
        return ""
    bits = listed(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)), limit=8)
    bands = count(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), "band", "bands")
    return f"a TIFF of a kind that cannot be read ({bands}, bits {bits}): write RGB of 8 bits"


@contextlib.contextmanager
def large_images() -> Iterator[None]:
    """
    Read images of up to 2^30 pixels, 3 GB as RGB. Pillow refuses those over 179 million, lest a
    small damaged file takes all memory.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 2**29  # its error comes at twice that
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _is_turned(file_name: str) -> bool:
    with Image.open(file_name) as image:
        return image.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
