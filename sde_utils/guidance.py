"""Guidance turns a denoiser into a denoiser: `D_y(z, σ) = D(z, σ) + σ² ∇_z log p(y | z)`. The methods differ in what stands for p(y | z).

Stiffness: DPS divides by σ_y² alone. Its correction is σ² Jᵀ Hᵀ (y - A(x̂)) / σ_y², and with σ² J = Cov[x_0 | z] its slope in z is about
|H|² Cov[x_0 | z]² / (σ² σ_y²). At large σ, where Cov[x_0 | z] is the data's variance v, that falls like v² / (σ² σ_y²); at small σ, where it
is σ² along the data, it is σ² / σ_y². Between the two it is steepest, and where σ_y is far below the data's size no explicit step follows it.
The exact correction is never that steep: it is E[x_0 | z, y] - E[x_0 | z], a shift of a mean, and m observed numbers shift it along m
directions, by a few σ each at most. So each sample's correction is held to `max_shift` σ sqrt(m), or sqrt(d) where the dimension d is
smaller. Where σ is below σ_y, where the width of the result is decided, this changes nothing. PiGDM and MMPS divide by a variance that grows
with σ and are not stiff; their bound, 10, rarely acts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_batch, check_count, check_positive, conjugate_gradient, expand, holds
from .sde import SDE, Denoise


class Observation:
    r"""`y = A(x_0) + σ_y n`. Its log-likelihood is `log N(y; A(x_0), σ_y² I)`, normalised.

    Args: operator: A, any batched differentiable callable, (B, *dims) -> (B, *obs_dims). y: one observation, `obs_dims` (broadcast over
    the batch), or one per sample, (B, *obs_dims). noise_std: σ_y > 0.
    Raises `TypeError`/`ValueError` for an operator that cannot be called, a y that is not finite, or a y that does not fit A(x_0).
    """

    def __init__(self, operator: Callable[[Tensor], Tensor], y: float | Tensor, noise_std: float) -> None:
        if not callable(operator):
            raise TypeError(f"operator must be callable, got {type(operator).__name__}")
        check_positive(noise_std=noise_std)
        y = y if isinstance(y, Tensor) else torch.tensor(y, dtype=torch.float64, device="cpu")
        if not y.is_floating_point():
            raise TypeError(f"y must be a floating-point number or tensor, got {y.dtype}")
        if not holds(y.isfinite().all()):
            raise ValueError("y must be finite, but holds NaN or infinity")
        self.operator, self.y, self.noise_std = operator, y, float(noise_std)
        self.size: int | None = None  # m, the observed numbers a sample, known once A has been called
        self._matrices: dict[object, Any] = {}  # by the inputs' shape: the operator's matrix, its singular values, whether it is linear

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x_0), (B, *obs_dims)."""
        version = None if x0.is_inference() else x0._version
        predicted = self.operator(x0)
        if version is not None and x0._version != version:
            raise ValueError("operator must not change its argument in place: begin it with x = x.clone()")
        if not isinstance(predicted, Tensor) or predicted.shape[:1] != x0.shape[:1]:
            got = tuple(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
            raise ValueError(f"operator must map (B, *dims) to (B, *obs_dims) with B = {len(x0)}, got {got}")
        if not predicted.is_floating_point():
            raise TypeError(f"operator must return real floating-point numbers (torch.view_as_real for complex ones), got {predicted.dtype}")
        if self.y.shape not in (predicted.shape, predicted.shape[1:]):
            one, all_ = tuple(predicted.shape[1:]), tuple(predicted.shape)
            raise ValueError(f"y must have shape {one} or {all_} to match A(x_0), got {tuple(self.y.shape)}")
        if x0.requires_grad and not predicted.requires_grad:
            raise ValueError("operator must be differentiable by autograd, but its result does not depend on its argument")
        self.size = predicted[0].numel()
        return self.y.to(predicted) - predicted

    def linear(self, x0: Tensor) -> bool:
        """Whether A(0) = 0 and A(u + v) = A(u) + A(v) up to rounding, for 64 random u and v of the shape of one of x0, (B, *dims).

        Asked once for each shape. 64 rows whatever B is: an operator with few outputs can be additive on a few by luck. Their entries are
        ten times cubes of normals, small and large ones, so that a clipped or nearly linear operator shows itself too.
        """
        key = ("linear", x0.shape[1:], x0.dtype)
        if key not in self._matrices:
            normal = torch.randn(2, 64, *x0.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
            u, v = 10 * normal.to(x0) ** 3
            with torch.no_grad():
                parts, whole, zero = (self.operator(u), self.operator(v)), self.operator(u + v), self.operator(torch.zeros_like(u[:1]))
            size = sum(part.abs().max() for part in parts)
            additive = (whole - parts[0] - parts[1]).abs().max() <= 1e3 * torch.finfo(x0.dtype).eps * size
            self._matrices[key] = holds(additive & (zero == 0).all())
        return self._matrices[key]

    def matrix(self, x0: Tensor) -> Tensor:
        """The operator as a matrix (m, d), for inputs like x0, (B, *dims); kept for later calls. `ValueError` if the operator is not linear."""
        if x0.shape[1:] not in self._matrices:
            if not self.linear(x0):
                raise ValueError("operator must be linear here, but A(u + v) is not A(u) + A(v): use MMPS, DPS or Annealed")
            identity = torch.eye(x0[0].numel(), dtype=x0.dtype, device=x0.device).reshape(-1, *x0.shape[1:])
            with torch.no_grad():
                self._matrices[x0.shape[1:]] = self.operator(identity).reshape(len(identity), -1).T
        return self._matrices[x0.shape[1:]].to(x0)

    def log_likelihood(self, x0: Tensor, variance: float | Tensor | None = None) -> Tensor:
        """log N(y; A(x_0), variance I), `variance` (float or (B,)) being σ_y² if None. x0: (B, *dims). Returns (B,)."""
        check_batch(x0, "x0")
        residual = self.residual(x0).reshape(len(x0), -1)  # (B, m)
        variance = torch.as_tensor(self.noise_std**2 if variance is None else variance, dtype=residual.dtype, device=residual.device)
        return -(residual**2).sum(1) / (2 * variance) - residual.shape[1] / 2 * (2 * math.pi * variance).log()


@dataclass(frozen=True)
class _Guided:
    """A denoiser and an observation. Subclasses say in `evaluate` what stands for p(y | z)."""

    denoiser: Denoise
    obs: Observation
    max_shift: float = 3.0

    def __post_init__(self) -> None:
        check_positive(max_shift=self.max_shift)
        if not callable(self.denoiser):
            raise TypeError(f"denoiser must be callable, got {type(self.denoiser).__name__}")
        if not isinstance(self.obs, Observation):
            raise TypeError(f"obs must be an Observation, got {type(self.obs).__name__}")

    def evaluate(self, z: Tensor, sigma: float | Tensor, log: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
        """By one network call: D(z, σ) and the shift σ² ∇ log p(y | z), both (B, *dims); log p(y | z), (B,), or None unless `log`; and
        the function u -> Jᵀ u, J = ∂D/∂z, by one vector-Jacobian product a call, to be called with `log` only: the graph is freed otherwise.
        """
        check_batch(z, "z")
        level = expand(sigma, z, "sigma")
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x0_hat = self.denoiser(z, level.flatten() if level.ndim else level)
            shift, log_likelihood = self._shift(z, x0_hat, level, log)
        length = shift.flatten(1).norm(dim=1)
        bound = self._bound(level.flatten() * math.sqrt(min(self.obs.size or math.inf, z[0].numel())))
        return (
            x0_hat.detach(),
            shift.detach() * expand((bound / length).clamp(max=1), z).detach(),
            None if log_likelihood is None else log_likelihood.detach(),
            lambda u: torch.autograd.grad(x0_hat, z, u, retain_graph=True)[0],
        )

    def _shift(self, z: Tensor, x0_hat: Tensor, level: Tensor, log: bool) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _bound(self, size: Tensor) -> Tensor:
        return self.max_shift * size

    def __call__(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """E[x_0 | z, y], approximately. z: (B, *dims); sigma: float, scalar tensor or (B,). Returns (B, *dims)."""
        x0_hat, shift, _, _ = self.evaluate(z, sigma, log=False)
        return x0_hat + shift

    def log_likelihood(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """The method's log p(y | z). z: (B, *dims); sigma: float, scalar tensor or (B,). Returns (B,)."""
        log_likelihood = self.evaluate(z, sigma)[2]
        assert log_likelihood is not None  # asked for
        return log_likelihood


@dataclass(frozen=True)
class Annealed(_Guided):
    r"""`p(y | z) ≈ N(y; A(x̂), (σ_y² + σ²) I)`, x̂ = D(z, σ): the likelihood widened by the noise still in z.

    One vector-Jacobian product. Source: Jalal et al. 2021 (arXiv 2108.01368), eq. 4, there at z in place of x̂.
    """

    def _variance(self, level: Tensor) -> Tensor:
        return self.obs.noise_std**2 + level.flatten() ** 2

    def _shift(self, z: Tensor, x0_hat: Tensor, level: Tensor, log: bool) -> tuple[Tensor, Tensor | None]:
        log_likelihood = self.obs.log_likelihood(x0_hat, self._variance(level))
        (gradient,) = torch.autograd.grad(log_likelihood.sum(), z, retain_graph=log)
        return level**2 * gradient, log_likelihood


@dataclass(frozen=True)
class DPS(Annealed):
    r"""`p(y | z) ≈ N(y; A(x̂), σ_y² I)`, x̂ = D(z, σ): all of p(x_0 | z) put at its mean. One vector-Jacobian product.

    With `zeta`, the step of the paper's Algorithm 1 instead, which forgets σ_y: an ancestral step t -> s is followed by
    `x_s <- x_s - (ζ / |y - A(x̂)|) ∇_{x_t} |y - A(x̂)|²`, norms per sample. What that asks of D_y depends on the step, so it needs the `sde`
    and the `times` that are given to `sample` too, with `predictor=ancestral`; no bound is applied. Source: Chung et al. 2023
    (arXiv 2209.14687), eq. 11 to 16 and algorithm 1.
    """

    zeta: float | None = None
    sde: SDE | None = None
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zeta is not None:
            check_positive(zeta=self.zeta)
            if self.sde is None or self.times is None or len(self.times) < 2:
                raise ValueError("zeta needs sde and the times of the sampler")

    def _variance(self, level: Tensor) -> Tensor:
        return torch.full_like(level.flatten(), self.obs.noise_std**2)

    def _bound(self, size: Tensor) -> Tensor:
        return super()._bound(size) if self.zeta is None else torch.full_like(size, math.inf)

    def _shift(self, z: Tensor, x0_hat: Tensor, level: Tensor, log: bool) -> tuple[Tensor, Tensor | None]:
        if self.zeta is None or self.sde is None or self.times is None:
            return super()._shift(z, x0_hat, level, log)
        levels = self.sde.sigma(torch.tensor(self.times, dtype=torch.float64, device="cpu")).to(level)
        if level.ndim or not holds((levels - level).abs().min() <= 1e-4 * level):
            raise ValueError("with zeta, sigma must be one of the noise levels of `times`")
        i = int((levels - level).abs().argmin())
        t, s = self.times[i], self.times[min(i + 1, len(self.times) - 1)]
        clean = s == 0 and (t == 0 or float(self.sde.sigma(0.0)) == 0)  # sample's last step: to x_0, where q = 0 and r = 1
        ratio = 0.0 if clean else (self.sde.sigma(s) / self.sde.sigma(t)) ** 2
        r_s = 1.0 if clean else self.sde.scale(s)
        step = self.zeta / (self.sde.scale(t) * r_s * (1 - ratio))  # undone by z_s = q z + (1 - q) D_y, x_s = r_s z_s
        norm = self.obs.residual(x0_hat).reshape(len(z), -1).norm(dim=1)
        (gradient,) = torch.autograd.grad(norm.sum(), z, retain_graph=True)  # ∇|r|² / |r| = 2 ∇|r|
        return -2 * expand(step, z) * gradient, self.obs.log_likelihood(x0_hat) if log else None


@dataclass(frozen=True)
class PiGDM(_Guided):
    r"""`p(y | z) ≈ N(y; A x̂, σ_y² I + ρ² A Aᵀ)` with `ρ² = σ² v / (σ² + v)`, for linear A; exact for data N(μ, v I).

    variance: v > 0, that of the data. One vector-Jacobian product; A's singular values are computed once. `ValueError` if A is not linear.
    Source: Song et al. 2023, Pseudoinverse-guided diffusion models for inverse problems (ICLR), eq. 7 to 9.
    """

    max_shift: float = 10.0
    variance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(variance=self.variance)

    def _shift(self, z: Tensor, x0_hat: Tensor, level: Tensor, log: bool) -> tuple[Tensor, Tensor]:
        u, s, vh = self._svd(x0_hat)
        noise, rho = self.obs.noise_std**2, level.reshape(-1, 1) ** 2 * self.variance / (level.reshape(-1, 1) ** 2 + self.variance)
        residual = self.obs.residual(x0_hat.detach()).reshape(len(z), -1)  # (B, m)
        e, total = residual @ u, noise + rho * s**2
        (product,) = torch.autograd.grad(x0_hat, z, ((e * s / total) @ vh).reshape(z.shape), retain_graph=True)
        outside, rest = ((residual**2).sum(1) - (e**2).sum(1)) / noise, residual.shape[1] - len(s)
        log_det = total.log().sum(1) + rest * math.log(noise) + residual.shape[1] * math.log(2 * math.pi)
        return level**2 * product, -((e**2 / total).sum(1) + outside + log_det) / 2

    def _svd(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = ("svd", x0.shape[1:], x0.dtype, x0.device)
        if key not in self.obs._matrices:
            self.obs._matrices[key] = torch.linalg.svd(self.obs.matrix(x0), full_matrices=False)
        return self.obs._matrices[key]


@dataclass(frozen=True)
class MMPS(_Guided):
    r"""`p(y | z) ≈ N(y; A(x̂), S)`, `S = σ_y² I + σ² H J Hᵀ + C`, J = ∂x̂/∂z, H = ∂A/∂x at x̂; σ² J is the covariance of x_0 given z (Tweedie).

    Exact for Gaussian data and linear A, where C = 0. For other A, C is the second moment of what the linearisation leaves out,
    `q = (A(x̂ + δ) + A(x̂ - δ))/2 - A(x̂)` over `probes` fixed δ ~ N(0, ρ² I), `ρ² = σ² s²/(σ² + s²)`, s = `size` that of the data;
    probes = 0 leaves C out; the published method is for linear A. C costs calls of A only, and none where A is found linear.
    Up to `dense` observed numbers S is built, by one vector-Jacobian product each; where a learned J is not positive, the direction has no
    say. Above that S⁻¹(y - A(x̂)) comes from `iterations` conjugate-gradient steps with the diagonal of C, one product each and one at the
    end; log p(y | z) builds S in any case. Source: Rozet et al. 2024 (arXiv 2405.13712), section 4.2; C is ours.
    """

    max_shift: float = 10.0
    iterations: int = 5
    dense: int = 8
    probes: int = 16
    size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(iterations=self.iterations, dense=self.dense, probes=self.probes + 1)
        check_positive(size=self.size)

    def _curvature(self, x0_hat: Tensor, level: Tensor) -> Tensor:
        """q for each probe, (B, probes, m)."""
        rho = level * self.size / (level**2 + self.size**2).sqrt()
        shape, generator = (self.probes, *x0_hat.shape[1:]), torch.Generator().manual_seed(0)
        directions = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(x0_hat)
        with torch.no_grad():
            centre = self.obs.operator(x0_hat)
            pairs = ((self.obs.operator(x0_hat + rho * d), self.obs.operator(x0_hat - rho * d)) for d in directions)
            q = [((plus + minus) / 2 - centre).reshape(len(x0_hat), -1) for plus, minus in pairs]
        return torch.stack(q, dim=1)

    def _shift(self, z: Tensor, x0_hat: Tensor, level: Tensor, log: bool) -> tuple[Tensor, Tensor | None]:
        point = x0_hat.detach().requires_grad_()
        residual = self.obs.residual(point).reshape(len(z), -1)  # (B, m); ∂/∂point is -H
        noise, m = self.obs.noise_std**2, residual.shape[1]
        square = level.reshape(-1, 1) ** 2
        curved = self.probes and not self.obs.linear(point)
        q = self._curvature(point.detach(), level) if curved else residual.new_zeros(len(z), 1, m)

        def pull(u: Tensor) -> tuple[Tensor, Tensor]:
            """Hᵀ u and J Hᵀ u, by the operator's and the denoiser's vector-Jacobian product (J is symmetric)."""
            (h,) = torch.autograd.grad(residual, point, -u, retain_graph=True)
            return h, torch.autograd.grad(x0_hat, z, h, retain_graph=True)[0]

        if m <= self.dense or log:
            pairs = [pull(unit.expand(len(z), m)) for unit in torch.eye(m, dtype=z.dtype, device=z.device)]
            h, g = (torch.stack([p[i].flatten(1) for p in pairs], dim=1) for i in (0, 1))  # (B, m, d): H and H J
            product = square[..., None] * (g @ h.mT) + q.mT @ q / q.shape[1]
            eigenvalues, vectors = torch.linalg.eigh((product + product.mT) / 2)
            total = noise + eigenvalues.clamp(min=0)
            e = (vectors.mT @ residual.detach()[..., None])[..., 0]
            weights = (vectors @ (e / total * (eigenvalues > 0))[..., None])[..., 0]
            log_likelihood = -((e**2 / total).sum(1) + total.log().sum(1) + m * math.log(2 * math.pi)) / 2
            return level**2 * (weights[:, None] @ g)[:, 0].reshape(z.shape), log_likelihood

        zero = torch.zeros_like(residual).requires_grad_()
        (linear,) = torch.autograd.grad(residual, point, -zero, create_graph=True)  # Hᵀ u, linear in u: its derivative is H

        def apply(u: Tensor) -> Tensor:
            (push,) = torch.autograd.grad(linear, zero, pull(u)[1], retain_graph=True)
            return (noise + (q**2).mean(1)) * u + square * push

        weights = conjugate_gradient(apply, residual.detach(), self.iterations)
        return level**2 * pull(weights)[1], None
