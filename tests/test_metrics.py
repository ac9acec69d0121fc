import math

import numpy as np
import pytest
import torch
from conftest import rng
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance

from sde_utils import coverage, frechet_distance, psnr, roll_mass, sliced_wasserstein, swiss_roll_curve, total_variation


def test_sliced_wasserstein_against_scipy_along_each_direction():
    x, y = torch.randn(200, 3, generator=rng(0), dtype=torch.float64), torch.rand(200, 3, generator=rng(1), dtype=torch.float64)
    directions = torch.randn(3, 20, generator=rng(2), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    expected = sum(wasserstein_distance(x @ d, y @ d) for d in directions.T) / 20
    assert float(sliced_wasserstein(x, y, 20, rng(2))) == pytest.approx(expected)


def test_sliced_wasserstein_of_a_shift_in_one_dimension():
    x = torch.randn(50, 1, generator=rng(3), dtype=torch.float64)
    assert float(sliced_wasserstein(x, x + 0.7)) == pytest.approx(0.7)
    assert float(sliced_wasserstein(x, x.flip(0))) == 0


def test_roll_mass_of_points_on_the_curve_and_its_weights():
    u = torch.tensor([0.01, 0.02, 0.52, 0.99])
    mass = roll_mass(swiss_roll_curve(u), bins=4)
    torch.testing.assert_close(mass, torch.tensor([0.5, 0.0, 0.25, 0.25]))
    weighted = roll_mass(swiss_roll_curve(u), torch.tensor([1.0, 1.0, 6.0, 2.0]), bins=4)
    torch.testing.assert_close(weighted, torch.tensor([0.2, 0.0, 0.6, 0.2]))
    assert float(total_variation(mass, weighted)) == pytest.approx(0.35)


def test_frechet_distance_against_scipy_and_in_closed_form():
    x, y = torch.randn(400, 5, generator=rng(0)) @ torch.randn(5, 5, generator=rng(1)), torch.randn(300, 5, generator=rng(2)) + 0.5
    cx, cy = np.cov(x.double().numpy().T), np.cov(y.double().numpy().T)
    expected = (x.mean(0) - y.mean(0)).square().sum() + np.trace(cx + cy - 2 * sqrtm(cx @ cy).real)
    assert float(frechet_distance(x, y)) == pytest.approx(float(expected), rel=1e-4)
    assert float(frechet_distance(x, x)) == pytest.approx(0, abs=1e-6)
    assert float(frechet_distance(x[:, :1], 2 * x[:, :1])) == pytest.approx(
        float(x[:, 0].double().mean() ** 2 + x[:, 0].double().var()), rel=1e-5
    )


@pytest.mark.parametrize("draws", [19, 20, 99])
def test_coverage_of_exchangeable_draws_is_the_level(draws):
    """40,000 truths among their draws: 0.9 within 4 standard errors, whatever the number of draws."""
    x = torch.randn(40_000, draws + 1, generator=rng(5))
    assert float(coverage(x[:, 0], x[:, 1:])) == pytest.approx(0.9, abs=4 * (0.09 / 40_000) ** 0.5)
    with pytest.raises(ValueError, match="at least 19"):
        coverage(x[:, 0], x[:, 1:10])


def test_psnr():
    x = torch.zeros(3, 1, 4, 4)
    assert psnr(x + torch.tensor([0.2, 0.02, 2.0])[:, None, None, None], x).tolist() == pytest.approx([20, 40, 0], abs=1e-4)
    assert psnr(x[:1] + 0.2, x.expand(3, *x.shape[1:])).tolist() == pytest.approx([20] * 3, abs=1e-4)
    for bad in ((x, x[..., :2]), (x, x[:2]), (x * math.nan, x)):
        with pytest.raises(ValueError, match="x"):
            psnr(*bad)
    with pytest.raises(ValueError, match="peak"):
        psnr(x, x, peak=0.0)


def test_bad_input_is_refused():
    x = torch.zeros(4, 2)
    for y in (torch.zeros(4, 3), torch.zeros(1, 2), torch.zeros(4, 2, 1)):
        with pytest.raises(ValueError, match="must be"):
            frechet_distance(x, y)
    with pytest.raises(ValueError, match="same shape"):
        sliced_wasserstein(x, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(x, x, 0)
    with pytest.raises(ValueError, match="bins"):
        roll_mass(x, bins=0)
