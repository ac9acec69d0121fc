"""Every public function on a pretended GPU: a tensor made on the wrong device is an error there, and no GPU is needed.

Under FakeTensorMode the device is `cuda`; autograd's engine asks for a real one, so what differentiates runs on `meta`.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sde_utils as su


@pytest.fixture
def fake():
    with FakeTensorMode():
        try:
            torch.zeros(1, device="cuda")[0]
        except RuntimeError:
            pytest.skip(
                "this torch (2.4) asks the driver before it indexes a pretended CUDA tensor"
            )
        yield torch.device("cuda")


def network(device):
    with device:  # made there: fake modules cannot be moved
        return su.Denoiser(su.MLP(width=8))


def check(x, shape, dtype=torch.float32):
    assert x.device.type in ("cuda", "meta")
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
def test_sampling(fake, kind):
    x = torch.randn(4, 2, device=fake)
    denoiser = (
        su.IsotropicMixture(torch.randn(3, 2, device=fake), 0.1)
        if kind == "mixture"
        else network(fake)
    )
    for sde in (su.VESDE(), su.VPSDE()):
        for predictor in (su.euler_maruyama, su.ancestral, su.euler, su.heun, su.Multistep()):
            check(
                su.sample(
                    sde,
                    denoiser,
                    x,
                    times=[1.0, 0.5, 0.1, 0.0],
                    predictor=predictor,
                    corrector=su.Langevin(),
                ),
                (4, 2),
            )
        check(su.sample(sde, denoiser, x, steps=3, trajectory=True), (4, 4, 2))


@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_guidance_and_likelihood(kind):
    meta = torch.device("meta")
    x = torch.randn(4, 2, device=meta)
    denoiser = (
        su.IsotropicMixture(torch.randn(3, 2, device=meta), 0.1)
        if kind == "mixture"
        else network(meta)
    )
    obs = su.Observation(lambda x: x[:, 0] * x[:, 1], 0.2, 0.1)
    for sde in (su.VESDE(), su.VPSDE()):
        for guided in (su.DPS(denoiser, obs), su.Annealed(denoiser, obs)):
            check(su.sample(sde, guided, x, times=[1.0, 0.5, 0.1, 0.0]), (4, 2))
            check(guided.log_likelihood(x, torch.rand(4, device=meta)), (4,))
        check(su.log_likelihood(sde, denoiser, x, steps=2), (4,))
        check(su.log_likelihood(sde, denoiser, x, steps=2, probes=2), (4,))
    check(obs.log_likelihood(x), (4,))


def test_training():
    meta = torch.device("meta")
    denoiser, data = network(meta), torch.randn(50, 2, device=meta)
    check(su.dsm_loss(denoiser, data, torch.rand(50, device=meta)), (50,))
    losses = su.train(
        denoiser, data, su.log_uniform(0.01, 50.0), steps=6, batch_size=8, progress=False
    )
    assert losses.shape == (6,)


def test_a_tensor_on_the_wrong_device_would_be_seen(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=fake) + torch.ones(3)
