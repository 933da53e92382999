import pytest
import torch
from cbbl_d2.distribution import expectation, exponential_grid, gaussian_logits, variance
from cbbl_d2.modeling import CBBLBox2BoxTransform
from cbbl_d2.modeling.output_layer import OutputsOnDemand, distribution_layer
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import nn

GRID = exponential_grid(2.0, 1.0, 6)
B = 7


def transform():
    return CBBLBox2BoxTransform((1.0, 1.0, 1.0, 1.0), GRID)


def layers(num_coordinates):
    """A stock layer of each kind, and the input of one region or of one image of 5x6 cells."""
    return (
        (nn.Linear(16, num_coordinates), torch.randn(1, 16)),
        (nn.Conv2d(16, num_coordinates, 3, padding=1), torch.randn(1, 16, 5, 6)),
        (nn.Conv2d(16, num_coordinates, 1), torch.randn(1, 16, 5, 6)),
    )


def offsets(logits):
    """(1, C * B, ...) -> (1, C, ...)"""
    return expectation(logits.unflatten(1, (-1, B)).movedim(2, -1), GRID)


def test_it_has_b_outputs_for_each_of_the_stock_layer():
    for stock, x in layers(12):
        new = distribution_layer(stock, transform(), weight_std=0.01)
        assert type(new) is type(stock)
        assert offsets(new(x)).shape == stock(x).shape
        assert (new(x) != 0).any()


def test_the_logits_of_a_coordinate_are_adjacent():
    for stock, x in layers(12):  # 3 anchors or classes of 4 coordinates
        new = distribution_layer(stock, transform(), weight_std=0.0)
        for anchor in range(3):
            for coordinate in range(4):
                nn.init.zeros_(new.bias)
                new.bias.data.view(3, 4, B)[anchor, coordinate, -1] = 50.0
                moved = offsets(new(x)).flatten(2) if x.dim() > 2 else offsets(new(x))
                expected = torch.zeros_like(moved)
                expected[:, anchor * 4 + coordinate] = GRID[-1]
                assert torch.allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("init_std", (0.0, 0.5))
def test_it_starts_around_zero_offset(init_std):
    for stock, _ in layers(64):
        new = distribution_layer(stock, transform(), weight_std=0.02, init_std=init_std)
        assert new.weight.std().item() == pytest.approx(0.02, rel=0.1)
        bias = new.bias.view(64, B)
        expected = gaussian_logits(GRID, init_std) if init_std else torch.zeros(B)
        assert torch.equal(bias, expected.expand(64, B))
        assert torch.allclose(expectation(bias, GRID), torch.zeros(64), atol=1e-6)
    narrow = distribution_layer(stock, transform(), weight_std=0.02, init_std=0.25).bias.view(64, B)
    assert (variance(narrow, GRID) < variance(bias, GRID)).all()


def test_other_layers_are_refused():
    for layer in (nn.ConvTranspose2d(16, 4, 2), nn.Sequential(nn.Linear(16, 4)), nn.Identity()):
        with pytest.raises(TypeError, match=type(layer).__name__):
            distribution_layer(layer, transform(), weight_std=0.01)


@pytest.mark.parametrize("kernel_size", ((1, 1), (3, 3), (3, 1)))
@pytest.mark.parametrize("num_picked", (0, 20))
def test_outputs_on_demand_are_those_of_the_convolution(kernel_size, num_picked):
    torch.manual_seed(0)
    padding = tuple(size // 2 for size in kernel_size)
    layer = nn.Conv2d(5, 3 * 8, kernel_size, padding=padding).double()
    features = torch.randn(2, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    image = torch.randint(2, (num_picked,))
    anchor = torch.randint(4 * 7 * 3, (num_picked,))
    anchor[:2] = torch.tensor([0, 4 * 7 * 3 - 1])[:num_picked]  # in two corners
    picked = OutputsOnDemand(layer, features, 8)[image, anchor]
    expected = permute_to_N_HWA_K(layer(features), 8)[image, anchor]
    assert picked.shape == (num_picked, 8)
    assert torch.allclose(picked, expected)
    inputs = (features, layer.weight, layer.bias)
    scale = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad((picked * scale).sum(), inputs),
        torch.autograd.grad((expected * scale).sum(), inputs),
    ):
        assert torch.allclose(got, wanted)
