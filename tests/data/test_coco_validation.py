import copy
import math

import pytest

pytest.importorskip("detectron2")

from cbbl_d2.data.coco_validation import (  # noqa: E402
    check_structure,
    count_over_the_edge,
    describe_faults,
    find_faults,
    is_positive_number,
)

WIDTH, HEIGHT = 64, 48  # of the images of the fixture ``content``


# -- structure -------------------------------------------------------------------------------------


def _set(*path_and_value):
    """A change of the sound content: the entry at a path gets a value."""
    *path, last, value = path_and_value

    def change(content):
        for step in path:
            content = content[step]
        content[last] = value

    return change


def _delete(*path):
    *path, last = path

    def change(content):
        for step in path:
            content = content[step]
        del content[last]

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (_delete("images"), 'no "images"'),
        (_delete("annotations"), 'no "annotations"'),
        (_delete("categories"), 'no "categories"'),
        (_set("images", {}), '"images" must be a list, not a object'),
        (_set("images", []), "no images"),
        (_set("categories", []), "no categories"),
        (_set("annotations", 0, None), '"annotations"[0] must be an object, not None'),
        (_delete("annotations", 1, "id"), '"annotations"[1] has no id'),
        (_set("annotations", 1, "id", "12"), "\"annotations\"[1] has the id '12'"),
        (_set("annotations", 1, "id", 11), 'the id 11 comes twice in "annotations"'),
        (_delete("images", 1, "id"), '"images"[1] has no id'),
        (_set("images", 1, "id", 9), 'the id 9 comes twice in "images"'),
        (_set("images", 1, "id", "9"), "use one kind"),
        (_delete("images", 1, "file_name"), "image 4 has no file_name"),
        (_delete("images", 1, "width"), "image 4 (a.png) has no width"),
        (_set("images", 1, "height", 0), "image 4 (a.png) has the height 0"),
        (_set("images", 1, "height", "48"), "image 4 (a.png) has the height '48'"),
        (_delete("categories", 0, "name"), "category 7 has no name"),
        (_set("categories", 0, "name", ""), "category 7 has no name"),
        (_set("categories", 0, "name", "car"), "two categories have the name 'car'"),
        (_set("categories", 0, "id", 0), 'the id 0 comes twice in "categories"'),
        (_delete("annotations", 0, "bbox"), "annotation 11 has no bbox"),
        (_delete("annotations", 0, "image_id"), "annotation 11 has no image_id"),
        (_delete("annotations", 0, "category_id"), "annotation 11 has no category_id"),
        (
            _set("annotations", 0, "category_id", 3),
            'annotation 11 has the category_id 3, which "categories" lacks (ids there: 0, 7)',
        ),
        (_set("annotations", 0, "category_id", [7]), "annotation 11 has the category_id [7]"),
        (_set("annotations", 0, "image_id", {}), "annotation 11 has the image_id {}"),
        (_set("annotations", 0, "bbox", []), "annotation 11 has the bbox []"),
        (_set("annotations", 0, "bbox", None), "annotation 11 has the bbox None"),
        (_set("annotations", 0, "bbox", [1, 2, 3]), "four numbers, [x, y, width, height]"),
        (_set("annotations", 0, "bbox", [1, 2, 3, "4"]), "annotation 11 has the bbox"),
        (_set("annotations", 0, "bbox", [1, 2, 3, True]), "annotation 11 has the bbox"),
        (_set("annotations", 0, "iscrowd", "0"), "annotation 11 has the iscrowd '0'"),
        (_set("annotations", 0, "ignore", 1), 'annotation 11 has "ignore": 1'),
        (_set("annotations", 0, "keypoints", ["x"]), "annotation 11 has malformed keypoints"),
    ],
)
def test_broken_structure_is_one_line_with_file_and_place(content, error_of, change, words):
    change(content)
    message = error_of(check_structure, content, "folder/mine.json")
    assert message.startswith("folder/mine.json: ")
    assert words in message


@pytest.mark.parametrize("content", [[], None, "images", 3])
def test_no_object_at_the_top(error_of, content):
    assert "the top level must be an object" in error_of(check_structure, content, "mine.json")


@pytest.mark.parametrize(
    "segmentation", [None, [], {}, [[]], [[1, 2, 3.5]], {"size": [48, 64], "counts": "x"}]
)
def test_sound_structure(content, segmentation):
    content["annotations"][0]["segmentation"] = segmentation
    before = copy.deepcopy(content)
    check_structure(content, "mine.json")
    assert content == before


# -- boxes that cannot be used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "bbox, fault",
    [
        ([5, 5, 0, 3], "of no size"),
        ([5, 5, 3, 0], "of no size"),
        ([5, 5, -4, 3], "of no size"),
        ([5, 5, 3, -4], "of no size"),
        ([math.nan, 5, 3, 3], "with NaN or infinity"),
        ([5, 5, math.nan, 3], "with NaN or infinity"),
        ([5, 5, 3, math.inf], "with NaN or infinity"),
        ([5, 10**400, 3, 3], "with NaN or infinity"),
        ([WIDTH, 5, 3, 3], "outside its image"),
        ([5, HEIGHT + 2, 3, 3], "outside its image"),
        ([-3, 5, 3, 3], "outside its image"),
        ([5, -9, 3, 3], "outside its image"),
    ],
)
def test_unusable_box_is_found(content, bbox, fault):
    assert find_faults(content) == {}
    content["annotations"].insert(1, {**content["annotations"][0], "id": 30, "bbox": bbox})
    check_structure(content, "mine.json")  # no reason to refuse the file
    assert find_faults(content) == {30: fault}


def test_box_of_an_image_that_is_not_listed(content):
    content["annotations"][1]["image_id"] = 1234
    assert find_faults(content) == {12: "of an image that is not listed"}


def test_faults_are_described_by_kind():
    assert describe_faults({3: "of no size"}) == "1 of no size (annotation id 3)"
    faults = {9: "of no size", 2: "outside its image", 7: "of no size"}
    assert describe_faults(faults) == (
        "2 of no size (annotation ids 9, 7), 1 outside its image (annotation id 2)"
    )


@pytest.mark.parametrize(
    "bbox, over",
    [
        ([0, 0, WIDTH, HEIGHT], 0),
        ([-1, -1, WIDTH + 2, HEIGHT + 2], 0),  # a pixel: rounding
        ([-1.5, 1, 4, 3], 1),
        ([1, -1.5, 4, 3], 1),
        ([WIDTH - 4, 1, 5.5, 3], 1),
        ([1, HEIGHT - 3, 4, 4.5], 1),
        ([WIDTH + 2, 1, 4, 3], 0),  # outside: that is a fault
    ],
)
def test_boxes_over_the_edge_are_counted(content, bbox, over):
    content["annotations"][0]["bbox"] = bbox
    assert count_over_the_edge(content, find_faults(content)) == over


def test_positive_numbers():
    assert all(map(is_positive_number, (1, 0.5, 10**300)))
    others = (0, -1, math.nan, math.inf, 10**400, True, "1", None, [1])
    assert not any(map(is_positive_number, others))
