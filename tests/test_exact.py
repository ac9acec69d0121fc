import math

import numpy as np
import pytest
import torch
from conftest import rng

from sde_utils import (
    GaussianMixture,
    IsotropicMixture,
    Observation,
    swiss_roll,
    swiss_roll_curve,
    swiss_roll_density,
    swiss_roll_parameter,
    swiss_roll_scaling,
    weighted_posterior,
)


@pytest.fixture(scope="module")
def mixture():
    g = rng(0)
    means = torch.randn(7, 2, generator=g, dtype=torch.float64)
    return IsotropicMixture(means, 0.3, torch.rand(7, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.0, 0.05, 1.0, 20.0])
def test_density_against_the_sum_written_out(mixture, sigma):
    z = 2 * torch.randn(50, 2, generator=rng(1), dtype=torch.float64)
    v = 0.3 + sigma**2
    expected = sum(
        w * torch.exp(-((z - m) ** 2).sum(1) / (2 * v)) / (2 * math.pi * v)
        for w, m in zip(mixture.weights, mixture.means, strict=True)
    )
    torch.testing.assert_close(mixture.log_prob(z, sigma), expected.log(), rtol=1e-10, atol=1e-10)


def test_denoiser_against_quadrature(mixture):
    """E[x_0 | z] by brute force: integrate x p(x) N(z; x, σ²) over a fine grid."""
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    prior = mixture.log_prob(grid).exp()
    for sigma in (0.3, 1.0):
        for z in torch.tensor([[0.0, 0.0], [1.0, -1.5]], dtype=torch.float64):
            w = prior * torch.exp(-((z - grid) ** 2).sum(1) / (2 * sigma**2))
            expected = (w[:, None] * grid).sum(0) / w.sum()
            torch.testing.assert_close(
                mixture.denoise(z[None], sigma)[0], expected, rtol=1e-6, atol=1e-8
            )


def test_score_is_the_gradient_and_tweedie_holds(mixture):
    z = torch.randn(30, 2, generator=rng(2), dtype=torch.float64).requires_grad_()
    sigma = torch.linspace(0.05, 3, 30, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mixture.log_prob(z, sigma).sum(), z)
    torch.testing.assert_close(mixture.score(z, sigma), gradient, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        mixture(z, sigma), z + sigma[:, None] ** 2 * gradient, rtol=1e-8, atol=1e-8
    )


def test_images_and_batches_agree_with_single_samples(mixture):
    means = torch.randn(5, 1, 3, 3, generator=rng(3))
    mix = IsotropicMixture(means, 0.0)
    z, sigma = torch.randn(4, 1, 3, 3, generator=rng(4)), torch.tensor([0.1, 0.5, 1.0, 2.0])
    assert mix(z, sigma).shape == z.shape
    assert mix(z, sigma).dtype == torch.float32
    for i in range(4):
        torch.testing.assert_close(mix(z, sigma)[i : i + 1], mix(z[i : i + 1], float(sigma[i])))


def test_atoms_at_small_noise_return_the_nearest_atom():
    means = torch.randn(50, 20, generator=rng(5))
    z = means[:10] + 0.01 * torch.randn(10, 20, generator=rng(6))
    torch.testing.assert_close(IsotropicMixture(means, 0.0)(z, 0.01), means[:10])


def test_samples_have_the_moments(mixture):
    n = 100_000
    x = mixture.sample(n, rng(7))
    mean = mixture.weights @ mixture.means
    cov = 0.3 * torch.eye(2) + (mixture.means - mean).T @ (
        mixture.weights[:, None] * (mixture.means - mean)
    )
    assert ((x.mean(0) - mean).abs() < 4 * x.std(0) / math.sqrt(n)).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert ((products.mean(0) - cov).abs() < 4 * products.std(0) / math.sqrt(n)).all()


def test_sigma_data_is_the_root_of_the_mean_variance():
    """tr Cov / d, the covariance written out: between the means and inside, with a basis."""
    g = rng(40)
    means = torch.randn(3, 2, 3, generator=g, dtype=torch.float64) + 2
    basis = torch.linalg.qr(torch.randn(6, 2, generator=g, dtype=torch.float64))[0]
    w, c = (torch.tensor(a, dtype=torch.float64) for a in ([0.2, 0.3, 0.5], [2.0, 0.1]))
    mix = GaussianMixture(means, 0.4, w, basis, c)
    flat = means.flatten(1) - w @ means.flatten(1)
    inside = 0.4 * (torch.eye(6) - basis @ basis.T) + basis @ torch.diag(c) @ basis.T
    covariance = flat.T @ (w[:, None] * flat) + inside
    assert mix.sigma_data == pytest.approx(math.sqrt(float(covariance.trace()) / 6), rel=1e-12)


def test_20000_points_against_4000_means_stay_in_blocks():
    import resource

    mix = IsotropicMixture(swiss_roll_curve(torch.linspace(0, 1, 4000, dtype=torch.float64)), 0.01)
    x = mix.sample(20_000, rng(8)).float()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert mix.log_prob(x).shape == (20_000,)
    assert mix.denoise(x, 0.1).shape == (20_000, 2)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1.5e9  # all at once: 640 MB an array, and several of them


def test_roll_is_resolved_by_its_quadrature(roll):
    """Against one Gauss-Legendre rule of 2,000 nodes, and against Monte Carlo."""
    x = roll.sample(2000, rng(9))
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(2000))
    finer = IsotropicMixture(swiss_roll_curve((nodes + 1) / 2), roll.variance, weights)
    torch.testing.assert_close(roll.log_prob(x), finer.log_prob(x), rtol=0, atol=1e-6)
    # independent: Monte-Carlo over the curve, at one point, at a noise where that converges
    u = torch.rand(400_000, generator=rng(10), dtype=torch.float64)
    v = roll.variance + 0.3**2
    terms = torch.exp(-((x[0] - swiss_roll_curve(u)) ** 2).sum(1) / (2 * v)) / (2 * math.pi * v)
    assert abs(float(roll.log_prob(x[:1], 0.3).exp() - terms.mean())) < 4 * float(
        terms.std()
    ) / math.sqrt(len(u))


def test_roll_data_are_of_the_density(roll):
    n = 40_000
    x, exact = swiss_roll(n, seed=0).double(), roll.sample(n, rng(11))
    for a, b in zip(
        (x, x**2, -roll.log_prob(x)[:, None]),
        (exact, exact**2, -roll.log_prob(exact)[:, None]),
        strict=True,
    ):
        assert ((a.mean(0) - b.mean(0)).abs() < 4 * ((a.var(0) + b.var(0)) / n).sqrt()).all()
    assert abs(float(x.mean())) < 4 / math.sqrt(2 * n)
    mean, sd = swiss_roll_scaling()
    assert sd > 6
    assert abs(mean) < 2


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_the_roll_is_standardised_exactly(noise):
    """Mean 0 and mean square 1 over both coordinates, the noise's variance included."""
    roll = swiss_roll_density(noise)
    assert float((roll.weights @ roll.means).mean()) == pytest.approx(0, abs=1e-12)
    square = float((roll.weights @ roll.means**2).mean()) + roll.variance
    assert square == pytest.approx(1, abs=1e-12)


def test_roll_sampling_follows_its_generator_and_parameter_inverts_curve():
    torch.testing.assert_close(swiss_roll(50, generator=rng(1)), swiss_roll(50, generator=rng(1)))
    assert not torch.equal(swiss_roll(50, generator=rng(1)), swiss_roll(50, generator=rng(2)))
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(swiss_roll_parameter(swiss_roll_curve(u)), u, rtol=0, atol=3e-4)


def linear(matrix):
    return lambda x: x @ matrix.T


def grid_posterior(density, obs, limit, n):
    """p(x | y) in two dimensions on a grid: points, log-density, log-evidence by trapezoids."""
    axis = torch.linspace(-limit, limit, n, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    log_joint = density.log_prob(x) + obs.log_likelihood(x)
    evidence = log_joint.logsumexp(0) + 2 * math.log(2 * limit / (n - 1))
    return x, log_joint - evidence, evidence


def test_posterior_is_gaussian_conditioning_in_eight_dimensions():
    """Against numpy, per component: the joint covariance of (x, y), conditioned on y; evidences."""
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    g = rng(20)
    means, weights = (
        torch.randn(4, 8, generator=g, dtype=torch.float64),
        torch.rand(4, generator=g, dtype=torch.float64),
    )
    singular = torch.randn(3, 8, generator=g, dtype=torch.float64)
    singular[2] = singular[0] - 2 * singular[1]  # rank 2
    tall = torch.randn(11, 8, generator=g, dtype=torch.float64)
    for matrix, v, noise in ((singular, 0.5, 0.3), (tall, 2.0, 0.1), (singular[:1], 0.1, 1.0)):
        y = torch.randn(len(matrix), generator=g, dtype=torch.float64)
        post = IsotropicMixture(means, v, weights).posterior(Observation(linear(matrix), y, noise))
        a = matrix.numpy()
        cov_y = v * a @ a.T + noise**2 * np.eye(len(a))
        gain = v * a.T @ np.linalg.inv(cov_y)
        covariance = v * np.eye(8) - gain @ a * v
        evidence = (
            np.array([multivariate_normal(a @ m, cov_y).pdf(y) for m in means.numpy()])
            * weights.numpy()
            / float(weights.sum())
        )
        np.testing.assert_allclose(
            post.means,
            means.numpy() + (y.numpy() - means.numpy() @ a.T) @ gain.T,
            rtol=1e-6,
            atol=1e-8,
        )
        np.testing.assert_allclose(post.weights, evidence / evidence.sum(), rtol=1e-6)
        np.testing.assert_allclose(post.log_evidence, np.log(evidence.sum()), rtol=1e-8)
        z = torch.randn(5, 8, generator=g, dtype=torch.float64)
        for sigma in (0.0, 0.7):
            normals = [
                multivariate_normal(m, covariance + sigma**2 * np.eye(8)).logpdf(z)
                for m in post.means.numpy()
            ]
            expected = logsumexp(np.array(normals), b=post.weights.numpy()[:, None], axis=0)
            np.testing.assert_allclose(post.log_prob(z, sigma), expected, rtol=1e-6, atol=1e-6)
        x = post.sample(100_000, rng(21))
        mean = post.weights.numpy() @ post.means.numpy()
        assert (np.abs(x.numpy().mean(0) - mean) < 4 * x.numpy().std(0) / 100_000**0.5).all()
        spread = post.means.numpy() - mean
        total = covariance + spread.T @ (post.weights.numpy()[:, None] * spread)
        assert (
            np.abs(np.cov(x.numpy().T) - total).max()
            < 4 * total.diagonal().max() * (2 / 100_000) ** 0.5
        )


def test_posterior_against_quadrature_in_one_and_two_dimensions():
    axis = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    one = IsotropicMixture(torch.tensor([[-2.0], [2.0]], dtype=torch.float64), 0.09)
    obs = Observation(lambda x: 0.7 * x, torch.tensor([0.5], dtype=torch.float64), 0.4)
    x = axis[:, None]
    joint = (one.log_prob(x) + obs.log_likelihood(x)).exp()
    evidence = joint.sum() * (axis[1] - axis[0])
    post = one.posterior(obs)
    torch.testing.assert_close(post.log_evidence, evidence.log(), rtol=1e-8, atol=0)
    torch.testing.assert_close(post.log_prob(x), (joint / evidence).log(), rtol=1e-8, atol=1e-8)

    two = IsotropicMixture(torch.randn(6, 2, generator=rng(22), dtype=torch.float64), 0.2)
    obs = Observation(
        linear(torch.tensor([[1.0, -0.5]], dtype=torch.float64)),
        torch.tensor([0.3], dtype=torch.float64),
        0.2,
    )
    points, log_density, evidence = grid_posterior(two, obs, limit=6.0, n=800)
    post = two.posterior(obs)
    torch.testing.assert_close(evidence, post.log_evidence, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_density, post.log_prob(points), rtol=1e-6, atol=1e-5)
    x, log_w, estimate = weighted_posterior(two, obs, 100_000, rng(23))
    spread = (
        float(obs.log_likelihood(x).exp().std() / obs.log_likelihood(x).exp().mean()) / 100_000**0.5
    )
    assert abs(float(estimate - evidence)) < 4 * spread
    mean = post.weights @ post.means
    error = 4 * ((log_w.exp()[:, None] * (x - mean)) ** 2).sum(0).sqrt()
    assert ((log_w.exp() @ x - mean).abs() < error).all()


def test_posterior_denoises_like_its_density():
    post = IsotropicMixture(
        torch.randn(5, 4, generator=rng(24), dtype=torch.float64), 0.3
    ).posterior(
        Observation(
            linear(torch.randn(2, 4, generator=rng(25), dtype=torch.float64)),
            torch.zeros(2, dtype=torch.float64),
            0.2,
        )
    )
    z = torch.randn(10, 4, generator=rng(26), dtype=torch.float64).requires_grad_()
    sigma = torch.linspace(0.1, 3, 10, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(post.log_prob(z, sigma).sum(), z)
    torch.testing.assert_close(
        post(z, sigma), z + sigma[:, None] ** 2 * gradient, rtol=1e-8, atol=1e-8
    )


def test_posterior_refuses_what_it_cannot_do():
    mix = IsotropicMixture(torch.zeros(2, 2, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="linear"):
        mix.posterior(Observation(lambda x: x**2, torch.zeros(2, dtype=torch.float64), 1.0))
    with pytest.raises(ValueError, match="y must"):
        mix.posterior(Observation(lambda x: x, torch.zeros(5, 2, dtype=torch.float64), 1.0))
    atoms = IsotropicMixture(torch.zeros(2, 2, dtype=torch.float64), 0.0)
    far = Observation(lambda x: x, torch.full((2,), 1e200, dtype=torch.float64), 1e-3)
    for attempt in (atoms.posterior, lambda o: weighted_posterior(mix, o, 10)):
        with pytest.raises(ValueError, match="impossible"):
            attempt(far)
    with pytest.raises(ValueError, match="basis"):
        GaussianMixture(torch.zeros(2, 3), 1.0, basis=torch.zeros(2, 1))
