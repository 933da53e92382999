"""The curves against values derived by hand."""

import io
import math

import cv2
import numpy as np
import pytest
import torch
from cbbl_d2.analysis.gradient_curves import (
    SIZES,
    gradient_curves,
    plot_gradient_curves,
    predicted_distribution,
)
from cbbl_d2.distribution import exponential_grid

GRIDS = [exponential_grid(5.0, 1.0, 5), exponential_grid(5.0, 0.5, 16), exponential_grid(2, 0, 2)]
WEIGHT = 10.0


@pytest.fixture(params=GRIDS, ids=lambda x: f"{len(x)} points")
def grid(request):
    return request.param


def test_the_regression_losses():
    errors = torch.tensor([0.01, 1.0, 3.0, 7.5])
    at_output, per_pixel = gradient_curves(errors, GRIDS[0])
    assert set(at_output) == {*per_pixel, "C-BBL"}
    for i, size in enumerate(SIZES):
        # L2 is (w e / s)^2 / 2: at the output it grows as 1 / size, per pixel as 1 / size^2.
        assert torch.allclose(at_output["L2"][i], WEIGHT * errors / size)
        assert torch.allclose(per_pixel["L2"][i], WEIGHT**2 * errors / size**2)
        assert torch.equal(at_output["Smooth-L1"][i], torch.ones(4))
        assert torch.allclose(per_pixel["Smooth-L1"][i], torch.full((4,), WEIGHT / size))
        # Two squares that differ by a shift in x: (s - e) / (s + e), and the smallest box around
        # both has no area besides them.
        for name in ("IoU", "GIoU"):
            expected = 2 * size / (size + errors) ** 2
            assert torch.allclose(per_pixel[name][i], expected, rtol=1e-3), name
            assert torch.allclose(at_output[name][i], expected * size / WEIGHT, rtol=1e-3), name


def test_boxes_apart_have_no_gradient_of_iou():
    at_output, _ = gradient_curves(torch.tensor([9.0, 20.0]), GRIDS[0], sizes=(8,))
    assert not at_output["IoU"].any() and (at_output["GIoU"] > 0).all()


def test_cbbl_is_bounded_and_vanishes_where_the_prediction_is_the_label(grid):
    errors = torch.linspace(1e-4, 40, 1000)
    for std in (0.0, 0.1, 1.0):
        gradients = gradient_curves(errors, grid, std=std)[0]["C-BBL"]
        assert (gradients <= math.sqrt(2) + 1e-6).all()
    exact = gradient_curves(torch.tensor([1e-6, 40.0]), grid, std=0.0)[0]["C-BBL"]
    assert (exact[:, 0] < 1e-3).all() and (exact[:, 1] > 0.5).all()


def test_cbbl_far_off():
    """Label (.5, .5) at the two inner points, prediction at the end of the grid."""
    gradients = gradient_curves(torch.tensor([20.0]), GRIDS[0], sizes=(8,))[0]["C-BBL"]
    assert gradients.item() == pytest.approx(math.sqrt(1 + 2 * 0.5**2), rel=1e-4)


def test_cbbl_sees_an_error_in_sizes_of_the_box():
    errors = torch.linspace(0.1, 3, 20)
    small = gradient_curves(errors, GRIDS[0], sizes=(8,))[0]["C-BBL"]
    large = gradient_curves(8 * errors, GRIDS[0], sizes=(64,))[0]["C-BBL"]
    assert torch.allclose(small, large, atol=1e-5)


def test_the_predicted_distribution(grid):
    offsets = torch.linspace(-0.8, 0.8, 9) * grid[-1]
    for std in (0.0, 0.02, 0.1):
        p = predicted_distribution(offsets, grid, std)
        assert torch.allclose(p.sum(dim=1), torch.ones(9), atol=1e-5) and (p >= 0).all()
        assert torch.allclose(p @ grid, offsets, atol=1e-4)
    # Of a standard Gaussian u, the mean code on wide intervals
    (p,) = predicted_distribution(torch.zeros(1), torch.tensor([-10.0, 0.0, 10.0]), 1.0, 20000)
    half = math.sqrt(2 / math.pi) / 2 / 10  # E max(0, u) / 10
    assert p.tolist() == pytest.approx([half, 1 - 2 * half, half], abs=1e-4)


def test_plot(grid):
    file = io.BytesIO()
    plot_gradient_curves(file, grid)
    picture = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[1] > 1500 and picture.std() > 10
