import math

import numpy as np
import pytest
import torch
from conftest import rng

from sde_utils import MMPS, IsotropicMixture, Observation, PiGDM
from sde_utils.operators import (
    Blur,
    Downsampling,
    Inpainting,
    PhaseRetrieval,
    Radon,
    adjoint,
    box_mask,
    gaussian_kernel,
    motion_kernel,
    pseudo_inverse,
    random_mask,
)

SHAPE = (3, 2, 12, 12)
LINEAR = {
    "box": Inpainting(box_mask(12, 12, 3, 2, 9, 8)),
    "random": Inpainting(random_mask(12, 12, 0.3, rng(0))),
    "x2": Downsampling(2),
    "x4": Downsampling(4),
    "gaussian": Blur(gaussian_kernel(1.2)),
    "motion": Blur(motion_kernel(5, 30.0)),
    "radon": Radon(12, [0.0, 20.0, 45.0, 90.0, 140.0]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_and_adjoint(name):
    """A(a x + b y) = a A x + b A y, and <A x, u> = <x, Aᵀ u>."""
    operator, g = LINEAR[name], rng(1)
    x, y = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(operator(2 * x - 3 * y), 2 * operator(x) - 3 * operator(y), atol=1e-12)
    u = torch.randn(operator(x).shape, generator=g, dtype=torch.float64)
    assert float((operator(x) * u).sum()) == pytest.approx(float((x * adjoint(operator, u, SHAPE)).sum()), rel=1e-12)
    assert torch.allclose(operator(x[:1]), operator(x)[:1], atol=1e-12)
    assert operator(x.float()).dtype == torch.float32


@pytest.mark.parametrize("name", LINEAR)
def test_pseudo_inverse_is_numpys(name):
    operator = LINEAR[name]
    shape = (1, 1, 12, 12)
    matrix = Observation(operator, torch.zeros(operator(torch.zeros(shape)).shape[1:]), 1.0).matrix(torch.zeros(shape, dtype=torch.float64))
    y = torch.randn(len(matrix), generator=rng(2), dtype=torch.float64)
    for ridge in (1e-2, 1.0):
        d = matrix.shape[1]
        expected = torch.linalg.solve(matrix.T @ matrix + ridge * torch.eye(d, dtype=torch.float64), matrix.T @ y)
        found = pseudo_inverse(operator, y.reshape(operator(torch.zeros(shape)).shape), shape, ridge)
        assert torch.allclose(found.reshape(-1), expected, atol=1e-8)


def test_operators_do_what_they_are_called():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Inpainting(box_mask(4, 4, 1, 1, 3, 3))(x).tolist() == [[[0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 14, 15]]]
    assert Downsampling(2)(x).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert int(random_mask(10, 10, 0.25, rng(0)).sum()) == 25
    flat = Blur(gaussian_kernel(2.0))(torch.full((1, 1, 9, 9), -1.0, dtype=torch.float64))
    assert torch.allclose(flat, torch.full_like(flat, -1.0))
    spike = torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    spike[..., 5, 5] = 1
    kernel = torch.arange(15.0, dtype=torch.float64).reshape(3, 5)
    assert torch.equal(Blur(kernel)(spike)[0, 0, 4:7, 3:8], kernel)  # a convolution, not a correlation


def test_kernels():
    kernel = gaussian_kernel(1.5, truncate=6.0)
    i = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    assert float(kernel.sum()) == pytest.approx(1)
    assert float((kernel.sum(0) * i**2).sum()) == pytest.approx(1.5**2, rel=1e-3)
    for angle, entry in ((0.0, (3, 5)), (90.0, (1, 3)), (45.0, (2, 4))):
        kernel = motion_kernel(7, angle)
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-9)
        assert kernel[entry] > kernel.flip(0)[entry] or angle in (0.0, 90.0)
        assert kernel[entry] > 0.1
    assert motion_kernel(1, 10.0).tolist() == [[1.0]]


def test_radon_is_scikit_images():
    radon = pytest.importorskip("skimage.transform").radon
    x = torch.zeros(28, 28, dtype=torch.float64)
    x[8:20, 10:16] = 1
    x[12:15, 5:20] += 0.5
    angles = [0.0, 30.0, 45.0, 90.0, 120.0, 177.0]
    expected = radon(x.numpy(), theta=np.array(angles), circle=True)
    assert np.abs(Radon(28, angles)(x[None, None])[0, 0].numpy().T - expected).max() < 1e-12 * expected.max()


def test_radon_of_a_disc_in_closed_form():
    """A disc of radius R projects to 2 sqrt(R² - k²) at any angle; pixels blur it by about one."""
    size, radius = 65, 20.0
    k = torch.arange(size, dtype=torch.float64) - size // 2
    disc = ((k[:, None] ** 2 + k**2) <= radius**2).double()[None, None]
    chord = 2 * (radius**2 - k**2).clamp(min=0).sqrt()
    for row in Radon(size, [0.0, 33.0, 71.0])(disc)[0, 0]:
        assert float((row - chord).abs()[k.abs() < 18].max()) < 1.6
        assert float(row.sum()) == pytest.approx(math.pi * radius**2, rel=0.01)


def test_phase_retrieval_does_not_see_shifts():
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x[..., 2:5, 1:4] = torch.rand(3, 3, generator=rng(3), dtype=torch.float64)
    operator = PhaseRetrieval()
    assert torch.allclose(operator(x), operator(x.roll((2, 3), dims=(2, 3))), atol=1e-9)
    x.requires_grad_()
    assert torch.autograd.grad(operator(x * 0).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("name", LINEAR)
def test_guidance_by_conjugate_gradients_takes_them(name):
    """MMPS matrix-free and PiGDM, for a Gaussian prior, against the exact posterior's denoiser."""
    prior = IsotropicMixture(torch.zeros(1, 1, 12, 12, dtype=torch.float64), 0.5)
    operator = LINEAR[name]
    y = operator(prior.sample(1, rng(4)))[0]
    obs = Observation(operator, y, 0.3)
    z, exact = torch.randn(2, 1, 12, 12, generator=rng(5), dtype=torch.float64), prior.posterior(obs)
    assert torch.allclose(MMPS(prior, obs, iterations=60, probes=0)(z, 0.7), exact(z, 0.7), atol=1e-5)
    assert torch.allclose(PiGDM(prior, obs, variance=0.5)(z, 0.7), exact(z, 0.7), atol=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_deepinv_physics_are_operators():
    """Where deepinv is installed: its physics in the place of ours, their adjoint, and the exact Gaussian posterior's denoiser."""
    physics = pytest.importorskip("deepinv.physics")
    prior, g = IsotropicMixture(torch.zeros(1, 1, 16, 16), 0.5), rng(6)
    kernel = gaussian_kernel(1.0).float()[None, None]
    for operator in (
        physics.Inpainting((1, 16, 16), mask=(torch.rand(1, 16, 16, generator=g) > 0.5).float()),
        physics.Downsampling(img_size=(1, 16, 16), factor=2, filter=None),
        physics.Blur(filter=kernel, padding="circular"),
    ):
        y = operator(prior.sample(2, g))
        assert torch.allclose(adjoint(operator, y, (2, 1, 16, 16)), operator.A_adjoint(y), atol=1e-6)
        obs, z = Observation(operator, y[0], 0.3), torch.randn(2, 1, 16, 16, generator=g)
        exact = prior.posterior(obs)(z, 0.7)
        assert torch.allclose(MMPS(prior, obs, iterations=80, probes=0)(z, 0.7), exact, atol=1e-4)
        assert torch.allclose(PiGDM(prior, obs, variance=0.5)(z, 0.7), exact, atol=1e-4)


def test_bad_input_is_named():
    x = torch.zeros(1, 1, 12, 12)
    cases = [
        (lambda: Inpainting(torch.zeros(4, 4, dtype=torch.bool)), "mask"),
        (lambda: Inpainting(torch.ones(4, 4)), "mask"),
        (lambda: LINEAR["box"](torch.zeros(1, 1, 10, 12)), "images of"),
        (lambda: LINEAR["box"](torch.zeros(12, 12)), "images"),
        (lambda: box_mask(4, 4, 2, 0, 2, 3), "box"),
        (lambda: random_mask(4, 4, 0.0), "keep"),
        (lambda: random_mask(4, 4, math.nan), "keep"),
        (lambda: Downsampling(5)(x), "multiples of 5"),
        (lambda: Downsampling(0), "factor"),
        (lambda: Blur(torch.ones(2, 3)), "odd"),
        (lambda: Blur(torch.ones(3)), "kernel"),
        (lambda: gaussian_kernel(0.0), "sd"),
        (lambda: motion_kernel(0, 1.0), "length"),
        (lambda: Radon(12, []), "angles"),
        (lambda: LINEAR["radon"](torch.zeros(1, 1, 12, 13)), "12 x 12"),
    ]
    for call, name in cases:
        with pytest.raises(ValueError, match=name):
            call()
