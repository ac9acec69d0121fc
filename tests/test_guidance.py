import math

import pytest
import torch
from conftest import SDES, Recorder, gaussian, rng

from sde_utils import DPS, Annealed, Observation, sample


def identity(x):
    return x


def product(x):
    return x[:, 0] * x[:, 1]


def test_log_likelihood_is_the_normalised_gaussian():
    x0 = torch.randn(6, 3, generator=rng(0), dtype=torch.float64)
    matrix = torch.randn(2, 3, generator=rng(1), dtype=torch.float64)
    y = torch.randn(2, generator=rng(2), dtype=torch.float64)
    obs = Observation(lambda x: x @ matrix.T, y, 0.7)
    expected = torch.distributions.Normal(x0 @ matrix.T, 0.7).log_prob(y).sum(1)
    torch.testing.assert_close(obs.log_likelihood(x0), expected)
    per_sample = Observation(lambda x: x @ matrix.T, y.expand(6, 2), 0.7)
    torch.testing.assert_close(per_sample.log_likelihood(x0), expected)


@pytest.mark.parametrize(("method", "widened"), [(Annealed, 1.0), (DPS, 0.0)])
def test_guided_denoiser_is_its_formula_on_a_gaussian(method, widened):
    """D = J z with J = v/(v + σ²); the correction is σ² J (y - J z) / (σ_y² + widened σ²)."""
    v, y, noise = 0.5, 0.4, 0.3
    z = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    sigma = torch.linspace(0.05, 0.3, 9, dtype=torch.float64)
    guided = method(gaussian(0, v), Observation(identity, torch.tensor([y], dtype=torch.float64), noise), max_shift=100.0)
    jacobian, s = v / (v + sigma[:, None] ** 2), sigma[:, None]
    variance = noise**2 + widened * s**2
    expected = jacobian * z + s**2 * jacobian * (y - jacobian * z) / variance
    torch.testing.assert_close(guided(z, sigma), expected)
    log_p = torch.distributions.Normal(jacobian * z, variance.sqrt()).log_prob(torch.tensor(y, dtype=torch.float64))[:, 0]
    torch.testing.assert_close(guided.log_likelihood(z, sigma), log_p)


def test_guidance_is_the_gradient_of_its_own_log_likelihood(roll):
    obs = Observation(product, 0.2, 0.5)
    z = roll.sample(10, rng(3)).requires_grad_()
    for method in (Annealed, DPS):
        guided = method(roll, obs, max_shift=1e6)
        (gradient,) = torch.autograd.grad(guided.log_likelihood(z, 0.4).sum(), z)
        torch.testing.assert_close(guided(z.detach(), 0.4), (roll(z, 0.4) + 0.16 * gradient).detach())


def test_one_network_call_each_and_samples_do_not_know_each_other(roll):
    obs = Observation(product, torch.linspace(-1, 1, 5, dtype=torch.float64), 0.1)
    z, sigma = roll.sample(5, rng(4)), torch.logspace(-1, 1, 5, dtype=torch.float64)
    for method in (Annealed, DPS):
        calls = Recorder(roll)
        together = method(calls, obs)(z, sigma)
        assert calls.calls == 1
        for i in range(5):
            one = method(roll, Observation(product, obs.y[i], 0.1))(z[i : i + 1], sigma[i])
            torch.testing.assert_close(one, together[i : i + 1])


def test_the_shift_is_bounded_and_untouched_below_its_bound():
    obs = Observation(identity, torch.tensor([5.0], dtype=torch.float64), 0.01)
    z = torch.zeros(1, 1, dtype=torch.float64)
    for sigma in (1e-3, 1.0, 30.0):
        shift = float(DPS(gaussian(), obs, max_shift=2.0)(z, sigma))
        jacobian = 1 / (1 + sigma**2)
        assert shift == pytest.approx(min(sigma**2 * jacobian * 5 / 1e-4, 2 * sigma))


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("method", [Annealed, DPS])
def test_samples_are_finite_and_on_the_observation(learned, name, method):
    """The step that explicit solvers cannot follow: σ_y from 0.01 to 0.5, 50 to 1,000 steps. Unbounded, DPS overflows (last assertion)."""
    sde = SDES[name]
    for noise in (0.01, 0.05, 0.1, 0.5):
        for steps in (50, 200, 1000):
            guided = method(learned, Observation(product, 0.2, noise))
            x = sample(sde, guided, sde.prior((100, 2), generator=rng(5)), steps=steps, generator=rng(6))
            assert x.isfinite().all()
            assert x.abs().max() < 4
    if method is DPS:
        unbounded = DPS(learned, Observation(product, 0.2, 0.01), max_shift=1e30)
        try:
            x = sample(sde, unbounded, sde.prior((100, 2), generator=rng(5)), steps=50, generator=rng(6))
            assert x.abs().max() > 4
        except FloatingPointError as error:
            assert "stiff" in str(error)  # noqa: PT017


def test_width_of_dps_tends_to_one_over_root_two():
    """Prior N(0, 1), y = x + σ_y n, σ_y = 0.05: the reverse SDE settles at variance σ_y²/2 where the posterior has σ_y²/(1 + σ_y²)."""
    sde, noise, n = SDES["vp"], 0.05, 8000
    exact = noise / math.sqrt(1 + noise**2)
    widths = {}
    for method in (DPS, Annealed):
        guided = method(gaussian(), Observation(identity, torch.tensor([0.5], dtype=torch.float64), noise))
        x = sample(sde, guided, sde.prior((n, 1), dtype=torch.float64, generator=rng(7)), steps=2000, generator=rng(8))
        widths[method] = float(x.std()) / exact
    error = 4 / math.sqrt(2 * n)
    assert abs(widths[DPS] - 1 / math.sqrt(2)) < 0.72 * error + 0.01
    assert widths[Annealed] > 0.95


def test_bad_input_is_refused(roll):
    for y in (math.nan, torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="y must be finite"):
            Observation(identity, y, 0.1)
    for noise in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_std"):
            Observation(identity, 0.0, noise)
    for arguments, name in [(("A", 0.0, 0.1), "operator"), ((identity, torch.tensor(1), 0.1), "y"), ((identity, 0.0, "0.1"), "noise_std")]:
        with pytest.raises(TypeError, match=name):
            Observation(*arguments)
    x0 = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="y must have shape"):
        Observation(identity, torch.zeros(3), 0.1).log_likelihood(x0)
    with pytest.raises(ValueError, match="operator must map"):
        Observation(lambda x: x.sum(), 0.0, 0.1).log_likelihood(x0)
    with pytest.raises(TypeError, match="obs"):
        DPS(roll, 0.2)
    with pytest.raises(TypeError, match="denoiser"):
        Annealed(None, Observation(product, 0.2, 0.1))
    with pytest.raises(ValueError, match="max_shift"):
        DPS(roll, Observation(product, 0.2, 0.1), max_shift=0.0)
