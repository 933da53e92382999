"""
Pascal VOC's labels: an XML file for each image, with a ``bndbox`` for each object.

============================================  ======================================================
``difficult`` 1                               ignored for its class, as in VOC's own evaluation
``truncated``, ``occluded``, ``pose``,        passed over; the parts of a person are no objects here
``part``, ``segmented``
no width or height                            left out and counted
============================================  ======================================================

**Corners or pixels.** In VOC's own files ``xmin`` and ``xmax`` are the numbers of the first and the
last pixel of an object, counted from 1: a box over an image of 100 pixels goes from 1 to 100.
LabelImg, CVAT, Roboflow and others write the corners of the box, 0 to 100. A file does not say
which: it is taken for VOC's own if its ``database`` has "VOC" in its name, and no such file has a
number under 1. ``coordinates`` decides it otherwise. Of an object of 16 pixels the two boxes have
an IoU of 0.89.

The splits are the lists in ``ImageSets/Main``, but for those of single classes (``dog_train``: each
line ends in 1, 0 or -1); without, the folders ``train``, ``val``, ``valid`` and ``test``, of images
and XML files together or of each; without those, everything is one split, "all". What is in none of
them is named as passed over. The size in an XML must be that of the image; one of 0, as LabelImg
can write it, or none is passed over and counted.
"""

import collections
import dataclasses
import glob
import math
import os
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from cbbl_d2.data.datasets.public_data import first_existing, images_bar
from cbbl_d2.data.image_files import find_images
from cbbl_d2.errors import UserError
from cbbl_d2.messages import count, listed, short

from .labeled_images import (
    NO_LABEL_FILE,
    NO_SIZE,
    LabeledImage,
    LabeledObject,
    check_some_labels,
    choose_splits,
    folders_of_splits,
    open_image,
    read_class_list,
    read_lines,
    refuse,
    write_splits,
)

__all__ = ["VocFile", "VocObject", "convert_voc", "read_voc_file"]

_USUAL = ("train", "val", "trainval", "test")
_LISTS = os.path.join("ImageSets", "Main")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclasses.dataclass(frozen=True)
class VocObject:
    name: str
    corners: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax as they stand in the file"""
    is_difficult: bool


@dataclasses.dataclass(frozen=True)
class VocFile:
    image_name: str
    """"": it does not say"""
    size: tuple[int, int] | None
    """width and height; None: it does not say"""
    is_of_voc: bool
    """whether it calls itself VOC's own"""
    objects: tuple[VocObject, ...]


@dataclasses.dataclass(frozen=True)
class _Split:
    images: str
    annotations: str
    """folders"""
    list_file: str = ""
    """names the files that are meant; "": all"""
    part: str = ""
    """a folder in ``images``, to which the split keeps; "": all of it"""


def convert_voc(
    root: str,
    images: str | None = None,
    annotations: str | None = None,
    classes: str | None = None,
    splits: Sequence[str] | None = None,
    coordinates: str | None = None,
) -> list[str]:
    """
    Write ``{root}/coco/instances_{split}.json`` for each split. Nothing is written if anything is
    refused.

    Args:
        root: the folder of the data set.
        images, annotations: other folders than the usual ones, relative to ``root``.
        classes: path of a text file with a name a line; None: the names that occur in any split,
            sorted.
        splits: None stands for all.
        coordinates: "pixels" or "corners"; None: see the module.

    Returns:
        lines that say what was written.

    Raises:
        UserError: files are missing, malformed or cannot be written; names the first one.
    """
    there, passed_over = _find_splits(root, images, annotations)
    chosen = choose_splits(there, splits, root)
    # Classes and coordinates are those of the whole data set, whatever is converted of it.
    files = {}
    for folder in dict.fromkeys(split.annotations for split in there.values()):
        files[folder] = _read_folder(folder)
    for folder in (there[name].annotations for name in chosen):
        if not files[folder]:
            raise UserError(
                f"{folder}: no XML files: give their folder as --annotations (or choose the other "
                "splits with --split)"
            )
    every = [file for found in files.values() for file in found.values()]
    names = read_class_list(classes) if classes else _class_names(every)
    own = [file for file in every if file.is_of_voc]
    under_1 = ""
    if coordinates is None:
        under_1 = next(
            (
                os.path.join(folder, f"{key}.xml")
                for folder, found in files.items()
                for key, file in found.items()
                if _is_under_1(file)
            ),
            "",
        )
    own = {"pixels": every, "corners": [], None: [] if under_1 else own}[coordinates]
    because = f": {under_1} calls itself VOC's and has a number under 1" if under_1 else ""
    read = {}
    for name in chosen:
        xmls = files[there[name].annotations]
        read[name] = _read_split(name, there[name], xmls, names, {id(file) for file in own})
    return [
        *write_splits(root, read, names, "VOC labels,"),
        *([f"passed over: {listed(passed_over)}"] if passed_over else []),
        f"coordinates: numbers of pixels from 1, as in VOC, in {count(len(own), 'file', 'files')}; "
        f"corners, as LabelImg, CVAT and Roboflow write, in {len(every) - len(own)}{because} "
        "(--coordinates decides it otherwise)",
    ]


# -- files -----------------------------------------------------------------------------------------


def _find_splits(
    root: str, images: str | None, annotations: str | None
) -> tuple[dict[str, _Split], list[str]]:
    """The splits, and the files beside them that are in none."""
    lists = os.path.join(root, _LISTS)
    usual = [os.path.join(root, name) for name in (_LISTS, "Annotations", "annotations")]
    folders = folders_of_splits(root)
    if folders and not images and not annotations and not any(map(os.path.isdir, usual)):
        return {name: _Split(folder, folder) for name, folder in folders.items()}, []
    images = images or first_existing(root, ("JPEGImages", "images", "."), "images")
    annotations = annotations or first_existing(root, ("Annotations", "annotations", "."), "XML")
    images, annotations = (os.path.join(root, folder) for folder in (images, annotations))
    for folder in (images, annotations):
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder: correct --images or --annotations")
    names = sorted(os.listdir(lists)) if os.path.isdir(lists) else []
    names = [name.removesuffix(".txt") for name in names if name.endswith(".txt")]
    of_classes = [name for name in names if _is_of_a_class(lists, name, names)]
    passed_over = [os.path.join(lists, f"{name}.txt") for name in of_classes]
    names = [name for name in names if name not in of_classes]
    if names:
        # sorted() keeps the order of names that compare equal.
        names = sorted(names, key=lambda name: [*_USUAL, name].index(name))
        files = {name: os.path.join(lists, f"{name}.txt") for name in names}
        splits = {name: _Split(images, annotations, file) for name, file in files.items()}
        return splits, passed_over
    folders = folders_of_splits(images)
    if not folders:
        return {"all": _Split(images, annotations)}, passed_over
    passed_over += _outside(find_images(images), folders.values())
    if not folders_of_splits(annotations):
        splits = {x: _Split(images, annotations, part=folder) for x, folder in folders.items()}
        return splits, passed_over
    folders = {name: (path, os.path.join(annotations, name)) for name, path in folders.items()}
    passed_over += _outside(_xml_files(annotations), [xmls for _, xmls in folders.values()])
    return {name: _Split(*paths) for name, paths in folders.items()}, passed_over


def _is_of_a_class(folder: str, name: str, names: Sequence[str]) -> bool:
    """
    Whether a list is one of VOC's for a single class, as ``dog_train``: each line is an image and
    1, 0 or -1. Other tools write them for splits with other names, too.

    Args:
        names: of all lists that are there.
    """
    kind, _, split = name.rpartition("_")
    if not kind or split not in {*_USUAL, *names}:
        return False
    lines = [line.split() for line in read_lines(os.path.join(folder, f"{name}.txt")) if line]
    return all(len(words) > 1 and words[-1] in ("1", "0", "-1") for words in lines)


def _outside(paths: Iterable[str], folders: Iterable[str]) -> list[str]:
    """Those of the paths that are in none of the folders."""
    starts = tuple(os.path.join(folder, "") for folder in folders)
    return [path for path in paths if not path.startswith(starts)]


def _xml_files(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.xml"), recursive=True))


def _read_folder(folder: str) -> dict[str, VocFile]:
    """Path of an XML, relative and without extension -> what it says."""
    found, problems = {}, []
    for path in images_bar(_xml_files(folder), f"VOC {folder}"):
        try:
            found[os.path.relpath(os.path.splitext(path)[0], folder)] = read_voc_file(path)
        except UserError as e:
            problems.append(str(e))
    refuse(problems, "XML files")
    return found


def read_voc_file(path: str) -> VocFile:
    """
    Raises:
        UserError: it cannot be read, or an object has no name or no box; names file and object.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as e:  # says line and column
        raise UserError(f"{path}: not valid XML ({e}): correct or export it again") from e
    except (OSError, ValueError, LookupError) as e:  # encodings that are unknown
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', '') or e})") from e
    if root.tag != "annotation":
        raise UserError(f"{path}: a <{short(root.tag)}>, not an <annotation>: is it of VOC?")
    size = [root.findtext(f"size/{key}", "").strip() for key in ("width", "height")]
    if not all(text.isdecimal() or not text for text in size):
        raise UserError(f"{path}: the size {' x '.join(size)} must be whole numbers: correct it")
    size = tuple(int(text or 0) for text in size)
    objects = []
    for number, node in enumerate(root.findall("object"), start=1):
        name = " ".join(node.findtext("name", "").split())
        where = f"{path}: object {number} ({name or 'without name'})"
        if not name:
            raise UserError(f"{where}: give it a <name>")
        texts = [node.findtext(f"bndbox/{key}") for key in _CORNERS]
        if None in texts:
            raise UserError(
                f"{where}: its <bndbox> must have {', '.join(_CORNERS)}"
                + ("" if node.find("robndbox") is None else "; oriented boxes are not converted")
            )
        try:
            corners = tuple(map(float, texts))
        except ValueError:
            corners = (math.nan,)
        if not all(map(math.isfinite, corners)):
            raise UserError(f"{where}: its <bndbox> holds {listed(texts)}: must be four numbers")
        if corners[2] < corners[0] or corners[3] < corners[1]:
            raise UserError(f"{where}: its <bndbox> ({listed(texts)}) ends before it begins")
        is_difficult = node.findtext("difficult", "").strip() not in ("", "0")
        objects.append(VocObject(name, corners, is_difficult))
    return VocFile(
        image_name=os.path.basename(root.findtext("filename", "").strip().replace("\\", "/")),
        size=size if min(size) > 0 else None,
        is_of_voc="voc" in root.findtext("source/database", "").lower(),
        objects=tuple(objects),
    )


def _is_under_1(file: VocFile) -> bool:
    """Whether a file that calls itself VOC's own has a number that VOC does not know."""
    return file.is_of_voc and any(min(x.corners) < 1 for x in file.objects)


def _class_names(files: Sequence[VocFile]) -> list[str]:
    names = sorted({x.name for file in files for x in file.objects})
    if not names:
        number = count(len(files), "XML file", "XML files")
        raise UserError(f"no object in any of {number}: give their folder as --annotations")
    return names


# -- one split -------------------------------------------------------------------------------------


def _read_split(
    name: str, split: _Split, files: dict[str, VocFile], classes: Sequence[str], own: set[int]
) -> list[LabeledImage]:
    """
    Args:
        files: from :func:`_read_folder`.
        own: ``id`` of those whose numbers are those of pixels.
    """
    paths = _Images(split.images)
    if split.list_file:
        keys = sorted({os.path.normpath(line) for line in read_lines(split.list_file) if line})
    else:
        keys = sorted(files)
    chosen, problems = {}, []
    for key in keys:
        path = paths.find(key, files[key].image_name if key in files else "")
        if path is None:
            where = split.list_file or os.path.join(split.annotations, f"{key}.xml")
            problems.append(f"{where}: the image {key} is not in {split.images}: restore it")
        elif path in chosen:
            problems.append(f"{path}: has two XML files, {chosen[path]} and {key}: remove one")
        else:
            chosen[path] = key
    if not split.list_file:
        chosen.update({path: "" for path in paths.all if path not in chosen})
    if split.part:
        others = set(_outside(chosen, [split.part]))
        chosen = {path: key for path, key in chosen.items() if path not in others}
    images = []
    for path, key in images_bar(sorted(chosen.items()), f"VOC {name}"):
        xml = os.path.join(split.annotations, f"{key}.xml")
        try:
            image = open_image(path)
            if key in files:
                _add_objects(image, xml, files[key], classes, id(files[key]) in own)
            else:
                image.notes[NO_LABEL_FILE] += 1
        except UserError as e:
            problems.append(str(e))
        else:
            images.append(image)
    refuse(problems, "files")
    if not images:
        where = split.list_file or split.part or split.images
        raise UserError(
            f"{where}: no images: is it the right one? (or choose the others with --split)"
        )
    first = os.path.splitext(os.path.relpath(images[0].path, split.images))[0]
    check_some_labels(images, name, os.path.join(split.annotations, f"{first}.xml"))
    return images


class _Images:
    """The images of a folder, to be found by their name without extension or by a whole name."""

    def __init__(self, folder: str):
        self.folder = folder
        self.all = find_images(folder)
        self._of_stem = collections.defaultdict(list)
        self._of_name = collections.defaultdict(list)
        for path in self.all:
            stem = os.path.relpath(os.path.splitext(path)[0], folder)
            self._of_stem[stem].append(path)
            self._of_name[os.path.basename(stem)].append(path)

    def find(self, stem: str, name: str) -> str | None:
        """
        Args:
            stem: of the XML file, relative to its folder.
            name: that it says; LabelImg leaves an old one there when files are renamed.
        """
        # Images may be in subfolders where the XML files are not.
        found = self._of_stem.get(stem) or self._of_name.get(os.path.basename(stem), [])
        named = os.path.join(self.folder, os.path.dirname(stem), name)
        if len(found) == 1:
            return found[0]
        return named if name and os.path.isfile(named) else None


def _add_objects(
    image: LabeledImage, xml: str, file: VocFile, classes: Sequence[str], is_pixels: bool
) -> None:
    size = image.width, image.height
    if file.size is None:
        image.notes["XML files without the size of their image"] += 1
    elif file.size != size:
        turned = (
            ", as turned by its EXIF data: annotate the turned image, or remove the EXIF data"
            if image.is_turned and file.size == size[::-1]
            else ": is it of this image?"
        )
        raise UserError(
            f"{xml}: says {file.size[0]}x{file.size[1]}, but {image.path} has "
            f"{size[0]}x{size[1]}{turned}"
        )
    for number, x in enumerate(file.objects, start=1):
        where = f"{xml}: object {number} ({x.name})"
        if x.name not in classes:
            raise UserError(f"{where}: not one of the classes: correct it, or --classes")
        x0, y0, x1, y1 = x.corners
        if is_pixels:
            x0, y0 = x0 - 1, y0 - 1
        if x0 >= image.width or y0 >= image.height or x1 <= 0 or y1 <= 0:
            raise UserError(f"{where}: lies outside its image of {size[0]}x{size[1]}: correct it")
        if x1 <= x0 or y1 <= y0:
            image.notes[NO_SIZE] += 1
            continue
        box = x0, y0, x1 - x0, y1 - y0
        image.objects.append(LabeledObject(classes.index(x.name), box, ignore=x.is_difficult))
