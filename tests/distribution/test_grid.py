import math

import pytest
import torch
from cbbl_d2.distribution import exponential_grid

ALPHAS = (0.5, 2.0, 5.0)
BETAS = (0.0, 0.1, 1.0, 3.0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("one_sided", (False, True))
def test_laws(alpha, beta, one_sided):
    for n in range(2, 65):
        grid = exponential_grid(alpha, beta, n, one_sided)
        assert grid.dtype == torch.float32 and grid.shape == (n + 1,)
        assert (grid.diff() > 0).all()
        assert grid[-1] == alpha  # exactly
        if one_sided:
            assert grid[0] == 0
        else:
            assert torch.equal(grid, -grid.flip(0))
        # Dense near zero: spacing grows with the distance from it. Zero is a point of one-sided
        # grids; on the others look at the right half.
        spacing = grid[grid >= 0].double().diff()
        if beta == 0:
            assert torch.allclose(spacing, spacing[:1].expand_as(spacing), rtol=1e-4)
        else:
            assert (spacing.diff() > 0).all()


def test_values_by_hand():
    # alpha = beta = 1, n = 4: y = -1, -.5, 0, .5, 1 and y' = (e^.5 - 1) / (e - 1) at .5
    middle = (math.exp(0.5) - 1) / (math.e - 1)
    expected = torch.tensor([-1, -middle, 0, middle, 1])
    assert torch.allclose(exponential_grid(1.0, 1.0, 4), expected, atol=1e-7)
    assert torch.equal(exponential_grid(5.0, 0.0, 5), torch.tensor([-5.0, -3, -1, 1, 3, 5]))
    assert torch.equal(exponential_grid(4.0, 0.0, 4, True), torch.tensor([0.0, 1, 2, 3, 4]))


def test_uniform_is_the_limit_of_small_beta():
    uniform = exponential_grid(5.0, 0.0, 11)
    for beta in (1e-3, 1e-6, 1e-12, 1e-16, 1e-300):
        assert torch.allclose(exponential_grid(5.0, beta, 11), uniform, atol=2 * beta * 25 + 1e-6)


def test_large_alpha_times_beta_does_not_overflow():
    grid = exponential_grid(1000.0, 1.0, 2)  # exp(1000) is not a float
    assert torch.equal(grid, torch.tensor([-1000.0, 0, 1000]))
    with pytest.raises(ValueError, match="alpha=1000.0"):
        exponential_grid(1000.0, 1.0, 3)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((0.0, 1.0, 5), "0.0"),
        ((-1.0, 1.0, 5), "-1.0"),
        ((math.nan, 1.0, 5), "nan"),
        ((math.inf, 1.0, 5), "inf"),
        ((5.0, -0.1, 5), "-0.1"),
        ((5.0, math.inf, 5), "inf"),
        ((5.0, 1.0, 1), "1"),
        ((5.0, 1.0, 2.5), "2.5"),
        ((5.0, 1.0, True), "True"),
        ((5.0, 1e4, 8), "beta=10000.0"),  # the points around zero collide
        ((1e39, 0.0, 2), "alpha=1e+39"),  # infinite in float32
        ((5.0, 1.0, 10**7), "num_intervals must be at most 10000"),
        ((1e39, 0.0, 8), "alpha=1e+39"),  # infinite in float32
    ],
)
def test_bad_arguments_raise_with_the_value(arguments, named):
    with pytest.raises(ValueError) as error:
        exponential_grid(*arguments)
    assert named in str(error.value)
