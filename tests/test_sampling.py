import math
import statistics
import time
from itertools import pairwise

import pytest
import torch
from conftest import SDES, Recorder, gaussian, rng

from sde_utils import (
    VESDE,
    VPSDE,
    IsotropicMixture,
    Langevin,
    Multistep,
    ancestral,
    euler,
    euler_maruyama,
    heun,
    karras_times,
    log_likelihood,
    sample,
    sliced_wasserstein,
    uniform_times,
)

POINT = IsotropicMixture(torch.zeros(1, 1, dtype=torch.float64), 0.0)


def before_last(sde, denoiser, n, seed, **options):
    """The states just before the last, clean step: (x / r, σ) at the lowest noise level of the grid."""
    times = options.pop("times", None) or uniform_times(options.pop("steps"))
    times = times if sde.sigma(0.0) > 0 else times[:-1]
    if times[-1] == 0:  # VE: run the predictors by hand down to t = 0, where σ = σ_min
        x, g = sde.prior((n, 1), dtype=torch.float64, generator=rng(seed)), rng(seed + 1)
        predictor, corrector = options.get("predictor", euler_maruyama), options.get("corrector")
        for t, s in pairwise(times):
            x = predictor(sde, denoiser, x, t, s, g)
            x = corrector(sde, denoiser, x, s, g) if corrector else x
        return x, float(sde.sigma(0.0))
    x = sample(sde, denoiser, sde.prior((n, 1), dtype=torch.float64, generator=rng(seed)), times=times, generator=rng(seed + 1), **options)
    return x / sde.scale(times[-1]), float(sde.sigma(times[-1]))


@pytest.mark.parametrize(("steps", "quoted"), [(30, 1.49), (100, 1.10), (1000, 1.009)])
def test_euler_maruyama_inflates_the_variance_of_ve_by_its_closed_form(steps, quoted):
    n = 40_000 if steps < 1000 else 10_000
    x, sigma = before_last(VESDE(), POINT, n, 0, steps=steps)
    h = 2 * math.log(5000) / steps
    inflation = h / (math.exp(-h) - (1 - h) ** 2)
    assert inflation == pytest.approx(quoted, abs=0.005)
    assert abs(float(x.var()) / sigma**2 - inflation) < 4 * inflation * math.sqrt(2 / n)


@pytest.mark.parametrize("name", SDES)
def test_ancestral_does_not_inflate(name):
    n = 40_000
    x, sigma = before_last(SDES[name], POINT, n, 1, steps=10, predictor=ancestral)
    assert abs(float(x.var()) / sigma**2 - 1) < 4 * math.sqrt(2 / n)


def test_corrector_improves_on_its_predictor():
    n = 40_000
    inflation = {}
    for corrector in (None, Langevin(), Langevin(steps=4)):
        x, sigma = before_last(VESDE(), POINT, n, 2, steps=30, corrector=corrector)
        inflation[corrector] = float(x.var()) / sigma**2 - 1
    plain, one, four = inflation.values()
    error = 2 * math.sqrt(2 / n)
    assert one < plain - 4 * error
    assert four < one - 4 * error


def test_corrector_improves_on_its_predictor_on_two_modes(two_modes):
    """Total variation of a histogram against the exact density, ten steps per e-fold coarse enough to see the predictor's error."""
    n, sde, edges = 40_000, VESDE(), torch.linspace(-4, 4, 81, dtype=torch.float64)
    exact = torch.histogram(two_modes.sample(400_000, rng(3))[:, 0], edges)[0] / 400_000
    error = []
    for corrector in (None, Langevin(steps=2)):
        x = sample(sde, two_modes, sde.prior((n, 1), dtype=torch.float64, generator=rng(4)), steps=20, corrector=corrector, generator=rng(5))
        error.append(float((torch.histogram(x[:, 0], edges)[0] / n - exact).abs().sum()) / 2)
    assert error[1] < 0.8 * error[0]


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_langevin_has_the_stationary_variance_of_its_step(name):
    """x <- (1 - e/V) x + sqrt(2e) n settles at V / (1 - e/(2V)) whatever x it starts from: no dependence of e on the state."""
    sde, v, t, n = SDES[name], 0.3, 0.4, 20_000
    r, sigma = float(sde.scale(t)), float(sde.sigma(t))
    total = r**2 * (v + sigma**2)
    e = 2 * 0.16**2 * (r * sigma) ** 2
    rounds = math.ceil(8 * total / e)  # the start has decayed by exp(-16)
    x = Langevin(steps=rounds)(sde, gaussian(0, v), torch.zeros(n, 1, dtype=torch.float64), t, rng(6))
    expected = total / (1 - e / (2 * total))
    assert abs(float(x.var()) - expected) < 4 * expected * math.sqrt(2 / n)


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize(("predictor", "order"), [(euler, 1), (heun, 2), (Multistep(), 2)])
def test_convergence_orders(two_modes, name, predictor, order):
    """Halving the step divides the error by 2^order: against the closed-form flow of a Gaussian, and a fine reference for two modes."""
    sde = SDES[name]

    def end(denoiser, steps):
        times = [float(sde.time(10 * (0.05 / 10) ** (i / steps))) for i in range(steps + 1)]
        z = 10 * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
        return sample(sde, denoiser, z * sde.scale(times[0]), times=times, predictor=predictor) / sde.scale(times[-1])

    v = 0.5  # z(σ) is proportional to sqrt(v + σ²)
    exact = 10 * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None] * math.sqrt((v + 0.05**2) / (v + 100))
    for denoiser, truth in ((gaussian(0, v), exact), (two_modes, end(two_modes, 4000))):
        errors = [float((end(denoiser, n) - truth).norm()) for n in (100, 200, 400)]
        for coarse, fine in pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_multistep_is_its_formula_and_forgets_between_runs(name):
    """Three steps on a Gaussian against the recursion written out: D = c z, c = v / (v + σ²); one call a step, twice with one object."""
    sde, v = SDES[name], 0.5
    levels, predictor = [10.0, 4.0, 1.0, 0.3], Multistep()
    times = [float(sde.time(sigma)) for sigma in levels]
    z, last = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], None
    expected = z
    for sigma_t, sigma_s in pairwise(levels):
        d, h = v / (v + sigma_t**2) * expected, math.log(sigma_t / sigma_s)
        ahead = d if last is None else d + h / (2 * last[0]) * (d - last[1])
        expected, last = sigma_s / sigma_t * expected + (1 - sigma_s / sigma_t) * ahead, (h, d)
    for _ in range(2):
        calls = Recorder(gaussian(0, v))
        x = sample(sde, calls, z * sde.scale(times[0]), times=times, predictor=predictor)
        torch.testing.assert_close(x / sde.scale(times[-1]), expected)
        assert calls.calls == 3
    by_hand = euler(sde, gaussian(0, v), z * sde.scale(times[0]), *times[:2])
    torch.testing.assert_close(predictor(sde, gaussian(0, v), z * sde.scale(times[0]), *times[:2]), by_hand)
    torch.testing.assert_close(predictor(sde, gaussian(0, v), z * sde.scale(times[0]), *times[:2]), by_hand)  # not where the last ended


def test_heun_is_exact_for_a_point_mass(sde):
    mix = IsotropicMixture(torch.full((1, 3), 1.7, dtype=torch.float64), 0.0)
    x = sample(sde, mix, sde.prior((5, 3), dtype=torch.float64, generator=rng(7)), steps=5, predictor=heun)
    torch.testing.assert_close(x, torch.full_like(x, 1.7))


@pytest.mark.parametrize("predictor", [euler, heun, ancestral])
def test_ve_and_vp_agree_after_rescaling(two_modes, predictor):
    levels = [40 * (0.02 / 40) ** (i / 20) for i in range(21)]
    z = 40 * torch.randn(50, 1, generator=rng(8), dtype=torch.float64)
    ends = []
    for sde in SDES.values():
        times = [float(sde.time(level)) for level in levels]
        x = sample(sde, two_modes, z * sde.scale(times[0]), times=times, predictor=predictor, generator=rng(9))
        ends.append(x / sde.scale(times[-1]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("last_step", [1.0, 0.5])
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_last_step_shrinks_a_gaussian_as_its_formula_says(name, last_step):
    sde, v = SDES[name], 0.03**2
    times = [1.0, *(float(sde.time(5.0 * (0.01 / 5.0) ** (i / 400))) for i in range(400))]
    times += [0.0] if name == "ve" else [float(sde.time(0.01)), 0.0]
    x1 = sde.prior((1000, 1), dtype=torch.float64, generator=rng(10))
    x = sample(sde, gaussian(0, v), x1, times=times, predictor=heun, last_step=last_step)
    flow = x1 / sde.scale(1.0) * math.sqrt((v + 0.01**2) / (v + float(sde.sigma(1.0)) ** 2))
    w = 1 - last_step * 0.01**2 / (v + 0.01**2)
    torch.testing.assert_close(x, w * flow, rtol=5e-3, atol=0)
    sd = w * math.sqrt(v + 0.01**2) / math.sqrt(v)
    assert (abs(sd - 1) < 0.002) == (last_step == 0.5)  # the half step is right to O(σ⁴), the whole one 5 % too thin


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_heun_with_18_steps_on_the_roll(roll, learned, name):
    """Sliced Wasserstein in units of the distance of two exact sets of 5,000, means over ten seeds; thickness in nats."""
    sde, n, seeds = SDES[name], 5000, 10
    g = rng(11)
    exact = [roll.sample(n, g).float() for _ in range(2 * seeds)]
    unit = statistics.mean(float(sliced_wasserstein(a, b, generator=g)) for a, b in zip(exact[::2], exact[1::2], strict=True))
    data = -float(torch.cat([roll.log_prob(x) for x in exact]).mean())
    for denoiser, limit in ((roll, 1.3), (learned, 2.0)):
        calls = Recorder(denoiser)
        sets = [sample(sde, calls, sde.prior((n, 2), generator=g), steps=18, predictor=heun) for _ in range(seeds)]
        assert calls.calls == 35 * seeds
        distance = statistics.mean(float(sliced_wasserstein(x, y, generator=g)) for x, y in zip(sets, exact, strict=False)) / unit
        thickness = -float(torch.cat([roll.log_prob(x) for x in sets]).mean()) - data
        print(f"{name} {'exact' if denoiser is roll else 'learned'}: distance {distance:.2f}, thickness {thickness:+.3f} nats")
        assert distance < limit
        if denoiser is roll:
            assert abs(thickness) < 0.03


def test_grids(sde):
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    times = karras_times(sde, 12, rho=7.0)
    assert times[0] == 1
    assert times[-1] == 0
    levels = [float(sde.sigma(t)) for t in times[:12]]
    assert levels[-1] == pytest.approx(0.01)
    assert levels[1] == pytest.approx(20.0)
    roots = torch.tensor(levels[1:], dtype=torch.float64) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(10), rtol=1e-4, atol=1e-5)
    narrow = karras_times(VESDE(sigma_max=5.0), 12)
    roots = VESDE(sigma_max=5.0).sigma(torch.tensor(narrow, dtype=torch.float64)) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(11), rtol=1e-6, atol=0)
    for steps in (1, 2, 3):
        assert len(karras_times(VPSDE(), steps)) == steps + 1
        assert karras_times(sde, steps)[0] == 1


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone(two_modes):
    state = torch.get_rng_state()
    x = VPSDE().prior((7, 1), dtype=torch.float64, generator=rng(12))
    a = sample(VPSDE(), two_modes, x, steps=10, corrector=Langevin(), generator=rng(13), trajectory=True)
    b = sample(VPSDE(), two_modes, x, steps=10, corrector=Langevin(), generator=rng(13))
    assert a.shape == (11, 7, 1)
    assert torch.equal(a[-1], b)
    assert torch.equal(a[0], x)
    assert torch.equal(state, torch.get_rng_state())


def test_the_loop_costs_at_most_a_tenth_of_the_network_calls(learned):
    sde, x = VESDE(), VESDE().prior((10_000, 2), generator=rng(14))
    sigma = torch.tensor(1.0)
    looped, bare = [], []
    with torch.no_grad():
        for _ in range(7):
            start = time.perf_counter()
            sample(sde, learned, x, steps=20, predictor=heun)
            looped.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(39):
                learned(x, sigma)
            bare.append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(looped, bare, strict=True))
    print(f"loop / bare calls: {ratio:.3f}")
    assert ratio < 1.1


def test_memory_does_not_grow_with_steps(two_modes):
    """Of all the states the denoiser has seen, only the current one is still alive."""
    import weakref

    seen, alive = [], []

    def watching(z, sigma):
        seen.append(weakref.ref(z))
        alive.append(sum(ref() is not None for ref in seen))
        return two_modes(z, sigma)

    sample(VESDE(), watching, VESDE().prior((10, 1), dtype=torch.float64, generator=rng(15)), steps=100, corrector=Langevin())
    assert len(alive) == 201
    assert max(alive) <= 2


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_likelihood_of_the_exact_denoiser_is_the_exact_density(roll, name):
    x = roll.sample(200, rng(16))
    error = log_likelihood(SDES[name], roll, x, steps=200) - roll.log_prob(x, 0.01)
    print(f"{name}: largest error {float(error.abs().max()):.2e} nats")
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_likelihood_of_the_learned_denoiser(roll, learned, name):
    x = roll.sample(2000, rng(17)).float()
    error = log_likelihood(SDES[name], learned, x) - roll.log_prob(x, 0.01)
    print(f"{name}: mean error {float(error.mean()):+.4f} nats")
    assert abs(float(error.mean())) < 0.05


def test_likelihood_with_probes_is_unbiased(two_modes):
    mix = IsotropicMixture(torch.randn(3, 2, generator=rng(18), dtype=torch.float64), 0.2)
    x = mix.sample(1, rng(19)).expand(4000, 2).contiguous()
    exact = log_likelihood(VESDE(), mix, x[:1], steps=30)
    estimate = log_likelihood(VESDE(), mix, x, steps=30, probes=1, generator=rng(20))
    assert abs(float(estimate.mean() - exact)) < 4 * float(estimate.std()) / math.sqrt(4000)
    assert estimate.std() > 0


def test_the_slope_of_the_likelihood_is_not_half_a_score():
    """What is detached along the path is detached at its end as well: no gradient rather than a wrong one."""
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    assert not log_likelihood(VESDE(), gaussian(), x, steps=4).requires_grad


def test_bad_input_is_refused(two_modes):
    sde, x = VESDE(), torch.zeros(3, 1, dtype=torch.float64)
    calls = Recorder(two_modes)
    for changes, name in [
        ({"predictor": "heun"}, "predictor"),
        ({"predictor": Multistep}, r"Multistep\(\)"),
        ({"corrector": Langevin}, r"Langevin\(\)"),
        ({"generator": 0}, "generator"),
        ({"generator": 0, "predictor": heun}, "generator"),
    ]:
        with pytest.raises(TypeError, match=name):
            sample(sde, calls, x, **changes)
    for call in (sample, log_likelihood):
        with pytest.raises(TypeError, match=r"VPSDE\(\)"):
            call(VPSDE, calls, x)
        with pytest.raises(TypeError, match="generator"):
            call(sde, calls, x, generator=0)
    with pytest.raises(TypeError, match="generator"):
        sde.prior((3, 1), generator=0)
    for changes, error, name in [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.0}, TypeError, "steps"),
        ({"times": [0.5, 0.5]}, ValueError, "times"),
        ({"times": [0.2, 0.5]}, ValueError, "times"),
        ({"times": [1.2, 0.0]}, ValueError, "times"),
        ({"times": [1.0, math.nan]}, ValueError, "times"),
        ({"times": [1.0]}, ValueError, "times"),
        ({"last_step": 0.0}, ValueError, "last_step"),
    ]:
        with pytest.raises(error, match=name):
            sample(sde, calls, x, **changes)
    for bad, error in ((torch.full((3, 1), math.nan), ValueError), (torch.zeros(3), ValueError), (torch.zeros(3, 1).long(), TypeError)):
        with pytest.raises(error, match="x"):
            sample(sde, calls, bad)
        with pytest.raises(error, match="x0"):
            log_likelihood(sde, calls, bad)
    for changes, name in [({"steps": 0}, "steps"), ({"sigma": 0.0}, "sigma"), ({"sigma": 100.0}, "sigma"), ({"probes": 0}, "probes")]:
        with pytest.raises(ValueError, match=name):
            log_likelihood(sde, calls, x, **changes)
    assert calls.calls == 0
    with pytest.raises(FloatingPointError, match=r"step 4, t = 0\.7"):
        sample(sde, lambda z, s: z * (math.nan if s < sde.sigma(0.75) else 0.5), x, steps=10, predictor=ancestral)
    for bad in ({"snr": 0.0}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Langevin(**bad)
    for bad in ({"steps": 0}, {"steps": 5, "rho": 0.0}, {"steps": 5, "sigma_min": -1.0}, {"steps": 5, "sigma_min": 30.0}):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            karras_times(VPSDE(), **bad)
