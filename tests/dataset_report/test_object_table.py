import numpy as np
import pytest

pytest.importorskip("detectron2")

from cbbl_d2.data.coco_validation import find_faults  # noqa: E402
from cbbl_d2.dataset_report.object_table import object_table, resized_shapes  # noqa: E402
from detectron2.data.transforms import ResizeShortestEdge  # noqa: E402


def table(content):
    return object_table(content, find_faults(content))


def test_objects_are_those_of_training(content):
    content["annotations"] += [
        {"id": 20, "image_id": 4, "category_id": 7, "bbox": [60, -4, 20, 20]},  # clipped
        {"id": 21, "image_id": 4, "category_id": 7, "bbox": [5, 5, 0, 9]},  # of no size
    ]
    objects = table(content)  # and without the crowd
    assert objects.boxes.tolist() == [
        [1, 2, 11, 14],
        [30.5, 20, 34.5, 23.25],
        [5, 5, 11, 11],
        [60, 0, 64, 16],
    ]
    assert objects.classes.tolist() == [1, 0, 1, 1]  # ship is the second by id
    assert objects.images.tolist() == [0, 1, 1, 1]
    assert objects.shapes.tolist() == [[48, 64], [48, 64]]
    assert objects.per_image().tolist() == [1, 3]
    assert objects.sizes.tolist() == [120**0.5, 13**0.5, 6, 8]


@pytest.mark.parametrize("min_size, max_size", [(800, 1333), (160, 200), (96, 10**6), (0, 5)])
def test_resizing_is_detectron2_s(content, min_size, max_size):
    content["images"][1].update(width=333, height=1001)
    objects = table(content)
    resized = objects.resized(min_size, max_size)
    for i, (height, width) in enumerate([(48, 64), (1001, 333)]):
        transform = ResizeShortestEdge(min_size, max_size).get_transform(
            np.zeros((height, width, 3), np.uint8)
        )
        mask = objects.images == i
        expected = transform.apply_box(objects.boxes[mask])
        np.testing.assert_allclose(resized.boxes[mask], expected, rtol=1e-6)
        image = transform.apply_image(np.zeros((height, width, 3), np.uint8))
        assert resized.shapes[i].tolist() == list(image.shape[:2])
    assert resized.images is objects.images


def test_resized_shapes_keep_their_order():
    shapes = np.array([[480, 640], [640, 480], [480, 640], [100, 1000]], dtype=float)
    assert resized_shapes(shapes, 800, 1333).tolist() == [
        [800, 1067],
        [1067, 800],
        [800, 1067],
        [133, 1333],
    ]


def test_an_even_choice_of_objects(content):
    content["annotations"] = [
        {"id": i, "image_id": 4, "category_id": 7, "bbox": [i, 0, 1, 1]} for i in range(10)
    ]
    objects = table(content)
    assert objects.spread(4).boxes[:, 0].tolist() == [0, 3, 6, 9]
    assert len(objects.spread(10)) == len(objects.spread(99)) == 10


def test_no_object(content):
    content["annotations"] = []
    objects = table(content)
    assert len(objects) == 0 and objects.per_image().tolist() == [0, 0]
    assert objects.resized(800, 1333).boxes.shape == (0, 4)
