"""What the files of a prediction are called, after the files that they are made from."""

import os
from collections import Counter
from collections.abc import Sequence

# The contact sheet beside the pictures, without extension: no picture of an image is called so.
OVERVIEW = "overview"


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
    Names in folders, without extension, for files that mirror the folders of others, as YOLO's
    labels do. Where two would be the same, also on a disk that does not tell upper from lower case,
    both keep their extension.
    """
    stems = [os.path.splitext(x)[0] for x in names]
    seen = Counter(stem.lower() for stem in stems)
    result, taken = [], set()
    for name, stem in zip(names, stems):
        unique, number = stem if seen[stem.lower()] == 1 else name, 2
        while unique.lower() in taken or (unique != stem and unique.lower() in seen):
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique.lower())
        result.append(unique)
    return result


def picture_names(files: Sequence[str]) -> list[str]:
    """
    Names in one folder, without extension, for the picture of every file: its own, or with as many
    of its folders as tell it from the others. They differ also where upper and lower case are the
    same, and none is "overview".
    """
    names, taken = [], {OVERVIEW}
    stems = [os.path.splitext(os.path.basename(x))[0].lower() for x in files]
    shared = {stem for stem, count in Counter(stems).items() if count > 1}
    for file, stem in zip(files, stems, strict=True):
        parts = os.path.abspath(file).strip(os.sep).split(os.sep)
        name, depth = os.path.splitext(parts.pop())[0], 0
        # All that share a name get their folder, not just the second one.
        while parts and (name.lower() in taken or (depth == 0 and stem in shared)):
            name, depth = f"{parts.pop()}_{name}", depth + 1
        number, unique = 2, name
        while unique.lower() in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique.lower())
        names.append(unique)
    return names
