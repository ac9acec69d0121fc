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
    ancestral,
    euler,
    euler_maruyama,
    heun,
    karras_times,
    log_likelihood,
    multistep,
    sample,
    sliced_wasserstein,
    uniform_times,
)

POINT = IsotropicMixture(torch.zeros(1, 1, dtype=torch.float64), 0.0)


def before_last(sde, denoiser, n, seed, steps, **options):
    """x / r and σ at the last time of the grid, before the step to x_0."""
    start = sde.prior((n, 1), dtype=torch.float64, generator=rng(seed))
    options |= {"generator": rng(seed + 1), "last_step": None}
    x = sample(sde, denoiser, start, steps=steps, **options)
    return x / sde.scale(1 / steps), float(sde.sigma(1 / steps))


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
    """Total variation of a histogram, at steps coarse enough to see the predictor's error."""
    n, sde, edges = 40_000, VESDE(), torch.linspace(-4, 4, 81, dtype=torch.float64)
    exact = torch.histogram(two_modes.sample(400_000, rng(3))[:, 0], edges)[0] / 400_000
    error = []
    for corrector in (None, Langevin(steps=2)):
        x = sample(
            sde,
            two_modes,
            sde.prior((n, 1), dtype=torch.float64, generator=rng(4)),
            steps=20,
            corrector=corrector,
            generator=rng(5),
        )
        error.append(float((torch.histogram(x[:, 0], edges)[0] / n - exact).abs().sum()) / 2)
    assert error[1] < 0.8 * error[0]


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_langevin_has_the_stationary_variance_of_its_step(name):
    """x <- (1 - e/V) x + sqrt(2e) n settles at V / (1 - e/(2V)), wherever it starts."""
    sde, v, t, n = SDES[name], 0.3, 0.4, 20_000
    r, sigma = float(sde.scale(t)), float(sde.sigma(t))
    total = r**2 * (v + sigma**2)
    e = 2 * 0.16**2 * (r * sigma) ** 2
    rounds = math.ceil(8 * total / e)  # the start has decayed by exp(-16)
    x = Langevin(steps=rounds)(
        sde, gaussian(0, v), torch.zeros(n, 1, dtype=torch.float64), t, rng(6)
    )
    expected = total / (1 - e / (2 * total))
    assert abs(float(x.var()) - expected) < 4 * expected * math.sqrt(2 / n)


def flow_error(sde, denoiser, predictor, steps, truth, top=10.0):
    """Norm of the error at σ = 0.05, on levels equally spaced in ln σ from top."""
    times = [float(sde.time(top * (0.05 / top) ** (i / steps))) for i in range(steps + 1)]
    z = top * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    start = z * sde.scale(times[0])
    x = sample(sde, denoiser, start, times=times, predictor=predictor(), last_step=None)
    return x / sde.scale(times[-1]) - truth


@pytest.mark.parametrize("name", ["ve", pytest.param("vp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("predictor", "order", "top"),
    [
        (lambda: euler, 1, 10.0),
        (lambda: heun, 2, 10.0),
        (multistep, 2, 10.0),
        (lambda: multistep(2, 0.3), 2, 10.0),
        (lambda: multistep(3), 3, 40.0),  # its first two steps are of lower order: at 40 they are
    ],  # far too short in u to matter
)
def test_convergence_orders(two_modes, name, predictor, order, top):
    """Half the step, error / 2^order: against a Gaussian's closed form, and Heun extrapolated."""
    sde, v = SDES[name], 0.5  # z(σ) is proportional to sqrt(v + σ²)
    z = top * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    exact = z * math.sqrt((v + 0.05**2) / (v + top**2))
    coarse, finer = (flow_error(sde, two_modes, lambda: heun, n, 0.0, top) for n in (1500, 3000))
    fine = (4 * finer - coarse) / 3
    for denoiser, truth in ((gaussian(0, v), exact), (two_modes, fine)):
        steps = (100, 200, 400)
        errors = [flow_error(sde, denoiser, predictor, n, truth, top).norm() for n in steps]
        for large, small in pairwise(errors):
            assert order - 0.25 < math.log2(large / small) < order + 0.25


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("order", [2, 3])
def test_multistep_is_its_formula_and_forgets_between_runs(name, order):
    """Against the integral of Lagrange's polynomial written out, D = c z; one call a step."""
    sde, v, size = SDES[name], 0.5, 0.7
    levels = [10.0, 4.0, 1.0, 0.5, 0.3]
    times = [float(sde.time(sigma)) for sigma in levels]
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    expected, past = z.clone(), []
    fine = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for sigma_t, sigma_s in pairwise(levels):
        d = v / (v + sigma_t**2) * expected
        past = [*past, (sigma_t / (size + sigma_t), (expected - d) / sigma_t - d / size)][-order:]
        start, end = past[-1][0], sigma_s / (size + sigma_s)
        u, y = start + fine * (end - start), expected / (size + sigma_t)
        for i, (at, slope) in enumerate(past):
            others = [other for k, (other, _) in enumerate(past) if k != i]
            basis = torch.ones_like(u)
            for other in others:
                basis = basis * (u - other) / (at - other)
            y = y + torch.trapezoid(basis, u) * slope
        expected = (size + sigma_s) * y
    predictor = multistep(order, size)
    for _ in range(2):
        calls, start = Recorder(gaussian(0, v)), z * sde.scale(times[0])
        x = sample(sde, calls, start, times=times, predictor=predictor, last_step=None)
        torch.testing.assert_close(x / sde.scale(times[-1]), expected, rtol=1e-7, atol=1e-8)
        assert calls.calls == 4
    first = [predictor(sde, gaussian(0, v), start, *times[:2]) for _ in range(2)]
    assert torch.equal(first[0], first[1])  # a state of another trajectory begins anew


@pytest.mark.parametrize("grid", ["uniform", "karras"])
def test_steps_are_network_calls(sde, two_modes, grid):
    """n for one-call predictors with every SDE, 2n - 1 for Heun, n - 1 more for a corrector."""
    x = sde.prior((3, 1), dtype=torch.float64, generator=rng(0))
    for n in (1, 2, 7):
        times = uniform_times(n) if grid == "uniform" else karras_times(sde, n, 2.0)
        assert len(times) == n
        for predictor, calls in [
            (euler_maruyama, n),
            (ancestral, n),
            (euler, n),
            (multistep(), n),
            (multistep(3), n),
            (heun, 2 * n - 1),
        ]:
            counter = Recorder(two_modes)
            sample(sde, counter, x, times=times, predictor=predictor, generator=rng(1))
            assert counter.calls == calls, predictor
        counter = Recorder(two_modes)
        sample(sde, counter, x, times=times, corrector=Langevin(), generator=rng(1))
        assert counter.calls == 2 * n - 1
    counter = Recorder(two_modes)
    sample(sde, counter, x, steps=9, generator=rng(1))
    assert counter.calls == 9


class Scaled:
    """The roll at another size, and how far it is from data."""

    def __init__(self, roll, size):
        self.roll, self.size, self.sigma_data = roll, size, size

    def __call__(self, z, sigma):
        return self.size * self.roll(z / self.size, sigma / self.size)


@pytest.mark.parametrize(
    "predictor", ["euler_maruyama", "ancestral", "euler", "heun", "two", "three"]
)
@pytest.mark.parametrize("grid", ["default", "karras"])
def test_data_of_any_size_come_out_alike(roll, predictor, grid):
    """sd 100 and 0.01, VESDE and sigma_data scaled alike: at most 1.1 times the distance of sd 1.

    In exact arithmetic all three are the same numbers; float32 keeps them within a few per cent.
    """
    exact, far = roll.sample(1000, rng(30)).float(), {}
    for size in (1.0, 100.0, 0.01):
        sde, scaled = VESDE(0.01 * size, 50.0 * size), Scaled(roll, size)
        step = {"two": multistep(2, size), "three": multistep(3, size)}.get(predictor)
        step = step or {f.__name__: f for f in (euler_maruyama, ancestral, euler, heun)}[predictor]
        times = karras_times(sde, 20, size) if grid == "karras" else None
        x = sde.prior((1000, 2), generator=rng(31))
        options = {"steps": 20, "times": times, "predictor": step, "generator": rng(32)}
        x = sample(sde, scaled, x, **options) / size
        far[size] = float(sliced_wasserstein(x, exact, generator=rng(33)))
    assert max(far[100.0], far[0.01]) < 1.1 * far[1.0]


def test_heun_is_exact_for_a_point_mass(sde):
    mix = IsotropicMixture(torch.full((1, 3), 1.7, dtype=torch.float64), 0.0)
    x = sample(
        sde, mix, sde.prior((5, 3), dtype=torch.float64, generator=rng(7)), steps=5, predictor=heun
    )
    torch.testing.assert_close(x, torch.full_like(x, 1.7))


@pytest.mark.parametrize("predictor", [euler, heun, ancestral])
def test_ve_and_vp_agree_after_rescaling(two_modes, predictor):
    levels = [40 * (0.02 / 40) ** (i / 20) for i in range(21)]
    z = 40 * torch.randn(50, 1, generator=rng(8), dtype=torch.float64)
    ends = []
    for sde in SDES.values():
        times = [float(sde.time(level)) for level in levels]
        x = sample(
            sde,
            two_modes,
            z * sde.scale(times[0]),
            times=times,
            predictor=predictor,
            last_step=None,
            generator=rng(9),
        )
        ends.append(x / sde.scale(times[-1]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("last_step", [1.0, 0.5])
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_last_step_shrinks_a_gaussian_as_its_formula_says(name, last_step):
    sde, v = SDES[name], 0.03**2
    times = [1.0, *(float(sde.time(5.0 * (0.01 / 5.0) ** (i / 400))) for i in range(401))]
    x1 = sde.prior((1000, 1), dtype=torch.float64, generator=rng(10))
    x = sample(sde, gaussian(0, v), x1, times=times, predictor=heun, last_step=last_step)
    flow = x1 / sde.scale(1.0) * math.sqrt((v + 0.01**2) / (v + float(sde.sigma(1.0)) ** 2))
    w = 1 - last_step * 0.01**2 / (v + 0.01**2)
    torch.testing.assert_close(x, w * flow, rtol=5e-3, atol=0)
    sd = w * math.sqrt(v + 0.01**2) / math.sqrt(v)
    assert (abs(sd - 1) < 0.002) == (
        last_step == 0.5
    )  # the half step is right to O(σ⁴), the whole one 5 % too thin


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_heun_with_18_steps_on_the_roll(roll, learned, name):
    """Sliced Wasserstein over that of two exact sets, means of ten seeds; thickness in nats."""
    sde, n, seeds = SDES[name], 5000, 10
    g = rng(11)
    exact = [roll.sample(n, g).float() for _ in range(2 * seeds)]
    unit = statistics.mean(
        float(sliced_wasserstein(a, b, generator=g))
        for a, b in zip(exact[::2], exact[1::2], strict=True)
    )
    data = -float(torch.cat([roll.log_prob(x) for x in exact]).mean())
    for denoiser, limit in ((roll, 1.3), (learned, 2.0)):
        calls = Recorder(denoiser)
        sets = [
            sample(
                sde,
                calls,
                sde.prior((n, 2), generator=g),
                times=karras_times(sde, 18),
                predictor=heun,
            )
            for _ in range(seeds)
        ]
        assert calls.calls == 35 * seeds
        distance = (
            statistics.mean(
                float(sliced_wasserstein(x, y, generator=g))
                for x, y in zip(sets, exact, strict=False)
            )
            / unit
        )
        thickness = -float(torch.cat([roll.log_prob(x) for x in sets]).mean()) - data
        which = "exact" if denoiser is roll else "learned"
        print(f"{name} {which}: distance {distance:.2f}, thickness {thickness:+.3f} nats")
        assert distance < limit
        if denoiser is roll:
            assert abs(thickness) < 0.03


def test_grids(sde):
    assert uniform_times(4) == [1.0, 0.75, 0.5, 0.25]
    for size in (1.0, 0.5):
        times = karras_times(sde, 12, size, rho=7.0, low=0.05)
        assert times[0] == 1
        levels = [float(sde.sigma(t)) for t in times]
        assert levels[-1] == pytest.approx(0.05 * size)
        assert levels[1] == pytest.approx(20.0 * size)
        roots = torch.tensor(levels[1:], dtype=torch.float64) ** (1 / 7)
        even = roots.diff().mean().expand(10)
        torch.testing.assert_close(roots.diff(), even, rtol=1e-4, atol=1e-5)
    narrow = karras_times(VESDE(sigma_max=5.0), 12)
    assert narrow[0] == pytest.approx(1.0)
    assert float(VESDE().sigma(karras_times(VESDE(), 5, 0.1)[-1])) == pytest.approx(0.01)  # σ(0)
    roots = VESDE(sigma_max=5.0).sigma(torch.tensor(narrow, dtype=torch.float64)) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(11), rtol=1e-6, atol=0)
    for n in (1, 2, 3):
        assert len(karras_times(VPSDE(), n)) == n
        assert karras_times(sde, n)[0] == 1


def test_a_corrector_stays_at_the_time_its_predictor_has_come_to():
    seen = []

    def corrector(sde, denoiser, x, t, generator):
        seen.append(t)
        return x

    x = VESDE().prior((4, 1), dtype=torch.float64, generator=rng(0))
    sample(VESDE(), gaussian(), x, times=[1.0, 0.7, 0.2], corrector=corrector, last_step=None)
    assert seen == [0.7, 0.2]


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone(two_modes):
    state = torch.get_rng_state()
    x = VPSDE().prior((7, 1), dtype=torch.float64, generator=rng(12))
    a = sample(
        VPSDE(), two_modes, x, steps=10, corrector=Langevin(), generator=rng(13), trajectory=True
    )
    b = sample(VPSDE(), two_modes, x, steps=10, corrector=Langevin(), generator=rng(13))
    assert a.shape == (11, 7, 1)  # 10 times and x_0
    assert torch.equal(a[-1], b)
    assert torch.equal(a[0], x)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.timing
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

    sample(
        VESDE(),
        watching,
        VESDE().prior((10, 1), dtype=torch.float64, generator=rng(15)),
        steps=100,
        corrector=Langevin(),
    )
    assert len(alive) == 199
    assert max(alive) <= 2


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_likelihood_of_the_exact_denoiser_is_the_exact_density(roll, name):
    x = roll.sample(200, rng(16))
    error = log_likelihood(SDES[name], roll, x, steps=200) - roll.log_prob(x, 0.01)
    print(f"{name}: largest error {float(error.abs().max()):.2e} nats")
    assert error.abs().max() < 1e-3


@pytest.mark.slow
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
    """What is detached along the path is detached at its end: no gradient, not a wrong one."""
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    assert not log_likelihood(VESDE(), gaussian(), x, steps=4).requires_grad


def test_karras_times_begin_at_one_wherever_they_begin():
    """σ(1) below, at and above high; one time alone is 1."""
    for sde in (VESDE(0.01, 12.0), VESDE(0.01, 20.0), VESDE(), VPSDE()):
        for n in (1, 2, 5):
            times = karras_times(sde, n)
            assert times[0] == 1.0
            assert len(times) == n
            assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize("probes", [None, 3])
def test_likelihood_of_a_gaussian_is_exact_however_low_the_prior(probes):
    """N(0.7, 0.5 I) in two dimensions: D is linear, and the wide Gaussian at σ(1) = 2 is exact.

    J is a multiple of I, so that Rademacher traces are exact, too, for any number of them.
    """
    mix, sde = gaussian(0.7, 0.5, dim=2), VESDE(0.01, 2.0)
    x = mix.sample(20, rng(21))
    found = log_likelihood(sde, mix, x, steps=60, probes=probes, generator=rng(22))
    torch.testing.assert_close(found, mix.log_prob(x, 0.01), rtol=0, atol=1e-6)
