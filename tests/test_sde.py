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
    assert ((sde.time(sde.sigma(t)) - t) / t).abs().max() < (1e-4 if not isinstance(sde, VESDE) else 1)


def test_closed_forms_against_numerical_integration_of_beta():
    t, n = 0.37, 200_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) * t / n
    integral = float((0.1 + 19.9 * u).sum() * t / n)
    assert float(VPSDE().scale(t)) == pytest.approx(math.exp(-integral / 2), rel=1e-9)
    assert float((VPSDE().scale(t) * VPSDE().sigma(t)) ** 2) == pytest.approx(1 - math.exp(-integral), rel=1e-9)
    assert float(SubVPSDE().scale(t) * SubVPSDE().sigma(t)) == pytest.approx(1 - math.exp(-integral), rel=1e-9)
    assert float(VESDE().sigma(0.5)) == pytest.approx(math.sqrt(0.01 * 50))


def test_simulate_has_the_closed_form_mean_and_variance(sde):
    n, x0 = 20_000, 1.5
    times = [0.0, 0.1, 0.35, 0.7, 1.0]
    path = sde.simulate(torch.full((n, 1), x0, dtype=torch.float64), times, rng(1))
    assert path.shape == (5, n, 1)
    for x, t in zip(path, times, strict=True):
        mean, sd = float(sde.scale(t)) * x0, float(sde.scale(t) * sde.sigma(t))
        assert abs(float(x.mean()) - mean) <= 4 * sd / math.sqrt(n) + 1e-12
        assert abs(float(x.var()) - sd**2) <= 4 * sd**2 * math.sqrt(2 / n) + 1e-12  # sd of a variance: v sqrt(2/n)


def test_simulate_correlates_times_as_the_linear_sde_does(sde):
    x = sde.simulate(torch.zeros(40_000, 1, dtype=torch.float64), [0.3, 0.6], rng(2))[..., 0]
    expected = float(sde.scale(0.6) / sde.scale(0.3)) * float(x[0].var())  # Cov(x_s, x_t) = (r_t / r_s) Var(x_s)
    error = float((x[0] * x[1]).std()) / math.sqrt(x.shape[1])
    assert abs(float((x[0] * x[1]).mean()) - expected) < 4 * error


def test_perturb_takes_one_time_or_one_per_sample(sde):
    x0 = torch.ones(3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    together = sde.perturb(x0, t, rng(3))
    noise = torch.randn(x0.shape, generator=rng(3), dtype=torch.float64)
    for i in range(3):
        torch.testing.assert_close(together[i], sde.scale(t[i]) * (x0[i] + sde.sigma(t[i]) * noise[i]))


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


def test_bad_input_is_refused():
    x = torch.zeros(3, 2)
    for bad in ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (0.1, math.inf)):
        with pytest.raises(ValueError, match="sigma_m"):
            VESDE(*bad)
        with pytest.raises(ValueError, match="beta_m"):
            VPSDE(*bad)
    with pytest.raises(TypeError, match="sigma_min"):
        VESDE("0.01")
    for sde in (VESDE(), VPSDE()):
        for t in (-0.1, 1.1, math.nan, torch.tensor([0.5, 1.5])):
            for function in (sde.scale, sde.sigma, sde.f, sde.g):
                with pytest.raises(ValueError, match="t must lie in"):
                    function(t)
        with pytest.raises(TypeError, match="floating"):
            sde.sigma(torch.tensor(1))
        for sigma in (1e4, math.nan, -1.0):
            with pytest.raises(ValueError, match="sigma must lie in"):
                sde.time(sigma)
        with pytest.raises(ValueError, match="finite"):
            sde.perturb(torch.tensor([[math.nan]]), 0.5)
        with pytest.raises(TypeError, match="floating"):
            sde.perturb(torch.ones(3, 2, dtype=torch.int64), 0.5)
        with pytest.raises(ValueError, match="shape"):
            sde.perturb(torch.ones(3), 0.5)
        with pytest.raises(ValueError, match="t must be a scalar"):
            sde.perturb(x, torch.tensor([0.5, 0.5]))
        for times in ([], [0.5, 0.5], [0.5, 0.2]):
            with pytest.raises(ValueError, match="times"):
                sde.simulate(x, times)
    with pytest.raises(ValueError, match="σ"):
        VPSDE().score(gaussian(), x[:, :1].double(), 0.0)
