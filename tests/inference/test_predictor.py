import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.inference import BatchPredictor, load_inference_config  # noqa: E402
from detectron2.engine import DefaultPredictor  # noqa: E402


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 80, 3), dtype=np.uint8) for _ in range(3)]


def same(a, b):
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-4)
    assert a.pred_classes.tolist() == b.pred_classes.tolist()


@pytest.mark.parametrize("format", ["BGR", "RGB"])
def test_predictions_are_those_of_detectron2(checkpoint, images, format):
    cfg = load_inference_config(checkpoint, None, ["INPUT.FORMAT", format], 0.0)
    theirs = DefaultPredictor(cfg)
    ours = BatchPredictor(cfg)
    for image in images:
        same(ours([image])[0], theirs(image[:, :, ::-1])["instances"])  # it takes BGR


def test_a_batch_is_as_its_images_alone(checkpoint, images):
    predictor = BatchPredictor(load_inference_config(checkpoint, None, [], 0.0))
    for together, image in zip(predictor(images), images, strict=True):
        same(together, predictor([image])[0])
    assert predictor([]) == []


def test_weights_that_do_not_fit(checkpoint):
    cfg = load_inference_config(checkpoint, None, ["MODEL.FPN.OUT_CHANNELS", "16"])
    with pytest.raises(UserError, match="does not fit"):
        BatchPredictor(cfg)


def test_an_order_of_channels_that_is_not_known(checkpoint):
    cfg = load_inference_config(checkpoint, None, ["INPUT.FORMAT", "YUV-BT.601"])
    with pytest.raises(UserError, match="INPUT.FORMAT = 'YUV-BT.601': must be RGB or BGR"):
        BatchPredictor(cfg)


@pytest.mark.parametrize("shape", [(2, 30000, 3), (30000, 2, 3), (1, 1, 3)])
def test_an_image_of_hardly_any_width(checkpoint, shape):
    """Detectron2 resizes it to nothing, and ends in an error of Pillow."""
    predictor = BatchPredictor(load_inference_config(checkpoint, None, [], 0.0))
    (found,) = predictor([np.zeros(shape, np.uint8)])
    assert found.image_size == shape[:2]


def test_an_image_at_its_own_size(checkpoint, images):
    options = ["INPUT.MIN_SIZE_TEST", "0"]
    predictor = BatchPredictor(load_inference_config(checkpoint, None, options, 0.0))
    assert predictor(images[:1])[0].image_size == images[0].shape[:2]
