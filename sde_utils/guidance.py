"""Guidance turns a denoiser into a denoiser: `D_y(z, σ) = D(z, σ) + σ² ∇_z log p(y | z)`. The methods differ in what stands for p(y | z).

Stiffness: with a likelihood of width σ_y the correction grows like σ²/σ_y², 10⁷ for σ = 30 and σ_y = 0.01, far beyond what any explicit
sampler's step can follow. The exact correction cannot do that: it is E[x_0 | z, y] - E[x_0 | z], a shift of a mean. So each
sample's correction is held to at most `max_shift` σ per root dimension. Where σ is below σ_y, where the width of the result is decided, this
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_batch, check_positive, expand, holds
from .sde import Denoise


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
        y = y if isinstance(y, Tensor) else torch.tensor(y, dtype=torch.float64)
        if not y.is_floating_point():
            raise TypeError(f"y must be a floating-point number or tensor, got {y.dtype}")
        if not holds(y.isfinite().all()):
            raise ValueError("y must be finite, but holds NaN or infinity")
        self.operator, self.y, self.noise_std = operator, y, float(noise_std)

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x_0), (B, *obs_dims)."""
        predicted = self.operator(x0)
        if not isinstance(predicted, Tensor) or predicted.shape[:1] != x0.shape[:1]:
            got = tuple(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
            raise ValueError(f"operator must map (B, *dims) to (B, *obs_dims) with B = {len(x0)}, got {got}")
        if self.y.shape not in (predicted.shape, predicted.shape[1:]):
            one, all_ = tuple(predicted.shape[1:]), tuple(predicted.shape)
            raise ValueError(f"y must have shape {one} or {all_} to match A(x_0), got {tuple(self.y.shape)}")
        return self.y.to(predicted) - predicted

    def log_likelihood(self, x0: Tensor, variance: float | Tensor | None = None) -> Tensor:
        """log N(y; A(x_0), variance I), `variance` (float or (B,)) being σ_y² if None. x0: (B, *dims). Returns (B,)."""
        check_batch(x0, "x0")
        residual = self.residual(x0).reshape(len(x0), -1)  # (B, m)
        variance = torch.as_tensor(self.noise_std**2 if variance is None else variance).to(residual)
        return -(residual**2).sum(1) / (2 * variance) - residual.shape[1] / 2 * (2 * math.pi * variance).log()


@dataclass(frozen=True)
class _Guided:
    """A denoiser, an observation, and a model of log p(y | z) to differentiate; one network call and one vector-Jacobian product."""

    denoiser: Denoise
    obs: Observation
    max_shift: float = 3.0

    def __post_init__(self) -> None:
        if not callable(self.denoiser):
            raise TypeError(f"denoiser must be callable, got {type(self.denoiser).__name__}")
        if not isinstance(self.obs, Observation):
            raise TypeError(f"obs must be an Observation, got {type(self.obs).__name__}")
        check_positive(max_shift=self.max_shift)

    def _variance(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """E[x_0 | z, y], approximately. z: (B, *dims); sigma: float, scalar tensor or (B,). Returns (B, *dims)."""
        level = expand(sigma, z, "sigma")
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x0_hat = self.denoiser(z, level.flatten() if level.ndim else level)
            log_likelihood = self.obs.log_likelihood(x0_hat, self._variance(level.flatten()))
            (gradient,) = torch.autograd.grad(log_likelihood.sum(), z)
        length = gradient.flatten(1).norm(dim=1)
        bound = self.max_shift * math.sqrt(gradient[0].numel()) / level.flatten()
        return x0_hat.detach() + level**2 * gradient * expand((bound / length).clamp(max=1), z)

    def log_likelihood(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """The method's log p(y | z). z: (B, *dims); sigma: float, scalar tensor or (B,). Returns (B,)."""
        level = expand(sigma, z, "sigma").flatten()
        return self.obs.log_likelihood(self.denoiser(z, level if len(level) > 1 else level[0]), self._variance(level))


class Annealed(_Guided):
    r"""`p(y | z) ≈ N(y; A(x̂), (σ_y² + σ²) I)`, x̂ = D(z, σ): the likelihood widened by the noise still in z.

    Not stiff, since σ²/(σ_y² + σ²) < 1. Source: Jalal et al. 2021 (arXiv 2108.01368), eq. 4, there at z in place of x̂.
    """

    def _variance(self, sigma: Tensor) -> Tensor:
        return self.obs.noise_std**2 + sigma**2


class DPS(_Guided):
    r"""`p(y | z) ≈ N(y; A(x̂), σ_y² I)`, x̂ = D(z, σ): all of p(x_0 | z) put at its mean.

    Source: Chung et al. 2023 (arXiv 2209.14687), eq. 11 to 15.
    """

    def _variance(self, sigma: Tensor) -> Tensor:
        return torch.full_like(sigma, self.obs.noise_std**2)
