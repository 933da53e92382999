import numpy as np
import pytest

pytest.importorskip("detectron2")

from cbbl_d2.data.ignored_regions import covered_share, erase_regions  # noqa: E402


def test_share_of_boxes_in_a_region():
    region = [10, 10, 20, 20]  # x and y from 10 to 30
    boxes = {
        (12, 12, 5, 5): 1.0,
        (0, 0, 10, 10): 0.0,  # touches its corner
        (25, 10, 10, 20): 0.5,
        (20, 20, 20, 20): 0.25,
        (0, 0, 40, 40): 0.25,  # the region lies in the box: 400 of 1600
    }
    shares = covered_share(list(boxes), [region], height=50, width=60)
    assert shares == pytest.approx(list(boxes.values()))


def test_regions_that_overlap_count_once():
    regions = [[0, 0, 10, 10], [5, 0, 10, 10]]  # together x from 0 to 15
    assert covered_share([[0, 0, 20, 10]], regions, 20, 30) == pytest.approx([0.75])


def test_share_equals_a_count_of_pixels():
    rng = np.random.default_rng(0)
    height, width = 40, 60

    def boxes(number):
        corner = rng.integers(0, (50, 30), size=(number, 2))
        return np.hstack([corner, rng.integers(1, 10, size=(number, 2))])

    some, regions = boxes(50), boxes(6)
    mask = np.zeros((height, width), dtype=bool)
    for x, y, w, h in regions:
        mask[y : y + h, x : x + w] = True
    expected = [mask[y : y + h, x : x + w].mean() for x, y, w, h in some]
    assert covered_share(some, regions, height, width) == pytest.approx(expected)
    assert 0 < np.mean(expected) < 1


def test_nothing_to_compare_and_boxes_without_a_pixel():
    assert covered_share([], [[0, 0, 5, 5]], 10, 10).shape == (0,)
    assert covered_share([[0, 0, 5, 5]], [], 10, 10).tolist() == [0]
    assert covered_share([[2.2, 2.2, 0.1, 0.1]], [[0, 0, 5, 5]], 10, 10)[0] in (0, 1)


def test_erasing_fills_with_the_mean_and_spares_objects():
    image = np.zeros((10, 12, 3), dtype=np.uint8)
    image[2:4, 2:6] = 100  # the left half of the region below
    image[0, 0] = 7
    region, kept = [2, 2, 8, 2], [8, 2, 5, 1]  # the object reaches out of the image
    erased = erase_regions(image, [region], [kept])
    assert (erased[2:4, 2:8] == 50).all() and (erased[3, 8:10] == 50).all()
    assert (erased[2, 8:10] == 0).all()
    outside = np.ones(image.shape[:2], dtype=bool)
    outside[2:4, 2:10] = False
    assert (erased[outside] == image[outside]).all()
    assert image[2, 2, 0] == 100  # the argument stays


def test_erasing_outside_the_image_changes_nothing():
    image = np.full((10, 12, 3), 9, dtype=np.uint8)
    image[5:] = 1
    assert (erase_regions(image, [[20, 20, 5, 5], [-9, -9, 9, 9]]) == image).all()
