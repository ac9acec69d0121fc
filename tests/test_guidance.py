import math

import pytest
import torch
from conftest import SDES, Recorder, gaussian, rng

from sde_utils import DPS, MMPS, Annealed, IsotropicMixture, Observation, PiGDM, ancestral, sample, uniform_times


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
    """By central differences along each axis."""
    obs = Observation(product, 0.2, 0.5)
    z, h = roll.sample(10, rng(3)), 1e-5
    for method in (Annealed, DPS):
        guided = method(roll, obs, max_shift=1e6)
        steps = h * torch.eye(2, dtype=torch.float64)
        gradient = torch.stack([(guided.log_likelihood(z + e, 0.4) - guided.log_likelihood(z - e, 0.4)) / (2 * h) for e in steps], dim=1)
        torch.testing.assert_close(guided(z, 0.4), roll(z, 0.4) + 0.16 * gradient, rtol=1e-6, atol=1e-6)


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
    with pytest.raises(TypeError, match="view_as_real"):
        Observation(torch.fft.fft, torch.zeros(2), 0.1).log_likelihood(x0)
    with pytest.raises(TypeError, match="obs"):
        DPS(roll, 0.2)
    with pytest.raises(TypeError, match="denoiser"):
        Annealed(None, Observation(product, 0.2, 0.1))
    with pytest.raises(ValueError, match="max_shift"):
        DPS(roll, Observation(product, 0.2, 0.1), max_shift=0.0)


class Gaussian:
    """The exact denoiser of N(mean, covariance), by one matrix product; an independent closed form for the tests."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance

    def __call__(self, z, sigma):
        sigma = torch.as_tensor(sigma, dtype=z.dtype).expand(len(z))
        noisy = self.covariance + sigma[:, None, None] ** 2 * torch.eye(len(self.mean), dtype=z.dtype)
        return self.mean + (self.covariance @ torch.linalg.solve(noisy, (z - self.mean)[..., None]))[..., 0]

    def posterior(self, matrix, y, noise):
        gain = self.covariance @ matrix.T @ torch.linalg.inv(matrix @ self.covariance @ matrix.T + noise**2 * torch.eye(len(matrix)).double())
        return Gaussian(self.mean + gain @ (y - matrix @ self.mean), self.covariance - gain @ matrix @ self.covariance)


def random_problem(seed, d=6, m=3, isotropic=None):
    g = rng(seed)
    root = torch.randn(d, d, generator=g, dtype=torch.float64)
    covariance = root @ root.T / d + 0.05 * torch.eye(d) if isotropic is None else isotropic * torch.eye(d, dtype=torch.float64)
    prior = Gaussian(torch.randn(d, generator=g, dtype=torch.float64), covariance)
    matrix = torch.randn(m, d, generator=g, dtype=torch.float64)
    y = torch.randn(m, generator=g, dtype=torch.float64)
    return prior, matrix, y, Observation(lambda x: x @ matrix.T, y, 0.4)


@pytest.mark.parametrize("dense", [8, 1])  # the matrix S built, and conjugate gradients
def test_mmps_is_exact_for_any_gaussian_and_linear_operator(dense):
    for seed in range(5):
        prior, matrix, y, obs = random_problem(seed)
        z = torch.randn(20, 6, generator=rng(seed + 50), dtype=torch.float64)
        sigma = torch.logspace(-1, 1, 20, dtype=torch.float64)
        guided = MMPS(prior, obs, max_shift=1e3, iterations=12, dense=dense)
        torch.testing.assert_close(guided(z, sigma), prior.posterior(matrix, y, 0.4)(z, sigma), rtol=1e-4, atol=1e-4)
        noisy = prior(z, sigma) @ matrix.T  # p(y | z) = N(A x̂, σ_y² + A Cov(x_0 | z) Aᵀ)
        for i in range(0, 20, 5):
            s = prior.covariance
            left = s - s @ torch.linalg.solve(s + sigma[i] ** 2 * torch.eye(6), s)
            exact = torch.distributions.MultivariateNormal(noisy[i], 0.16 * torch.eye(3) + matrix @ left @ matrix.T).log_prob(y)
            torch.testing.assert_close(guided.log_likelihood(z[i : i + 1], sigma[i])[0], exact, rtol=1e-6, atol=1e-6)


def test_pigdm_is_exact_for_isotropic_gaussians_and_only_there():
    z, sigma = torch.randn(20, 6, generator=rng(60), dtype=torch.float64), torch.logspace(-1, 1, 20, dtype=torch.float64)
    for m in (3, 8):  # wide and tall
        prior, matrix, y, obs = random_problem(7, m=m, isotropic=0.7)
        guided = PiGDM(prior, obs, max_shift=1e3, variance=0.7)
        torch.testing.assert_close(guided(z, sigma), prior.posterior(matrix, y, 0.4)(z, sigma), rtol=1e-4, atol=1e-4)
        mmps = MMPS(prior, obs, max_shift=1e3).log_likelihood(z, sigma)
        torch.testing.assert_close(guided.log_likelihood(z, sigma), mmps, rtol=1e-6, atol=1e-6)
    prior, matrix, y, obs = random_problem(8)
    error = PiGDM(prior, obs, variance=float(prior.covariance.diagonal().mean()))(z, sigma) - prior.posterior(matrix, y, 0.4)(z, sigma)
    assert error.abs().max() > 0.05


def test_mmps_is_wrong_for_two_modes(two_modes):
    obs = Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0)
    z = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    error = MMPS(two_modes, obs)(z, 2.0) - two_modes.posterior(obs)(z, 2.0)
    assert error.abs().max() > 0.1


def test_calls_and_products_are_no_more_than_the_formula_needs():
    prior, _, _, obs = random_problem(3)
    products = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            products.append(1)
            return g

    for method, options, log, expected in [
        (Annealed, {}, False, 1),
        (DPS, {}, False, 1),
        (PiGDM, {}, True, 1),
        (MMPS, {}, True, 3),
        (MMPS, {"dense": 1, "iterations": 5}, False, 6),
    ]:
        calls = Recorder(lambda z, sigma: Counted.apply(prior(z, sigma)))
        products.clear()
        method(calls, obs, **options).evaluate(torch.zeros(4, 6, dtype=torch.float64), 0.5, log=log)
        assert (calls.calls, len(products)) == (1, expected), method


def test_linear_operators_are_told_from_others_and_spare_mmps_its_probes():
    """Affine, clipped, slightly curved, odd and moduli are not linear; A is called once on x̂ where it is, 2 probes more where it is not."""
    x0 = torch.zeros(3, 4, dtype=torch.float64)
    matrix = torch.randn(2, 4, dtype=torch.float64, generator=rng(60))
    for operator in (identity, lambda x: x @ matrix.T.to(x), lambda x: x[:, :1] * 0):
        assert Observation(operator, 0.0, 0.1).linear(x0)
        assert Observation(operator, 0.0, 0.1).linear(x0.float())
    crooked = [lambda x: x + 1e-4, lambda x: x[:, :1].abs(), lambda x: x[:, :1].relu(), lambda x: x.norm(dim=1)]
    crooked += [lambda x: x + 1, lambda x: x.clamp(-50, 50), lambda x: x + 1e-3 * x**2, torch.tanh, torch.abs, torch.exp]
    for operator in crooked:
        assert not Observation(operator, 0.0, 0.1).linear(x0)
        assert not Observation(operator, 0.0, 0.1).linear(x0.float())
    for operator, again in ((lambda x: x @ matrix.T, 1), (lambda x: (x @ matrix.T).tanh(), 1 + 1 + 2 * 16)):
        seen = []
        obs = Observation(lambda x, f=operator, seen=seen: (seen.append(1), f(x))[1], torch.zeros(2, dtype=torch.float64), 0.1)
        guided = MMPS(gaussian(dim=4), obs)
        guided(x0, 1.0)
        seen.clear()
        guided(x0, 0.5)
        assert len(seen) == again


def test_pigdm_refuses_a_non_linear_operator(roll):
    with pytest.raises(ValueError, match="linear"):
        PiGDM(roll, Observation(product, 0.2, 0.1))(torch.zeros(3, 2), 1.0)


def test_operators_that_cannot_be_used_are_named(roll):
    with pytest.raises(ValueError, match="differentiable"):
        MMPS(roll, Observation(lambda x: x.detach(), torch.zeros(2), 0.1))(torch.zeros(3, 2), 1.0)
    with pytest.raises(ValueError, match="iterations"):
        MMPS(roll, Observation(product, 0.2, 0.1), iterations=0)
    with pytest.raises(ValueError, match="variance"):
        PiGDM(roll, Observation(product, 0.2, 0.1), variance=0.0)
    with pytest.raises(ValueError, match="zeta needs"):
        DPS(roll, Observation(product, 0.2, 0.1), zeta=1.0)


def test_an_operator_that_masks_in_place_is_refused(roll):
    """The natural way to write inpainting changes the denoiser's own output, and the hidden part is 0 in every draw."""

    def masked(x):
        x[:, 1:] = 0
        return x

    for use in (lambda obs: obs.log_likelihood(torch.ones(3, 2)), lambda obs: DPS(roll, obs)(torch.ones(3, 2), 1.0)):
        with pytest.raises(ValueError, match="in place"):
            use(Observation(masked, torch.zeros(2), 0.1))


def test_one_row_says_as_much_about_linearity_as_many():
    """|x| of one number is additive for a pair of one sign: 64 pairs settle it, whatever the batch; the posterior is refused too."""
    prior = IsotropicMixture(torch.zeros(1, 1), 1.0)
    for operator in (torch.abs, torch.relu, lambda x: x + 0.01):
        for rows in (1, 4):
            assert not Observation(operator, torch.zeros(1), 0.1).linear(torch.zeros(rows, 1))
        with pytest.raises(ValueError, match="linear"):
            prior.posterior(Observation(operator, torch.zeros(1), 0.1))


def test_dps_with_zeta_is_algorithm_1_step_for_step(two_modes):
    """The paper's loop for DDPM, written out: x0_hat from the score, posterior step, then - ζ/|r| ∇_x |r|²."""
    sde, zeta = SDES["vp"], 0.3
    times = tuple([1 - i / 50 for i in range(50)] + [0.0])
    mix = IsotropicMixture(torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64), 0.2)
    matrix = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
    y = torch.tensor([0.4], dtype=torch.float64)
    x = torch.randn(6, 2, generator=rng(70), dtype=torch.float64)
    guided = DPS(mix, Observation(lambda x: x @ matrix.T, y, 0.1), zeta=zeta, sde=sde, times=times)
    library = sample(sde, guided, x, times=times, predictor=ancestral, generator=rng(71), trajectory=True)

    alpha_bar = [float(sde.scale(t)) ** 2 for t in times]
    g = rng(71)
    for i in range(50):
        now, before = alpha_bar[i], alpha_bar[i + 1]
        alpha = now / before
        x = x.detach().requires_grad_()
        x0_hat = mix(x / now**0.5, ((1 - now) / now) ** 0.5)
        distance = torch.stack([(y - x0 @ matrix.T).norm() for x0 in x0_hat])
        (gradient,) = torch.autograd.grad((distance**2).sum(), x)
        mean = alpha**0.5 * (1 - before) / (1 - now) * x + before**0.5 * (1 - alpha) / (1 - now) * x0_hat
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64) if i < 49 else 0
        x = mean + ((1 - before) / (1 - now) * (1 - alpha)) ** 0.5 * noise - zeta / distance[:, None] * gradient
        torch.testing.assert_close(library[i + 1], x.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize(("noise", "annealed"), [(0.05, 1.012), (0.5, 1.079)])
def test_width_against_the_exact_posterior_in_one_dimension(name, noise, annealed):
    """Prior N(0, 1), y = x + σ_y n. Ancestral steps with log-spaced noise levels, fine enough for the sampler's own error to be below 1 %."""
    sde, n = SDES[name], 20_000
    times = [float(sde.time(40 * (0.0101 / 40) ** (i / 600))) for i in range(601)] if name == "vp" else uniform_times(600)
    times = times if name == "ve" else [*times, 0.0]
    obs, exact = Observation(identity, torch.tensor([0.5], dtype=torch.float64), noise), noise / math.sqrt(1 + noise**2)
    error = 4 / math.sqrt(2 * n)
    for method, expected in ((PiGDM, 1.0), (MMPS, 1.0), (Annealed, annealed)):
        start = 40 * torch.randn(n, 1, generator=rng(80), dtype=torch.float64) * sde.scale(times[0])
        x = sample(sde, method(gaussian(), obs), start, times=times, predictor=ancestral, generator=rng(81))
        assert float(x.std()) / exact == pytest.approx(expected, abs=error + 0.015), method


def test_a_step_of_dps_costs_a_forward_and_a_backward_pass(learned):
    """The fastest of 15 turns each, taken in turn: what else the machine does only ever adds time."""
    import time

    sde, steps, passes = SDES["ve"], [], []
    x, guided = sde.prior((20_000, 2), generator=rng(90)), DPS(learned, Observation(product, 0.2, 0.1))
    for _ in range(15):
        began = time.perf_counter()
        for _ in range(5):
            with torch.no_grad():
                ancestral(sde, guided, x, 0.6, 0.5, rng(91))
        middle = time.perf_counter()
        for _ in range(5):
            z = x.clone().requires_grad_()
            x0_hat = learned(z, sde.sigma(0.6))
            torch.autograd.grad(x0_hat, z, x)
        steps.append(middle - began)
        passes.append(time.perf_counter() - middle)
    print(f"step of DPS / forward and backward: {min(steps) / min(passes):.3f}")
    assert min(steps) < 1.15 * min(passes)


def test_memory_of_guided_sampling_does_not_grow_with_steps(two_modes):
    import weakref

    for method in (DPS, MMPS):
        seen, alive = [], []

        def watching(z, sigma, seen=seen, alive=alive):
            seen.append(weakref.ref(z))
            alive.append(sum(ref() is not None for ref in seen))
            return two_modes(z, sigma)

        guided = method(watching, Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0))
        sample(SDES["ve"], guided, torch.zeros(10, 1, dtype=torch.float64), steps=200)
        assert max(alive) <= 2


@pytest.mark.parametrize("method", [Annealed, DPS, MMPS])
def test_ve_and_vp_give_the_same_posterior(two_modes, method):
    """The same noise levels and noise: the same samples after rescaling, to rounding."""
    guided = method(two_modes, Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0))
    levels, ends = [40 * (0.02 / 40) ** (i / 50) for i in range(51)], []
    z = 40 * torch.randn(200, 1, generator=rng(92), dtype=torch.float64)
    for sde in SDES.values():
        times = [float(sde.time(level)) for level in levels]
        x = sample(sde, guided, z * sde.scale(times[0]), times=times, predictor=ancestral, generator=rng(93))
        ends.append(x / sde.scale(times[-1]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-6, atol=1e-6)
