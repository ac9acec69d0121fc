import pytest
import torch

from sde_utils import (
    MLP,
    VESDE,
    VPSDE,
    Denoiser,
    IsotropicMixture,
    SubVPSDE,
    log_uniform,
    swiss_roll,
    swiss_roll_density,
    train,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


SDES = {"ve": VESDE(), "vp": VPSDE(), "subvp": SubVPSDE()}


@pytest.fixture(params=SDES)
def sde(request):
    return SDES[request.param]


@pytest.fixture(scope="session")
def roll():
    return swiss_roll_density()


@pytest.fixture(scope="session")
def two_modes():
    return IsotropicMixture(torch.tensor([[-2.0], [2.0]], dtype=torch.float64), 0.09)


def gaussian(mean=0.0, variance=1.0, dim=1):
    return IsotropicMixture(torch.full((1, dim), mean, dtype=torch.float64), variance)


class Recorder:
    """A denoiser that counts its calls."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, z, sigma):
        self.calls += 1
        return self.denoiser(z, sigma)


@pytest.fixture(scope="session")
def learned():
    """The lecture's network, trained as in the notebooks, over the noise levels of both SDEs."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP())
    sampler = log_uniform(0.01, float(VPSDE().sigma(1.0)))
    train(
        denoiser,
        swiss_roll(20_000, seed=0),
        sampler,
        steps=3500,
        batch_size=768,
        generator=rng(1),
        progress=False,
    )
    return denoiser
