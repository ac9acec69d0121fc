r"""One step each, as functions (sde, denoiser, x, t, s, generator) -> x_s, with 1 >= t > s.

t and s are numbers and σ_s > 0: the step to x_0 is `sample`'s. With z = x_t / r_t throughout.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Denoise, Predictor, Random, call, randn_like
from .sde import SDE, check_sde


def levels(sde: SDE, t: float, s: float) -> tuple[float, float, float, float]:
    """r_t, σ_t, r_s, σ_s. `ValueError` unless t > s and σ_s > 0."""
    check_sde(sde)
    t, s = check.number("t", t, 0, 1, "[]"), check.number("s", s, 0, 1, "[]")
    r_t, sigma_t = float(sde.scale(t)), float(sde.sigma(t))
    r_s, sigma_s = float(sde.scale(s)), float(sde.sigma(s))
    found = f"t = {t:g}, s = {s:g}, σ_s = {sigma_s:g}"
    check.require(t > s and sigma_s > 0, f"s must be below t, with σ_s > 0, got {found}")
    return r_t, sigma_t, r_s, sigma_s


def euler_maruyama(
    sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: Random = None
) -> Tensor:
    r"""The reverse SDE by its simplest discretisation.

        x_s = x_t - (f x_t - g² ∇log p_t(x_t)) (t - s) + g sqrt(t - s) n,   f and g at t.

    Args: x: x_t, (B, *dims). t, s: numbers.   Returns: x_s.
    Source: Song et al. 2021 (arXiv 2011.13456), eq. 6.
    """
    r, sigma, _, _ = levels(sde, t, s)
    f, g, h = float(sde.f(t)), float(sde.g(t)), t - s
    score = (call(denoiser, x / r, sigma) - x / r) / (r * sigma**2)
    return x - (f * x - g**2 * score) * h + g * math.sqrt(h) * randn_like(x, generator)


def ancestral(
    sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: Random = None
) -> Tensor:
    r"""One exact step of the reverse chain, were D(z, σ) the true x_0.

        z_s = q z + (1 - q) D(z, σ_t) + σ_s sqrt(1 - q) n,   q = (σ_s / σ_t)².

    Args: x: x_t, (B, *dims). t, s: numbers.   Returns: x_s.
    Source: Song et al. 2021, appendix F; Ho et al. 2020 (arXiv 2006.11239), eq. 7.
    """
    r_t, sigma_t, r_s, sigma_s = levels(sde, t, s)
    z, q = x / r_t, (sigma_s / sigma_t) ** 2
    mean = q * z + (1 - q) * call(denoiser, z, sigma_t)
    return r_s * (mean + sigma_s * math.sqrt(1 - q) * randn_like(x, generator))


def euler(
    sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: Random = None
) -> Tensor:
    r"""Euler's step along the probability flow, order 1; the same as DDIM.

        z_s = D + (σ_s / σ_t) (z - D),   D = D(z, σ_t).

    Args: x: x_t, (B, *dims). t, s: numbers. generator: not used.   Returns: x_s.
    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without lines 6 to 8; Song, J., et
    al. 2020 (arXiv 2010.02502), eq. 13.
    """
    r_t, sigma_t, r_s, sigma_s = levels(sde, t, s)
    z = x / r_t
    x0_hat = call(denoiser, z, sigma_t)
    return r_s * (x0_hat + sigma_s / sigma_t * (z - x0_hat))


def heun(
    sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: Random = None
) -> Tensor:
    r"""Heun's step along the probability flow, order 2, two calls.

        z_s = z + (σ_s - σ_t) (d_t + d_s) / 2,   d = (z - D(z, σ)) / σ,   d_s at Euler's z_s.

    Args: x: x_t, (B, *dims). t, s: numbers. generator: not used.   Returns: x_s.
    Source: Karras et al. 2022, algorithm 1.
    """
    r_t, sigma_t, r_s, sigma_s = levels(sde, t, s)
    z, h = x / r_t, sigma_s - sigma_t
    d_t = (z - call(denoiser, z, sigma_t)) / sigma_t
    z_s = z + h * d_t
    d_s = (z_s - call(denoiser, z_s, sigma_s)) / sigma_s
    return r_s * (z + h * (d_t + d_s) / 2)


def multistep(order: int = 2, sigma_data: float = 1.0) -> Predictor:
    r"""Adams-Bashforth steps along the probability flow, of order 2 or 3 for one call a step.

    In the variables in which the flow of wide data and of noise alike is straight it reads

        dy/du = v,   u = σ / (s + σ),  y = z / (s + σ),   v = (z - D)/σ - D/s,   s = sigma_data,

    and a step adds to y the integral of the polynomial through the last `order` slopes v. The
    result remembers, so that each run takes a new one; a state that it did not return itself
    (another run, a corrector's) begins anew, with order 1.
    Args: order: 2 or 3. sigma_data: root mean square of the data.   Returns: a predictor.
    Source: Zhang & Chen 2023 (arXiv 2204.13902) for the method, in σ; Liu et al. 2022 (arXiv
    2209.03003) for the variables.
    """
    order, size = check.count("order", order, 2, 3), check.number("sigma_data", sigma_data)
    nodes: list[tuple[float, Tensor]] = []  # (u, v) of the last steps
    returned: Tensor | None = None

    def step(
        sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: Random = None
    ) -> Tensor:
        nonlocal nodes, returned
        r_t, sigma_t, r_s, sigma_s = levels(sde, t, s)
        z, u_t, u_s = x / r_t, sigma_t / (size + sigma_t), sigma_s / (size + sigma_s)
        x0_hat = call(denoiser, z, sigma_t)
        v = (z - x0_hat) / sigma_t - x0_hat / size
        nodes = [*(nodes if x is returned else []), (u_t, v)][-order:]
        y = z / (size + sigma_t)
        for weight, (_, v) in zip(adams_bashforth([u for u, _ in nodes], u_s), nodes, strict=True):
            y = y + weight * v
        returned = r_s * (size + sigma_s) * y
        return returned

    return step


def adams_bashforth(nodes: list[float], end: float) -> list[float]:
    """Weights w with Σ w_j p(u_j) = ∫ p du from the last node to `end`, for polynomials p."""
    h, k = end - nodes[-1], torch.arange(len(nodes), dtype=torch.float64, device="cpu")
    x = (torch.tensor(nodes, dtype=torch.float64, device="cpu") - nodes[-1]) / h
    return (h * torch.linalg.solve(x ** k[:, None], 1 / (k + 1))).tolist()


@dataclass(frozen=True)
class Langevin:
    r"""Corrector: `steps` Langevin moves at fixed t.

        x <- x + e ∇log p_t(x) + sqrt(2e) n,   e = 2 (snr r σ)².

    That is e = 2 (snr |n| / |∇log p|)² with the norms that one sample of d dimensions has under the
    perturbation kernel, sqrt(d) and sqrt(d) / (r σ). Norms of the batch at hand would tie samples
    to each other; the sample's own would make the chain settle on a law ∝ p |∇log p|².
    Args: snr: > 0. steps: at least 1.
    Source: Song et al. 2021, algorithms 4 and 5, without their α_t, which tends to 1.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        check.number("snr", self.snr)
        check.count("steps", self.steps)

    def __call__(
        self, sde: SDE, denoiser: Denoise, x: Tensor, t: float, generator: Random = None
    ) -> Tensor:
        r, sigma = float(sde.scale(t)), float(sde.sigma(t))
        check.require(sigma > 0, "t must have σ(t) > 0, got σ(t) = 0")
        e = 2 * (self.snr * r * sigma) ** 2
        for _ in range(self.steps):
            score = (call(denoiser, x / r, sigma) - x / r) / (r * sigma**2)
            x = x + e * score + math.sqrt(2 * e) * randn_like(x, generator)
        return x
