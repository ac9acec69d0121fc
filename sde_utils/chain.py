r"""x_0 given x_0 + σ ε = z, by steps that keep the covariance of the reverse process.

Given z, x_0 is not D but has the covariance σ² J, J = ∂D/∂z (Tweedie, second order). A step from
σ_t to σ_s that keeps it needs J n for a normal n: one call more, and no derivative.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Denoise, Predictor, Random, call, randn_like
from .predictors import levels
from .sampling import karras_levels, sample
from .sde import SDE, check_sde

Chain = Callable[[Tensor, float, Random], Tensor]  # (z, ρ, generator) -> x, a draw of x_0 given z


def reverse_moments(sigma_t: float, sigma_s: float) -> tuple[float, float, float]:
    r"""q, ν, β: given z at σ_t the reverse process has, at σ_s, mean and covariance

        m = q z + (1 - q) D,   L²,   L = ν I + β J,   q = (σ_s / σ_t)²,   ν² = σ_s² (1 - q).

    J = ∂D/∂z. The covariance is ν² I + (1 - q)² σ_t² J; L² equals it at J = 0 and at J = I.
    Source: Bao et al. 2022 (arXiv 2206.07309) in Tweedie's form, Cov[x_0 | z] = σ_t² J; L is ours.
    """
    q = (sigma_s / sigma_t) ** 2
    nu = sigma_s * math.sqrt(1 - q)
    return q, nu, math.hypot(nu, (1 - q) * sigma_t) - nu


def moment_matched(
    sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: Random = None
) -> Tensor:
    r"""A Gaussian step with the mean and about the covariance of the reverse process; two calls.

        z_s = q z + (1 - q) D(z, σ_t) + ν n + β J n,   q and ν as in `reverse_moments`,

    β as in `spread`. `ancestral` leaves β J n out, and so is too narrow: of N(0, I) 16 steps
    keep 0.75 of the standard deviation, and any number of these all of it.
    Args: x: x_t, (B, *dims). t, s: numbers.   Returns: x_s.
    """
    r_t, sigma_t, r_s, sigma_s = levels(sde, t, s)
    z, (q, nu, _) = x / r_t, reverse_moments(sigma_t, sigma_s)
    x0_hat, noise = spread(denoiser, z, sigma_t, nu, (1 - q) * sigma_t, generator)
    return r_s * (q * z + (1 - q) * x0_hat + noise)


def spread(
    denoiser: Denoise, z: Tensor, sigma: float, nu: float, c: float, generator: Random = None
) -> tuple[Tensor, Tensor]:
    r"""D(z, σ), and noise ν n + β J n whose covariance is about ν² I + c² J.

    J n = (D(z + h n, σ) - D) / h, h = σ / 10, and β >= 0 is, for each sample, such that

        |ν n + β J n|² = ν² |n|² + c² n·J n.

    The means of both sides are traces: that of the covariance is right. Where J = λ P, P a
    projection, β does not depend on n, and the covariance itself is.
    """
    n, x0_hat, h = randn_like(z, generator), call(denoiser, z, sigma), sigma / 10
    j_n = (call(denoiser, z + h * n, sigma) - x0_hat) / h
    a = (n * j_n).flatten(1).sum(1).clamp(min=0)
    b = j_n.flatten(1).square().sum(1)
    root = nu * a + (a * (nu**2 * a + c**2 * b)).sqrt()
    beta = c**2 * a / root.clamp(min=torch.finfo(z.dtype).tiny)
    return x0_hat, nu * n + beta.reshape(-1, *[1] * (z.ndim - 1)) * j_n


def reverse_chain(
    sde: SDE,
    denoiser: Denoise,
    steps: int = 2,
    predictor: Predictor = moment_matched,
    depth: float = 20.0,
) -> Chain:
    r"""x_0 given x_0 + ρ ε = z, by the reverse process from σ = ρ downward.

    Levels as Karras et al.'s (2022, eq. 5), `steps` of them for each factor of ten, to ρ / depth,
    but not below σ(0). From the last a leap to x_0, of mean D and about the covariance σ² J that
    x_0 has given z, as in `spread`. n levels are 2n calls of `moment_matched`.
    Args: steps: at least 2. depth: > 1.
    """
    check_sde(sde)
    steps, depth = check.count("steps", steps, 2), check.number("depth", depth, 1)
    least, most = float(sde.sigma(0.0)), float(sde.sigma(1.0))
    n = 1 + max(1, round(steps * math.log10(depth)))

    @torch.no_grad()
    def chain(z: Tensor, rho: float, generator: Random = None) -> Tensor:
        rho = check.number("rho", rho, least, most, "(]")
        low = max(rho / depth, least)
        times = [float(sde.time(level)) for level in karras_levels(rho, low, n)]
        walk = partial(sample, times=times, predictor=predictor, last_step=None)
        x = walk(sde, denoiser, z * float(sde.scale(times[0])), generator=generator)
        x0_hat, noise = spread(denoiser, x / float(sde.scale(times[-1])), low, 0, low, generator)
        return x0_hat + noise

    return chain
