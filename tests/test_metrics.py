import pytest
import torch
from conftest import rng
from scipy.stats import wasserstein_distance

from sde_utils import roll_mass, sliced_wasserstein, swiss_roll_curve, total_variation


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


def test_bad_input_is_refused():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="same shape"):
        sliced_wasserstein(x, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(x, x, 0)
    with pytest.raises(ValueError, match="bins"):
        roll_mass(x, bins=0)
