"""Twisted sequential Monte Carlo: guidance as a proposal, and weights that make up for what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ._checks import check_batch, check_count, check_generator, check_positive, expand, randn_like
from .guidance import _Guided
from .sampling import check_sde, check_times, karras_times
from .sde import SDE


@dataclass(frozen=True)
class Particles:
    """Weighted draws from p(x_0 | y): x (n, *dims), log_weights (n,) summing to 1 as exp, ess (steps,), log_evidence ≈ log p(y), a scalar."""

    x: Tensor
    log_weights: Tensor
    ess: Tensor
    log_evidence: Tensor

    def resample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n unweighted draws, (n, *dims), by systematic resampling."""
        check_count(n=n)
        return self.x[systematic(self.log_weights, n, generator)]


def systematic(log_weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """n indices, k about n w_k times: n equally spaced points, one random offset, in the cumulative weights. Shuffled, (n,), on their device."""
    device = log_weights.device if generator is None else generator.device
    offset = torch.rand((), generator=generator, device=device, dtype=log_weights.dtype).to(log_weights.device)
    points = (torch.arange(n, device=log_weights.device, dtype=log_weights.dtype) + offset) / n
    cumulative = log_weights.softmax(0).cumsum(0)
    index = torch.searchsorted(cumulative / cumulative[-1], points)
    return index.clamp(max=len(log_weights) - 1)[torch.randperm(n, generator=generator, device=device).to(log_weights.device)]


@torch.no_grad()
def twisted_smc(
    sde: SDE,
    guided: _Guided,
    x: Tensor,
    *,
    steps: int = 100,
    times: Sequence[float] | Tensor | None = None,
    resample_below: float = 0.5,
    last_step: float = 1.0,
    generator: torch.Generator | None = None,
) -> Particles:
    r"""Particles for p(x_0 | y): propose by a guided step, weigh by what the unguided one would have done.

    Given z at σ_t, the reverse process has at σ_s the mean `m = q z + (1 - q) D` and the covariance `ν² I + (1 - q)² σ_t² J`, with
    `q = (σ_s/σ_t)²`, `ν² = σ_s² (1 - q)` and J = ∂D/∂z; ancestral sampling keeps the first term only. A step draws `z_s = m + L (n + a)`,
    n ~ N(0, I), with `L = ν I + β J`, `β = sqrt(ν² + (1 - q)² σ_t²) - ν`, so that L² is right at J = 0 and I, and `a = (1 - q) (D_y - D) / ν`.
    Its weight is `p̃(y | z_s) / p̃(y | z_t) exp(-a·n - |a|²/2)`, p̃ the method's p(y | z). The last step is `sample`'s, unguided,
    `x_0 = z + w (D - z)`; its weight is `p(y | x_0) / p̃(y | z)`. Weights are kept in float64 (on the CPU for MPS)
    and particles resampled where the effective sample size falls below `resample_below` n. A learned denoiser's twist is left out at
    σ > 10 `sigma_data`: z says next to nothing about x_0 there, and σ² times a small error of its Jacobian says much that is wrong.
    Each step costs one network call, the guidance's vector-Jacobian products and one more; a resampling costs one more evaluation.

    Args: guided: Annealed, DPS, PiGDM or MMPS. x: (n, *dims), as from `sde.prior`; σ(1) has to exceed the size of the data, at any scale.
    times: decreasing to 0; if None `karras_times` from σ(1) down, for a learned denoiser in one step from there to 20 `sigma_data`.
    The evidence is unbiased, and as n grows the draws become exact, up to the chain's own steps and the denoiser's error.
    Raises `ValueError`/`TypeError` before any work for bad arguments; `FloatingPointError` if all weights vanish: y is impossible under the
    prior, or beyond the reach of these particles. Source: Wu et al. 2023 (arXiv 2306.17775), algorithm 1; the covariance is that of
    Bao et al. 2022 (arXiv 2206.07309), theorem 1, in Tweedie's form, Cov[x_0 | z] = σ² J; its root L is ours.
    """
    check_batch(x)
    if not isinstance(guided, _Guided):
        raise TypeError(f"guided must be a guided denoiser (MMPS, PiGDM, DPS, Annealed), got {type(guided).__name__}")
    if getattr(guided, "zeta", None) is not None:
        raise ValueError("guided must stand for a likelihood, but DPS with zeta (Algorithm 1) has none: leave zeta out")
    if guided.obs.y.ndim and guided.obs.y.shape == getattr(guided.obs.operator(x), "shape", None):
        raise ValueError(f"guided.obs.y must be one observation, since particles are exchanged, got one for each: {tuple(guided.obs.y.shape)}")
    check_sde(sde)
    check_generator(generator)
    check_positive(resample_below=resample_below, last_step=last_step)
    informed = 10 * getattr(guided.denoiser, "sigma_data", math.inf)
    grid = karras_times(sde, steps, sigma_max=min(float(sde.sigma(1.0)), 2 * informed)) if times is None else check_times(times)
    if grid[-1] != 0:
        raise ValueError(f"times must end at 0, got {grid[-1]}")
    inner = grid if sde.sigma(0.0) > 0 else grid[:-1]
    place = torch.device("cpu") if x.device.type == "mps" else x.device
    n, z = len(x), x / expand(sde.scale(inner[0]), x)

    def look(z: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        x0_hat, shift, log_twist, pull = guided.evaluate(z, sde.sigma(t).to(z))
        assert log_twist is not None  # asked for
        known = float(sde.sigma(t) <= informed)
        return x0_hat, shift * known, log_twist.to(place, torch.float64) * known, pull

    x0_hat, shift, log_twist, pull = look(z, inner[0])
    log_weights, log_evidence, ess = log_twist, torch.zeros((), dtype=torch.float64, device=place), []
    for t, s in pairwise(inner):
        ess.append(_effective(log_weights))
        if ess[-1] < resample_below * n:
            log_evidence = log_evidence + log_weights.logsumexp(0) - math.log(n)
            z = z[systematic(log_weights, n, generator).to(z.device)]
            x0_hat, shift, log_twist, pull = look(z, t)
            log_weights = torch.zeros_like(log_weights)
        q = expand((sde.sigma(s) / sde.sigma(t)) ** 2, z)
        sd = expand(sde.sigma(s), z) * (1 - q).sqrt()
        beta = (sd**2 + ((1 - q) * expand(sde.sigma(t), z)) ** 2).sqrt() - sd
        noise, move = randn_like(z, generator), (1 - q) * shift / sd
        z = q * z + (1 - q) * x0_hat + sd * (noise + move) + beta * pull(noise + move)
        log_weights = log_weights - (move * (move / 2 + noise)).flatten(1).to(place, torch.float64).sum(1) - log_twist
        x0_hat, shift, log_twist, pull = look(z, s)
        log_weights = log_weights + log_twist
    x0 = z + last_step * (x0_hat - z)
    log_weights = log_weights + guided.obs.log_likelihood(x0).to(place, torch.float64) - log_twist
    ess.append(_effective(log_weights))
    log_evidence = log_evidence + log_weights.logsumexp(0) - math.log(n)
    return Particles(x0, log_weights.log_softmax(0).to(x.device), torch.stack(ess), log_evidence)


def _effective(log_weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w²."""
    if not log_weights.max().isfinite():
        raise FloatingPointError("all weights vanished: y is impossible under the prior, or too few particles are near it")
    return 1 / log_weights.softmax(0).square().sum()
