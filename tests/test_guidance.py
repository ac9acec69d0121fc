import math

import pytest
import torch
from conftest import SDES, Recorder, gaussian, rng

from sde_utils import (
    DPS,
    MMPS,
    Annealed,
    Guided,
    Isotropic,
    IsotropicMixture,
    Observation,
    PiGDM,
    ancestral,
    dps_step,
    euler,
    heun,
    sample,
    twisted_smc,
)


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
    guided = method(
        gaussian(0, v),
        Observation(identity, torch.tensor([y], dtype=torch.float64), noise),
        max_shift=100.0,
    )
    jacobian, s = v / (v + sigma[:, None] ** 2), sigma[:, None]
    variance = noise**2 + widened * s**2
    expected = jacobian * z + s**2 * jacobian * (y - jacobian * z) / variance
    torch.testing.assert_close(guided(z, sigma), expected)
    log_p = torch.distributions.Normal(jacobian * z, variance.sqrt()).log_prob(
        torch.tensor(y, dtype=torch.float64)
    )[:, 0]
    torch.testing.assert_close(guided.log_likelihood(z, sigma), log_p)


def test_guidance_is_the_gradient_of_its_own_log_likelihood(roll):
    """By central differences along each axis."""
    obs = Observation(product, 0.2, 0.5)
    z, h = roll.sample(10, rng(3)), 1e-5
    for method in (Annealed, DPS):
        guided = method(roll, obs, max_shift=1e6)
        steps = h * torch.eye(2, dtype=torch.float64)
        gradient = torch.stack(
            [
                (guided.log_likelihood(z + e, 0.4) - guided.log_likelihood(z - e, 0.4)) / (2 * h)
                for e in steps
            ],
            dim=1,
        )
        torch.testing.assert_close(
            guided(z, 0.4), roll(z, 0.4) + 0.16 * gradient, rtol=1e-6, atol=1e-6
        )


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("method", [Annealed, DPS])
def test_samples_are_finite_and_on_the_observation(learned, name, method):
    """σ_y from 0.01 to 0.5, 50 to 1,000 steps. Unbounded, DPS overflows (last assertion)."""
    sde = SDES[name]
    for noise in (0.01, 0.05, 0.1, 0.5):
        for steps in (50, 200, 1000):
            guided = method(learned, Observation(product, 0.2, noise))
            x = sample(
                sde, guided, sde.prior((100, 2), generator=rng(5)), steps=steps, generator=rng(6)
            )
            assert x.isfinite().all()
            assert x.abs().max() < 4
    if method is DPS:
        unbounded = DPS(learned, Observation(product, 0.2, 0.01), max_shift=1e30)
        try:
            x = sample(
                sde, unbounded, sde.prior((100, 2), generator=rng(5)), steps=50, generator=rng(6)
            )
            assert x.abs().max() > 4
        except FloatingPointError as error:
            assert "stiff" in str(error)  # noqa: PT017


@pytest.mark.slow
def test_width_of_dps_tends_to_one_over_root_two():
    """Prior N(0, 1), σ_y = 0.05: variance σ_y²/2, where the posterior has σ_y²/(1 + σ_y²)."""
    sde, noise, n = SDES["vp"], 0.05, 8000
    exact = noise / math.sqrt(1 + noise**2)
    widths = {}
    for method in (DPS, Annealed):
        guided = method(
            gaussian(), Observation(identity, torch.tensor([0.5], dtype=torch.float64), noise)
        )
        x = sample(
            sde,
            guided,
            sde.prior((n, 1), dtype=torch.float64, generator=rng(7)),
            steps=2000,
            generator=rng(8),
        )
        widths[method] = float(x.std()) / exact
    error = 4 / math.sqrt(2 * n)
    assert abs(widths[DPS] - 1 / math.sqrt(2)) < 0.72 * error + 0.01
    assert widths[Annealed] > 0.95


class Gaussian:
    """The exact denoiser of N(mean, covariance): an independent closed form for the tests."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = mean, covariance

    def __call__(self, z, sigma):
        sigma = torch.as_tensor(sigma, dtype=z.dtype).expand(len(z))
        noisy = self.covariance + sigma[:, None, None] ** 2 * torch.eye(
            len(self.mean), dtype=z.dtype
        )
        return (
            self.mean
            + (self.covariance @ torch.linalg.solve(noisy, (z - self.mean)[..., None]))[..., 0]
        )

    def posterior(self, matrix, y, noise):
        gain = (
            self.covariance
            @ matrix.T
            @ torch.linalg.inv(
                matrix @ self.covariance @ matrix.T + noise**2 * torch.eye(len(matrix)).double()
            )
        )
        return Gaussian(
            self.mean + gain @ (y - matrix @ self.mean),
            self.covariance - gain @ matrix @ self.covariance,
        )


def random_problem(seed, d=6, m=3, isotropic=None):
    g = rng(seed)
    root = torch.randn(d, d, generator=g, dtype=torch.float64)
    covariance = (
        root @ root.T / d + 0.05 * torch.eye(d)
        if isotropic is None
        else isotropic * torch.eye(d, dtype=torch.float64)
    )
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
        torch.testing.assert_close(
            guided(z, sigma), prior.posterior(matrix, y, 0.4)(z, sigma), rtol=1e-4, atol=1e-4
        )
        noisy = prior(z, sigma) @ matrix.T  # p(y | z) = N(A x̂, σ_y² + A Cov(x_0 | z) Aᵀ)
        for i in range(0, 20, 5):
            s = prior.covariance
            left = s - s @ torch.linalg.solve(s + sigma[i] ** 2 * torch.eye(6), s)
            exact = torch.distributions.MultivariateNormal(
                noisy[i], 0.16 * torch.eye(3) + matrix @ left @ matrix.T
            ).log_prob(y)
            torch.testing.assert_close(
                guided.log_likelihood(z[i : i + 1], sigma[i])[0], exact, rtol=1e-6, atol=1e-6
            )


def test_pigdm_is_exact_for_isotropic_gaussians_and_only_there():
    z, sigma = (
        torch.randn(20, 6, generator=rng(60), dtype=torch.float64),
        torch.logspace(-1, 1, 20, dtype=torch.float64),
    )
    for m in (3, 8):  # wide and tall
        prior, matrix, y, obs = random_problem(7, m=m, isotropic=0.7)
        guided = PiGDM(prior, obs, (6,), 0.7, max_shift=1e3)
        torch.testing.assert_close(
            guided(z, sigma), prior.posterior(matrix, y, 0.4)(z, sigma), rtol=1e-4, atol=1e-4
        )
        mmps = MMPS(prior, obs, max_shift=1e3).log_likelihood(z, sigma)
        torch.testing.assert_close(guided.log_likelihood(z, sigma), mmps, rtol=1e-6, atol=1e-6)
    prior, matrix, y, obs = random_problem(8)
    error = PiGDM(prior, obs, (6,), float(prior.covariance.diagonal().mean()))(
        z, sigma
    ) - prior.posterior(matrix, y, 0.4)(z, sigma)
    assert error.abs().max() > 0.05


def test_mmps_is_wrong_for_two_modes(two_modes):
    obs = Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0)
    z = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    error = MMPS(two_modes, obs)(z, 2.0) - two_modes.posterior(obs)(z, 2.0)
    assert error.abs().max() > 0.1


def test_an_operator_that_masks_in_place_is_refused(roll):
    """It would change the denoiser's own output, and the hidden part be 0 in every draw."""

    def masked(x):
        x[:, 1:] = 0
        return x

    for use in (
        lambda obs: obs.log_likelihood(torch.ones(3, 2)),
        lambda obs: DPS(roll, obs)(torch.ones(3, 2), 1.0),
    ):
        with pytest.raises(ValueError, match="in place"):
            use(Observation(masked, torch.zeros(2), 0.1))


class Power(Guided):
    """A reader's own method: the likelihood widened by another power of the noise."""

    def covariance(self, at):
        return Isotropic(at.noise + at.levels**3)


def test_a_method_of_ones_own_is_a_class_of_one_method(two_modes):
    """Its D_y by central differences of its own log p; through `sample`; exact through the SMC."""
    obs = Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0)
    z, h, level = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None], 1e-5, 0.7
    guided = Power(two_modes, obs, max_shift=math.inf)
    ends = [guided.log_likelihood(z + d, level) for d in (h, -h)]
    slope = (ends[0] - ends[1])[:, None] / (2 * h)
    expected = two_modes(z, level) + level**2 * slope
    torch.testing.assert_close(guided(z, level), expected, rtol=1e-6, atol=1e-6)
    sde, n = SDES["ve"], 4000
    start = sde.prior((n, 1), dtype=torch.float64, generator=rng(0))
    x = sample(sde, guided, start, predictor=ancestral, generator=rng(1))
    assert x.isfinite().all()
    right = float(two_modes.posterior(obs).weights[1])
    particles = twisted_smc(sde, guided, start, generator=rng(2))
    share = float(particles.log_weights.exp()[particles.x[:, 0] > 0].sum())
    error = math.sqrt(right * (1 - right) / float(particles.ess.min()))
    assert abs(share - right) < 3 * error
    assert abs(float((x > 0).double().mean()) - right) > 3 * error  # guidance alone is off


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize(("noise", "annealed"), [(0.05, 1.012), (0.5, 1.079)])
def test_width_against_the_exact_posterior_in_one_dimension(name, noise, annealed):
    """Prior N(0, 1), y = x + σ_y n. Ancestral steps so fine that their own error is below 1 %."""
    sde, n = SDES[name], 20_000
    times = [float(sde.time(40 * (0.0101 / 40) ** (i / 600))) for i in range(601)]
    obs = Observation(identity, torch.tensor([0.5], dtype=torch.float64), noise)
    exact, error = noise / math.sqrt(1 + noise**2), 4 / math.sqrt(2 * n)
    prior = gaussian()
    for guided, expected in (
        (PiGDM(prior, obs, (1,)), 1.0),
        (MMPS(prior, obs), 1.0),
        (Annealed(prior, obs), annealed),
    ):
        start = 40 * torch.randn(n, 1, generator=rng(80), dtype=torch.float64)
        start = start * sde.scale(times[0])
        x = sample(sde, guided, start, times=times, predictor=ancestral, generator=rng(81))
        found = float(x.std()) / exact
        assert found == pytest.approx(expected, abs=error + 0.015), type(guided)


@pytest.mark.parametrize("curved", [False, True])
def test_mmps_probes_measure_what_the_linearisation_leaves_out(curved):
    """x_0 ~ N(0, v), A = x² or 3x: S is read off the shift and compared with its closed form.

    Given z, x_0 ~ N(x̂, ρ²). q of δ ~ N(0, ρ²) is δ² for A = x², with second moment 3 ρ⁴ and
    variance 96 ρ⁸; 0 for 3x.
    """
    v, sigma, noise, probes = 0.5, 0.8, 0.3, 20_000
    prior, z = gaussian(0.0, v), torch.tensor([[0.4], [1.5]], dtype=torch.float64)
    operator = torch.square if curved else lambda x: 3 * x
    obs = Observation(operator, torch.tensor([0.7], dtype=torch.float64), noise)
    rho2 = sigma**2 * v / (sigma**2 + v)  # = σ² J
    x0_hat = prior(z, sigma)
    slope = 2 * x0_hat if curved else torch.full_like(z, 3.0)
    bend = 3 * rho2**2 if curved else 0.0
    guided, r = MMPS(prior, obs, probes=probes, max_shift=math.inf), obs.y - operator(x0_hat)
    s = rho2 * slope * r / (guided(z, sigma) - x0_hat)
    error = 4 * math.sqrt(96 / probes) * rho2**2 if curved else 1e-9
    torch.testing.assert_close(s, noise**2 + slope**2 * rho2 + bend, rtol=0, atol=error)
    log_p = torch.distributions.Normal(operator(x0_hat), s.sqrt()).log_prob(obs.y)[:, 0]
    torch.testing.assert_close(guided.log_likelihood(z, sigma), log_p)
    without = MMPS(prior, obs, max_shift=math.inf)(z, sigma)
    assert (float((without - guided(z, sigma)).abs().max()) > 0.05) == curved


@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_bound_counts_the_numbers_observed_or_the_dimensions(m):
    """y far away, d = 3: the shift has the length max_shift σ sqrt(min(m, d)), per sample."""
    matrix = torch.randn(m, 3, generator=rng(30), dtype=torch.float64)
    obs = Observation(lambda x: x @ matrix.T, torch.full((m,), 1e6, dtype=torch.float64), 0.1)
    z, sigma = torch.randn(4, 3, generator=rng(31), dtype=torch.float64), torch.logspace(-1, 1, 4)
    sigma, prior = sigma.double(), gaussian(dim=3)
    length = (DPS(prior, obs, max_shift=2.0)(z, sigma) - prior(z, sigma)).norm(dim=1)
    torch.testing.assert_close(length, 2 * sigma * math.sqrt(min(m, 3)))


def test_where_a_learned_derivative_is_negative_mmps_says_nothing():
    """D = (z_1, -z_2)/2, y = x: σ²/2 (y - z_1/2) / (σ_y² + σ²/2) along the first, 0 else."""
    signs, sigma, noise = torch.tensor([0.5, -0.5], dtype=torch.float64), 0.8, 0.3
    obs = Observation(identity, torch.tensor([0.7, 0.4], dtype=torch.float64), noise)
    z = torch.randn(5, 2, generator=rng(32), dtype=torch.float64)
    shift = MMPS(lambda z, sigma: signs * z, obs, max_shift=math.inf)(z, sigma) - signs * z
    gain = sigma**2 / 2 / (noise**2 + sigma**2 / 2)
    expected = torch.stack([gain * (0.7 - z[:, 0] / 2), torch.zeros(5).double()], dim=1)
    torch.testing.assert_close(shift, expected)


def test_pigdm_takes_the_variance_of_the_denoisers_own_data():
    prior, _, _, obs = random_problem(7, isotropic=0.7)
    assert PiGDM(prior, obs, (6,)).variance == 1.0  # it has no sigma_data
    assert PiGDM(gaussian(0.3, 0.7, dim=6), obs, (6,)).variance == pytest.approx(0.7)


def test_probes_reach_the_conjugate_gradients_by_their_diagonal():
    """A = x², each coordinate by itself: S = σ_y² + σ² (2x̂)² J + 3 ρ⁴, within 4 errors of 3 ρ⁴."""
    v, sigma, noise, probes = 0.5, 0.9, 0.4, 4000
    prior = gaussian(0.2, v, dim=6)
    obs = Observation(torch.square, torch.full((6,), 0.3, dtype=torch.float64), noise)
    z = torch.randn(5, 6, generator=rng(7), dtype=torch.float64)
    found = MMPS(prior, obs, probes=probes, dense=1, iterations=30, max_shift=math.inf)(z, sigma)
    x0_hat, rho2, error = prior(z, sigma), sigma**2 * v / (sigma**2 + v), 4 * math.sqrt(96 / probes)
    ends = []
    for bend in ((3 - error) * rho2**2, (3 + error) * rho2**2):
        s = noise**2 + 4 * x0_hat**2 * rho2 + bend
        ends.append(x0_hat + rho2 * 2 * x0_hat * (obs.y - x0_hat**2) / s)
    low, high = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
    assert ((found > low - 1e-9) & (found < high + 1e-9)).all()


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

    calls = Recorder(lambda z, sigma: Counted.apply(prior(z, sigma)))
    z = torch.zeros(4, 6, dtype=torch.float64)
    for guided, looks, expected in [
        (Annealed(calls, obs), False, 1),
        (DPS(calls, obs), False, 1),
        (PiGDM(calls, obs, (6,)), True, 1),
        (MMPS(calls, obs), True, 3),
        (MMPS(calls, obs, dense=1, iterations=5), False, 6),
    ]:
        calls.calls = 0
        products.clear()
        guided.look(z, 0.5) if looks else guided(z, 0.5)
        assert (calls.calls, len(products)) == (1, expected), type(guided)


def test_one_row_says_as_much_about_linearity_as_many():
    """|x| of one number is additive for a pair of one sign: 64 pairs settle it."""
    matrix = torch.randn(2, 4, dtype=torch.float64, generator=rng(60))
    linear = [identity, lambda x: x @ matrix.T.to(x), lambda x: x[:, :1] * 0]
    for operator in linear:
        assert Observation(operator, 0.0, 0.1).matrix((4,)).shape[1] == 4
    crooked = [lambda x: x + 1e-4, lambda x: x[:, :1].abs(), lambda x: x[:, :1].relu()]
    crooked += [lambda x: x.norm(dim=1), lambda x: x + 1, lambda x: x.clamp(-50, 50)]
    crooked += [lambda x: x + 1e-3 * x**2, torch.tanh, torch.abs, torch.exp]
    for operator in crooked:
        for y in (torch.zeros(()), torch.zeros((), dtype=torch.float64)):
            with pytest.raises(ValueError, match="linear"):
                Observation(operator, y, 0.1).matrix((4,))
        with pytest.raises(ValueError, match="linear"):
            PiGDM(gaussian(dim=4), Observation(operator, 0.0, 0.1), (4,))


@pytest.mark.parametrize("predictor", [ancestral, euler, heun])
def test_dps_step_is_algorithm_1_with_any_predictor(predictor):
    """The paper's loop for DDPM written out for `ancestral`; each other against itself unguided.

    x0_hat from the score, posterior step, then - ζ/|r| ∇_x |r|².
    """
    sde, zeta = SDES["vp"], 0.3
    times = [1 - i / 50 for i in range(50)]
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    mix = IsotropicMixture(means, 0.2)
    matrix = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
    y = torch.tensor([0.4], dtype=torch.float64)
    x = torch.randn(6, 2, generator=rng(70), dtype=torch.float64)
    obs = Observation(lambda x: x @ matrix.T, y, 0.1)
    calls, g = Recorder(mix), rng(71)
    step = dps_step(predictor, obs, zeta)
    options = {"times": times, "generator": rng(71), "trajectory": True}
    library = sample(sde, calls, x, predictor=step, **options)
    assert calls.calls == (99 if predictor is heun else 50)

    alpha_bar = [float(sde.scale(t)) ** 2 for t in times]
    for i in range(49):
        now, before = alpha_bar[i], alpha_bar[i + 1]
        x = x.detach().requires_grad_()
        x0_hat = mix(x / now**0.5, ((1 - now) / now) ** 0.5)
        distance = torch.stack([(y - x0 @ matrix.T).norm() for x0 in x0_hat])
        (gradient,) = torch.autograd.grad((distance**2).sum(), x)
        if predictor is ancestral:
            alpha = now / before
            mean = alpha**0.5 * (1 - before) / (1 - now) * x
            mean = mean + before**0.5 * (1 - alpha) / (1 - now) * x0_hat
            noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
            x_s = mean + ((1 - before) / (1 - now) * (1 - alpha)) ** 0.5 * noise
        else:
            x_s = predictor(sde, mix, x.detach(), times[i], times[i + 1])
        x = (x_s - zeta / distance[:, None] * gradient).detach()
        torch.testing.assert_close(library[i + 1], x, rtol=1e-8, atol=1e-8)


def test_guidance_works_in_inference_mode_and_leaves_the_callers_tensors_alone(two_modes):
    obs = Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0)
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for guided in (DPS(two_modes, obs), MMPS(two_modes, obs), PiGDM(two_modes, obs, (1,))):
        expected = guided(z, 0.5)
        with torch.inference_mode():
            assert torch.equal(guided(z.clone(), 0.5), expected)
        assert not z.requires_grad
        assert not expected.requires_grad


def test_guidance_at_sigma_zero_changes_nothing(two_modes):
    """A denoiser may be called there: D(z, 0) = z, and no shift; one 0 among others too."""
    obs = Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0)
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    levels = torch.tensor([0.0, 0.5, 1.0, 0.0, 2.0], dtype=torch.float64)
    methods = (DPS(two_modes, obs), Annealed(two_modes, obs), MMPS(two_modes, obs))
    for guided in (*methods, PiGDM(two_modes, obs, (1,))):
        torch.testing.assert_close(guided(z, 0.0), z)
        mixed = guided(z, levels)
        torch.testing.assert_close(mixed[[0, 3]], z[[0, 3]])
        torch.testing.assert_close(mixed[1:2], guided(z[1:2], 0.5))


def test_half_precision_has_its_small_matrices_in_single():
    prior, matrix, y, _ = random_problem(3, isotropic=0.7)
    obs = Observation(lambda x: x @ matrix.T.to(x), y, 0.4)
    z = torch.randn(4, 6, generator=rng(3), dtype=torch.float64)
    half = Gaussian(prior.mean.half(), prior.covariance.half())

    def shrink(z, sigma):
        return half.mean + (z - half.mean) * (0.7 / (0.7 + sigma**2))

    for kind, rest in ((MMPS, ()), (PiGDM, ((6,), 0.7))):
        expected = kind(prior, obs, *rest)(z, 0.5)
        found = kind(shrink, obs, *rest)(z.half(), 0.5)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.timing
def test_a_step_of_dps_costs_a_forward_and_a_backward_pass(learned):
    """Median ratio of 15 turns: a slow moment of the machine meets both halves of one, or few."""
    import statistics
    import time

    sde, steps, passes = SDES["ve"], [], []
    x = sde.prior((20_000, 2), generator=rng(90))
    guided = DPS(learned, Observation(product, 0.2, 0.1))
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
    ratio = statistics.median(a / b for a, b in zip(steps, passes, strict=True))
    print(f"step of DPS / forward and backward: {ratio:.3f}")
    assert ratio < 1.15


def test_memory_of_guided_sampling_does_not_grow_with_steps(two_modes):
    import weakref

    for method in (DPS, MMPS):
        seen, alive = [], []

        def watching(z, sigma, seen=seen, alive=alive):
            seen.append(weakref.ref(z))
            alive.append(sum(ref() is not None for ref in seen))
            return two_modes(z, sigma)

        obs = Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0)
        guided = method(watching, obs)
        start = SDES["ve"].prior((10, 1), dtype=torch.float64, generator=rng(1))
        sample(SDES["ve"], guided, start, steps=200)
        assert max(alive) <= 2


@pytest.mark.parametrize("method", [Annealed, DPS, MMPS])
def test_ve_and_vp_give_the_same_posterior(two_modes, method):
    """The same noise levels and noise: the same samples after rescaling, to rounding."""
    guided = method(two_modes, Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0))
    levels, ends = [40 * (0.02 / 40) ** (i / 50) for i in range(51)], []
    z = 40 * torch.randn(200, 1, generator=rng(92), dtype=torch.float64)
    for sde in SDES.values():
        times = [float(sde.time(level)) for level in levels]
        x = sample(
            sde,
            guided,
            z * sde.scale(times[0]),
            times=times,
            predictor=ancestral,
            last_step=None,
            generator=rng(93),
        )
        ends.append(x / sde.scale(times[-1]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-6, atol=1e-6)


def test_an_operator_with_numbers_of_single_precision_has_a_matrix():
    """As deepinv's physics, or a sparse matrix: it takes no float64."""
    weights = torch.randn(3, 4, generator=rng(61))
    obs = Observation(lambda x: (weights @ x.T).T, torch.zeros(3), 0.1)
    with pytest.raises(RuntimeError):
        obs.operator(torch.zeros(1, 4, dtype=torch.float64))
    assert torch.allclose(obs.matrix((4,)), weights.double(), atol=1e-6)
    z = torch.randn(5, 4, generator=rng(62))
    prior = IsotropicMixture(torch.zeros(1, 4), 1.0)
    guided, posterior = PiGDM(prior, obs, (4,), max_shift=1e3), prior.posterior(obs)
    assert torch.allclose(guided(z, 1.0), posterior(z, 1.0), atol=1e-3)
