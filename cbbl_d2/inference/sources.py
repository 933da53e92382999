"""What to predict on: files that a command line names, or a data set."""

import dataclasses
import glob
import os
from collections.abc import Sequence

from cbbl_d2.data.dataset_checks import load_dataset
from cbbl_d2.data.image_files import IMAGE_TYPES
from cbbl_d2.errors import UserError
from detectron2.data import MetadataCatalog

from .names import relative_names

VIDEO_TYPES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


@dataclasses.dataclass(frozen=True)
class Source:
    """
    Attributes:
        records: dataset dicts; those of files have "file_name" alone, and no ground truth.
        names: relative file names, one for each, see
            :func:`cbbl_d2.inference.names.relative_names`.
        takes_videos: whether videos are read as such; else they are files that cannot be read.
    """

    records: list[dict]
    names: list[str]
    takes_videos: bool = True

    @property
    def files(self) -> list[str]:
        """Paths of the images and videos."""
        return [r["file_name"] for r in self.records]

    def spread(self, number: int | None) -> "Source":
        """At most ``number`` of them, see :func:`spread`."""
        return Source(spread(self.records, number), spread(self.names, number), self.takes_videos)

    def is_video(self, file: str) -> bool:
        return self.takes_videos and file.lower().endswith(VIDEO_TYPES)


def find_source(
    words: Sequence[str] | None,
    dataset: str | None = None,
    types: Sequence[str] = IMAGE_TYPES + VIDEO_TYPES,
) -> Source:
    """
    Args:
        words: see :func:`find_files`; not read where there is a ``dataset``.
        dataset: name of a registered data set.
        types: the extensions of files to look for in folders; without those of videos, a video
            that is named by itself is a file that cannot be read.

    Raises:
        UserError: a word stands for nothing, or the data set cannot be loaded.
    """
    if dataset is None:
        records, root = [{"file_name": x} for x in find_files(words, types)], None
    else:
        records = load_dataset(dataset)
        root = MetadataCatalog.get(dataset).get("image_root", None)
    names = relative_names([r["file_name"] for r in records], root)
    return Source(records, names, dataset is not None or set(VIDEO_TYPES) <= set(types))


def spread(items: list, number: int | None) -> list:
    """``number`` items at equal distances: neighbors are often much alike, as in a video."""
    if number is None or number >= len(items):
        return items
    return [items[i * len(items) // number] for i in range(number)]


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
