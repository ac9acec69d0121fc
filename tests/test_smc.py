import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import SDES, gaussian, rng
from scipy.stats import chisquare

from sde_utils import (
    DPS,
    MMPS,
    VESDE,
    Annealed,
    IsotropicMixture,
    Observation,
    PiGDM,
    ancestral,
    calibration_ranks,
    coverage,
    karras_times,
    roll_mass,
    sample,
    sliced_wasserstein,
    total_variation,
    twisted_smc,
    uniform_times,
    weighted_posterior,
)
from sde_utils.smc import systematic


def identity(x):
    return x


OBS = Observation(identity, torch.tensor([0.5], dtype=torch.float64), 1.0)
METHODS = {
    "mmps": MMPS,
    "annealed": Annealed,
    "dps": DPS,
    "pigdm": lambda denoiser, obs: PiGDM(denoiser, obs, (1,), 1.0),
}


def start(sde, n, seed, dim=1):
    return sde.prior((n, dim), dtype=torch.float64, generator=rng(seed))


def test_guidance_alone_has_the_wrong_mode_weights(two_modes):
    """Exact 0.862; known values of the approximations, 4 standard errors and 0.01 for the steps."""
    sde, n = SDES["ve"], 8000
    for method, expected in (
        (MMPS, 0.675),
        (Annealed, 0.667),
        (partial(DPS, max_shift=50.0), 0.953),
    ):
        x = sample(
            sde,
            method(two_modes, OBS),
            start(sde, n, 0),
            steps=300,
            predictor=ancestral,
            generator=rng(1),
        )
        assert (
            abs(float((x > 0).double().mean()) - expected)
            < 4 * math.sqrt(expected * (1 - expected) / n) + 0.01
        ), method


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("method", METHODS)
def test_smc_has_the_right_mode_weights_and_evidence(two_modes, name, method):
    exact = two_modes.posterior(OBS)
    right = float(exact.weights[1])  # the modes do not overlap
    assert right == pytest.approx(0.862, abs=5e-4)
    particles = twisted_smc(
        SDES[name], METHODS[method](two_modes, OBS), start(SDES[name], 4000, 2), generator=rng(3)
    )
    weights = particles.log_weights.exp()
    assert float(weights.sum()) == pytest.approx(1)
    error = math.sqrt(right * (1 - right) / float(particles.ess.min()))
    assert abs(float(weights[particles.x[:, 0] > 0].sum()) - right) < 3 * error
    assert abs(float(particles.log_evidence - exact.log_evidence)) < 0.05


@pytest.mark.slow
def test_error_falls_as_particles_grow_and_the_evidence_is_unbiased(two_modes):
    exact, sde = two_modes.posterior(OBS), SDES["ve"]
    errors, ratios = [], []
    for n in (50, 800):
        runs = [
            twisted_smc(
                sde, MMPS(two_modes, OBS), start(sde, n, 10 + i), steps=60, generator=rng(100 + i)
            )
            for i in range(40)
        ]
        share = torch.stack([r.log_weights.exp()[r.x[:, 0] > 0].sum() for r in runs])
        errors.append(float((share - exact.weights[1]).square().mean().sqrt()))
        ratios.append(torch.stack([r.log_evidence - exact.log_evidence for r in runs]).exp())
    assert errors[1] < errors[0] / 2  # sqrt(16) = 4 if all goes with 1/sqrt(n)
    assert abs(float(ratios[0].mean()) - 1) < 4 * float(ratios[0].std()) / math.sqrt(40) + 0.01


def test_exact_twist_gives_equal_weights():
    """N(0, 1) and MMPS: the twist is p(y | z) itself.

    Only the chain's finite steps keep the weights from being equal.
    """
    sde = SDES["ve"]
    particles = twisted_smc(
        sde, MMPS(gaussian(), OBS), start(sde, 2000, 4), steps=400, generator=rng(5)
    )
    assert particles.ess.min() > 0.95 * 2000


def test_systematic_resampling_keeps_each_share_within_one():
    log_w = torch.randn(50, generator=rng(6), dtype=torch.float64).log_softmax(0)
    counts = torch.bincount(systematic(log_w, 1000, rng(7)), minlength=50)
    assert ((counts - 1000 * log_w.exp()).abs() < 1).all()


def test_each_resampled_draw_follows_the_weights():
    """4,000 times 3 of 3: each place by itself has the shares w, within 4 standard errors."""
    w, g = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64), rng(8)
    index = torch.stack([systematic(w.log(), 3, g) for _ in range(4000)])
    for place in index.T:
        share = torch.bincount(place, minlength=3) / 4000
        assert ((share - w).abs() < 4 * (w * (1 - w) / 4000).sqrt()).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", [MMPS, Annealed])  # weights of DPS have too long a tail
def test_the_evidence_is_that_of_the_chain_whatever_twists_it(method):
    """N(0, 1), seven steps that end at σ = 0.5: the unguided chain is linear, its end N(0, V),

    V by the recursion of the docstring. The mean of 300 estimates from 50 particles each is
    N(y; 0, V + σ_y²) within 4 standard errors: no step's weight, the last's included, is left out.
    """
    sde, obs = VESDE(), Observation(identity, torch.tensor([1.2], dtype=torch.float64), 0.5)
    times = karras_times(sde, 8, low=0.5)
    levels = [float(sde.sigma(t)) for t in times]
    v = levels[0] ** 2
    for sigma_t, sigma_s in pairwise(levels):
        q, j = (sigma_s / sigma_t) ** 2, 1 / (1 + sigma_t**2)
        nu = sigma_s * math.sqrt(1 - q)
        beta = math.hypot(nu, (1 - q) * sigma_t) - nu
        v = (q + (1 - q) * j) ** 2 * v + (nu + beta * j) ** 2
    v = v / (1 + levels[-1] ** 2) ** 2
    exact = math.exp(-(1.2**2) / (2 * (v + 0.25))) / math.sqrt(2 * math.pi * (v + 0.25))
    guided, options = method(gaussian(), obs), {"times": times, "generator": rng(70)}
    runs = [twisted_smc(sde, guided, start(sde, 50, i), **options) for i in range(300)]
    ratios = torch.stack([run.log_evidence for run in runs]).exp() / exact
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / math.sqrt(300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_smc_on_the_roll_with_the_learned_denoiser(roll, learned, name):
    """Eight observations y = x1 x2, 4,000 particles, 100 steps: branch masses and evidence.

    One run's log-evidence has a standard error of 0.01 to 0.04: 0.15 is at least 3.5 of them, and
    0.06 bounds the root mean square of eight. Without the probes' C the observation -1.0 comes out
    with evidence off by 1.6 to 2.1 nats.
    """
    wrong, gaps, sde = [], [], SDES[name]
    for i, (y, noise) in enumerate(
        [
            (0.2, 0.05),
            (0.2, 0.03),
            (-0.2, 0.1),
            (0.5, 0.1),
            (-1.0, 0.1),
            (0.0, 0.3),
            (1.0, 0.3),
            (-0.5, 0.03),
        ]
    ):
        obs = Observation(lambda x: x[:, 0] * x[:, 1], y, noise)
        x, log_w, evidence = weighted_posterior(roll, obs, 200_000, rng(8))
        particles = twisted_smc(
            sde,
            MMPS(learned, obs, probes=16),
            sde.prior((4000, 2), generator=rng(9 + i)),
            times=karras_times(sde, 100),
            generator=rng(20 + i),
        )
        wrong.append(
            float(
                total_variation(
                    roll_mass(particles.x, particles.log_weights.exp()).double(),
                    roll_mass(x, log_w.exp()),
                )
            )
        )
        gaps.append(float(particles.log_evidence - evidence))
        print(f"{name} y = {y}, σ_y = {noise}: wrong {wrong[-1]:.3f}, evidence {gaps[-1]:+.3f}")
    assert sum(wrong) / len(wrong) <= 0.05
    assert max(wrong) <= 0.08
    assert max(abs(gap) for gap in gaps) < 0.15
    assert math.sqrt(sum(gap**2 for gap in gaps) / len(gaps)) < 0.06


def mixture_problem(d, m, seed):
    """25 unit Gaussians on a grid of spacing 8 in two coordinates, tiled; A of rank m."""
    g, axis = rng(seed), torch.tensor([-16.0, -8.0, 0.0, 8.0, 16.0], dtype=torch.float64)
    means = torch.cartesian_prod(axis, axis).repeat(1, d // 2)
    mix = IsotropicMixture(means, 1.0, torch.rand(25, generator=g, dtype=torch.float64))
    left = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(d, m, generator=g, dtype=torch.float64))[0]
    matrix = left @ torch.diag(torch.rand(m, generator=g, dtype=torch.float64)) @ right.T
    noise = max(0.1, float(torch.rand((), generator=g)))
    y = mix.sample(1, g)[0] @ matrix.T + noise * torch.randn(m, generator=g, dtype=torch.float64)
    return mix, Observation(lambda x: x @ matrix.T, y, noise)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "m", "problems"),
    [(8, 1, 8), (8, 2, 8), (8, 4, 8), (80, 1, 8), (80, 2, 8), (80, 4, 8), (800, 1, 3)],
)
def test_mixtures(d, m, problems):
    """Mean sliced Wasserstein-1 to exact draws at most twice that of two exact sets."""
    far, unit, sde, g = [], [], VESDE(0.01, 2000.0), rng(50)
    for seed in range(problems):
        mix, obs = mixture_problem(d, m, seed)
        exact = mix.posterior(obs)
        x, times = start(sde, 2000, 1000 + seed, d), uniform_times(100)
        particles = twisted_smc(sde, MMPS(mix, obs), x, times=times, generator=g)
        sets = [exact.sample(2000, g) for _ in range(4)]
        far += [float(sliced_wasserstein(particles.resample(2000, g), a, 300, g)) for a in sets[:3]]
        unit += [float(sliced_wasserstein(a, sets[3], 300, g)) for a in sets[:3]]
    print(f"d = {d}, {m} observed: {sum(far) / sum(unit):.2f} times exact against exact")
    assert sum(far) < 2 * sum(unit)


def test_steps_have_the_reverse_process_covariance():
    """Prior N(0, 4), y says nothing, 40 steps: variance within 2 %; ancestral steps lack 19 %."""
    sde, n, prior = VESDE(), 20_000, gaussian(variance=4.0)
    obs = Observation(identity, torch.zeros(1, dtype=torch.float64), 1000.0)
    times_ = karras_times(sde, 40, high=50.0)
    options = {"times": times_, "generator": rng(61)}
    x = twisted_smc(sde, MMPS(prior, obs), start(sde, n, 60), **options).resample(n, rng(62))
    plain = sample(
        sde,
        prior,
        start(sde, n, 60),
        times=times_,
        predictor=ancestral,
        generator=rng(61),
    )
    error = math.sqrt(2 / n)
    print(f"variance {float(x.var()) / 4:.4f} of exact, ancestral {float(plain.var()) / 4:.4f}")
    assert abs(float(x.var()) / 4 - 1) < 0.02 + 3 * error
    assert float(plain.var()) / 4 < 0.85


@pytest.mark.slow
def test_calibration_tells_smc_from_dps(two_modes):
    """Ranks of the truth in 19 draws, 240 problems: uniform for SMC, not for DPS (chi-square)."""
    n, draws, sde, g = 240, 19, SDES["ve"], rng(40)
    truth = two_modes.sample(n, g)
    noise = 0.2
    y = truth + noise * torch.randn(n, 1, generator=g, dtype=torch.float64)
    guide = [MMPS(two_modes, Observation(identity, yi, noise)) for yi in y]
    smc = []
    for one in guide:
        particles = twisted_smc(
            sde, one, sde.prior((200, 1), dtype=torch.float64, generator=g), steps=40, generator=g
        )
        smc.append(particles.resample(draws, g)[:, 0])
    every = Observation(identity, y.repeat_interleave(draws, dim=0), noise)
    dps = sample(
        sde,
        DPS(two_modes, every),
        sde.prior((n * draws, 1), dtype=torch.float64, generator=g),
        predictor=ancestral,
        generator=g,
    )
    p, covered = {}, {}
    for name, x in (("smc", torch.stack(smc)), ("dps", dps.reshape(n, draws))):
        counts = torch.bincount(calibration_ranks(truth[:, 0], x) // 2, minlength=10)
        p[name], covered[name] = chisquare(counts).pvalue, float(coverage(truth[:, 0], x))
    print(p, covered)
    assert p["smc"] > 1e-3
    assert p["dps"] < 1e-4
    assert covered["dps"] < covered["smc"]
    with pytest.raises(ValueError, match="truth"):
        calibration_ranks(truth, x)
    with pytest.raises(ValueError, match="level"):
        coverage(truth[:, 0], x, 1.0)


class Bare:
    """Whatever has `look` and `obs`: no denoiser, and not to be called."""

    def __init__(self, guided):
        self.look, self.obs = guided.look, guided.obs


def test_whatever_looks_and_has_an_observation_is_taken(two_modes):
    guided, x = MMPS(two_modes, OBS), start(SDES["ve"], 200, 7)
    times = karras_times(SDES["ve"], 30)
    whole, bare = (
        twisted_smc(SDES["ve"], g, x, times=times, generator=rng(8)) for g in (guided, Bare(guided))
    )
    assert torch.equal(whole.x, bare.x)
