"""Reverse-time sampling: one loop, and predictors and correctors as plain functions of (sde, denoiser, x, t, s, generator).

A predictor goes from time t to an earlier time s. Noise is added only where σ(s) > 0, so that a step that ends on clean data is clean.
One with memory is an object, `Multistep()`; `sample` takes a fresh one for each run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from ._checks import check_batch, check_count, check_generator, check_positive, expand, holds, randn_like
from .sde import SDE, Denoise

Predictor = Callable[..., Tensor]  # (sde, denoiser, x, t, s, generator) -> x_s
Corrector = Callable[..., Tensor]  # (sde, denoiser, x, t, generator) -> x_t


def euler_maruyama(sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: torch.Generator | None = None) -> Tensor:
    r"""The reverse SDE by its simplest discretisation.

    `x_s = x_t - (f x_t - g² ∇log p_t(x_t)) (t - s) + g sqrt(t - s) n`, f and g at t.

    x: (B, *dims); 1 >= t > s >= 0. Returns x_s. Source: Song et al. 2021 (arXiv 2011.13456), eq. 6.
    """
    f, g = expand(sde.f(t), x), expand(sde.g(t), x)
    x_s = x - (f * x - g**2 * sde.score(denoiser, x, t)) * (t - s)
    return x_s + g * math.sqrt(t - s) * randn_like(x, generator) if holds(sde.sigma(s) > 0) else x_s


def ancestral(sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: torch.Generator | None = None) -> Tensor:
    r"""One exact step of the reverse chain, were D(z, σ) the true x_0.

    `z_s = q z_t + (1 - q) D(z_t, σ_t) + σ_s sqrt(1 - q) n`, `q = (σ_s / σ_t)²`.

    x: (B, *dims); 1 >= t > s >= 0. Returns x_s. Source: Song et al. 2021, appendix F; Ho et al. 2020 (arXiv 2006.11239), eq. 7.
    """
    z, sigma_t, sigma_s = x / expand(sde.scale(t), x), expand(sde.sigma(t), x), expand(sde.sigma(s), x)
    q = (sigma_s / sigma_t) ** 2
    z_s = q * z + (1 - q) * sde.denoise(denoiser, x, t)
    if holds(sigma_s > 0):
        z_s = z_s + sigma_s * (1 - q).sqrt() * randn_like(x, generator)
    return expand(sde.scale(s), x) * z_s


def euler(sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: torch.Generator | None = None) -> Tensor:
    r"""Euler's step for the probability-flow ODE in σ: `z_s = z_t + (σ_s - σ_t) (z_t - D(z_t, σ_t)) / σ_t`. Order 1; the same as DDIM.

    x: (B, *dims); 1 >= t > s >= 0. `generator` is not used. Returns x_s.
    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without lines 6 to 8; Song et al. 2020 (arXiv 2010.02502), eq. 13.
    """
    z, ratio = x / expand(sde.scale(t), x), expand(sde.sigma(s) / sde.sigma(t), x)
    x0_hat = sde.denoise(denoiser, x, t)
    return expand(sde.scale(s), x) * (x0_hat + ratio * (z - x0_hat))


def heun(sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: torch.Generator | None = None) -> Tensor:
    r"""Heun's step for the probability-flow ODE: `z_s = z_t + (σ_s - σ_t) (d_t + d_s) / 2`, `d = (z - D(z, σ)) / σ`. Order 2.

    d_s is taken at Euler's z_s. Where σ_s = 0 the step is Euler's, D(z, σ_t).
    x: (B, *dims); 1 >= t > s >= 0. `generator` is not used. Returns x_s.
    Source: Karras et al. 2022, algorithm 1.
    """
    z, sigma_t, sigma_s = x / expand(sde.scale(t), x), expand(sde.sigma(t), x), expand(sde.sigma(s), x)
    slope = (z - sde.denoise(denoiser, x, t)) / sigma_t
    r_s = expand(sde.scale(s), x)
    z_s = z + (sigma_s - sigma_t) * slope
    if not holds(sigma_s > 0):
        return r_s * z_s
    slope_s = (z_s - sde.denoise(denoiser, r_s * z_s, s)) / sigma_s
    return r_s * (z + (sigma_s - sigma_t) * (slope + slope_s) / 2)


class Multistep:
    r"""DPM-Solver++(2M): order 2 for one network call a step, by the memory of the step before. With λ = -ln σ and h = λ_s - λ_t,

    `z_s = q z_t + (1 - q) (D + h / (2 h') (D - D'))`, `q = σ_s / σ_t`, D = D(z_t, σ_t), and D', h' those of the step before.

    A step that does not begin at the time where the last one ended has no memory and is `euler`'s; so is one to σ_s = 0.
    x: (B, *dims); 1 >= t > s >= 0. `generator` is not used. Returns x_s.
    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    def __init__(self) -> None:
        self._last: tuple[float, Tensor, Tensor] | None = None  # s, h and D of the last step

    def __call__(self, sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: torch.Generator | None = None) -> Tensor:
        z, q = x / expand(sde.scale(t), x), expand(sde.sigma(s) / sde.sigma(t), x)
        x0_hat, h = sde.denoise(denoiser, x, t), -q.log()
        ahead = x0_hat
        if self._last is not None and self._last[0] == t and self._last[2].shape == x.shape and holds(q > 0):
            _, last_h, last_x0_hat = self._last
            ahead = x0_hat + h / (2 * last_h) * (x0_hat - last_x0_hat)
        self._last = s, h, x0_hat
        return expand(sde.scale(s), x) * (q * z + (1 - q) * ahead)


@dataclass(frozen=True)
class Langevin:
    r"""Corrector: `steps` Langevin moves at fixed t, `x <- x + e s + sqrt(2e) n`, s the score, `e = 2 (snr |n| / |s|)²`.

    The norms are those expected of one sample of d dimensions under the perturbation kernel, |n| = sqrt(d) and |s| = sqrt(d) / (r σ), so
    `e = 2 snr² (r σ)²`. Taken from the batch at hand they would tie the samples to each other; taken from the one sample they make the step
    depend on the state, and the chain then settles on a law proportional to p |s|², which in few dimensions is far from p.
    Source: Song et al. 2021, algorithms 4 and 5, without their factor α_t, which tends to 1 as steps shrink.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        check_positive(snr=self.snr)
        check_count(steps=self.steps)

    def __call__(self, sde: SDE, denoiser: Denoise, x: Tensor, t: float, generator: torch.Generator | None = None) -> Tensor:
        e = 2 * self.snr**2 * expand((sde.scale(t) * sde.sigma(t)) ** 2, x)
        for _ in range(self.steps):
            x = x + e * sde.score(denoiser, x, t) + (2 * e).sqrt() * randn_like(x, generator)
        return x


def uniform_times(steps: int) -> list[float]:
    """steps + 1 times, equally spaced from 1 to 0."""
    check_count(steps=steps)
    return [1 - i / steps for i in range(steps)] + [0.0]


def karras_times(sde: SDE, steps: int, rho: float = 7.0, sigma_min: float = 0.01, sigma_max: float = 20.0) -> list[float]:
    r"""Times of `steps` noise levels, then t = 0: first σ(1), then `n = steps - 1` levels, i = 0..n-1,

    `σ_i = (σ_max^{1/ρ} + i/(n-1) (σ_min^{1/ρ} - σ_max^{1/ρ}))^ρ`.

    One step leads from σ(1) to `sigma_max`: above twenty times the data's size (here 1) D hardly changes, and the flow is a straight line.
    `sigma_min` gives way to σ(0) where that is positive (VE; the last level is then t = 0 itself).
    Raises `ValueError` unless 0 < sigma_min < sigma_max. Source: Karras et al. 2022, eq. 5.
    """
    check_count(steps=steps)
    check_positive(rho=rho, sigma_min=sigma_min, sigma_max=sigma_max)
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")
    top, bottom, n = float(sde.sigma(1.0)), float(sde.sigma(0.0)), steps - 1
    high, low = min(sigma_max, top) ** (1 / rho), (bottom or sigma_min) ** (1 / rho)
    skip = 1 if top <= sigma_max * (1 + 1e-9) else 0  # σ(1) is then itself the first of the levels
    shares = [i / (n - 1 + skip) for i in range(skip, n + skip)] if n > 1 else [1.0] * n
    times = [1.0, *(float(sde.time((high + share * (low - high)) ** rho)) for share in shares)]
    return [*(times[:-1] if bottom and n else times), 0.0]


def _grid(sde: SDE, steps: int, times: Sequence[float] | Tensor | None, predictor: Predictor) -> list[float]:
    if times is None:
        return karras_times(sde, steps) if predictor in (euler, heun) or isinstance(predictor, Multistep) else uniform_times(steps)
    return check_times(times)


def check_sde(sde: SDE) -> None:
    if not isinstance(sde, SDE):
        got = f"the class {sde.__name__}: write {sde.__name__}()" if isinstance(sde, type) else type(sde).__name__
        raise TypeError(f"sde must be an SDE, got {got}")


def check_times(times: Sequence[float] | Tensor) -> list[float]:
    """`times` as a list; `ValueError` unless they decrease within [0, 1] and are at least two."""
    times = [float(t) for t in times]
    if len(times) < 2 or any(not t > s for t, s in pairwise(times)) or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must decrease within [0, 1] and hold at least two, got {times}")
    return times


def _check_step(x: Tensor, i: int, t: float, s: float) -> None:
    if not holds(x.isfinite().all()):
        raise FloatingPointError(
            f"step {i + 1}, t = {t:.4g} to {s:.4g}, left the finite numbers: the denoiser's output is not finite there, "
            "or its guidance is too stiff for this step"
        )


@torch.no_grad()
def sample(
    sde: SDE,
    denoiser: Denoise,
    x: Tensor,
    *,
    steps: int = 100,
    times: Sequence[float] | Tensor | None = None,
    predictor: Predictor = euler_maruyama,
    corrector: Corrector | None = None,
    last_step: float = 1.0,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    progress: bool = False,
) -> Tensor:
    r"""Run the reverse process from noise `x` at times[0] to clean data.

    The last step, from the lowest noise level to clean data, is the same for every predictor: `x_0 = z + w (D(z, σ) - z)`, w = `last_step`.
    w = 1 gives D, the mean of x_0 given z, as Song and Karras do; where the data have a fine structure of width s it comes out too thin, by
    the factor s² / (s² + σ²) in variance. w = 1/2 is Heun's step with the slope -σ ∇log p -> 0 at its end: right to O(σ⁴) for a smooth
    density, but it leaves half the noise around atoms. VE has σ(0) = σ_min > 0 and takes this step after t = 0, one network call more.

    Args: x: (B, *dims), as from `sde.prior`. steps: network steps, if `times` is None; then `karras_times` for `euler`, `heun` and
    `Multistep`, `uniform_times` for the stochastic ones. times: decreasing, within [0, 1]; one that ends above 0 returns x at that time.
    corrector: called after each step to a time with σ > 0. trajectory: return all len(times) states, the last one clean.
    Returns: (B, *dims), or (len(times), B, *dims). Raises `ValueError`/`TypeError` before any work for bad arguments,
    `FloatingPointError` naming the step that left the finite numbers.
    """
    check_batch(x)
    check_positive(last_step=last_step)
    check_sde(sde)
    check_generator(generator)
    for name, step in (("predictor", predictor), ("corrector", corrector)):
        if isinstance(step, type) or (step is not None and not callable(step)):
            got = f"the class {step.__name__}: write {step.__name__}()" if isinstance(step, type) else f"{type(step).__name__} {step!r}"
            raise TypeError(f"{name} must be a function of one step, as `su.heun`, got {got}")
    grid = _grid(sde, steps, times, predictor)
    path = [x]
    pairs = list(pairwise(grid))
    clean = grid[-1] == 0
    if isinstance(predictor, Multistep):
        predictor = type(predictor)()  # without the memory of another run
    if clean and not holds(sde.sigma(0.0) > 0):
        pairs.pop()
    for i, (t, s) in enumerate(tqdm(pairs, desc="sampling", file=sys.stdout, disable=not progress, mininterval=1.0)):
        x = predictor(sde, denoiser, x, t, s, generator)
        if corrector is not None:
            x = corrector(sde, denoiser, x, s, generator)
        _check_step(x, i, t, s)
        if trajectory:
            path.append(x)
    if clean:
        t = pairs[-1][1] if pairs else grid[0]
        z = x / expand(sde.scale(t), x)
        x = z + last_step * (sde.denoise(denoiser, x, t) - z)
        _check_step(x, len(pairs), t, 0.0)
        path = [*path[: len(grid) - 1], x]
    return torch.stack(path) if trajectory else x


def log_likelihood(
    sde: SDE,
    denoiser: Denoise,
    x0: Tensor,
    *,
    sigma: float | None = None,
    steps: int = 100,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""`log p(x_0; σ)` in nats, the density of x_0 + σ ε at x_0, along the probability-flow ODE with λ = ln σ:

    `dz/dλ = z - D`, `d log p/dλ = -tr(∂(z - D)/∂z)`, by Runge-Kutta of order 4 up to σ(1). There p is the isotropic Gaussian whose score is the
    denoiser's, linearised at 0, which has the data's mean and variance; the bare prior N(0, σ(1)² I) would cost about |mean| / σ(1) nats.

    Args: x0: (B, *dims). sigma: noise level where the integration starts; σ(0) if that is positive (VE), else 0.01.
    steps: Runge-Kutta steps, four evaluations each. probes: None takes the trace exactly, by one vector-Jacobian product per dimension;
    an int estimates it with so many Rademacher vectors, the same ones along the path.
    Returns (B,). Raises `ValueError`/`TypeError` for bad arguments, `FloatingPointError` if the result is not finite.
    Source: Song et al. 2021, eq. 39 and appendix D.2, in Karras' variables.
    """
    check_batch(x0, "x0")
    check_count(steps=steps)
    check_sde(sde)
    check_generator(generator)
    sigma = float(sde.sigma(0.0)) or 0.01 if sigma is None else sigma
    check_positive(sigma=sigma)
    z, dim, top = x0.detach(), x0[0].numel(), float(sde.sigma(1.0))
    sde.time(sigma)  # refuses a σ out of range
    if probes is None:
        vectors = torch.eye(dim, dtype=x0.dtype, device=x0.device).reshape(dim, 1, *x0.shape[1:]).expand(dim, *x0.shape)
    else:
        check_count(probes=probes)
        vectors = randn_like(x0.expand(probes, *x0.shape), generator).sign() / math.sqrt(probes)

    def slope(z: Tensor, log_sigma: float) -> tuple[Tensor, Tensor]:
        level = torch.tensor(math.exp(log_sigma), dtype=z.dtype, device=z.device)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x0_hat = denoiser(z, level)
            products = [torch.autograd.grad(x0_hat, z, v, retain_graph=True)[0] for v in vectors]
        trace = sum((p * v).flatten(1).sum(1) for p, v in zip(products, vectors, strict=True))
        return (z - x0_hat).detach(), dim - trace

    h, gained = math.log(top / sigma) / steps, torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for i in range(steps):
        a = math.log(sigma) + i * h
        k1, m1 = slope(z, a)
        k2, m2 = slope(z + h / 2 * k1, a + h / 2)
        k3, m3 = slope(z + h / 2 * k2, a + h / 2)
        k4, m4 = slope(z + h * k3, a + h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        gained = gained + h / 6 * (m1 + 2 * m2 + 2 * m3 + m4)
    offset, free = slope(torch.zeros_like(z), math.log(top))  # at z = 0: -D(0) and dim - tr ∂D/∂z
    free = expand(free / dim, z)
    square = ((z + offset / free) ** 2 * free / top**2).flatten(1).sum(1)
    prior = -square / 2 + dim / 2 * ((free / (2 * math.pi * top**2)).log()).flatten()
    if not holds((prior + gained).isfinite().all()):
        raise FloatingPointError("the likelihood left the finite numbers: check the denoiser, or take more steps")
    return prior + gained
