"""What a guided denoiser needs at one point: derivatives of A(D(z, σ)), and covariances of y given z."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ._numerics import Denoise, as_level, check_batch, differentiable
from .observation import Observation


class Tangent:
    """x̂ = D(z, σ) and r = y - A(x̂), by one network call, and products with their derivatives."""

    def __init__(self, denoiser: Denoise, obs: Observation, z: Tensor, sigma: float | Tensor):
        check_batch("z", z, finite=False)
        self.noise, self.sigma = obs.noise_std**2, as_level(sigma, z)  # σ_y², and σ over z's dims
        self.levels = self.sigma.flatten()  # σ, (1,) or (B,)
        level = self.levels if self.sigma.ndim else self.sigma
        self.z, self._x0_hat = differentiable(denoiser, z, level)
        with torch.inference_mode(False), torch.enable_grad():
            self.point = self._x0_hat.detach().requires_grad_()
            self._r = obs.residual(self.point)
        self.x0_hat, self.r = self._x0_hat.detach(), self._r.detach()  # (B, *dims), (B, m)

    def J(self, v: Tensor, last: bool = False) -> Tensor:
        """J v, (B, *dims). J is symmetric: σ² J is a covariance. After the `last` no other."""
        return torch.autograd.grad(self._x0_hat, self.z, v, retain_graph=not last)[0]

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

    def log_det(self, r: Tensor) -> Tensor:
        """log det S, (1,) or (B,)."""
        return r.shape[1] * self.s.log()


class Spectral(NamedTuple):
    """S = U diag(λ) Uᵀ."""

    values: Tensor  # λ, (B, m)
    basis: Tensor  # U, (m, m) or (B, m, m)

    def solve(self, r: Tensor) -> Tensor:
        """S⁻¹ r, (B, m)."""
        e = (r.to(self.basis)[:, None] @ self.basis) / self.values[:, None]
        return (e @ self.basis.mT)[:, 0].to(r)

    def log_det(self, r: Tensor) -> Tensor:
        """log det S, (B,)."""
        return self.values.log().sum(1).to(r)
