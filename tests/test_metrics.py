import math

import numpy as np
import pytest
import torch
from conftest import rng
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance

from sde_utils import (
    calibration_ranks,
    central_interval,
    coverage,
    frechet_distance,
    psnr,
    roll_mass,
    sliced_wasserstein,
    swiss_roll_curve,
    total_variation,
)


def test_sliced_wasserstein_against_scipy_along_each_direction():
    x = torch.randn(200, 3, generator=rng(0), dtype=torch.float64)
    y = torch.rand(200, 3, generator=rng(1), dtype=torch.float64)
    directions = torch.randn(3, 20, generator=rng(2), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    expected = sum(wasserstein_distance(x @ d, y @ d) for d in directions.T) / 20
    assert float(sliced_wasserstein(x, y, 20, rng(2))) == pytest.approx(expected)


def test_sliced_wasserstein_of_a_shift_in_one_dimension():
    x = torch.randn(50, 1, generator=rng(3), dtype=torch.float64)
    assert float(sliced_wasserstein(x, x + 0.7)) == pytest.approx(0.7)
    assert float(sliced_wasserstein(x, x.flip(0))) == 0


def test_roll_mass_of_points_on_the_curve_and_its_weights():
    u = torch.tensor([0.01, 0.24, 0.73, 0.99])
    mass = roll_mass(swiss_roll_curve(u), bins=4)
    torch.testing.assert_close(mass, torch.tensor([0.5, 0.0, 0.25, 0.25]))
    weighted = roll_mass(swiss_roll_curve(u), torch.tensor([1.0, 1.0, 6.0, 2.0]), bins=4)
    torch.testing.assert_close(weighted, torch.tensor([0.2, 0.0, 0.6, 0.2]))
    assert float(total_variation(mass, weighted)) == pytest.approx(0.35)


def test_total_variation_is_the_largest_difference_of_an_event():
    """max over the 2^6 sets of bins of |P - Q|."""
    p, q = (torch.rand(6, generator=rng(i), dtype=torch.float64) for i in range(2))
    p, q = p / p.sum(), q / q.sum()
    events = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6)
    assert float(total_variation(p, q)) == pytest.approx(float((events @ (p - q)).abs().max()))


def test_frechet_distance_against_scipy_and_in_closed_form():
    x = torch.randn(400, 5, generator=rng(0)) @ torch.randn(5, 5, generator=rng(1))
    y = torch.randn(300, 5, generator=rng(2)) + 0.5
    cx, cy = np.cov(x.double().numpy().T), np.cov(y.double().numpy().T)
    shift = float((x.mean(0) - y.mean(0)).square().sum())
    expected = shift + np.trace(cx + cy - 2 * sqrtm(cx @ cy).real)
    assert float(frechet_distance(x, y)) == pytest.approx(float(expected), rel=1e-4)
    assert float(frechet_distance(x, x)) == pytest.approx(0, abs=1e-6)
    one = x[:, :1]
    moments = float(one.double().mean() ** 2 + one.double().var())
    assert float(frechet_distance(one, 2 * one)) == pytest.approx(moments, rel=1e-5)


def test_frechet_distance_of_samples_of_one_law():
    """C = I, d = 8: its expectation is (d + d (d + 1) / 4) / n to first order in 1/n.

    Mean of 40 pairs, m = 100 n; 4 standard errors and 5 % for the next order.
    """
    d, n = 8, 400
    x = torch.randn(40, n, d, generator=rng(3), dtype=torch.float64)
    y = torch.randn(100 * n, d, generator=rng(4), dtype=torch.float64)
    found = torch.stack([frechet_distance(a, y) for a in x])
    expected = (d + d * (d + 1) / 4) / n * (1 + 1 / 100)
    error = 4 * float(found.std()) / 40**0.5 + 0.05 * expected
    assert float(found.mean()) == pytest.approx(expected, abs=error)


@pytest.mark.parametrize("draws", [19, 20, 99])
def test_coverage_of_exchangeable_draws_is_the_level(draws):
    """40,000 truths among their draws: 0.9 within 4 standard errors, however many the draws."""
    x = torch.randn(40_000, draws + 1, generator=rng(5))
    error = 4 * (0.09 / 40_000) ** 0.5
    assert float(coverage(x[:, 0], x[:, 1:])) == pytest.approx(0.9, abs=error)
    with pytest.raises(ValueError, match="at least 19"):
        coverage(x[:, 0], x[:, 1:10])


def test_ranks_of_exchangeable_draws_are_uniform():
    """20,000 ranks on 0..9: chi² of 9 degrees of freedom, 9 ± 4 sqrt(18)."""
    x = torch.randn(20_000, 10, generator=rng(6))
    counts = torch.bincount(calibration_ranks(x[:, 0], x[:, 1:]), minlength=10)
    assert len(counts) == 10
    assert float(((counts - 2000) ** 2 / 2000).sum()) == pytest.approx(9, abs=4 * 18**0.5)


def test_ranks_count_the_draws_below():
    draws = torch.tensor([[3.0, 1.0, 2.0], [5.0, 7.0, 6.0]])
    assert calibration_ranks(torch.tensor([2.5, 5.5]), draws).tolist() == [2, 1]


def test_psnr():
    x = torch.zeros(3, 1, 4, 4)
    noisy = x + torch.tensor([0.2, 0.02, 2.0])[:, None, None, None]
    assert psnr(noisy, x).tolist() == pytest.approx([20, 40, 0], abs=1e-4)
    assert psnr(noisy, x, peak=1.0).tolist() == pytest.approx([13.979, 33.979, -6.021], abs=1e-3)
    assert psnr(x[:1] + 0.2, x.expand(3, 1, 4, 4)).tolist() == pytest.approx([20] * 3, abs=1e-4)
    assert psnr(noisy, x[:1]).tolist() == pytest.approx([20, 40, 0], abs=1e-4)


def test_bad_input_is_refused():
    x, p = torch.zeros(4, 2), torch.tensor([0.25, 0.75])
    images, truth = torch.zeros(3, 1, 4, 4), torch.zeros(4)
    for call, name in [
        *((lambda y=y: frechet_distance(x, y), "must be") for y in (x[:, :1], x[:1], x[..., None])),
        (lambda: sliced_wasserstein(x, torch.zeros(5, 2)), "same shape"),
        (lambda: sliced_wasserstein(x, x * math.nan), "y must be finite"),
        (lambda: sliced_wasserstein(x, x, 0), "projections"),
        (lambda: roll_mass(x, bins=0), "bins"),
        (lambda: total_variation(p, torch.tensor([0.2, 0.3, 0.5])), "q must have shape"),
        (lambda: total_variation(p, p[:, None]), "q must have shape"),
        (lambda: total_variation(p.log(), p), "p must be finite, non-negative"),
        (lambda: total_variation(p, 100 * p), "q must sum to 1"),
        (lambda: total_variation(p * math.nan, p), "p must be finite"),
        (lambda: calibration_ranks(truth, x[:3]), "truth must be"),
        (lambda: calibration_ranks(truth * math.nan, x), "truth must be finite"),
        (lambda: coverage(x, x), "truth must be"),
        (lambda: coverage(truth, x * math.nan), "draws must be finite"),
        (lambda: central_interval(torch.zeros(30, 2), 1.0), "level"),
        (lambda: psnr(images, images[..., :2]), "x and truth"),
        (lambda: psnr(images, images[:2]), "x and truth"),
        (lambda: psnr(images * math.nan, images), "x must be finite"),
        (lambda: psnr(images, images, peak=0.0), "peak"),
    ]:
        with pytest.raises(ValueError, match=name):
            call()


def test_arrays_and_lists_are_named_with_the_remedy():
    x, array = torch.zeros(4, 2), np.zeros((4, 2))
    for call, name in (
        (lambda: sliced_wasserstein(x, array), "y must be"),
        (lambda: frechet_distance(array, x), "x must be"),
        (lambda: total_variation([0.5, 0.5], x), "p must be"),
        (lambda: total_variation(torch.tensor([0.5, 0.5]), np.ones(2) / 2), "q must be"),
        (lambda: calibration_ranks(x[:, 0], array), "draws must be"),
        (lambda: coverage(array[:, 0], x), "truth must be"),
        (lambda: central_interval(array), "draws must be"),
        (lambda: psnr(x, array), "truth must be"),
    ):
        with pytest.raises(TypeError, match=rf"{name}.*as_tensor"):
            call()
    with pytest.raises(TypeError, match=r"dtype.*float64.*y\.to"):
        sliced_wasserstein(x, x.double())
    with pytest.raises(TypeError, match="generator"):
        sliced_wasserstein(x, x, 10, 0)
