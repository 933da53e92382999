import pytest
import torch
from cbbl_d2.distribution import exponential_grid, gaussian_variance, two_hot, variance

GRIDS = [
    exponential_grid(5.0, 1.0, 5),
    exponential_grid(5.0, 1.0, 10),
    exponential_grid(2.0, 1.0, 16),
    exponential_grid(5.0, 0.0, 7),
    exponential_grid(8.0, 0.25, 16, one_sided=True),
]


def mean_code(mean, std, grid, num=20001):
    """Logits of the mean of the two-hot codes of offsets ``t ~ N(mean, std^2)``, by quadrature."""
    z = torch.linspace(-6, 6, num, dtype=torch.float64)
    weights = torch.exp(-(z**2) / 2)
    left, right = two_hot(mean + std * z, grid.double())
    code = torch.zeros(grid.numel(), dtype=torch.float64)
    code.index_add_(0, left, weights * (1 - right)).index_add_(0, left + 1, weights * right)
    return (code / weights.sum()).log()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{len(g)}_from_{g[0]:g}")
def test_finds_the_variance_of_the_offsets_that_were_coded(grid):
    generator = torch.Generator().manual_seed(0)
    low, high = grid[0].item(), grid[-1].item()
    compared, overstated = 0, []
    while compared < 40:
        mean = low + (high - low) * torch.rand((), generator=generator).item()
        std = (high - low) / 5 * torch.rand((), generator=generator).item()
        left = two_hot(torch.tensor(mean), grid)[0]
        interval = (grid[left + 1] - grid[left]).item()
        if std < interval / 4 or not low + 4 * std < mean < high - 4 * std:
            continue  # the offsets' code says next to nothing, or they leave the grid
        logits = mean_code(mean, std, grid)
        assert gaussian_variance(logits, grid.double()).sqrt().item() == pytest.approx(
            std, rel=0.03
        )
        assert gaussian_variance(logits.float(), grid).sqrt().item() == pytest.approx(std, rel=0.04)
        overstated.append(variance(logits, grid.double()).sqrt().item() / std)
        compared += 1
    assert min(overstated) >= 1
    assert max(overstated) > 1.1  # what the plain variance would say


def test_of_an_exact_offset_there_is_no_variance_left_but_that_of_rounding():
    for grid in GRIDS:
        offsets = torch.linspace(grid[0].item(), grid[-1].item(), 101)
        left, right = two_hot(offsets, grid)
        code = torch.zeros(101, grid.numel()).scatter_(1, left[:, None], 1 - right[:, None])
        code.scatter_add_(1, left[:, None] + 1, right[:, None])
        found, plain = (f(code.log(), grid).sqrt() for f in (gaussian_variance, variance))
        # In the middle of its interval it cannot be told from a fifth of it, see the docstring.
        interval = (grid[left + 1] - grid[left]).clamp(min=1e-3)
        assert (found <= 0.3 * interval).all()
        assert plain.max() >= 0.49 * grid.diff().max()


@pytest.mark.parametrize("mean", (0.35, 1.2, 2.0, 2.8))
def test_a_floor_where_the_code_says_nothing(mean):
    """Away from the center of the coarse default grid: never too sure, at most a quarter."""
    grid = exponential_grid(5.0, 1.0, 5)
    left = two_hot(torch.tensor(mean), grid)[0]
    interval = (grid[left + 1] - grid[left]).item()
    for std in (0.001, 0.05, 0.1, 0.2, 0.4):
        found = gaussian_variance(mean_code(mean, std, grid).float(), grid).sqrt().item()
        assert std * 0.98 <= found <= max(1.05 * std, 0.24 * interval)


@pytest.mark.parametrize("spread", (0.1, 1.0, 10.0, 1000.0))
def test_lies_between_zero_and_the_variance_and_scales_with_the_grid(spread):
    generator = torch.Generator().manual_seed(1)
    for grid in GRIDS:
        logits = torch.randn(200, 4, grid.numel(), generator=generator) * spread
        found = gaussian_variance(logits, grid)
        assert found.shape == (200, 4) and found.dtype == torch.float32
        assert (found >= 0).all() and torch.isfinite(found).all()
        assert (found <= variance(logits, grid) * (1 + 1e-5) + 1e-9).all()
        larger = gaussian_variance(logits, grid * 3)
        assert torch.allclose(larger.sqrt(), found.sqrt() * 3, rtol=0.01, atol=1e-3)


def test_any_number_of_dimensions_half_precision_and_nan():
    grid = GRIDS[0]
    logits = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    found = gaussian_variance(logits, grid)
    assert torch.allclose(found[1, 2, 3], gaussian_variance(logits[1, 2, 3], grid))
    assert gaussian_variance(torch.zeros(0, 4, 6), grid).shape == (0, 4)
    half = gaussian_variance(logits.bfloat16(), grid)
    assert half.dtype == torch.float32
    assert torch.allclose(half, gaussian_variance(logits.bfloat16().float(), grid))
    logits[0, 0, 0, 0] = float("nan")
    broken = gaussian_variance(logits, grid).isnan()
    assert broken[0, 0, 0] and broken.sum() == 1
