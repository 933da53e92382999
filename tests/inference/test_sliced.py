import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")
pytest.importorskip("sahi")

from cbbl_d2.inference import BatchPredictor, load_inference_config  # noqa: E402
from cbbl_d2.inference.sliced import CBBLDetectionModel, SlicedPredictor  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from sahi.predict import get_sliced_prediction  # noqa: E402


class SquareFinder:
    """
    A detector of which all is known: it finds the rectangles of one color, the red value being
    class + 1 and the green one the score in percent; each box goes around what is seen of one. Its
    field says the middle of the box, its one keypoint is there, too.
    """

    device = "cpu"

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append([image.shape[:2] for image in images])
        return [self._find(image) for image in images]

    def _find(self, image):
        boxes, scores, classes = [], [], []
        for color in np.unique(image.reshape(-1, 3), axis=0):
            if color[0] == 0:
                continue
            y, x = np.nonzero((image == color).all(axis=2))
            boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
            scores.append(color[1] / 100)
            classes.append(int(color[0]) - 1)
        boxes = torch.tensor(np.reshape(boxes, (-1, 4)), dtype=torch.float32)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        return Instances(
            image.shape[:2],
            pred_boxes=Boxes(boxes),
            scores=torch.tensor(scores, dtype=torch.float32),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
            size=boxes[:, 2:] - boxes[:, :2],
            pred_keypoints=torch.cat([middle, torch.ones(len(boxes), 1)], dim=1)[:, None],
        )


def draw(size, *objects):
    """An image with objects (x_min, y_min, x_max, y_max, class, score)."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    for i, (x_min, y_min, x_max, y_max, category, score) in enumerate(objects):
        image[y_min:y_max, x_min:x_max] = (category + 1, round(100 * score), i)
    return image


def found(instances):
    rows = zip(instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist())
    return [(*map(int, box), c) for box, c in rows]


@pytest.mark.parametrize("whole_image", [True, False])
@pytest.mark.parametrize("overlap", [0.2, 0.25, 0.5])
def test_every_object_is_found_once_where_it_is(whole_image, overlap):
    """Objects that are smaller than the overlap, at random places, also across edges."""
    rng = np.random.default_rng(0)
    objects = []
    for i in range(60):
        y, x = divmod(i, 10)
        x, y = 30 * x + rng.integers(0, 12), 35 * y + rng.integers(0, 18)
        objects.append((x, y, x + 15, y + 16, i % 3, 0.3 + i / 100))
    image = draw((210, 307), *objects)
    predictor = SlicedPredictor(SquareFinder(), 80, overlap, 4, whole_image)
    instances = predictor([image])[0]
    assert sorted(found(instances)) == sorted(o[:5] for o in objects)
    assert instances.image_size == (210, 307)
    scores = instances.scores.tolist()
    assert scores == sorted(scores, reverse=True)


def test_the_fields_of_the_model_are_kept():
    image = draw((100, 250), (60, 10, 70, 22, 0, 0.9), (200, 50, 230, 52, 1, 0.4))
    instances = SlicedPredictor(SquareFinder(), 64, 0.5)([image])[0]
    assert instances.size.tolist() == [[10, 12], [30, 2]]
    # In pixels of the whole image.
    assert instances.pred_keypoints.tolist() == [[[65, 16, 1]], [[215, 51, 1]]]
    assert instances.scores.tolist() == pytest.approx([0.9, 0.4])
    assert Image.MAX_IMAGE_PIXELS  # sahi sets it to None


def test_pieces_are_left_out_where_a_neighbor_shows_the_whole():
    image = draw((100, 280), (90, 40, 98, 48, 0, 0.9), (170, 10, 270, 30, 1, 0.8))
    model = CBBLDetectionModel(model=SquareFinder(), device="cpu", confidence_threshold=0)

    def widths(x_min, x_max):
        """Of what is found in a slice of the image, from left to right."""
        model.perform_inference(image[:, x_min:x_max])
        model.convert_original_predictions(shift_amount=[x_min, 0], full_shape=[100, 280])
        boxes = sorted(p.bbox.to_xyxy() for p in model.object_prediction_list)
        return [x_max - x_min for x_min, _, x_max, _ in boxes]

    slices = [(0, 93), (80, 180), (94, 194), (160, 260), (180, 280)]
    assert [widths(*s) for s in slices] == [[3], [8, 10], [4, 24], [90], [90]]
    model.min_overlap = 20
    # 10 of 100 pixels at the right edge, where the next slice shows at least 20; 24 are kept.
    assert [widths(*s) for s in slices] == [[], [8], [24], [90], [90]]
    # The edge of the image is none between slices.
    image = draw((100, 100), (0, 0, 5, 5, 0, 0.9), (95, 95, 100, 100, 1, 0.9))
    model.perform_inference(image)
    model.convert_original_predictions(shift_amount=[0, 0], full_shape=[100, 100])
    assert len(model.object_prediction_list) == 2


def test_slices_are_batched():
    finder = SquareFinder()
    SlicedPredictor(finder, 50, 0.0, batch_size=3, whole_image=False)([draw((100, 100))])
    assert finder.batches == [[(50, 50)] * 3, [(50, 50)]]


def test_an_image_smaller_than_a_slice_and_one_without_objects():
    predictor = SlicedPredictor(SquareFinder(), 320, 0.2)
    assert found(predictor([draw((40, 60), (5, 6, 15, 18, 2, 0.7))])[0]) == [(5, 6, 15, 18, 2)]
    nothing = predictor([draw((700, 700))])[0]
    assert found(nothing) == []
    # With the fields of the model, as without slices.
    assert nothing.size.shape == (0, 2) and nothing.pred_keypoints.shape == (0, 1, 3)
    assert predictor([]) == []


def test_low_scores_are_kept():
    """AP needs them; sahi's own threshold must not act."""
    image = draw((100, 100), (5, 6, 15, 18, 2, 0.01))
    assert len(SlicedPredictor(SquareFinder(), 64)([image])[0]) == 1


def test_neighbors_of_another_class_are_kept():
    image = draw((200, 200), (50, 50, 80, 80, 0, 0.9), (55, 55, 65, 65, 1, 0.5))
    assert len(SlicedPredictor(SquareFinder(), 100, 0.5)([image])[0]) == 2


def test_a_checkpoint_is_all_that_sahi_needs(checkpoint):
    model = CBBLDetectionModel(model_path=checkpoint, device="cpu", confidence_threshold=0.0)
    assert model.category_names == ["disk", "ring", "square", "triangle", "cross"]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)
    result = get_sliced_prediction(image, model, 64, 64, verbose=0, perform_standard_pred=False)
    assert result.object_prediction_list
    # On one slice, it says what the model says.
    instances = BatchPredictor(load_inference_config(checkpoint, None, [], 0.0))([image])[0]
    model.perform_inference(image)
    model.convert_original_predictions(shift_amount=[0, 0], full_shape=[90, 130])
    boxes = [p.bbox.to_xyxy() for p in model.object_prediction_list]
    nonempty = instances.pred_boxes.nonempty()
    assert boxes == instances.pred_boxes.tensor[nonempty].tolist()
    assert len(boxes) > 0
