r"""Twisted sequential Monte Carlo: guidance proposes, weights make up for what is wrong with it."""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Random, Times, randn_like
from .chain import reverse_moments
from .guided import Guidance, Guided
from .sampling import check_run, karras_times
from .sde import SDE


@dataclass(frozen=True, eq=False)
class Particles:
    """Weighted draws from p(x_0 | y).

    x: (n, *dims). log_weights: (n,), exp of them sums to 1. ess: effective sample size before each
    step, and at the end. log_evidence: estimate of log p(y), a scalar. The last three are on the
    CPU in float64. ancestors: (n,), from which of the first particles each one comes.
    """

    x: Tensor
    log_weights: Tensor
    ess: Tensor
    log_evidence: Tensor
    ancestors: Tensor

    def resample(self, n: int, generator: Random = None) -> Tensor:
        """n unweighted draws, (n, *dims), by systematic resampling."""
        index = systematic(self.log_weights, check.count("n", n), generator)
        return self.x[index.to(self.x.device)]


def systematic(log_weights: Tensor, n: int, generator: Random = None) -> Tensor:
    """n indices, k about n w_k times, shuffled: n equal steps through the cumulative weights."""
    check.generator(generator)
    device = log_weights.device if generator is None else generator.device
    offset = float(torch.rand((), generator=generator, device=device))
    points = torch.arange(n, dtype=log_weights.dtype, device=log_weights.device)
    cumulative = log_weights.softmax(0).cumsum(0)
    index = torch.searchsorted(cumulative / cumulative[-1], (points + offset) / n)
    order = torch.randperm(n, generator=generator, device=device).to(log_weights.device)
    return index.clamp(max=len(log_weights) - 1)[order]


def effective(log_weights: Tensor) -> Tensor:
    """Effective sample size (Σ w)² / Σ w²."""
    if log_weights.isnan().any():
        raise FloatingPointError("weights are NaN: the denoiser, its derivative or A is not finite")
    if log_weights.max() == -math.inf:
        causes = "y is impossible under the prior, or too few particles are near it"
        raise FloatingPointError(f"all weights vanished: {causes}")
    return 1 / log_weights.softmax(0).square().sum()


def log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean weight."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def check_particles(
    sde: SDE, guided: Guided, x: Tensor, steps: int, times: Times | None, generator: Random
) -> list[float]:
    """The doors: a guided denoiser, one observation for all, and `sample`'s. Returns the times."""
    good = callable(getattr(guided, "look", None)) and hasattr(guided, "obs")
    check.kind(good, "guided must be a guided denoiser, as su.MMPS(denoiser, obs)", guided)
    check.batch("x", x)
    guided.obs.check_single(x)
    if times is None:
        size = getattr(getattr(guided, "denoiser", None), "sigma_data", 1.0)
        times = karras_times(sde, steps, size)
    return check_run(sde, guided, x, times, generator)


@torch.no_grad()
def twisted_smc(
    sde: SDE,
    guided: Guided,
    x: Tensor,
    *,
    steps: int = 100,
    times: Times | None = None,
    resample_below: float = 0.5,
    generator: Random = None,
) -> Particles:
    r"""Particles for p(x_0 | y): propose by a guided step, weigh by what the unguided would do.

    Given z at σ_t, the reverse process has at σ_s the mean m and about the covariance L²,

        m = q z + (1 - q) D,   L = ν I + β J,

    q, ν, β as in `chain.reverse_moments`; ancestral sampling keeps ν alone. A step draws
    n ~ N(0, I) and goes to m + L (n + a), a = (1 - q) (D_y - D) / ν. Its weight is

        p̃(y | z_s) / p̃(y | z_t) exp(-a·n - |a|²/2),   p̃ the method's p(y | z),

    that of the last step, to D, p(y | D) / p̃(y | z). The evidence is unbiased, and as n grows the
    draws become exact, up to the chain's steps and the denoiser's error. A step costs one network
    call, the guidance's vector-Jacobian products and one more; a resampling costs one more look.

    Args:
        guided: whatever has `look` and `obs`, as Annealed, DPS, PiGDM, MMPS.
        x: (n, *dims), as from `sde.prior`; σ(1) has to exceed the size of the data.
        times: as in `sample`; `karras_times(sde, steps, sigma_data)` if None, in units of the
            denoiser's sigma_data, else 1. The first step, from times[0] to the next, is unguided:
            there z says next to nothing of x_0, and a learned J much that is wrong.
        resample_below: resample where the effective size falls below this share of n; 0: never.
    Raises as `sample` does, `FloatingPointError` if all weights vanish or are NaN; warns if fewer
    than one in twenty particles was left.
    Source: Wu et al. 2023 (arXiv 2306.17775), algorithm 1, with L in the place of ν I.
    """
    times = check_particles(sde, guided, x, steps, times, generator)
    threshold = check.number("resample_below", resample_below, 0, 1, "[]") * len(x)
    z, levels = x / float(sde.scale(times[0])), [float(sde.sigma(t)) for t in times]
    now = guided.look(z, levels[0])._replace(shift=torch.zeros_like(z), log_p=z.new_zeros(len(z)))
    log_w = torch.zeros(len(z), dtype=torch.float64, device="cpu")
    log_evidence, sizes = log_w.new_zeros(()), []
    ancestors = torch.arange(len(z), device="cpu")
    for sigma_t, sigma_s in pairwise(levels):
        sizes.append(effective(log_w))
        if sizes[-1] < threshold:
            log_evidence = log_evidence + log_mean(log_w)
            index = systematic(log_w, len(z), generator)
            z, ancestors = z[index.to(z.device)], ancestors[index]
            now, log_w = guided.look(z, sigma_t), torch.zeros_like(log_w)
        z, log_ratio = propose(now, z, sigma_t, sigma_s, generator)
        new = guided.look(z, sigma_s)
        log_w = log_w + (new.log_p - now.log_p + log_ratio).cpu().double()
        now = new
    last = guided.obs.log_likelihood(now.x0_hat) - now.log_p
    log_w = log_w + last.cpu().double()
    ess = torch.stack([*sizes, effective(log_w)])
    warn_of_collapse(ess, len(x), "more steps, or a twist of the right width")
    log_evidence = log_evidence + log_mean(log_w)
    return Particles(now.x0_hat, log_w.log_softmax(0), ess, log_evidence, ancestors)


def warn_of_collapse(ess: Tensor, n: int, remedy: str) -> None:
    """Where fewer than one in twenty of n particles was left."""
    if ess.min() < n / 20:
        found = f"particles collapsed: {float(ess.min()):.1f} effective of {n}"
        advice = f"shares and evidence are guesses: take more of them, {remedy}"
        warnings.warn(f"{found}; {advice}", stacklevel=4)


def propose(
    now: Guidance, z: Tensor, sigma_t: float, sigma_s: float, generator: Random
) -> tuple[Tensor, Tensor]:
    """z_s by the guided step, and -a·n - |a|²/2, log of unguided over guided density, (n,)."""
    q, nu, beta = reverse_moments(sigma_t, sigma_s)
    a, noise = (1 - q) / nu * now.shift, randn_like(z, generator)
    move = nu * (noise + a) + beta * now.J(noise + a)
    return q * z + (1 - q) * now.x0_hat + move, -(a * (noise + a / 2)).flatten(1).sum(1)


def equal_particles(x: Tensor, log_w: list[Tensor], ancestors: Tensor) -> Particles:
    """Equal particles; their sizes and the evidence from the weights, one row a level."""
    ess, n = torch.stack([effective(row) for row in log_w]), len(x)
    warn_of_collapse(ess, n, "or more sweeps")
    log_evidence = torch.stack([log_mean(row) for row in log_w]).sum()
    equal = torch.full((n,), -math.log(n), dtype=torch.float64, device="cpu")
    return Particles(x, equal, ess, log_evidence, ancestors)
