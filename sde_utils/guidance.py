r"""Guidance turns a denoiser into a denoiser, and a method is a covariance.

All methods here say that y is Gaussian given z, around A(x̂), x̂ = D(z, σ). They differ in nothing
but its covariance S, and D_y follows by Tweedie's formula:

    log p(y | z) = log N(y; A(x̂), S),
    D_y = x̂ + σ² ∇_z log p(y | z) = x̂ + σ² Jᵀ Hᵀ S⁻¹ (y - A(x̂)),   J = ∂x̂/∂z,  H = ∂A/∂x̂.

Stiffness. σ² J is the covariance of x_0 given z. With S = σ_y² I the correction has the slope
|H|² (σ² J)² / (σ² σ_y²) in z: it falls like v² / (σ² σ_y²) at large σ, where σ² J is the data's
variance v, and is σ² / σ_y² at small σ along the data. In between, and wherever a learned J is too
large, no explicit step follows it if σ_y is small. The exact correction is the shift of a mean, by
a few σ at most in each of m directions. So each sample's is held to

    |σ² ∇_z log p(y | z)| <= max_shift σ sqrt(min(m, d)),   m numbers observed, d dimensions.

Below σ_y, where the width of the result is decided, that changes nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ._numerics import (
    Denoise,
    Predictor,
    check_count,
    check_function,
    check_number,
    conjugate_gradient,
    differentiable,
    expand,
    kind,
)
from .observation import Observation
from .tangent import Isotropic, Spectral, Tangent


class Guidance(NamedTuple):
    """What one network call at (z, σ) says of x_0 and of y."""

    x0_hat: Tensor  # D(z, σ), (B, *dims)
    shift: Tensor  # σ² ∇_z log p(y | z), (B, *dims)
    log_p: Tensor  # log p(y | z), (B,)
    J: Callable[[Tensor], Tensor]  # v -> J v


@dataclass(frozen=True, eq=False)
class Guided:
    """`guided(z, sigma)` is D_y. A method is a class of one method, `covariance`.

    Args: denoiser: D(z, σ), differentiable. obs: what was observed. max_shift: > 0; inf: no bound.
    """

    denoiser: Denoise
    obs: Observation
    max_shift: float = field(default=3.0, kw_only=True)

    def __post_init__(self) -> None:
        check_function("denoiser", self.denoiser, "a function D(z, sigma)")
        if not isinstance(self.obs, Observation):
            raise TypeError(f"obs must be an Observation, got {kind(self.obs)}")
        check_number("max_shift", self.max_shift, ends="(]")

    def covariance(self, at: Tangent) -> Isotropic | Spectral:
        """S at z."""
        raise NotImplementedError

    def weights(self, at: Tangent) -> Tensor:
        """S⁻¹ r, (B, m)."""
        return self.covariance(at).solve(at.r)

    def shift(self, at: Tangent, weights: Tensor, last: bool = False) -> Tensor:
        """σ² Jᵀ Hᵀ weights, bounded, (B, *dims)."""
        shift = at.sigma**2 * at.JHt(weights, last)
        if self.max_shift == math.inf:
            return shift
        length = shift.flatten(1).norm(dim=1).clamp(min=torch.finfo(shift.dtype).tiny)
        bound = self.max_shift * at.levels * math.sqrt(min(at.r.shape[1], shift[0].numel()))
        return shift * expand((bound / length).clamp(max=1), shift)

    def __call__(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """E[x_0 | z, y], approximately.

        Args: z: (B, *dims). sigma: number, scalar tensor or (B,).   Returns: (B, *dims).
        """
        at = Tangent(self.denoiser, self.obs, z, sigma)
        return at.x0_hat + self.shift(at, self.weights(at), last=True)

    def look(self, z: Tensor, sigma: float | Tensor) -> Guidance:
        """All that a particle at z has to know, arguments as above."""
        at = Tangent(self.denoiser, self.obs, z, sigma)
        S = self.covariance(at)
        w, m = S.solve(at.r), at.r.shape[1]
        log_p = -((at.r * w).sum(1) + S.log_det(at.r) + m * math.log(2 * math.pi)) / 2
        return Guidance(at.x0_hat, self.shift(at, w), log_p, at.J)

    def log_likelihood(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """The method's log p(y | z), (B,), arguments as above."""
        return self.look(z, sigma).log_p

    def check(self, x: Tensor) -> None:
        """The door of a run: the operator is tried on x, scaled to unit size, before any step.

        Raises what `Observation.residual` raises; warns where A has no slope at all.
        """
        with torch.inference_mode(False), torch.enable_grad():
            point = (x / x.square().mean().sqrt().clamp(min=1e-6)).detach().clone()
            distance = self.obs.residual(point.requires_grad_()).square().sum()
            (slope,) = torch.autograd.grad(distance, point)
        if not slope.any():
            warnings.warn(
                "operator has the gradient 0 everywhere (round, sign, a threshold?): "
                "guidance will do nothing",
                stacklevel=4,
            )


@dataclass(frozen=True, eq=False)
class DPS(Guided):
    r"""All of p(x_0 | z) put at its mean.

        S = σ_y² I.

    One vector-Jacobian product. Source: Chung et al. 2023 (arXiv 2209.14687), eq. 11 to 16.
    """

    def covariance(self, at: Tangent) -> Isotropic:
        return Isotropic(torch.full_like(at.levels, at.noise))


@dataclass(frozen=True, eq=False)
class Annealed(Guided):
    r"""The likelihood widened by the noise that is still in z.

        S = (σ_y² + σ²) I.

    One vector-Jacobian product. Source: Jalal et al. 2021 (arXiv 2108.01368), there at z, not x̂.
    """

    def covariance(self, at: Tangent) -> Isotropic:
        return Isotropic(at.noise + at.levels**2)


@dataclass(frozen=True, eq=False)
class PiGDM(Guided):
    r"""Every direction of the data as wide as any other; exact for data N(μ, v I).

        S = σ_y² I + ρ² A Aᵀ,   ρ² = σ² v / (σ² + v).

    One vector-Jacobian product; A becomes a matrix once, here (`ValueError` if it is not linear).
    Args:
        shape: of one x_0, dims.
        variance: v, that of the data; `denoiser.sigma_data`² if None, 1 where there is no such.
    Source: Song, J., et al. 2023, Pseudoinverse-guided diffusion models (ICLR).
    """

    shape: tuple[int, ...]
    variance: float | None = None
    max_shift: float = field(default=10.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        variance = self.variance
        if variance is None:
            variance = getattr(self.denoiser, "sigma_data", 1.0) ** 2
        object.__setattr__(self, "variance", check_number("variance", variance))
        assert self.gram  # refuses a crooked A before any work

    @cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """A Aᵀ = U diag(values) Uᵀ."""
        matrix = self.obs.matrix(self.shape)
        values, basis = torch.linalg.eigh(matrix @ matrix.T)
        return values.clamp(min=0), basis

    def covariance(self, at: Tangent) -> Spectral:
        wide = torch.promote_types(at.r.dtype, torch.float32)
        values, basis = (a.to(at.r.device, wide) for a in self.gram)
        square = at.levels[:, None].to(wide) ** 2
        return Spectral(at.noise + square * self.variance / (square + self.variance) * values, basis)


@dataclass(frozen=True, eq=False)
class MMPS(Guided):
    r"""The covariance of x_0 given z by Tweedie's formula, σ² J; exact for Gaussian data.

        S = σ_y² I + σ² H J Hᵀ.

    Up to `dense` observed numbers S is built, by one vector-Jacobian product each; where a learned
    J is not positive, the direction has no say. Above, S⁻¹ r takes `iterations` of conjugate
    gradients, one product each, and one more at the end; log p(y | z) builds S in any case.
    Source: Rozet et al. 2024 (arXiv 2405.13712), section 4.2, for linear A; H linearises others.
    """

    dense: int = field(default=8, kw_only=True)
    iterations: int = field(default=5, kw_only=True)
    max_shift: float = field(default=10.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("dense", self.dense)
        check_count("iterations", self.iterations)

    def covariance(self, at: Tangent) -> Spectral:
        h, g = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in at.rows)
        product = at.levels[:, None, None].to(g) ** 2 * g @ h.mT
        values, basis = torch.linalg.eigh((product + product.mT) / 2)
        return Spectral(at.noise + values.clamp(min=0), basis * (values > 0)[:, None])

    def weights(self, at: Tangent) -> Tensor:
        if at.r.shape[1] <= self.dense:
            return super().weights(at)
        square = at.levels[:, None] ** 2
        return conjugate_gradient(
            lambda u: at.noise * u + square * at.H(at.JHt(u)), at.r, self.iterations
        )


def dps_step(predictor: Predictor, obs: Observation, zeta: float) -> Predictor:
    r"""Algorithm 1 of the DPS paper. It forgets σ_y, and so is a step, no denoiser.

        x_s = predictor(x_t) - ζ ∇_{x_t} |r|² / |r|,   r = y - A(D(z_t, σ_t)), norms per sample.

    Published with `ancestral`. The last step, to x_0, is `sample`'s. No bound; ζ is tuned.
    Args: predictor: as `sample` takes it. zeta: ζ > 0.   Returns: a predictor.
    Source: Chung et al. 2023 (arXiv 2209.14687), algorithm 1.
    """
    check_function("predictor", predictor, "a function of one step, as su.ancestral")
    zeta = check_number("zeta", zeta)

    def step(sde, denoiser, x, t, s, generator=None):  # type: ignore[no-untyped-def]
        r, sigma = float(sde.scale(t)), x.new_full((), float(sde.sigma(t)))
        z, x0_hat = differentiable(denoiser, x / r, sigma)
        with torch.enable_grad():
            norm = obs.residual(x0_hat).norm(dim=1).sum()
        (gradient,) = torch.autograd.grad(norm, z)  # ∇|r|² / |r| = 2 ∇|r|, and ∇_x = ∇_z / r
        known = [x0_hat.detach()]

        def told(z: Tensor, sigma: Tensor) -> Tensor:
            return known.pop() if known else denoiser(z, sigma)  # the first call has been made

        return predictor(sde, told, x, t, s, generator) - 2 * zeta / r * gradient

    return step
