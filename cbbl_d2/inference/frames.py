"""Reading what to predict on: images and the frames of videos, one after the other."""

import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np
from cbbl_d2.data.broken_images import TO_8_BITS, misread, why_broken
from cbbl_d2.errors import UserError
from detectron2.data.detection_utils import check_image_size, read_image
from PIL import Image
from tqdm import tqdm

from .names import unique_stems
from .sources import Source

logger = logging.getLogger(__name__)

# Images read ahead to fill a batch with others of their size, in batches.
_READ_AHEAD = 4


@dataclasses.dataclass
class Frame:
    """
    One image, or one frame of a video.

    Attributes:
        index: its place among all that could be read, from 0, in the order of the sources.
        file_name: relative, with forward slashes; the frames of ``clip.mp4`` are called
            ``clip/frame_000000.png``, ..., as CVAT calls them.
        image: (H, W, 3) uint8, RGB.
        record: the dataset dict, of an image from a data set.
        video: path of the video, and ``fps`` its frames per second.
        source_index: the place of its file in the source, from 0.
    """

    index: int
    file_name: str
    image: np.ndarray
    record: dict | None = None
    video: str | None = None
    fps: float = 0.0
    source_index: int = 0


class Skipped:
    """
    Names files that have to be left out on stderr, a line each, without disturbing a progress bar.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, line: str) -> None:
        self.count += 1
        tqdm.write(f"skipped: {line}", file=sys.stderr)


def count_frames(source: Source) -> int | None:
    """Images and frames in all, for a progress bar; None where a video does not say."""
    total = 0
    for path in source.files:
        if not source.is_video(path):
            total += 1
            continue
        video = cv2.VideoCapture(path)
        frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
        if frames < 0:
            return None
        total += frames
    return total


def read_frames(source: Source, skipped: Callable[[str], None]) -> Iterator[Frame]:
    """
    Read images as Detectron2 does, turned as their EXIF data say, and the frames of videos.

    Args:
        skipped: called with one line on each file that cannot be read.
    """
    index = itertools.count()
    entries = zip(source.records, source.names, unique_stems(source.names), strict=True)
    for place, (record, name, stem) in enumerate(entries):
        path = record["file_name"]
        try:
            if source.is_video(path):
                for number, (image, fps) in enumerate(_read_video(path)):
                    file_name = f"{stem}/frame_{number:06d}.png"
                    yield Frame(next(index), file_name, image, None, path, fps, place)
            else:
                image = read_rgb(path, record)
                # Of a file there is the name alone.
                known = record if len(record) > 1 else None
                yield Frame(next(index), name, image, known, source_index=place)
        except UserError as e:
            skipped(str(e))


def batches(frames: Iterable[Frame], batch_size: int) -> Iterator[list[Frame]]:
    """
    Batches of images of one size, so that the predictions do not depend on what else is in a
    batch. Images wait until there are enough of their size, while no more than four batches wait;
    those of one size come in their order.
    """
    waiting: dict[tuple[int, ...], list[Frame]] = {}
    for frame in frames:
        same = waiting.setdefault(frame.image.shape, [])
        same.append(frame)
        if len(same) < batch_size:
            if sum(map(len, waiting.values())) < _READ_AHEAD * batch_size:
                continue
            same = max(waiting.values(), key=len)
        yield waiting.pop(same[0].image.shape)
    yield from waiting.values()


def read_rgb(path: str, record: dict) -> np.ndarray:
    """
    An image as Detectron2 reads it: (H, W, 3) uint8, turned as its EXIF data say.

    Args:
        record: its dataset dict; if that knows the size of the image, it has to be so.

    Raises:
        UserError: it cannot be read, has another size, or what :func:`misread` finds.
    """
    try:
        image = read_image(path, format="RGB")
        check_image_size(dict(record), image)
        with Image.open(path) as file:
            fault = misread(file)
            pages = getattr(file, "n_frames", 1)
    except Exception as e:  # a damaged file can make a decoder raise anything
        reason = why_broken(e, path) or " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{path}: {reason}") from e
    if fault:
        raise UserError(f"{path}: has {fault}: {TO_8_BITS}")
    if pages > 1:
        logger.warning(f"{path}: has {pages} pages, of which the first is used")
    return image


def _read_video(path: str) -> Iterator[tuple[np.ndarray, float]]:
    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise UserError(f"{path}: not a video that OpenCV can read")
    fps = video.get(cv2.CAP_PROP_FPS)
    is_read, image = video.read()
    if not is_read:
        raise UserError(f"{path}: no frame of this video can be read")
    while is_read:
        yield np.ascontiguousarray(image[:, :, ::-1]), fps
        is_read, image = video.read()
