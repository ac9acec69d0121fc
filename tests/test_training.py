import math

import pytest
import torch
from conftest import SDES, rng

from sde_utils import MLP, Denoiser, dsm_loss, load_denoiser, log_normal, log_uniform, save_denoiser, swiss_roll, train

# E |ε̂ - ε*|² / 2 over t ~ U(0, 1), the measure of a trained network; what is asked of it
LIMIT = {"ve": 0.0012, "vp": 0.0007}


def excess_loss(denoiser, sde, roll, points=1500):
    g, terms = rng(5), []
    for t in torch.linspace(0, 1, 41, dtype=torch.float64):
        sigma = sde.sigma(t)
        if sigma < 1e-3:
            continue
        z = roll.sample(points, g) + sigma * torch.randn(points, 2, generator=g, dtype=torch.float64)
        with torch.no_grad():
            eps_hat = (z - denoiser(z.float(), sigma.float()).double()) / sigma
        terms.append(((eps_hat - (z - roll(z, sigma)) / sigma) ** 2).sum(1).mean() / 2)
    return float(torch.stack(terms).mean())


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
    """Karras et al. 2022, eq. 15: (x_0 - c_skip z) / c_out has variance 1 for data of variance sigma_data²."""
    s, n = 0.7, 200_000

    class Probe(torch.nn.Module):
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
    from conftest import gaussian

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
    torch.testing.assert_close(0.01 * 5000**t, SDES["ve"].sigma(t))  # uniform in t of the lecture's VE


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    def run():
        torch.manual_seed(0)
        denoiser = Denoiser(MLP(width=8, depth=1))
        state = torch.get_rng_state()
        losses = train(denoiser, swiss_roll(500, seed=0), log_uniform(0.01, 50.0), steps=20, batch_size=64, generator=rng(1), progress=False)
        assert torch.equal(state, torch.get_rng_state())
        return losses, denoiser

    (a, first), (b, second) = run(), run()
    assert torch.equal(a, b)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_every_parameter_learns_and_double_works():
    denoiser = Denoiser(MLP()).double()
    torch.nn.init.normal_(denoiser.network.last.weight)
    loss = dsm_loss(denoiser, swiss_roll(64, seed=0).double(), log_uniform(0.01, 50.0)(64, rng(0)), rng(1)).mean()
    loss.backward()
    assert loss.dtype == torch.float64
    assert all(p.grad.abs().sum() > 0 for p in denoiser.parameters())


def test_batch_of_n_is_n_batches_of_one(learned):
    z, sigma = torch.randn(5, 2, generator=rng(0)), torch.logspace(-2, 1, 5)
    together = learned(z, sigma)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], learned(z[i : i + 1], float(sigma[i])), rtol=1e-5, atol=1e-5)


def test_save_and_load(learned, tmp_path):
    path = tmp_path / "roll.safetensors"
    save_denoiser(learned, path, data="Swiss roll")
    z = torch.randn(5, 2, generator=rng(0))
    assert torch.equal(load_denoiser(path)(z, 0.3), learned(z, 0.3))
    path.write_bytes(b"not a denoiser")
    with pytest.raises(ValueError, match="not a denoiser"):
        load_denoiser(path)
    with pytest.raises(FileNotFoundError):
        load_denoiser(tmp_path / "nothing")


def test_bad_input_is_refused():
    data, denoiser, sampler = swiss_roll(100, seed=0), Denoiser(MLP(width=8)), log_uniform(0.01, 50.0)
    before = [p.clone() for p in denoiser.parameters()]

    def attempt(data=data, **changes):
        return train(denoiser, data, sampler, **({"steps": 5, "batch_size": 16, "progress": False} | changes))

    for changes, error, name in [
        ({"data": torch.full((10, 2), math.nan)}, ValueError, "data"),
        ({"data": torch.ones(10, 2, dtype=torch.int64)}, TypeError, "data"),
        ({"data": torch.ones(10)}, ValueError, "data"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay"),
    ]:
        with pytest.raises(error, match=name):
            attempt(**changes)
    assert all(torch.equal(p, q) for p, q in zip(before, denoiser.parameters(), strict=True))
    with pytest.raises(FloatingPointError, match="loss"):
        attempt(steps=200, lr=1e12)
    for low, high in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="low"):
            log_uniform(low, high)
    for sigma, error in ((0.0, "positive"), (torch.ones(3), "sigma must be a scalar")):
        with pytest.raises(ValueError, match=error):
            dsm_loss(denoiser, data, sigma)
    with pytest.raises(ValueError, match="sigma"):
        Denoiser(MLP())(data, -1.0)
    with pytest.raises(TypeError, match=r"data\.float"):
        Denoiser(MLP())(data.double(), 1.0)
    for shape in ((10, 3), (10, 2, 2)):
        with pytest.raises(ValueError, match=r"shape \(B, 2\)"):
            Denoiser(MLP())(torch.zeros(shape), 1.0)
    with pytest.raises(ValueError, match="width"):
        MLP(width=0)
    with pytest.raises(ValueError, match="sigma_data"):
        Denoiser(MLP(), 0.0)


def test_a_short_run_forgets_its_first_weights():
    """120 steps, 24 averages: with decay 0.99 from the start, three quarters of the weights would be the first ones, and the denoiser linear."""
    torch.manual_seed(0)
    denoiser, data = Denoiser(MLP()), swiss_roll(5000, seed=0)
    x, g = data[:2000], rng(5)
    z = x + 0.3 * torch.randn(x.shape, generator=g)
    linear = (denoiser(z, 0.3) - x).square().mean()
    losses = train(denoiser, data, log_uniform(0.05, 5.0), steps=120, batch_size=512, generator=rng(6), progress=False)
    assert losses[-20:].mean() < losses[:20].mean()
    error = (denoiser(z, 0.3) - x).square().mean()
    assert error < 0.93 * linear


def test_log_normal_has_its_moments_and_covers_the_range():
    """The normal share's mean and sd, stratified, so far better than 1/sqrt(n); the other tenth from low to high."""
    log_sigma = log_normal(-0.6, 1.2, 1e-4, 1e4, wide=0.0)(10_000, rng(0)).log()
    assert float(log_sigma.mean()) == pytest.approx(-0.6, abs=2e-3)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=5e-3)
    sigma = log_normal(-0.6, 0.1, 0.01, 100.0)(10_000, rng(1))
    assert float(((sigma < 0.3) | (sigma > 1.0)).float().mean()) == pytest.approx(0.1 * (1 - math.log(1 / 0.3) / math.log(1e4)), abs=2e-3)
    assert sigma.min() < 0.011
    assert sigma.max() > 90
    for options, name in [({"sd": 0.0}, "sd"), ({"low": 2.0, "high": 1.0}, "low"), ({"wide": 1.5}, "wide")]:
        with pytest.raises(ValueError, match=name):
            log_normal(**{"mean": 0.0, "sd": 1.0, "low": 0.1, "high": 1.0} | options)
