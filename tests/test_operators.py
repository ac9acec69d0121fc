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
    motion_kernel,
    pseudo_inverse,
)

SHAPE = (3, 2, 12, 12)


def bell(sd):
    """exp(-(i² + j²) / 2 sd²), normalised."""
    i = torch.arange(-math.ceil(3 * sd), math.ceil(3 * sd) + 1, dtype=torch.float64)
    line = torch.exp(-(i**2) / (2 * sd**2))
    return torch.outer(line, line) / line.sum() ** 2


LINEAR = {
    "box": Inpainting(box_mask(12, 12, 3, 2, 9, 8)),
    "random": Inpainting(torch.rand(12, 12, generator=rng(0)) < 0.3),
    "x2": Downsampling(2),
    "x4": Downsampling(4),
    "gaussian": Blur(bell(1.2)),
    "motion": Blur(motion_kernel(5, 30.0)),
    "radon": Radon(12, [0.0, 20.0, 45.0, 90.0, 140.0]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_and_adjoint(name):
    """A(a x + b y) = a A x + b A y, and <A x, u> = <x, Aᵀ u>."""
    operator, g = LINEAR[name], rng(1)
    x, y = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    together = operator(2 * x - 3 * y)
    assert torch.allclose(together, 2 * operator(x) - 3 * operator(y), atol=1e-12)
    u = torch.randn(operator(x).shape, generator=g, dtype=torch.float64)
    right = float((x * adjoint(operator, u, SHAPE)).sum())
    assert float((operator(x) * u).sum()) == pytest.approx(right, rel=1e-12)
    assert torch.allclose(operator(x[:1]), operator(x)[:1], atol=1e-12)
    assert operator(x.float()).dtype == torch.float32


@pytest.mark.parametrize("name", LINEAR)
def test_differentiable_twice(name):
    """MMPS differentiates the backward pass: the derivative of Aᵀ u in u, along v, is A v."""
    operator, g = LINEAR[name], rng(2)
    x, v = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    y = operator(x.requires_grad_())
    u = torch.randn(y.shape, generator=g, dtype=torch.float64).requires_grad_()
    (back,) = torch.autograd.grad(y, x, u, create_graph=True)
    (forth,) = torch.autograd.grad(back, u, v)
    assert torch.allclose(forth, operator(v), atol=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_pseudo_inverse_is_numpys(name):
    operator = LINEAR[name]
    shape = (1, 1, 12, 12)
    seen = operator(torch.zeros(shape, dtype=torch.float64))
    matrix = Observation(operator, seen[0], 1.0).matrix(shape[1:])
    y = torch.randn(len(matrix), generator=rng(2), dtype=torch.float64)
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    for ridge in (1e-2, 1.0):
        expected = torch.linalg.solve(matrix.T @ matrix + ridge * eye, matrix.T @ y)
        found = pseudo_inverse(operator, y.reshape(seen.shape), shape, ridge=ridge)
        assert torch.allclose(found.reshape(-1), expected, atol=1e-8)


def test_adjoint_and_pseudo_inverse_work_without_a_graph():
    operator, y = LINEAR["x2"], torch.randn(1, 1, 6, 6, generator=rng(3))
    expected = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(adjoint(operator, y.clone(), (1, 1, 12, 12)), expected / 4)
            inverse = pseudo_inverse(operator, y.clone(), (1, 1, 12, 12))
            assert torch.allclose(inverse, expected, atol=1e-5)


def test_operators_do_what_they_are_called():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    outside = [[[0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 14, 15]]]
    assert Inpainting(box_mask(4, 4, 1, 1, 3, 3))(x).tolist() == outside
    assert Downsampling(2)(x).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    flat = Blur(bell(2.0))(torch.full((1, 1, 9, 9), -1.0, dtype=torch.float64))
    assert torch.allclose(flat, torch.full_like(flat, -1.0))
    spike = torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    spike[..., 5, 5] = 1
    kernel = torch.arange(15.0, dtype=torch.float64).reshape(3, 5)
    seen = Blur(kernel)(spike)[0, 0, 4:7, 3:8]
    assert torch.equal(seen, kernel)  # a convolution, not a correlation


def test_an_operator_keeps_its_own_mask_and_kernel_and_angles():
    mask, kernel, x = torch.rand(12, 12, generator=rng(4)) < 0.5, bell(1.0), torch.randn(SHAPE)
    angles = torch.tensor([10.0, 70.0], dtype=torch.float64)
    operators = Inpainting(mask), Blur(kernel), Radon(12, angles)
    before = [operator(x) for operator in operators]
    mask[:6], kernel[:], angles[:] = False, 0, 0
    assert all(torch.equal(operator(x), y) for operator, y in zip(operators, before, strict=True))


def test_motion_kernel():
    """Sum 1; the second moments along and across are those of the segment and of the sharing.

    Of n points over a length L the variance is L² (n + 1) / (12 (n - 1)). A point shared between
    two pixels with weights 1 - a, a adds a (1 - a), from 0 to 1/4, in each direction.
    """
    for angle, entry in ((0.0, (3, 5)), (90.0, (1, 3)), (45.0, (2, 4))):
        kernel = motion_kernel(7, angle)
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)
        assert kernel[entry] > kernel.flip(0)[entry] or angle in (0.0, 90.0)
        assert kernel[entry] > 0.1
    kernel, n = motion_kernel(31, 30.0), 64 * 31
    i = torch.arange(31, dtype=torch.float64) - 15
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    along, across = c * i - s * i[:, None], s * i + c * i[:, None]  # rows downwards
    assert 0 <= float((kernel * along**2).sum()) - 30**2 * (n + 1) / (12 * (n - 1)) <= 0.25
    assert 0 <= float((kernel * across**2).sum()) <= 0.25
    assert motion_kernel(1, 10.0).tolist() == [[1.0]]


def test_radon_is_scikit_images():
    radon = pytest.importorskip("skimage.transform").radon
    x = torch.zeros(28, 28, dtype=torch.float64)
    x[8:20, 10:16] = 1
    x[12:15, 5:20] += 0.5
    angles = [0.0, 30.0, 45.0, 90.0, 120.0, 177.0]
    expected = radon(x.numpy(), theta=np.array(angles), circle=True)
    found = Radon(28, angles)(x[None, None])[0, 0].numpy().T
    assert np.abs(found - expected).max() < 1e-12 * expected.max()


def test_radon_is_its_formula():
    """A pixel at (column, row) from the centre is seen at k = column cos θ - row sin θ."""
    k = torch.arange(29, dtype=torch.float64) - 14
    for column, row, angle in ((0, 6, 90.0), (6, 6, 30.0), (-5, 3, 140.0)):
        x = torch.zeros(1, 1, 29, 29, dtype=torch.float64)
        x[..., 14 + row, 14 + column] = 1
        seen = Radon(29, [angle])(x)[0, 0, 0]
        theta = math.radians(angle)
        centre = column * math.cos(theta) - row * math.sin(theta)
        assert float((seen * k).sum() / seen.sum()) == pytest.approx(centre, abs=0.2)


def test_radon_of_a_disc_in_closed_form():
    """A disc of radius R projects to 2 sqrt(R² - k²) at any angle; pixels blur it by about one."""
    size, radius = 65, 20.0
    k = torch.arange(size, dtype=torch.float64) - size // 2
    disc = ((k[:, None] ** 2 + k**2) <= radius**2).double()[None, None]
    chord = 2 * (radius**2 - k**2).clamp(min=0).sqrt()
    for row in Radon(size, [0.0, 33.0, 71.0])(disc)[0, 0]:
        assert float((row - chord).abs()[k.abs() < 18].max()) < 1.6
        assert float(row.sum()) == pytest.approx(math.pi * radius**2, rel=0.01)


def test_radon_keeps_no_matrix_and_takes_angles_in_parts():
    """All it keeps is the angles, and more rays than go at a time are the same rays."""
    operator = Radon(400, torch.arange(0.0, 180.0, 45.0))  # one angle at a time
    kept = [v for v in vars(operator).values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() for v in kept) == 4
    x = torch.randn(1, 1, 400, 400, generator=rng(5), dtype=torch.float64)
    for i, angle in enumerate(operator.angles):
        assert torch.equal(operator(x)[:, :, i : i + 1], Radon(400, [float(angle)])(x))


def test_phase_retrieval_does_not_see_shifts():
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x[..., 2:5, 1:4] = torch.rand(3, 3, generator=rng(3), dtype=torch.float64)
    operator = PhaseRetrieval()
    assert torch.allclose(operator(x), operator(x.roll((2, 3), dims=(2, 3))), atol=1e-9)
    x.requires_grad_()
    assert torch.autograd.grad(operator(x * 0).sum(), x)[0].isfinite().all()


def test_phase_retrieval_is_its_formula():
    """The transform onto 2H x 2W frequencies written out as sums over the H x W pixels."""
    x = torch.randn(2, 3, 4, 6, generator=rng(6), dtype=torch.float64)
    sums = []
    for n in (4, 6):
        angles = torch.outer(torch.arange(2.0 * n).double(), torch.arange(n)) * math.pi / n
        sums.append(torch.polar(torch.full_like(angles, (2 * n) ** -0.5), -angles))
    wave = sums[0] @ x.to(torch.complex128) @ sums[1].T
    expected = (wave.real**2 + wave.imag**2 + 1e-6).sqrt()
    torch.testing.assert_close(PhaseRetrieval()(x), expected)


@pytest.mark.parametrize("name", LINEAR)
def test_guidance_by_conjugate_gradients_takes_them(name):
    """MMPS matrix-free and PiGDM, for a Gaussian prior, against the exact posterior's denoiser."""
    prior = IsotropicMixture(torch.zeros(1, 1, 12, 12, dtype=torch.float64), 0.5)
    operator = LINEAR[name]
    y = operator(prior.sample(1, rng(4)))[0]
    obs = Observation(operator, y, 0.3)
    z = torch.randn(2, 1, 12, 12, generator=rng(5), dtype=torch.float64)
    exact = prior.posterior(obs)(z, 0.7)
    assert torch.allclose(MMPS(prior, obs, iterations=60, probes=0)(z, 0.7), exact, atol=1e-5)
    assert torch.allclose(PiGDM(prior, obs, (1, 12, 12), 0.5)(z, 0.7), exact, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_deepinv_physics_are_operators():
    """Where deepinv is installed: its physics as operators, their adjoint, the exact denoiser."""
    physics = pytest.importorskip("deepinv.physics")
    prior, g = IsotropicMixture(torch.zeros(1, 1, 16, 16), 0.5), rng(6)
    kernel = bell(1.0).float()[None, None]
    for operator in (
        physics.Inpainting((1, 16, 16), mask=(torch.rand(1, 16, 16, generator=g) > 0.5).float()),
        physics.Downsampling(img_size=(1, 16, 16), factor=2, filter=None),
        physics.Blur(filter=kernel, padding="circular"),
    ):
        y = operator(prior.sample(2, g))
        back = adjoint(operator, y, (2, 1, 16, 16))
        assert torch.allclose(back, operator.A_adjoint(y), atol=1e-6)
        obs, z = Observation(operator, y[0], 0.3), torch.randn(2, 1, 16, 16, generator=g)
        exact = prior.posterior(obs)(z, 0.7)
        assert torch.allclose(MMPS(prior, obs, iterations=80, probes=0)(z, 0.7), exact, atol=1e-4)
        assert torch.allclose(PiGDM(prior, obs, (1, 16, 16), 0.5)(z, 0.7), exact, atol=1e-4)


def test_bad_input_is_named():
    x, y = torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 6, 6)
    half = LINEAR["x2"]
    cases = [
        (lambda: Inpainting(torch.zeros(4, 4, dtype=torch.bool)), "mask"),
        (lambda: Inpainting(torch.ones(4, dtype=torch.bool)), "mask"),
        (lambda: LINEAR["box"](torch.zeros(1, 1, 10, 12)), "12, 12"),
        (lambda: LINEAR["box"](torch.zeros(12, 12)), "images"),
        (lambda: box_mask(4, 4, 2, 0, 2, 3), "box"),
        (lambda: Downsampling(5)(x), "multiples of 5"),
        (lambda: Downsampling(0), "factor"),
        (lambda: Blur(torch.ones(2, 3)), "odd"),
        (lambda: Blur(torch.ones(3)), "kernel"),
        (lambda: Blur(torch.full((3, 3), math.nan)), "kernel"),
        (lambda: motion_kernel(0, 1.0), "length"),
        (lambda: motion_kernel(3, math.inf), "angle"),
        (lambda: Radon(12, []), "angles"),
        (lambda: Radon(12, [math.nan]), "angles"),
        (lambda: Radon(0, [0.0]), "size"),
        (lambda: LINEAR["radon"](torch.zeros(1, 1, 12, 13)), "12, 12"),
        (lambda: adjoint(torch.sin, x, x.shape), "linear"),
        (lambda: adjoint(half, x, x.shape), "u must have"),
        (lambda: pseudo_inverse(lambda x: x + 1, x, x.shape), "linear"),
        (lambda: pseudo_inverse(half, y, x.shape, ridge=-1.0), "ridge"),
        (lambda: pseudo_inverse(half, y, x.shape, ridge=math.nan), "ridge"),
        (lambda: pseudo_inverse(half, y, x.shape, iterations=0), "iterations"),
        (lambda: pseudo_inverse(half, y * math.nan, x.shape), "y must be finite"),
        (lambda: pseudo_inverse(half, x, x.shape), "y must have"),
    ]
    for call, name in cases:
        with pytest.raises(ValueError, match=name):
            call()
    for call, name in (
        (lambda: Inpainting(torch.ones(4, 4)), "mask"),
        (lambda: Inpainting([[True]]), "mask"),
        (lambda: Blur([[1.0]]), "kernel"),
        (lambda: half(x.numpy()), "x must be"),
        (lambda: adjoint(half, y.numpy(), x.shape), "u must be"),
        (lambda: adjoint(half, y, 144), "shape"),
        (lambda: pseudo_inverse(half, y, x.shape, 50), "positional"),
    ):
        with pytest.raises(TypeError, match=name):
            call()
