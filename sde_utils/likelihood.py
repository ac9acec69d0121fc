"""Log-likelihood by the probability flow."""

import math
import sys
import warnings

import torch
from torch import Tensor
from tqdm import tqdm

from . import _check as check
from ._numerics import Denoise, Random, differentiable, expand, product, randn_like
from .sde import SDE, check_sde


def trace_vectors(z: Tensor, probes: int | None, generator: Random) -> Tensor:
    """Vectors v with tr M = Σ vᵀ M v: the d units, or Rademacher ones, for which it is the mean."""
    if probes is None:
        d = z[0].numel()
        return torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, 1, *z.shape[1:])
    shape = (check.count("probes", probes), *z.shape)
    return randn_like(z.expand(shape), generator).sign() / math.sqrt(probes)


def traced(denoiser: Denoise, z: Tensor, sigma: float, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """z - D(z, σ), (B, *dims), and the trace of its derivative, (B,), seen along the vectors."""
    z, x0_hat = differentiable(denoiser, z, z.new_full((), sigma))
    trace = torch.full((len(z),), float(z[0].numel()), dtype=z.dtype, device=z.device)
    for v in vectors:
        trace = trace - (product(x0_hat, z, v.expand_as(z)) * v).flatten(1).sum(1)
    return (z - x0_hat).detach(), trace


def log_likelihood(
    sde: SDE,
    denoiser: Denoise,
    x0: Tensor,
    *,
    sigma: float | None = None,
    steps: int = 100,
    probes: int | None = None,
    generator: Random = None,
    progress: bool = False,
) -> Tensor:
    r"""log p(x_0; σ) in nats: the density of x_0 + σ ε at x_0, along the probability flow.

        dz/dλ = z - D,   d log p/dλ = -tr(∂(z - D)/∂z),   λ = ln σ,

    by Runge-Kutta of order 4 up to σ(1). There p is the Gaussian whose score is the denoiser's,
    linearised at 0, which has the data's mean and variance; N(0, σ(1)² I) would cost |mean| / σ(1).

    Args:
        x0: (B, *dims).
        sigma: where the integration starts; σ(0) if that is positive (VE), else 0.01.
        steps: Runge-Kutta steps, four evaluations each.
        probes: None takes the trace exactly, by one vector-Jacobian product per dimension; a
            number estimates it with so many Rademacher vectors, the same along the path.
    Returns: (B,), without a graph.
    Raises `FloatingPointError` if the result is not finite; warns of a σ(1) near the data's size.
    Source: Song et al. 2021 (arXiv 2011.13456), eq. 39 and appendix D.2, in Karras' variables.
    """
    check_sde(sde)
    check.batch("x0", x0)
    check.function("denoiser", denoiser, "a function D(z, sigma)")
    check.generator(generator)
    steps = check.count("steps", steps)
    sigma = float(sde.sigma(0.0)) or 0.01 if sigma is None else check.number("sigma", sigma)
    sde.time(sigma)  # refuses a σ out of range
    z, top = x0.detach(), float(sde.sigma(1.0))
    if top < 3 * (size := getattr(denoiser, "sigma_data", 0.0)):
        found = f"σ(1) = {top:.3g}, below 3 sigma_data = {3 * size:.3g}, still knows the data"
        warnings.warn(f"{found}: scale them, or take an SDE that goes further", stacklevel=2)
    vectors = trace_vectors(z, probes, generator)
    h, gained = math.log(top / sigma) / steps, z.new_zeros(len(z))
    for i in tqdm(range(steps), desc="likelihood", file=sys.stdout, disable=not progress):
        z, gain = runge_kutta(denoiser, z, math.log(sigma) + i * h, h, vectors)
        gained = gained + gain
    total = gained + wide_gaussian(denoiser, z, top, vectors)
    if not total.isfinite().all():
        causes = f"the denoiser, its derivative, a short {z.dtype}, σ(1) = {top:g} below the data"
        raise FloatingPointError(f"the likelihood left the finite numbers; likely causes: {causes}")
    return total


def runge_kutta(
    denoiser: Denoise, z: Tensor, a: float, h: float, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of order 4 in ln σ, from a to a + h: z, and what log p gained, (B,)."""
    k1, m1 = traced(denoiser, z, math.exp(a), vectors)
    k2, m2 = traced(denoiser, z + h / 2 * k1, math.exp(a + h / 2), vectors)
    k3, m3 = traced(denoiser, z + h / 2 * k2, math.exp(a + h / 2), vectors)
    k4, m4 = traced(denoiser, z + h * k3, math.exp(a + h), vectors)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), h / 6 * (m1 + 2 * m2 + 2 * m3 + m4)


def wide_gaussian(denoiser: Denoise, z: Tensor, sigma: float, vectors: Tensor) -> Tensor:
    """log p(z; σ), (B,), of the isotropic Gaussian whose denoiser is D, linearised at 0."""
    d = z[0].numel()
    offset, trace = traced(denoiser, torch.zeros_like(z), sigma, vectors)
    free = expand(trace / d, z)  # (z - D) / z, on average
    square = ((z + offset / free) ** 2 * free / sigma**2).flatten(1).sum(1)
    return -square / 2 + d / 2 * (free.reshape(-1) / (2 * math.pi * sigma**2)).log()
