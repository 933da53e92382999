"""Detections that test-time augmentation has merged keep their deviations."""

import numpy as np
import pytest
import torch
from cbbl_d2.modeling import CBBLGeneralizedRCNNWithTTA
from cbbl_d2.modeling.test_time_augmentation import _undo_flips
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes
from fvcore.transforms.transform import (
    HFlipTransform,
    ScaleTransform,
    TransformList,
    VFlipTransform,
)

from .detectors import build, config, set_score_threshold

SIZE = (40, 60)  # of the original image
SCALE = (0.1, 0.2, 0.3, 0.4)  # MODEL.CBBL.STD_SCALE: each side has a deviation of its own


def augmented_model(name="faster", stock=False, **options):
    options = {"TEST__AUG__MIN_SIZES": (64, 96), "TEST__DETECTIONS_PER_IMAGE": 7, **options}
    model = build(name, stock, **options).eval()
    set_score_threshold(model, 0.0)
    return CBBLGeneralizedRCNNWithTTA(config(name, stock, **options), model)


def image():
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.randint(256, (3, *SIZE), dtype=torch.uint8, generator=generator),
        "height": SIZE[0],
        "width": SIZE[1],
    }


@pytest.mark.parametrize("name", ["faster", "faster_class_specific", "cascade", "mask"])
@torch.no_grad()
def test_each_detection_keeps_the_deviations_of_the_augmentation_that_it_is_from(name):
    model = augmented_model(name, MODEL__CBBL__STD_SCALE=SCALE)
    (found,) = model([image()])
    found = found["instances"]
    assert len(found) == 7

    inputs, transforms = model._get_augmented_inputs(image())
    outputs = model.model.inference(inputs, do_postprocess=False)
    boxes, stds = [], []
    for output, transform in zip(outputs, transforms):
        boxes.append(transform.inverse().apply_box(output.pred_boxes.tensor.numpy()))
        std = output.pred_boxes_std
        flipped = any(isinstance(t, HFlipTransform) for t in transform.transforms)
        stds.append(std[:, [2, 1, 0, 3]] if flipped else std)
    boxes = torch.from_numpy(np.concatenate(boxes)).float()
    boxes = Boxes(boxes)
    boxes.clip(SIZE)
    stds = torch.cat(stds)
    origins = set()
    for box, std in zip(found.pred_boxes.tensor, found.pred_boxes_std):
        candidate = (boxes.tensor - box).abs().sum(dim=1).argmin()
        torch.testing.assert_close(std, stds[candidate], rtol=1e-4, atol=1e-6)
        origins.add(int(candidate) // len(outputs[0]))
    assert len(origins) > 1


@torch.no_grad()
def test_merging_by_hand():
    model = augmented_model()
    model._candidates_std = std = torch.arange(16.0).reshape(4, 4)
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [20, 20, 99, 99], [0, 0, 9, 9]]).double()
    scores, classes = torch.tensor([0.5, 0.75, 0.25, 0.125]), torch.tensor([1, 1, 2, 2])
    merged = model._merge_detections(boxes, list(scores), list(classes), SIZE)
    assert merged.scores.tolist() == [0.75, 0.25, 0.125]
    assert merged.pred_boxes_std.tolist() == std[1:].tolist()


@torch.no_grad()
def test_candidates_of_which_none_is_kept():
    model = augmented_model()
    model._candidates_std = torch.ones(1, 4)
    score, class_ = torch.tensor(0.0), torch.tensor(1)
    merged = model._merge_detections(torch.tensor([[0.0, 0, 9, 9]]), [score], [class_], SIZE)
    assert merged.pred_boxes_std.shape == (0, 4)


@torch.no_grad()
def test_nothing_found():
    model = augmented_model()
    set_score_threshold(model.model, 1.1)
    (found,) = model([image()])
    assert found["instances"].pred_boxes_std.shape == (0, 4)


@torch.no_grad()
def test_a_stock_model_is_as_before():
    model = augmented_model(stock=True)
    (found,) = model([image()])
    (stock,) = GeneralizedRCNNWithTTA(model.cfg, model.model)([image()])
    found, stock = found["instances"], stock["instances"]
    assert not found.has("pred_boxes_std") and len(found) == 7
    assert torch.equal(found.pred_boxes.tensor, stock.pred_boxes.tensor)


@pytest.mark.parametrize(
    ("transforms", "sides"),
    [
        ([], [0, 1, 2, 3]),
        ([ScaleTransform(40, 60, 80, 90)], [0, 1, 2, 3]),
        ([HFlipTransform(60)], [2, 1, 0, 3]),
        ([ScaleTransform(40, 60, 20, 30), VFlipTransform(20)], [0, 3, 2, 1]),
        ([HFlipTransform(60), VFlipTransform(40)], [2, 3, 0, 1]),
        ([HFlipTransform(60), HFlipTransform(60)], [0, 1, 2, 3]),
    ],
)
def test_flips_are_undone(transforms, sides):
    std = torch.tensor([[0.0, 1, 2, 3]])
    assert _undo_flips(std, TransformList(transforms)).tolist() == [sides]
