import math

import pytest
import torch
from conftest import gaussian, rng

from sde_utils import VESDE, VPSDE, SubVPSDE

TIMES = torch.linspace(1e-3, 1, 50, dtype=torch.float64)


def test_f_and_g_are_the_derivatives_of_scale_and_sigma(sde):
    t = TIMES.clone().requires_grad_()
    r, square = sde.scale(t), sde.sigma(t) ** 2
    dr = torch.autograd.grad(r.sum(), t)[0] if r.requires_grad else None  # VE: r = 1
    (dsquare,) = torch.autograd.grad(square.sum(), t)
    dr = torch.zeros_like(t) if dr is None else dr
    torch.testing.assert_close(sde.f(t), dr / r, rtol=1e-6, atol=0)
    torch.testing.assert_close(sde.g(t), r * dsquare.sqrt(), rtol=1e-6, atol=0)


def test_time_inverts_sigma(sde):
    torch.testing.assert_close(sde.time(sde.sigma(TIMES)), TIMES, rtol=1e-12, atol=1e-14)
    for end in (0.0, 1.0):
        assert float(sde.time(sde.sigma(end))) == pytest.approx(end, abs=1e-12)


def test_no_cancellation_at_small_t_in_float32(sde):
    t = torch.tensor([1e-6, 1e-5, 1e-3], dtype=torch.float32)
    exact = sde.sigma(t.double())
    assert ((sde.sigma(t).double() - exact) / exact).abs().max() < 1e-5
    assert ((sde.time(sde.sigma(t)) - t) / t).abs().max() < (
        1e-4 if not isinstance(sde, VESDE) else 1
    )


def test_closed_forms_against_numerical_integration_of_beta():
    t, n = 0.37, 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) * t / n
    integral = float((0.1 + 19.9 * u).sum() * t / n)
    assert float(VPSDE().scale(t)) == pytest.approx(math.exp(-integral / 2), rel=1e-9)
    assert float((VPSDE().scale(t) * VPSDE().sigma(t)) ** 2) == pytest.approx(
        1 - math.exp(-integral), rel=1e-9
    )
    assert float(SubVPSDE().scale(t) * SubVPSDE().sigma(t)) == pytest.approx(
        1 - math.exp(-integral), rel=1e-9
    )
    assert float(VESDE().sigma(0.5)) == pytest.approx(math.sqrt(0.01 * 50))


def test_perturb_takes_one_time_or_one_per_sample(sde):
    x0 = torch.ones(3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    together = sde.perturb(x0, t, rng(3))
    noise = torch.randn(x0.shape, generator=rng(3), dtype=torch.float64)
    for i in range(3):
        torch.testing.assert_close(
            together[i], sde.scale(t[i]) * (x0[i] + sde.sigma(t[i]) * noise[i])
        )


def test_prior_has_the_variance_of_pure_noise(sde):
    x = sde.prior((50_000, 1), dtype=torch.float64, generator=rng(4))
    v = float(sde.scale(1.0) * sde.sigma(1.0)) ** 2
    assert abs(float(x.var()) - v) < 4 * v * math.sqrt(2 / 50_000)


def test_score_of_a_gaussian(sde):
    x = torch.randn(20, 1, generator=rng(5), dtype=torch.float64)
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    r, sigma = sde.scale(t)[:, None], sde.sigma(t)[:, None]
    expected = -(x - r * 0.7) / (r**2 * (0.4 + sigma**2))
    torch.testing.assert_close(sde.score(gaussian(0.7, 0.4), x, t), expected, rtol=1e-9, atol=1e-12)
