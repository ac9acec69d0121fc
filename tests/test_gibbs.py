import math

import pytest
import torch
from conftest import SDES, Recorder, gaussian, rng

import sde_utils as su
from sde_utils import operators as ops
from sde_utils.chain import spread


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear_problem(components, m, rank, seed=0, d=5):
    """A mixture in d dimensions, a random A of m rows and this rank, y and σ_y = 0.4."""
    g = rng(seed)
    prior = su.IsotropicMixture(2 * randn(components, d, generator=g), 0.3)
    matrix = randn(m, rank, generator=g) @ randn(rank, d, generator=g)
    y = prior.sample(1, g)[0] @ matrix.T + 0.4 * randn(m, generator=g)
    return prior, matrix, su.Observation(lambda x: x @ matrix.T.to(x), y, 0.4)


def exact_chain(prior):
    """Draws of x_0 given z = x_0 + ρ ε, for a mixture of isotropic Gaussians."""

    def chain(z, rho, generator=None):
        total = prior.variance + rho**2
        log_w = -(torch.cdist(z, prior.means) ** 2) / (2 * total)
        k = torch.multinomial(log_w.softmax(1), 1, generator=generator)[:, 0]
        mean = prior.means[k] + prior.variance / total * (z - prior.means[k])
        sd = math.sqrt(prior.variance * rho**2 / total)
        return mean + sd * randn(*z.shape, generator=generator)

    return chain


def tempered(prior, kernel, rho):
    """π_ρ in closed form: rows of Uᵀ A, each divided by its noise sqrt(v_i), have noise 1."""
    v = (rho * kernel.s).square().clamp(min=kernel.obs.noise_std**2).sqrt()
    rows = (kernel.s / v)[:, None] * kernel.vh
    return prior.posterior(su.Observation(lambda x: x @ rows.T, kernel.e / v, 1.0))


def moments(x):
    return torch.cat([x, (x[:, :, None] * x[:, None]).flatten(1)], dim=1)


def far(x, y):
    """The largest difference of first and second moments, in standard errors."""
    x, y = moments(x), moments(y)
    error = (x.var(0) / len(x) + y.var(0) / len(y)).sqrt()
    return float(((x.mean(0) - y.mean(0)) / error).abs().max())


@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize(("m", "rank"), [(1, 1), (3, 3), (4, 2), (7, 5)])
@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_kernel_leaves_its_law_alone(components, m, rank, factor):
    """One sweep from exact draws of π_ρ, ρ below, at and above ρ*, x given z exact: 40,000 draws,
    20 moments within 4.5 standard errors; below ρ* the law is the posterior."""
    prior, _, obs = linear_problem(components, m, rank)
    kernel, g = su.SplitGibbs(obs, (5,), exact_chain(prior)), rng(1)
    rho = factor * kernel.rho
    law = tempered(prior, kernel, rho)
    start = law.sample(40_000, g)
    x = kernel(start, rho, g)
    assert far(x, law.sample(40_000, g)) < 4.5
    assert (x != start).all()
    if factor <= 1:
        assert far(x, prior.posterior(obs).sample(40_000, g)) < 4.5


def test_from_the_prior_it_comes_to_the_posterior():
    """Of a Gaussian, 60 sweeps at ρ*. With y independent of ρ ε the variance where A sees most is
    1 / (1/v + 1/(2 ρ*²)), not 1 / (1/v + 1/ρ*²)."""
    prior, matrix, obs = linear_problem(1, 3, 3)
    kernel, g, exact = su.SplitGibbs(obs, (5,), exact_chain(prior)), rng(2), prior.posterior(obs)
    chain, x, other = kernel.chain, *(prior.sample(20_000, g) for _ in "ab")
    precision = torch.eye(5, dtype=torch.float64) / kernel.rho**2 + matrix.T @ matrix / 0.4**2
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    for _ in range(60):
        x = kernel(x, generator=g)
        mean = (other / kernel.rho**2 + obs.y @ matrix / 0.4**2) @ torch.linalg.inv(precision)
        other = chain(mean + randn(*x.shape, generator=g) @ root.T, kernel.rho, g)
    assert far(x, exact.sample(20_000, g)) < 4.5
    v, error = 0.3, 4 * math.sqrt(2 / len(x))
    for draws, factor in ((x, 1), (other, 2)):
        expected = 1 / (1 / v + 1 / (factor * kernel.rho**2))
        assert float((draws @ kernel.vh[0]).var()) == pytest.approx(expected, rel=error)


@pytest.mark.parametrize(("m", "rank"), [(3, 3), (7, 5), (4, 2)])
def test_the_likelihood_is_normalised(m, rank):
    """Against a multivariate normal with the covariance U diag(v) Uᵀ, σ_y² outside of U."""
    _, matrix, obs = linear_problem(1, m, rank)
    kernel, x = su.SplitGibbs(obs, (5,), lambda z, rho, g: z), randn(6, 5, generator=rng(3))
    u, s, _ = torch.linalg.svd(matrix)
    for rho in (0.01, 0.2, 5.0):
        v = torch.full((m,), 0.4**2, dtype=torch.float64)
        v[: len(s)] = (rho * s).square().clamp(min=0.4**2)
        law = torch.distributions.MultivariateNormal(x @ matrix.T, u @ torch.diag(v) @ u.T)
        torch.testing.assert_close(kernel.log_likelihood(x, rho), law.log_prob(obs.y))
    assert torch.allclose(kernel.log_likelihood(x, kernel.rho), obs.log_likelihood(x))


@pytest.mark.parametrize(
    "operator",
    [
        ops.Inpainting(ops.box_mask(28, 28, 8, 8, 20, 20)),
        ops.Downsampling(4),
        ops.Blur(ops.motion_kernel(9, 45.0)),
        ops.Radon(28, [0.0, 45.0, 90.0, 135.0]),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_operators_of_images(operator):
    """ρ* = σ_y / |A|; there the likelihood is the observation's; z keeps shape and dtype."""
    x = torch.rand(3, 1, 28, 28, generator=rng(4))
    obs = su.Observation(operator, operator(x)[0], 0.1)
    kernel = su.SplitGibbs(obs, (1, 28, 28), lambda z, rho, g: z)
    norm = torch.linalg.matrix_norm(obs.matrix((1, 28, 28)), 2)
    assert kernel.rho == pytest.approx(0.1 / float(norm), rel=1e-6)
    found, right = kernel.log_likelihood(x, kernel.rho), obs.log_likelihood(x)
    torch.testing.assert_close(found.float(), right, rtol=1e-4, atol=0.02)
    z = kernel.couple(x, 0.3, rng(5))
    assert z.shape == x.shape
    assert z.dtype == x.dtype


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_the_evidence_is_unbiased_and_modes_have_their_weights(name):
    """40 runs from 800 prior draws to 200 particles, x given z exact: mean evidence ratio and first
    coordinate's mean within 4 standard errors."""
    prior, _, obs = linear_problem(4, 2, 2, seed=5)
    exact, sde, ratios, means = prior.posterior(obs), SDES[name], [], []
    for i in range(40):
        options = {"chain": exact_chain(prior), "final": 2, "generator": rng(100 + i)}
        particles = su.tempered_smc(sde, prior, obs, prior.sample(800, rng(i)), 200, **options)
        assert len(particles.x) == 200
        ratios.append((particles.log_evidence - exact.log_evidence).exp())
        means.append(particles.x[:, 0].mean())
    for found, right in ((ratios, 1.0), (means, float(exact.weights @ exact.means[:, 0]))):
        found = torch.stack(found)
        assert abs(float(found.mean()) - right) < 4 * float(found.std()) / math.sqrt(40)


@pytest.mark.slow
def test_it_agrees_with_the_twisted_monte_carlo_on_the_roll(roll):
    """x_1 = 0.3 ± 0.1, exact denoiser: shares of the roll and evidence, of both, against exact."""
    obs = su.Observation(lambda x: x[:, :1], torch.tensor([0.3], dtype=torch.float64), 0.1)
    exact, sde = roll.posterior(obs), SDES["ve"]
    right = su.roll_mass(exact.sample(50_000, rng(6)))
    x = sde.prior((2000, 2), dtype=torch.float64, generator=rng(7))
    twisted = su.twisted_smc(sde, su.MMPS(roll, obs), x, generator=rng(8))
    split = su.tempered_smc(sde, roll, obs, roll.sample(8000, rng(7)), 2000, generator=rng(9))
    for particles in (twisted, split):
        mass = su.roll_mass(particles.x, particles.log_weights.exp())
        assert float(su.total_variation(mass, right)) < 0.06  # of 2,000 exact draws about 0.02
        assert abs(float(particles.log_evidence - exact.log_evidence)) < 0.1
        assert len(particles.ancestors.unique()) > 100
    assert split.ess[0] == pytest.approx(0.7 * 4000, rel=0.02)
    assert split.ess[1:-1].numpy() == pytest.approx(0.7 * 2000, rel=0.02)


def test_calls_and_levels_of_the_chain():
    """`steps` levels for each factor of ten from ρ to ρ / depth, not below σ(0); 2n calls."""
    prior, levels = gaussian(variance=4.0), []

    def denoiser(z, sigma):
        levels.append(float(sigma))
        return prior(z, sigma)

    for sde, rho, low in ((su.VPSDE(), 2.0, 0.2), (su.VESDE(0.05, 50.0), 0.3, 0.05)):
        levels.clear()
        chain = su.reverse_chain(sde, denoiser, 6, depth=10)
        chain(torch.full((3, 1), rho, dtype=torch.float64), rho, rng())
        assert len(levels) == 2 * 7
        assert levels[0] == pytest.approx(rho, rel=1e-5)
        assert levels[-2:] == pytest.approx([low, low], rel=1e-5)
    with pytest.raises(ValueError, match="rho must lie in"):
        su.reverse_chain(SDES["ve"], prior)(torch.zeros(3, 1), 0.005)


@pytest.mark.parametrize("N", [200, 1600])
def test_a_run_visits_its_levels(two_modes, N):
    """One sweep at each level above ρ*, `final` there; half as many at each, at least n, n at ρ*;
    no call of the network but the chain's."""
    denoiser, visited, sizes = Recorder(two_modes), [], []
    obs = su.Observation(lambda x: x, torch.tensor([1.0], dtype=torch.float64), 0.1)

    def chain(z, rho, generator):
        visited.append(rho)
        sizes.append(len(z))
        return exact_chain(two_modes)(z, rho, generator)

    options = {"chain": chain, "final": 3, "generator": rng(14)}
    x = two_modes.sample(N, rng(13))
    particles = su.tempered_smc(SDES["ve"], denoiser, obs, x, 200, **options)
    assert denoiser.calls == 0
    above = visited[:-3]
    assert visited[-3:] == pytest.approx(3 * [0.1])
    assert len(above) == len(particles.ess) - 1
    assert above == sorted(above, reverse=True)
    assert min(above) > 0.1
    assert sizes[:-3] == [max(200, N // 2 ** (i + 1)) for i in range(len(above))]
    assert sizes[-3:] == [200] * 3
    assert len(particles.x) == len(particles.ancestors) == 200
    assert int(particles.ancestors.max()) < N


@pytest.mark.parametrize("rho", [0.3, 1.0, 4.0])
def test_the_chain_draws_x_given_z(rho):
    """Prior N(0, I), 8 calls: mean and variance of 20,000 draws within 4 standard errors; of
    ancestral steps, as many calls, the variance is too small by a fifth and more."""
    prior, variance = gaussian(), rho**2 / (1 + rho**2)
    z = torch.full((20_000, 1), math.hypot(1, rho), dtype=torch.float64)
    for sde in (su.VESDE(0.001, 50.0), SDES["vp"]):
        x = su.reverse_chain(sde, prior)(z, rho, rng(10))
        error = 4 / math.sqrt(len(z))
        assert abs(float(x.mean()) - 1 / math.hypot(1, rho)) < error * math.sqrt(variance)
        assert float(x.var()) / variance == pytest.approx(1, abs=error * math.sqrt(2))
        plain = su.reverse_chain(sde, prior, 5, su.ancestral)(z, rho, rng(10))
        assert float(plain.var()) / variance < 0.8


@pytest.mark.parametrize(("nu", "c"), [(0.0, 0.7), (0.4, 0.3)])
def test_noise_of_the_covariance_of_the_reverse_process(nu, c):
    """ν² I + c² J: itself where J = 0.3 P, its trace for any J; 100,000 draws, 4 standard errors.

    Of k products of normals the mean has a standard error of at most sqrt(3 / n) max cov."""
    basis = torch.linalg.qr(torch.randn(5, 5, generator=rng(1), dtype=torch.float64))[0]
    for values in ([0.3, 0.3, 0.3, 0.0, 0.0], [0.9, 0.5, 0.2, 0.1, 0.0]):
        jacobian = basis * torch.tensor(values, dtype=torch.float64) @ basis.T
        z = torch.randn(5, generator=rng(2), dtype=torch.float64).expand(100_000, 5)
        x0_hat, noise = spread(lambda z, sigma, j=jacobian: z @ j, z, 0.5, nu, c, rng(3))
        torch.testing.assert_close(x0_hat, z @ jacobian)
        expected = nu**2 * torch.eye(5, dtype=torch.float64) + c**2 * jacobian
        found, error = noise.T @ noise / len(z), 4 * math.sqrt(3 / len(z)) * expected.amax()
        assert noise.mean(0).abs().max() < 4 * (expected.amax() / len(z)).sqrt()
        assert abs(found.trace() - expected.trace()) < 5 * error
        if values[1] == values[0]:
            torch.testing.assert_close(found, expected, atol=float(error), rtol=0)


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (su.Observation(lambda x: x[:, :1] ** 2, torch.zeros(1), 0.1), "linear"),
        (su.Observation(lambda x: x[:, :1], torch.zeros(50, 1), 0.1), "one observation"),
        (su.Observation(lambda x: 0 * x, torch.zeros(2), 0.1), "0 everywhere"),
        (su.Observation(lambda x: x, torch.zeros(2), 0.01), "sde must have"),
    ],
)
def test_what_it_cannot_do_is_refused(obs, message):
    prior = su.IsotropicMixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match=message):
        su.tempered_smc(SDES["ve"], prior, obs, prior.sample(50, rng()))


def test_a_collapse_is_told(roll):
    """An observation no particle is near: far outside of the roll."""
    obs = su.Observation(lambda x: x, torch.tensor([9.0, 9.0], dtype=torch.float64), 0.02)
    x, options = roll.sample(40, rng(11)), {"keep": 0.01, "final": 1, "generator": rng(12)}
    with pytest.warns(UserWarning, match="collapsed"):
        su.tempered_smc(SDES["ve"], roll, obs, x, **options)
