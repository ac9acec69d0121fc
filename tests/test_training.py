import copy
import math
import os
import resource
import signal
import warnings

import numpy as np
import pytest
import torch
from conftest import SDES, gaussian, rng
from torch import nn

from sde_utils import (
    MLP,
    Denoiser,
    dsm_loss,
    load_denoiser,
    log_normal,
    log_uniform,
    save_denoiser,
    swiss_roll,
    train,
)

# E |ε̂ - ε*|² / 2 over t ~ U(0, 1), the measure of a trained network; what is asked of it
LIMIT = {"ve": 0.0012, "vp": 0.0007}


def excess_loss(denoiser, sde, roll, points=1500):
    g, terms = rng(5), []
    for t in torch.linspace(0, 1, 41, dtype=torch.float64):
        sigma = sde.sigma(t)
        if sigma < 1e-3:
            continue
        x0 = roll.sample(points, g)
        z = x0 + sigma * torch.randn(points, 2, generator=g, dtype=torch.float64)
        with torch.no_grad():
            eps_hat = (z - denoiser(z.float(), sigma.float()).double()) / sigma
        terms.append(((eps_hat - (z - roll(z, sigma)) / sigma) ** 2).sum(1).mean() / 2)
    return float(torch.stack(terms).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_excess_loss_of_the_trained_network(learned, roll, name):
    excess = excess_loss(learned, SDES[name], roll)
    print(f"excess loss {name}: {excess:.5f}")
    assert excess <= LIMIT[name]
    untrained = excess_loss(Denoiser(MLP()), SDES[name], roll, points=200)
    assert untrained > 20 * excess


def test_untrained_denoiser_is_the_best_linear_one():
    """F = 0 at the start: D = c_skip z, the exact denoiser of N(0, sigma_data²)."""
    z = torch.randn(10, 2, generator=rng(0))
    torch.testing.assert_close(Denoiser(MLP(), sigma_data=0.5)(z, 2.0), z * 0.25 / 4.25)


def test_preconditioning_keeps_the_network_target_at_unit_variance():
    """Karras et al. 2022, eq. 15: (x_0 - c_skip z) / c_out has variance 1 for such data."""
    s, n = 0.7, 200_000

    class Probe(nn.Module):
        def forward(self, x, c):
            self.input = x
            return torch.ones_like(x)

    probe = Probe()
    denoiser = Denoiser(probe, s)
    x0 = s * torch.randn(n, 1, generator=rng(1), dtype=torch.float64)
    for sigma in (0.02, 0.7, 30.0):
        z = x0 + sigma * torch.randn(n, 1, generator=rng(2), dtype=torch.float64)
        c_skip = (denoiser(z, sigma) - denoiser(torch.zeros_like(z), sigma)) / z
        c_out = denoiser(torch.zeros_like(z), sigma)
        target = (x0 - c_skip * z) / c_out
        denoiser(z, sigma)
        for values in (probe.input, target):
            assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / n) + 1e-3
    torch.testing.assert_close(denoiser(z, 0.0), z)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_dsm_loss_is_least_and_known_for_the_exact_denoiser(two_modes, sigma):
    """dsm_loss(D) - dsm_loss(D*) = E |ε̂ - ε*|² for any D, here a wrong one with a known offset."""
    n = 200_000
    x0 = two_modes.sample(n, rng(0))
    exact = dsm_loss(two_modes, x0, sigma, rng(1))
    wrong = dsm_loss(lambda z, s: two_modes(z, s) + 0.5 * sigma, x0, sigma, rng(1))
    difference = wrong - exact  # (ε̂* - 0.5 - ε)² - (ε̂* - ε)²: mean 0.25
    assert abs(float(difference.mean()) - 0.25) < 4 * float(difference.std()) / math.sqrt(n)


def test_dsm_loss_of_a_gaussian_is_its_closed_form():
    n, v, sigma = 200_000, 0.5, torch.tensor(0.8, dtype=torch.float64)
    mix = gaussian(0.0, v)
    losses = dsm_loss(mix, mix.sample(n, rng(2)), sigma, rng(3))
    floor = float(v / (v + sigma**2))  # Var(ε | z) = v / (v + σ²)
    assert abs(float(losses.mean()) - floor) < 4 * float(losses.std()) / math.sqrt(n)


def test_log_uniform_is_stratified():
    sigma = log_uniform(0.01, 50.0)(1000, rng(4))
    cells = (sigma / 0.01).log() / math.log(5000) * 1000
    assert torch.equal(cells.floor().sort()[0], torch.arange(1000.0))
    t = torch.rand(100, generator=rng(0))
    torch.testing.assert_close(0.01 * 5000**t, SDES["ve"].sigma(t))  # uniform in t


def test_a_draw_lies_anywhere_in_its_cell():
    """Places within the 10,000 cells: mean 1/2, variance 1/12, within 4 standard errors."""
    n = 10_000
    place = (log_uniform(1.0, math.e)(n, rng(8)).double().log() * n) % 1
    assert float(place.mean()) == pytest.approx(1 / 2, abs=4 * math.sqrt(1 / 12 / n))
    assert float(place.var()) == pytest.approx(1 / 12, abs=4 * math.sqrt((1 / 80 - 1 / 144) / n))


def test_log_normal_is_clipped_to_its_range():
    """ln σ ~ N(0, 1) clipped to ±1: a share Φ(-1) at either end, stratified."""
    n = 10_000
    sigma = log_normal(0.0, 1.0, math.exp(-1), math.e, wide=0.0)(n, rng(7))
    share = 0.5 * math.erfc(1 / math.sqrt(2))
    for end in (sigma.min(), sigma.max()):
        assert abs(float(end.log())) == pytest.approx(1, abs=1e-5)
        assert float((sigma == end).double().mean()) == pytest.approx(share, abs=1.5 / n)


def small(seed=0):
    torch.manual_seed(seed)
    return Denoiser(MLP(width=8, depth=1))


def fit(denoiser, data=None, sampler=None, **changes):
    data = swiss_roll(500, seed=0) if data is None else data
    sampler = log_uniform(0.01, 50.0) if sampler is None else sampler
    options = {"steps": 20, "batch_size": 64, "generator": rng(1), "progress": False} | changes
    return train(denoiser, data, sampler, **options)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    (first, second), state = (small(), small()), torch.get_rng_state()
    a, b = fit(first), fit(second)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, b)
    assert same(first, second)
    assert not first.training


def by_hand(denoiser, data, sampler, steps, n, g, fall=1.0, weight=None, clip=None, stop=None,
            ema_decay=0.99):  # fmt: skip
    """`train` written out once more: losses, and averaged weights. lr 0.005, warm-up over 2 %."""
    optimizer = torch.optim.Adam(denoiser.parameters(), 5e-3, (0.9, 0.99), fused=True)
    rise, losses, average = max(1, round(0.02 * steps)), [], None
    for i in range(stop or steps):
        rate = 5e-3 * (min((i + 1) / rise, 1) * min((1 - i / steps) / fall, 1))
        optimizer.param_groups[0]["lr"] = rate
        x0 = data[torch.randint(len(data), (n,), generator=g)]
        sigma = sampler(n, g)
        loss = dsm_loss(denoiser, x0, sigma, g)
        loss = (loss if weight is None else weight(sigma.to(data)) * loss).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            norm = torch.cat([p.grad.flatten() for p in denoiser.parameters()]).norm()
            for p in denoiser.parameters():
                p.grad *= min(1.0, clip / float(norm + 1e-6))
        optimizer.step()
        losses.append(loss.detach())
        if (i + 1) % 5 == 0:
            k, now = i // 5, [p.detach().clone() for p in denoiser.parameters()]
            d = min(ema_decay, (1 + k) / (10 + k)) if k else 0.0
            average = [d * a + (1 - d) * b for a, b in zip(average or now, now, strict=True)]
    return torch.stack(losses), average or [p.detach() for p in denoiser.parameters()]


@pytest.mark.parametrize(
    "options",
    [{}, {"fall": 0.3}, {"weight": lambda sigma: 1 + sigma**2}, {"clip": 0.1}, {"ema_decay": 0.3}],
    ids=["plain", "fall", "weight", "clip", "decay"],
)
def test_training_is_what_its_docstring_says(options):
    """Losses and averaged weights against an independent loop, up to rounding in double."""
    data, sampler = swiss_roll(500, seed=0).double(), log_uniform(0.01, 5.0)
    denoiser, other = small().double(), small().double()
    losses = fit(denoiser, data, sampler, steps=50, **options)
    expected, average = by_hand(other, data, sampler, 50, 64, rng(1), **options)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    for p, q in zip(denoiser.parameters(), average, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-12)


def test_an_autocast_around_training_sees_the_weights_of_now():
    """torch keeps casts of weights until autocast ends; here each call may end with its own."""

    class Short(Denoiser):
        def forward(self, z, sigma):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(z, sigma)

    outside, inside = small(), small()
    inside_each = Short(inside.network)
    a = fit(inside_each)
    with torch.autocast("cpu", torch.bfloat16):
        b = fit(outside)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_compiled_denoiser_trains_to_the_same():
    plain, compiled = small(), small()
    a, b = fit(plain), fit(torch.compile(compiled, backend="eager"))
    torch.testing.assert_close(a, b)


def test_every_parameter_learns_and_double_works():
    denoiser = Denoiser(MLP()).double()
    nn.init.normal_(denoiser.network.last.weight)
    x0, sigma = swiss_roll(64, seed=0).double(), log_uniform(0.01, 50.0)(64, rng(0))
    loss = dsm_loss(denoiser, x0, sigma, rng(1)).mean()
    loss.backward()
    assert loss.dtype == torch.float64
    assert all(p.grad.abs().sum() > 0 for p in denoiser.parameters())


@pytest.fixture
def random_denoiser():
    torch.manual_seed(0)
    denoiser = Denoiser(MLP())
    nn.init.normal_(denoiser.network.last.weight)
    return denoiser.requires_grad_(False)


def test_batch_of_n_is_n_batches_of_one(random_denoiser):
    z, sigma = torch.randn(5, 2, generator=rng(0)), torch.logspace(-2, 1, 5)
    together = random_denoiser(z, sigma)
    for i in range(5):
        alone = random_denoiser(z[i : i + 1], float(sigma[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_save_and_load(random_denoiser, tmp_path):
    path = tmp_path / "roll.safetensors"
    save_denoiser(random_denoiser, path, data="Swiss roll")
    z = torch.randn(5, 2, generator=rng(0))
    assert torch.equal(load_denoiser(path)(z, 0.3), random_denoiser(z, 0.3))
    path.write_bytes(b"not a denoiser")
    with pytest.raises(ValueError, match="not a denoiser"):
        load_denoiser(path)
    with pytest.raises(FileNotFoundError):
        load_denoiser(tmp_path / "nothing")


NOT_NUMBERS = ["lr", "warmup", "ema_decay", "fall", "save_every"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"denoiser": Denoiser}, TypeError, "denoiser must be an nn.Module"),
        ({"denoiser": lambda z, s: z}, TypeError, "denoiser must be an nn.Module"),
        ({"denoiser": MLP(width=8)}, TypeError, "denoiser .*su.Denoiser"),
        ({"denoiser": Denoiser(nn.Identity())}, Exception, "denoiser"),
        ({"denoiser": Denoiser(MLP(width=8)).requires_grad_(False)}, ValueError, "denoiser .*grad"),
        ({"data": torch.full((10, 2), math.nan)}, ValueError, "data"),
        ({"data": torch.ones(10, 2, dtype=torch.int64)}, TypeError, "data"),
        ({"data": torch.ones(10)}, ValueError, "data"),
        ({"data": np.ones((10, 2))}, TypeError, "data"),
        ({"data": torch.ones(10, 3)}, ValueError, r"\(B, 2\)"),
        ({"data": torch.ones(10, 2).double()}, TypeError, "torch.float32, got .*64: data.float"),
        ({"sampler": log_uniform}, TypeError, "sigma_sampler"),
        ({"sampler": log_normal}, TypeError, "sigma_sampler"),
        ({"sampler": 0.5}, TypeError, "sigma_sampler"),
        ({"sampler": lambda n, g: 0.5}, TypeError, "sigma_sampler"),
        ({"sampler": lambda n, g: torch.ones(n, 1)}, ValueError, "sigma_sampler"),
        ({"sampler": lambda n, g: torch.zeros(n)}, ValueError, "sigma_sampler"),
        ({"sampler": lambda n, g: torch.full((n,), math.inf)}, ValueError, "sigma_sampler"),
        ({"sampler": lambda n, g: torch.ones(n, dtype=torch.int64)}, TypeError, "sigma_sampler"),
        ({"weight": 2.0}, TypeError, "weight"),
        ({"weight": lambda sigma: 2.0}, ValueError, "weight"),
        ({"weight": lambda sigma: sigma[:, None]}, ValueError, "weight"),
        ({"generator": 0}, TypeError, "generator"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"ema_every": 0}, ValueError, "ema_every"),
        ({"ema_every": 2.0}, TypeError, "ema_every"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"warmup": 1.0}, ValueError, "warmup"),
        ({"fall": 0.0}, ValueError, "fall"),
        ({"fall": 1.1}, ValueError, "fall"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"clip": "1"}, TypeError, "clip"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay"),
        ({"checkpoint": 5}, TypeError, "checkpoint"),
        ({"checkpoint": "checkpoint.pt", "generator": None}, ValueError, "checkpoint .*generator"),
        ({"checkpoint": "no folder/checkpoint.pt"}, ValueError, "checkpoint"),
        *(({name: None}, TypeError, name) for name in NOT_NUMBERS),
    ],
)
def test_bad_arguments_of_train_are_named_before_the_first_step(changes, error, said):
    changes = {"denoiser": small(), "generator": rng(0)} | changes
    denoiser, generator = changes.pop("denoiser"), changes.pop("generator")
    before = copy.deepcopy(denoiser)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    with pytest.raises(error, match=said):
        fit(denoiser, generator=generator, **changes)
    if state is not None:
        assert torch.equal(state, generator.get_state())
    if isinstance(denoiser, nn.Module):
        assert same(denoiser, before)
        assert denoiser.training


def test_numbers_may_be_numpys_or_tensors(tmp_path):
    path = tmp_path / "checkpoint.pt"
    numbers = {"steps": np.int64(5), "lr": torch.tensor(0.5), "clip": np.float64(1.0)}
    a = fit(small(), checkpoint=path, **numbers)
    assert torch.equal(a, fit(small(), checkpoint=path, steps=5, lr=0.5, clip=1.0))


def test_under_no_grad_it_says_so():
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        fit(small())


def test_looking_at_the_denoiser_first_leaves_no_trace():
    """Batch normalisation and dropout: state, mode, global generator, before the first step."""
    layers = [nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)]

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, x, c):
            return self.layers(x)

    denoiser = Denoiser(Network())
    layers[1].eval()
    before, state = copy.deepcopy(denoiser.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match="sigma_sampler"):
        fit(denoiser, sampler=lambda n, g: -torch.rand(n), generator=None)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in denoiser.state_dict().items())
    assert denoiser.training
    assert not layers[1].training


def test_data_far_from_sigma_data_warn():
    for scale, warned in [(0.1, True), (0.5, False), (2.0, False), (100.0, True)]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(small(), scale * torch.randn(500, 2, generator=rng(2)), steps=1)
        assert [w.filename for w in caught if "sigma_data" in str(w.message)] == [__file__] * warned


def test_a_loss_that_is_not_finite_names_the_rate():
    denoiser = small()
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit(denoiser, steps=200, lr=1e12)
    assert not denoiser.training


def breaking(step, error=KeyboardInterrupt):
    """A sampler that raises the error in this step, the first call being the door's."""
    calls = []

    def sampler(n, generator):
        calls.append(n)
        if len(calls) == 1 + step:
            raise error
        return log_uniform(0.01, 50.0)(n, generator)

    return sampler


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", [13, 3])
def test_an_interrupted_run_keeps_the_average(error, step):
    """In step 13 the average of 10 steps is there; in step 3 there is none, the weights stay."""
    denoiser, other, data = small(), small(), swiss_roll(500, seed=0)
    with pytest.raises(error):
        fit(denoiser, data, breaking(step, error))
    assert not denoiser.training
    average = by_hand(other, data, log_uniform(0.01, 50.0), 20, 64, rng(1), stop=step - 1)[1]
    for p, q in zip(denoiser.parameters(), average, strict=True):
        torch.testing.assert_close(p.detach(), q)


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    """Interrupted twice; what the network and the generator are when it goes on is of no matter."""
    path, whole, denoiser, used = tmp_path / "checkpoint.pt", small(), small(), rng(1)
    losses = fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(denoiser, sampler=breaking(7), checkpoint=str(path), save_every=0)
    with pytest.raises(KeyboardInterrupt):  # 6 steps were done, and 7 are now
        fit(small(3), sampler=breaking(8), checkpoint=path, save_every=0)
    assert torch.load(path, weights_only=True)["step"] == 13
    torch.rand(5, generator=used)
    for last in (small(4), small(5)):  # the second finds a run that has ended
        assert torch.equal(fit(last, checkpoint=path, generator=used), losses)
        assert same(last, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_no_checkpoint_is_written_before_its_time(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(small(), sampler=breaking(7), checkpoint=tmp_path / "checkpoint.pt", save_every=1e6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.01}, "lr = 0.005 there, 0.01 here"),
        ({"steps": 30}, "steps = 20 there, 30 here"),
        ({"clip": 1.0}, "clip = None there, 1.0 here"),
        ({"generator": rng(2)}, "seed = 1 there, 2 here"),
        ({"data": swiss_roll(400, seed=0)}, r"data = \(500, 2\) there, \(400, 2\) here"),
        ({"denoiser": Denoiser(MLP(width=4))}, "parameters = "),
        ({"lr": 0.01, "fall": 0.5}, "lr = .* fall = 1.0 there, 0.5 here"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(options, said, tmp_path):
    path = tmp_path / "checkpoint.pt"
    fit(small(), checkpoint=path)
    before, denoiser = path.read_bytes(), options.get("denoiser") or small()
    first = copy.deepcopy(denoiser)
    with pytest.raises(ValueError, match=said):
        fit(**{"denoiser": denoiser, "checkpoint": path} | options)
    assert path.read_bytes() == before
    assert same(denoiser, first)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "foreign", "pickle", "other", "folder"])
def test_what_is_no_checkpoint_is_refused_and_left_alone(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    fit(small(), checkpoint=path)
    saved = torch.load(path, weights_only=True)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind in ("text", "empty"):
        path.write_bytes(b"weights" if kind == "text" else b"")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        other = saved | {"denoiser": {"weight": torch.zeros(3)}}
        content = {"foreign": {"weights": torch.zeros(3)}, "pickle": Trap(), "other": other}
        torch.save(content[kind], path)
    before = None if kind == "folder" else path.read_bytes()
    with pytest.raises(ValueError, match="is not a checkpoint") as caught:
        fit(small(), checkpoint=path)
    assert "weights_only" not in str(caught.getrepr(style="native"))
    assert kind == "folder" or path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """Files are limited to 10 kB from step 9 on: the error says what to do; the run can go on."""
    path, limits = tmp_path / "checkpoint.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    whole, denoiser, calls = small(), small(), []
    losses = fit(whole)

    def sampler(n, generator):
        calls.append(n)
        if len(calls) == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return log_uniform(0.01, 50.0)(n, generator)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="free some space"):
            fit(denoiser, sampler=sampler, checkpoint=path, save_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert torch.load(path, weights_only=True)["step"] == 8
    assert not denoiser.training
    assert torch.equal(fit(denoiser, checkpoint=path), losses)
    assert same(denoiser, whole)


def test_bad_input_of_the_loss_and_the_levels_is_refused():
    data, denoiser = swiss_roll(100, seed=0), Denoiser(MLP(width=8))
    for low, high in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="must lie in"):
            log_uniform(low, high)
    for sigma in (0.0, -1.0, -torch.ones(100), torch.ones(3)):
        with pytest.raises(ValueError, match="sigma must"):
            dsm_loss(denoiser, data, sigma)
    with pytest.raises(TypeError, match=r"su\.Denoiser"):
        dsm_loss(MLP(width=8), data, 1.0)
    with pytest.raises(ValueError, match="sigma"):
        denoiser(data, -1.0)
    with pytest.raises(TypeError, match="float32"):
        denoiser(data.double(), 1.0)
    for shape in ((10, 3), (10, 2, 2)):
        with pytest.raises(ValueError, match=r"\(B, 2\)"):
            denoiser(torch.zeros(shape), 1.0)
    with pytest.raises(ValueError, match="width"):
        MLP(width=0)
    with pytest.raises(ValueError, match="sigma_data"):
        Denoiser(MLP(), 0.0)


def test_a_short_run_forgets_its_first_weights():
    """120 steps, 24 averages: with decay 0.99 from the start, three quarters of the weights would
    be the first ones, and the denoiser linear."""
    torch.manual_seed(0)
    denoiser, data = Denoiser(MLP()), swiss_roll(5000, seed=0)
    x, g = data[:2000], rng(5)
    z = x + 0.3 * torch.randn(x.shape, generator=g)
    linear = (denoiser(z, 0.3) - x).square().mean()
    levels = log_uniform(0.05, 5.0)
    losses = fit(denoiser, data, levels, steps=120, batch_size=512, generator=rng(6))
    assert losses[-20:].mean() < losses[:20].mean()
    error = (denoiser(z, 0.3) - x).square().mean()
    assert error < 0.93 * linear


def test_log_normal_has_its_moments_and_covers_the_range():
    """The normal share's mean and sd, stratified: far better than 1/sqrt(n)."""
    log_sigma = log_normal(-0.6, 1.2, 1e-4, 1e4, wide=0.0)(10_000, rng(0)).log()
    assert float(log_sigma.mean()) == pytest.approx(-0.6, abs=2e-3)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=5e-3)
    sigma = log_normal(-0.6, 0.1, 0.01, 100.0)(10_000, rng(1))
    far = float(((sigma < 0.3) | (sigma > 1.0)).float().mean())  # of the other tenth
    assert far == pytest.approx(0.1 * (1 - math.log(1 / 0.3) / math.log(1e4)), abs=2e-3)
    assert sigma.min() < 0.011
    assert sigma.max() > 90
    for options, name in [({"sd": 0.0}, "sd"), ({"high": 0.01}, "high"), ({"wide": 1.5}, "wide")]:
        with pytest.raises(ValueError, match=name):
            log_normal(**{"mean": 0.0, "sd": 1.0, "low": 0.1, "high": 1.0} | options)
