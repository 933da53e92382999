"""What to predict on: image files and the frames of videos, read one after the other."""

import dataclasses
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import cv2
import numpy as np
from detectron2.data.detection_utils import check_image_size, read_image
from PIL import Image

from cbbl_d2.data.broken_images import is_too_deep, why_broken
from cbbl_d2.errors import UserError

IMAGE_TYPES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_TYPES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

# Images read ahead to fill a batch with others of their size, in batches.
_READ_AHEAD = 4


@dataclasses.dataclass
class Frame:
    """
    One image, or one frame of a video.

    Attributes:
        index: its place among all, from 0, in the order of the sources.
        file_name: relative, with forward slashes; the frames of ``clip.mp4`` are called
            ``clip/frame_000000.png``, ..., as CVAT calls them.
        image: (H, W, 3) uint8, RGB.
        record: the dataset dict, of an image from a data set.
        video: path of the video, and ``fps`` its frames per second.
    """

    index: int
    file_name: str
    image: np.ndarray
    record: dict | None = None
    video: str | None = None
    fps: float = 0.0


def find_files(words: Sequence[str], types: Sequence[str] = IMAGE_TYPES + VIDEO_TYPES) -> list[str]:
    """
    The files that words of a command line stand for, each once: files, folders (those in it with a
    fitting extension) and glob patterns.

    Raises:
        UserError: a word that stands for none.
    """
    files = []
    for word in words:
        path = os.path.expanduser(word)
        if os.path.isdir(path):
            found = [os.path.join(path, x) for x in sorted(os.listdir(path))]
            found = [x for x in found if x.lower().endswith(tuple(types)) and os.path.isfile(x)]
            if not found:
                kinds = "images" if set(types) <= set(IMAGE_TYPES) else "images or videos"
                raise UserError(f"{word}: no {kinds} in this folder ({', '.join(types)})")
        elif os.path.isfile(path):
            found = [path]
        else:
            found = [x for x in sorted(glob.glob(path, recursive=True)) if os.path.isfile(x)]
            if not found:
                raise UserError(f"{word}: no such file, folder or match")
        files.extend(found)
    # The same file may be named twice, by itself and by its folder.
    return list({os.path.realpath(x): x for x in reversed(files)}.values())[::-1]


def relative_names(files: Sequence[str], root: str | None = None) -> list[str]:
    """
    The paths of files from the deepest folder that holds them all, with forward slashes.

    Args:
        root: this folder instead, where it holds them all.
    """
    paths = [os.path.abspath(x) for x in files]
    folders = {os.path.dirname(x) for x in paths}
    if root is not None:
        root = os.path.abspath(root)
        if any(os.path.commonpath([root, x]) != root for x in folders):
            root = None
    if root is None and folders:
        root = os.path.commonpath(folders)
    return [os.path.relpath(x, root).replace(os.sep, "/") for x in paths]


def unique_stems(names: Sequence[str]) -> list[str]:
    """
    File names without extension, for files that are made from them. Where two would be the same,
    also on a disk that does not tell upper from lower case, both keep their extension.
    """
    stems = [os.path.splitext(x)[0] for x in names]
    seen: dict[str, int] = {}
    for stem in stems:
        seen[stem.lower()] = seen.get(stem.lower(), 0) + 1
    result, taken = [], set()
    for name, stem in zip(names, stems):
        unique, number = stem if seen[stem.lower()] == 1 else name, 2
        while unique.lower() in taken or (unique != stem and unique.lower() in seen):
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique.lower())
        result.append(unique)
    return result


def is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_TYPES)


def count_frames(files: Iterable[str]) -> int | None:
    """Images and frames in all, for a progress bar; None where a video does not say."""
    total = 0
    for path in files:
        if is_video(path):
            video = cv2.VideoCapture(path)
            frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
            video.release()
            if frames < 0:
                return None
            total += frames
        else:
            total += 1
    return total


def read_frames(
    records: Sequence[dict], names: Sequence[str], skipped: Callable[[str], None]
) -> Iterator[Frame]:
    """
    Read images as Detectron2 does, turned as their EXIF data say, and the frames of videos.

    Args:
        records: dataset dicts, of which only "file_name" must be there.
        names: relative names, one for each.
        skipped: called with one line on each file that cannot be read.
    """
    index = 0
    stems = unique_stems(names)
    for record, name, stem in zip(records, names, stems, strict=True):
        path = record["file_name"]
        try:
            if is_video(path):
                for number, (image, fps) in enumerate(_read_video(path)):
                    file_name = f"{stem}/frame_{number:06d}.png"
                    yield Frame(index, file_name, image, video=path, fps=fps)
                    index += 1
            else:
                image = read_rgb(path, record)
                yield Frame(index, name, image, record if "image_id" in record else None)
                index += 1
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
        UserError: it cannot be read, has another size, or more than 8 bits.
    """
    try:
        image = read_image(path, format="RGB")
        check_image_size(dict(record), image)
        with Image.open(path) as file:
            too_deep = is_too_deep(file)
    except Exception as e:  # a damaged file can make a decoder raise anything
        reason = why_broken(e, path) or " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{path}: {reason}") from e
    if too_deep:
        raise UserError(
            f"{path}: has values over 255, which would be read as white: convert it to 8 bits"
        )
    return image


def _read_video(path: str) -> Iterator[tuple[np.ndarray, float]]:
    video = cv2.VideoCapture(path)
    try:
        if not video.isOpened():
            raise UserError(f"{path}: not a video that OpenCV can read")
        fps = video.get(cv2.CAP_PROP_FPS)
        empty = True
        while True:
            is_read, image = video.read()
            if not is_read:
                break
            empty = False
            yield np.ascontiguousarray(image[:, :, ::-1]), fps
        if empty:
            raise UserError(f"{path}: no frame of this video can be read")
    finally:
        video.release()
