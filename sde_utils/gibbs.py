r"""Posteriors by the plain, unguided sampler, for linear A: split Gibbs at a finite noise level.

With A = U diag(s) Vᵀ, c = Vᵀx and e = Uᵀy, and a noise level ρ, the tempered posterior is

    π_ρ(x) ∝ p(x) Π_i N(e_i; s_i c_i, v_i),   v_i = max(σ_y², ρ² s_i²),

the prior for large ρ, and p(x | y) itself from ρ* = σ_y / max s downward. Let z = x + ρ ε, and let
ρ ε be part of the noise that A sees: e = s Vᵀz + n, n_i ~ N(0, v_i - ρ² s_i²). That is the same law
of (x, y), so that draws of z given (x, y) and of x given z in turn leave π_ρ alone. The first is a
Gaussian's, the second is what a diffusion model is for: its reverse process from σ = ρ, without y.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Denoise, Random, randn_like
from .chain import Chain, reverse_chain
from .observation import Observation
from .sde import SDE, check_sde
from .smc import Particles, effective, equal_particles, systematic


@dataclass(frozen=True, eq=False)
class SplitGibbs:
    r"""The kernel: z given x and y in closed form, x given z by a chain that never sees y.

        z' = x + ρ n,   e' = s Vᵀz' + sqrt(v - ρ² s²) n',   z = z' + V ((ρ² s / v) (e - e')).

    Args:
        obs: one observation; its operator is linear, else `ValueError`.
        shape: of one x_0, dims.
        chain: (z, ρ, generator) -> x, as from `reverse_chain`.
    A costs one singular value decomposition, O(d m²), and O(d min(d, m)) numbers.
    Source: noise that is part of the measurement's: Kawar et al. 2021 (arXiv 2105.14951); split
    Gibbs, y independent of ρ ε and so exact for ρ -> 0 only: Wu et al. 2024 (arXiv 2405.18782).
    """

    obs: Observation
    shape: Sequence[int]
    chain: Chain
    s: Tensor = field(init=False)  # (k,), k = min(m, d)
    vh: Tensor = field(init=False)  # Vᵀ, (k, d)
    e: Tensor = field(init=False)  # (k,)
    outside: float = field(init=False)  # |y - U e|²

    def __post_init__(self) -> None:
        check.function("chain", self.chain, "a function (z, rho, generator) -> x", 3)
        check.kind(isinstance(self.obs, Observation), "obs must be an Observation", self.obs)
        matrix = self.obs.matrix(self.shape)
        self.obs.check_single(torch.zeros(1, *self.shape, dtype=self.obs.y.dtype))
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        check.require(s[0] > 0, "operator must not be 0 everywhere")
        y = self.obs.y.detach().cpu().double().reshape(-1)
        vars(self).update(s=s, vh=vh, e=y @ u, outside=float((y - u @ (u.T @ y)).square().sum()))

    @cached_property
    def rho(self) -> float:
        """ρ* = σ_y / max s: from here downward π_ρ is the posterior."""
        return self.obs.noise_std / float(self.s[0])

    def log_likelihood(self, x: Tensor, rho: float) -> Tensor:
        """log N(y; A x, S_ρ), S_ρ with the eigenvalues v_i and σ_y², (n,), float64, CPU."""
        rho, noise = check.at_level(x, self.shape, rho), self.obs.noise_std**2
        v = (rho * self.s).square().clamp(min=noise)
        residual = self.e - self.s * (x.flatten(1) @ self.vh.T.to(x)).cpu().double()
        extra = self.obs.y.numel() - len(self.s)
        constant = (2 * math.pi * v).log().sum() + extra * math.log(2 * math.pi * noise)
        return -(residual.square() / v).sum(1) / 2 - (constant + self.outside / noise) / 2

    def couple(self, x: Tensor, rho: float, generator: Random = None) -> Tensor:
        """z given x and y, (n, *dims)."""
        rho = check.at_level(x, self.shape, rho)
        s, vh, e = (a.to(x) for a in (self.s, self.vh, self.e))
        spread = (rho * s).square()
        v = spread.clamp(min=self.obs.noise_std**2)
        z = (x + rho * randn_like(x, generator)).flatten(1)
        seen = s * (z @ vh.T)
        seen = seen + (v - spread).sqrt() * randn_like(seen, generator)
        return (z + (rho**2 * s / v * (e - seen)) @ vh).reshape(x.shape)

    def __call__(self, x: Tensor, rho: float | None = None, generator: Random = None) -> Tensor:
        """One sweep at ρ, ρ* if None: π_ρ stays π_ρ.   Args: x: (n, *dims)."""
        rho = self.rho if rho is None else check.number("rho", rho)
        return check.drawn(self.chain, self.couple(x, rho, generator), rho, generator)

    def next_level(self, x: Tensor, now: Tensor, rho: float, least: float) -> float:
        """The lowest level from ρ* to ρ at which as many particles as `least` stay effective."""
        low = high = self.rho
        while high < rho and self.left(x, now, high) < least:
            low, high = high, 2 * high
        high = min(high, rho)
        for _ in range(30 if high > low else 0):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.left(x, now, middle) >= least else (middle, high)
        return high

    def left(self, x: Tensor, now: Tensor, rho: float) -> float:
        """Effective sample size after a move of the level to ρ."""
        return float(effective(self.log_likelihood(x, rho) - now))


@torch.no_grad()
def tempered_smc(
    sde: SDE,
    denoiser: Denoise,
    obs: Observation,
    x: Tensor,
    n: int | None = None,
    *,
    sweeps: int = 1,
    final: int = 5,
    keep: float = 0.7,
    chain: Chain | None = None,
    generator: Random = None,
) -> Particles:
    r"""Particles for p(x_0 | y), A linear: draws of the prior, led through π_ρ down to ρ*.

    From one level to the next a particle weighs N(y; A x, S_ρ') / N(y; A x, S_ρ): the prior
    cancels, and no network is asked. Half as many, but at least n, are resampled, and moved by
    `sweeps` sweeps of `SplitGibbs` at the new level, at ρ* n of them by `final`. A level is as low
    as leaves keep times as many effective as are resampled. Many draws at the start cost little,
    and it is there that modes part. Exact as n grows, for the prior whose x given z the chain
    draws.

    Args:
        denoiser: D(z, σ), not differentiated.
        x: (N, *dims), draws of the prior, as from `sample`; good for any number of observations.
        n: of particles, at most N; N if None.   sweeps, final: at least 1.   keep: in (0, 1).
        chain: of the sweeps; `reverse_chain(sde, denoiser)` if None.
    Returns: n particles of equal weight. Raises as `SplitGibbs` does; warns of a collapse.
    Source: Del Moral, Doucet & Jasra 2006, J. R. Stat. Soc. B 68, for the sampler.
    """
    sweeps, final = check.count("sweeps", sweeps), check.count("final", final)
    keep, n = check.number("keep", keep, 0, 1), check_draws(denoiser, x, n)
    kernel = SplitGibbs(obs, x.shape[1:], chain or reverse_chain(sde, denoiser))
    check_levels(sde, kernel.rho)
    rho, weights, ancestors = math.inf, [], torch.arange(len(x), device="cpu")
    now = torch.zeros(len(x), dtype=torch.float64, device="cpu")
    while rho > kernel.rho:
        left = max(n, len(x) // 2)
        rho = kernel.next_level(x, now, rho, keep * left)
        check.require(rho <= float(sde.sigma(1.0)), "y is impossible, or no particle is near it")
        weights.append(kernel.log_likelihood(x, rho) - now)
        index = systematic(weights[-1], left if rho > kernel.rho else n, generator)
        index = index.sort().values  # relatives side by side: a family keeps its share within one
        x, ancestors = x[index.to(x.device)], ancestors[index]
        for _ in range(sweeps if rho > kernel.rho else final):
            x = kernel(x, rho, generator)
        now = kernel.log_likelihood(x, rho)
    return equal_particles(x, weights, ancestors)


def check_draws(denoiser: Denoise, x: Tensor, n: int | None) -> int:
    """The doors of prior draws: the prior's denoiser, no noise, no fewer than n. Returns n."""
    check.batch("x", x)
    guided = hasattr(denoiser, "look")
    check.kind(not guided, "denoiser must be the prior's: a guided one counts y twice", denoiser)
    size, data = float(x.float().square().mean().sqrt()), getattr(denoiser, "sigma_data", math.inf)
    found = f"its root mean square is {size:.3g}, the data's spread {data:.3g}"
    remedy = "draws of the prior, as from su.sample, not noise"
    check.require(size < 10 * data, f"x must be {remedy}: {found}")
    return len(x) if n is None else check.count("n", n, most=len(x))


def check_levels(sde: SDE, rho: float) -> None:
    """ρ* must be a level of the SDE."""
    check_sde(sde)
    good = float(sde.sigma(0)) < rho < float(sde.sigma(1))
    check.require(good, f"sde must have σ(0) < σ_y / |A| < σ(1), got σ_y / |A| = {rho:g}")
