"""What a method of guidance is made of: derivatives at a point, a covariance, the shift."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Denoise, as_level, differentiable, expand, product
from .observation import Observation


class Tangent:
    """x̂ = D(z, σ) and r = y - A(x̂), by one network call, and products with their derivatives."""

    def __init__(
        self, denoiser: Denoise, obs: Observation, z: Tensor, sigma: float | Tensor
    ) -> None:
        check.batch("z", z, finite=False)
        self.noise, self.sigma = obs.noise_std**2, as_level(sigma, z)  # σ_y², and σ over z's dims
        self.levels = self.sigma.flatten()  # σ, (1,) or (B,)
        level = self.levels if self.sigma.ndim else self.sigma
        self.z, self._x0_hat = differentiable(denoiser, z, level)
        with torch.inference_mode(False), torch.enable_grad():
            self.point = self._x0_hat.detach().requires_grad_()
            self._r = obs.residual(self.point.clone())  # a leaf may not be written to
        self.x0_hat, self.r = self._x0_hat.detach(), self._r.detach()  # (B, *dims), (B, m)

    def J(self, v: Tensor, last: bool = False) -> Tensor:
        """J v, (B, *dims). J is symmetric: σ² J is a covariance. After the `last` no other."""
        return product(self._x0_hat, self.z, v, last)

    def Ht(self, u: Tensor) -> Tensor:
        """Hᵀ u, (B, m) -> (B, *dims)."""
        return torch.autograd.grad(self._r, self.point, -u, retain_graph=True)[0]

    def H(self, v: Tensor) -> Tensor:
        """H v, (B, *dims) -> (B, m): the derivative of u -> Hᵀ u."""
        return torch.autograd.grad(self._pulled[1], self._pulled[0], v, retain_graph=True)[0]

    @cached_property
    def _pulled(self) -> tuple[Tensor, Tensor]:
        u = torch.zeros_like(self._r).requires_grad_()
        with torch.enable_grad():
            return u, torch.autograd.grad(self._r, self.point, -u, create_graph=True)[0]

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """H and H J, (B, m, d) each, by m products."""
        units = torch.eye(self.r.shape[1], dtype=self.r.dtype, device=self.r.device)
        h = [self.Ht(unit.expand_as(self.r)) for unit in units]
        g = [self.J(row) for row in h]
        return torch.stack(h, dim=1).flatten(2), torch.stack(g, dim=1).flatten(2)

    def JHt(self, u: Tensor, last: bool = False) -> Tensor:
        """J Hᵀ u, from the rows of H J where they have been built."""
        if "rows" in self.__dict__:
            return (u[:, None] @ self.rows[1]).reshape(self.z.shape)
        return self.J(self.Ht(u), last)


class Isotropic(NamedTuple):
    """S = s I."""

    s: Tensor  # (1,) or (B,)

    def solve(self, r: Tensor) -> Tensor:
        """S⁻¹ r, (B, m)."""
        return r / self.s[:, None]

    def log_prob(self, r: Tensor) -> Tensor:
        """log N(r; 0, S), (B,)."""
        return -(r.square() / self.s[:, None] + (2 * math.pi * self.s[:, None]).log()).sum(1) / 2


class Spectral(NamedTuple):
    """S = U diag(λ) Uᵀ; where `live` is not, S⁻¹ is taken as 0."""

    values: Tensor  # λ, (B, m)
    basis: Tensor  # U, (m, m) or (B, m, m)
    live: Tensor | bool = True  # (B, m)

    def along(self, r: Tensor) -> Tensor:
        """Uᵀ r, (B, m)."""
        return (r.to(self.basis)[:, None] @ self.basis)[:, 0]

    def solve(self, r: Tensor) -> Tensor:
        """S⁻¹ r, (B, m)."""
        e = self.along(r) / self.values * self.live
        return (e[:, None] @ self.basis.mT)[:, 0].to(r)

    def log_prob(self, r: Tensor) -> Tensor:
        """log N(r; 0, S), (B,)."""
        terms = self.along(r).square() / self.values + (2 * math.pi * self.values).log()
        return -terms.sum(1).to(r) / 2


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
        check.function("denoiser", self.denoiser, "a function D(z, sigma)")
        check.kind(isinstance(self.obs, Observation), "obs must be an Observation", self.obs)
        check.number("max_shift", self.max_shift, ends="(]")

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
        return Guidance(at.x0_hat, self.shift(at, S.solve(at.r)), S.log_prob(at.r), at.J)

    def log_likelihood(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """The method's log p(y | z), (B,), arguments as above."""
        return self.look(z, sigma).log_p

    def check(self, x: Tensor) -> None:
        """The door of a run: the operator is tried on x, scaled to unit size, before any step.

        Raises what `Observation.residual` raises; warns where A has no slope at all.
        """
        with torch.inference_mode(False), torch.enable_grad():
            point = (x / x.square().mean().sqrt().clamp(min=1e-6)).detach().clone()
            distance = self.obs.residual(point.requires_grad_().clone()).square().sum()
            (slope,) = torch.autograd.grad(distance, point)
        if not slope.any():
            found = "operator has the gradient 0 everywhere (round, sign, a threshold?)"
            warnings.warn(f"{found}: guidance will do nothing", stacklevel=5)
