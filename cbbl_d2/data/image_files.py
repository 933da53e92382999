"""Image files in folders, and their size as Detectron2 reads them."""

import os

from cbbl_d2.errors import UserError
from PIL import ExifTags, Image

__all__ = ["IMAGE_TYPES", "find_images", "image_size"]

IMAGE_TYPES = tuple(".bmp .gif .jfif .jp2 .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp".split())
_TURNED, _QUARTER_TURNED = range(2, 9), range(5, 9)


def find_images(folder: str) -> list[str]:
    """The images in a folder and its subfolders, sorted; without hidden ones, as macOS makes."""
    found = []
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in files if not name.startswith(".")]
        found += [os.path.join(path, x) for x in names if x.lower().endswith(IMAGE_TYPES)]
    return sorted(found)


def image_size(path: str) -> tuple[int, int, bool]:
    """
    Read from the header alone.

    Returns:
        width and height in pixels, after turning the image as its EXIF data say, and whether these
        turn or mirror it.

    Raises:
        UserError: not an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # damaged EXIF data, which Detectron2 passes over, too
                orientation = None
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        reason = getattr(e, "strerror", None) or "it is not an image"
        raise UserError(f"{path}: cannot be read ({reason}): restore it, or take it out") from e
    if orientation in _QUARTER_TURNED:
        width, height = height, width
    return width, height, orientation in _TURNED
