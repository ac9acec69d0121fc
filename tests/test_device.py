"""Every public function on a pretended GPU: under FakeTensorMode a tensor made on the wrong device is an error, and no GPU is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sde_utils as su


@pytest.fixture
def fake():
    with FakeTensorMode():
        yield torch.device("cuda")


def network(device):
    with device:  # made there: fake modules cannot be moved
        return su.Denoiser(su.MLP(width=8))


def check(x, shape, dtype=torch.float32):
    assert x.device.type == "cuda"
    assert tuple(x.shape) == shape
    assert x.dtype == dtype


def test_sde(fake):
    x = torch.randn(4, 2, device=fake)
    mix = su.IsotropicMixture(torch.randn(3, 2, device=fake), 0.1)
    for sde in (su.VESDE(), su.VPSDE(), su.SubVPSDE()):
        for t in (0.5, torch.rand((), device=fake), torch.rand(4, device=fake)):
            for y in (sde.perturb(x, t), sde.score(mix, x, t), sde.denoise(mix, x, t)):
                check(y, (4, 2))
        t = torch.rand(4, device=fake)
        for y in (sde.scale(t), sde.sigma(t), sde.f(t), sde.g(t), sde.time(t + 1)):
            check(y, (4,))
        check(sde.prior((4, 2), device=fake), (4, 2))
        check(sde.simulate(x, [0.0, 0.5, 1.0]), (3, 4, 2))


def test_exact_and_metrics(fake):
    z = torch.randn(4, 2, device=fake)
    mix = su.IsotropicMixture(torch.randn(3, 2, device=fake), 0.1, torch.rand(3, device=fake))
    for sigma in (0.3, torch.rand(4, device=fake)):
        check(mix(z, sigma), (4, 2))
        check(mix.score(z, sigma), (4, 2))
        check(mix.log_prob(z, sigma), (4,))
    check(mix.sample(5), (5, 2))
    check(mix.to(dtype=torch.float64).sample(5), (5, 2), torch.float64)
    check(su.sliced_wasserstein(z, z), ())
    check(su.total_variation(z[:, 0], z[:, 1]), ())


@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_sampling_guidance_likelihood(fake, kind):
    x = torch.randn(4, 2, device=fake)
    mix = su.IsotropicMixture(torch.randn(3, 2, device=fake), 0.1)
    denoiser = mix if kind == "mixture" else network(fake)
    obs = su.Observation(lambda x: x[:, 0] * x[:, 1], 0.2, 0.1)
    for sde in (su.VESDE(), su.VPSDE()):
        for predictor in (su.euler_maruyama, su.ancestral, su.euler, su.heun):
            for d in (denoiser, su.DPS(denoiser, obs), su.Annealed(denoiser, obs)):
                check(su.sample(sde, d, x, times=[1.0, 0.5, 0.1, 0.0], predictor=predictor, corrector=su.Langevin()), (4, 2))
        check(su.sample(sde, denoiser, x, steps=3, trajectory=True), (4, 4, 2))
        check(su.log_likelihood(sde, denoiser, x, steps=2), (4,))
        check(su.log_likelihood(sde, denoiser, x, steps=2, probes=2), (4,))
    check(su.DPS(denoiser, obs).log_likelihood(x, torch.rand(4, device=fake)), (4,))
    check(obs.log_likelihood(x), (4,))


def test_training(fake):
    denoiser = network(fake)
    data = torch.randn(50, 2, device=fake)
    check(su.dsm_loss(denoiser, data, torch.rand(50, device=fake)), (50,))
    losses = su.train(denoiser, data, su.log_uniform(0.01, 50.0), steps=6, batch_size=8, progress=False)
    assert losses.shape == (6,)


def test_a_tensor_on_the_wrong_device_would_be_seen(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=fake) + torch.ones(3)
