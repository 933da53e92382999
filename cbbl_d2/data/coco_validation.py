"""
What can be wrong with the content of an annotation file in COCO format: functions of the parsed
JSON, which they leave as it is.

* Its structure (:func:`check_structure`): a missing field, an unknown category, an id that comes
  twice. Detectron2 or pycocotools could not work with the file.
* Its boxes (:func:`find_faults`): no size, NaN, outside its image, of an image that is not listed.
  Such a box would be an object that no detector can find.
* Its masks (:func:`usable_mask`) and areas (:func:`describe_odd_areas`), which not all detectors
  need.
* All of its boxes (:func:`check_boxes`, :func:`describe_other_format`): they are in another unit or
  format.

A box that is partly outside its image can be used: Detectron2 clips it in training, and COCO's
metric takes it as it is.

Boxes are COCO's: ``[x, y, width, height]`` in pixels, x and y of the upper left corner.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from cbbl_d2.errors import UserError
from cbbl_d2.messages import count, listed, short

__all__ = [
    "check_boxes",
    "check_structure",
    "count_over_the_edge",
    "describe_faults",
    "describe_odd_areas",
    "describe_other_format",
    "find_faults",
    "is_positive_number",
    "unusable_masks",
    "usable_mask",
]

# Boxes that end this far outside their image are worth a word in the log, pixels. Below it are
# rounding and the many converters that are off by one.
_EDGE_TOLERANCE = 1.0

# NumPy, Detectron2 and pycocotools keep ids as integers of 64 bits.
_ID_LIMIT = 2**63

# An area may differ by that from its box's, or by one square pixel: rounding.
_AREA_TOLERANCE = 0.02
# Of the box of an object whose area is no mask's.
_LEAST_SHARE_OF_BOX = 0.1

# From that share of boxes over the edge on they may be in another format; of few boxes, all.
_MIN_SHARE_OVER_THE_EDGE, _MANY_BOXES = 0.25, 5


# -- structure -------------------------------------------------------------------------------------


def check_structure(content: Any, json_file: str) -> None:
    """
    Check that Detectron2 and pycocotools can work with all entries.

    Args:
        content: the parsed JSON.
        json_file: where it is from, for the message.

    Raises:
        UserError: they cannot; names file, entry and cure.
    """
    problem = next(_problems(content), None)
    if problem is not None:
        raise UserError(f"{json_file}: {problem}")


# The generators below take for granted what they have yielded no problem about: only the first
# problem can be trusted, and asking for the next one may raise anything.


def _problems(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield (
            "not a COCO file: the top level must be an object with images, annotations and "
            f"categories, not a {_json_type(content)}"
        )
    for key in ("images", "annotations", "categories"):
        if key not in content:
            yield f'not a COCO file: it has no "{key}"'
        if not isinstance(content[key], list):
            yield f'"{key}" must be a list, not a {_json_type(content[key])}'
        yield from _problems_of_ids(key, content[key])
    yield from _problems_of_images(content["images"])
    yield from _problems_of_categories(content["categories"], content["annotations"])
    categories = {category["id"] for category in content["categories"]}
    id_type = type(content["images"][0]["id"])
    for annotation in content["annotations"]:
        for problem in _problems_of_annotation(annotation, categories, id_type):
            yield f"annotation {annotation['id']} has {problem}"


def _problems_of_ids(key: str, entries: list) -> Iterator[str]:
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            yield f'"{key}"[{i}] must be an object, not {short(entry)}'
        if "id" not in entry:
            yield f'"{key}"[{i}] has no id: add a unique one'
        id = entry["id"]
        if not _is_integer(id) and not (key == "images" and isinstance(id, str)):
            yield f'"{key}"[{i}] has the id {short(id)}: it must be an integer'
        if _is_integer(id) and not -_ID_LIMIT <= id < _ID_LIMIT:
            yield (
                f'"{key}"[{i}] has the id {short(id)}, which does not fit into 64 bits: number '
                f"the {key} anew"
            )
    twice = _first_duplicate(entry["id"] for entry in entries)
    if twice is not None:
        yield (
            f'the id {twice!r} comes twice in "{key}": make the ids unique, and correct the '
            "entries that refer to them"
        )


def _problems_of_images(images: list[dict]) -> Iterator[str]:
    if not images:
        yield 'no images: "images" is empty; is it the right file?'
    if len({type(image["id"]) for image in images}) > 1:
        yield 'some ids in "images" are numbers and some are strings: use one kind'
    for image in images:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            yield f"image {image['id']!r} has no file_name: add it"
        for key in ("width", "height"):
            if key not in image:
                yield f"image {image['id']!r} ({name}) has no {key}: add it, in pixels"
            if not is_positive_number(image[key]):
                yield (
                    f"image {image['id']!r} ({name}) has the {key} {short(image[key])}: it must "
                    "be the number of pixels"
                )


def _problems_of_categories(categories: list[dict], annotations: list[dict]) -> Iterator[str]:
    if not categories:
        yield 'no categories: "categories" is empty; list the classes there'
    for category in categories:
        name = category.get("name")
        if not isinstance(name, str) or not name.strip():
            yield f'category {category["id"]} has no name: add "name": "..."'
    twice = _first_duplicate(category["name"] for category in categories)
    if twice is not None:
        ids = [category["id"] for category in categories if category["name"] == twice]
        used = [annotation.get("category_id") for annotation in annotations]
        unused = [id for id in ids if id not in used]
        # Some exports have a root category with the name of its one class.
        cure = f"remove the one without annotations, id {listed(unused)}"
        yield (
            f"two categories have the name {twice!r} (ids {listed(ids)}): "
            + (cure if 0 < len(unused) < len(ids) else "give each its own")
        )


def _problems_of_annotation(
    annotation: dict, categories: set[int], image_id_type: type
) -> Iterator[str]:
    for key in ("image_id", "category_id", "bbox"):
        if key not in annotation:
            yield f"no {key}: add it or remove the annotation"
    id = annotation["category_id"]
    if not _is_integer(id) or id not in categories:
        yield (
            f'the category_id {short(id)}, which "categories" lacks (ids there: '
            f"{listed(sorted(categories))}): add the category with its name, or correct the id"
        )
    id = annotation["image_id"]
    if not _is_integer(id) and not isinstance(id, str):
        yield f"the image_id {short(id)}: it must be the id of an image"
    if type(id) is not image_id_type:
        kinds = {int: "an integer", str: "a string"}
        yield (
            f"the image_id {short(id)}, {kinds[type(id)]}, but the id of an image is "
            f'{kinds[image_id_type]} in "images": use one kind'
        )
    box = annotation["bbox"]
    if not _is_list_of_numbers(box) or len(box) != 4:
        yield f"the bbox {short(box)}: it must be four numbers, [x, y, width, height]"
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield f"the iscrowd {short(annotation['iscrowd'])}: it must be 0 or 1"
    if annotation.get("ignore", 0) != 0:
        yield (
            f'"ignore": {short(annotation["ignore"])}, which Detectron2 does not support: write '
            '"iscrowd": 1 instead, or remove the annotation'
        )
    keypoints = annotation.get("keypoints")
    if keypoints is not None and not _is_list_of_numbers(keypoints):
        yield "malformed keypoints: they must be numbers [x, y, v, ...]; or remove them"


# -- boxes that cannot be used ---------------------------------------------------------------------


def find_faults(content: dict) -> dict[int, str]:
    """
    Find the boxes that cannot be used.

    Args:
        content: the parsed JSON, of a sound structure.

    Returns:
        id of the annotation -> why, e.g. "of no size". Other annotations are left out.
    """
    faults = {a["id"]: _fault(a["bbox"], image) for a, image in _with_images(content)}
    return {id: fault for id, fault in faults.items() if fault}


def describe_faults(faults: dict[int, str]) -> str:
    """Number and ids for each kind of fault, e.g. "2 of no size (annotation ids 20, 21)"."""
    ids_of = {}
    for id, fault in faults.items():
        ids_of.setdefault(fault, []).append(id)
    return ", ".join(
        f"{len(ids)} {fault} (annotation id{'s' if len(ids) > 1 else ''} {listed(ids)})"
        for fault, ids in ids_of.items()
    )


def count_over_the_edge(content: dict, faults: dict[int, str]) -> int:
    """Number of the boxes without a fault that reach out of their image by more than a pixel."""
    return sum(
        _is_over_the_edge(a["bbox"], image)
        for a, image in _with_images(content)
        if a["id"] not in faults
    )


def check_boxes(content: dict, faults: dict[int, str], where: str) -> None:
    """
    Args:
        where: the content is from, for the message.

    Raises:
        UserError: no box can be used, or all lie between 0 and 1, as the fractions of width and
            height that other formats have: in pixels, none of them would be larger than one.
    """
    usable = [a for a in content["annotations"] if a["id"] not in faults]
    if all(a.get("iscrowd", 0) for a in usable):
        words = [f"of {len(faults)}: {describe_faults(faults)}"] if faults else []
        if usable:
            more = "more " if faults else ""
            words.append(f"{len(usable)} {more}marked as crowds, which training leaves out")
        raise UserError(
            f"{where}: {', '.join(['no box that can be used', *words])}: nothing to learn or to "
            "measure; "
            + ('write "iscrowd": 0 for single objects' if usable else "is it the right file?")
        )
    if all(0 <= value <= 1 for a in usable for value in a["bbox"]):
        raise UserError(
            f"{where}: all boxes lie between 0 and 1, as fractions of the image: COCO's are in "
            "pixels, multiply x and width by the width of the image, y and height by its height"
        )


def describe_other_format(content: dict, faults: dict[int, str]) -> str:
    """
    A line, with the cure, where the boxes look like corners or centers in the place of
    ``[x, y, width, height]``: all of them would be boxes within their image, which as COCO's many
    are not. "" where they do not.
    """
    pairs = [(a["bbox"], image) for a, image in _with_images(content) if a["id"] not in faults]
    num_over = sum(_is_over_the_edge(box, image) for box, image in pairs)
    least_share = _MIN_SHARE_OVER_THE_EDGE if len(pairs) >= _MANY_BOXES else 1
    if not pairs or num_over < least_share * len(pairs):
        return ""
    for format, cure, convert in _OTHER_FORMATS:
        boxes = [(convert(*box), image) for box, image in pairs]
        if all(min(b[2:]) > 0 and not _is_over_the_edge(b, image) for b, image in boxes):
            return (
                f"the boxes look like {format}, but in COCO's format they are [x, y, width, "
                f"height]: if so, subtract {cure}"
            )
    return ""


# What it looks like, what to subtract, the conversion to COCO's.
_OTHER_FORMATS = (
    (
        "[x0, y0, x1, y1]",
        "x0 from x1 and y0 from y1",
        lambda x0, y0, x1, y1: (x0, y0, x1 - x0, y1 - y0),
    ),
    (
        "[center x, center y, width, height]",
        "half the width from x and half the height from y",
        lambda x, y, width, height: (x - width / 2, y - height / 2, width, height),
    ),
)


def usable_mask(annotation: dict, image: dict) -> list | dict | None:
    """
    What of a ``segmentation`` Detectron2 and pycocotools can work with: the polygons of at least
    three points, or a run-length code of the size of the image.

    Args:
        annotation: with anything as its ``segmentation``, which may be missing.
        image: its entry.

    Returns:
        None: the object has no mask, only a box.
    """
    value = annotation.get("segmentation")
    if isinstance(value, list):
        return [x for x in value if _is_polygon(x)] or None
    if not isinstance(value, dict) or value.get("size") != [image["height"], image["width"]]:
        return None
    counts = value.get("counts")
    if isinstance(counts, list):
        is_code = all(_is_integer(x) and x >= 0 for x in counts)
        return value if is_code and sum(counts) == image["height"] * image["width"] else None
    return value if isinstance(counts, str) and counts else None


def unusable_masks(content: dict, faults: dict[int, str]) -> list[int]:
    """Ids of the annotations that have a segmentation, of which nothing is a mask."""
    return [
        a["id"]
        for a, image in _with_images(content)
        if a["id"] not in faults and a.get("segmentation") and usable_mask(a, image) is None
    ]


def describe_odd_areas(content: dict) -> list[str]:
    """
    COCO's metric sorts objects into small and large ones by the ``area`` of their annotation, which
    converters take from the image, or in other units.

    Args:
        content: the parsed JSON; annotations without numbers as bbox and area are passed over.

    Returns:
        A line, with the cure, for areas that are larger than their box by more than rounding, and
        for those of less than a tenth of it, without a segmentation.
    """
    odd = {"larger than their box": [], "under a tenth of their box, without a mask": []}
    too_large, too_small = odd.values()
    for a in content.get("annotations", ()):
        box, area = a.get("bbox"), a.get("area")
        if not is_positive_number(area) or not _is_list_of_numbers(box) or len(box) != 4:
            continue
        size = box[2] * box[3]
        if area > size + max(1, _AREA_TOLERANCE * size):
            too_large.append(a["id"])
        elif area < _LEAST_SHARE_OF_BOX * size and not a.get("segmentation"):
            too_small.append(a["id"])
    return [
        f"{count(len(ids), 'box has', 'boxes have')} an area {kind} (annotation ids "
        f"{listed(ids)}): AP by size (APvs, APs, APm, APl) sorts objects by it; write width x "
        "height, or leave area out"
        for kind, ids in odd.items()
        if ids
    ]


def _with_images(content: dict) -> list[tuple[dict, dict | None]]:
    """Each annotation with its image, or None if the image is not listed."""
    images = {image["id"]: image for image in content["images"]}
    return [(a, images.get(a["image_id"])) for a in content["annotations"]]


def _fault(box: list, image: dict | None) -> str:
    """Why a box cannot be used, "" if it can."""
    if image is None:
        return "of an image that is not listed"
    if not all(map(_is_finite, box)):
        return "with NaN or infinity"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "of no size"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return "outside its image"
    return ""


def _is_over_the_edge(box: list, image: dict) -> bool:
    x, y, width, height = box
    return (
        min(x, y) < -_EDGE_TOLERANCE
        or x + width > image["width"] + _EDGE_TOLERANCE
        or y + height > image["height"] + _EDGE_TOLERANCE
    )


# -- values ----------------------------------------------------------------------------------------


def is_positive_number(value: Any) -> bool:
    """Whether a JSON value is a finite number > 0; ``true`` is none."""
    return _is_number(value) and _is_finite(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_polygon(value: Any) -> bool:
    return (
        _is_list_of_numbers(value)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(map(_is_finite, value))
    )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _first_duplicate(values: Iterable) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _json_type(value: Any) -> str:
    names = {list: "list", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
