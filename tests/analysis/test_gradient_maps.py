import io

import cv2
import numpy as np
import pytest
import torch
from cbbl_d2.analysis.gradient_maps import MapColumn, localization_gradient_map, plot_gradient_maps
from detectron2.utils.events import EventStorage

from tests.modeling.detectors import DETECTORS, build, image


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("stock", (False, True))
def test_of_every_detector(name, stock):
    model, record = build(name, stock), image(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pixels, state = record["image"].clone(), torch.get_rng_state()
    first = localization_gradient_map(model, record)
    assert first.shape == (96, 96) and torch.isfinite(first).all() and (first > 0).any()
    # Neither the model nor the image nor the random numbers have changed; nor has the result.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(record["image"], pixels) and torch.equal(torch.get_rng_state(), state)
    localization_gradient_map(model, image(2, seed=5))
    with torch.jit.optimized_execution(False):
        again = localization_gradient_map(model, record)
    assert torch.allclose(again, first, rtol=1e-4, atol=0.0)


def test_it_is_the_difference_quotient_of_the_loss():
    model, record = build("fcos").double(), image(2)
    record["image"] = record["image"].double()
    model.pixel_mean, model.pixel_std = model.pixel_mean.double(), model.pixel_std.double()
    assert localization_gradient_map(model, record).max() > 0

    def loss(pixels):
        vars(model).pop("loss_normalizer", None)
        with EventStorage(), torch.no_grad():
            losses = model([{**record, "image": pixels}])
        return sum(v for k, v in losses.items() if not k.endswith(("_cls", "_ctr"))).item()

    gradients = localization_gradient_map(model, record)
    y, x = divmod(int(gradients.argmax()), 96)
    square, step = 0.0, 1e-2
    for channel in range(3):
        values = []
        for sign in (1, -1):
            pixels = record["image"].clone()
            pixels[channel, y, x] += sign * step
            values.append(loss(pixels))
        square += ((values[0] - values[1]) / (2 * step)) ** 2
    assert gradients[y, x].item() == pytest.approx(square**0.5, rel=1e-2)


def test_an_rpn_counts_where_there_is_no_other_loss_of_boxes():
    record, model = image(3), build("rpn_and_faster")
    before = localization_gradient_map(model, record)
    model.proposal_generator.loss_weight = {"loss_rpn_loc": 100.0}
    assert torch.equal(localization_gradient_map(model, record), before)

    model = build("rpn", MODEL__META_ARCHITECTURE="ProposalNetwork")
    before = localization_gradient_map(model, record)
    model.proposal_generator.loss_weight = {"loss_rpn_loc": 100.0}
    assert torch.allclose(localization_gradient_map(model, record), 100 * before, rtol=1e-3)
    assert before.max() > 0


def test_plot():
    records = [image(3), image(2, seed=1)]
    bright, dark = (torch.full((96, 96), value) for value in (1.0, 0.0))
    columns = [
        MapColumn("early", "a", [bright, bright]),
        MapColumn("late", "a", [dark, dark]),
        MapColumn("other", "b", [0.01 * bright, 0.01 * bright]),
    ]
    file = io.BytesIO()
    plot_gradient_maps(file, records, columns)
    picture = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    # Middles of the panels of the upper row: of one scale, bright and dark; of another, bright.
    height, width = picture.shape[:2]
    tones = [
        np.median(picture[height // 4 : height // 3, width * (2 * i + 1) // 8 - 20 :][:, :40])
        for i in (1, 2, 3)
    ]
    assert tones[0] > 100 and tones[1] < 30 and tones[2] > 100
