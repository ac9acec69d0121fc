"""Three diffusions, each one pair of functions: `x_t = r(t) (x_0 + σ(t) ε)`. The SDE owns time; everything else sees (z, σ)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ._checks import check_batch, check_positive, expand, holds, randn_like

Denoise = Callable[[Tensor, Tensor], Tensor]  # D(z, sigma) -> E[x_0 | z]


def as_time(t: float | Tensor) -> Tensor:
    """`t` as a floating-point tensor (a Python number in float64); `ValueError` outside [0, 1]."""
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")
    if not t.is_floating_point():
        raise TypeError(f"t must be a floating-point tensor, got {t.dtype}")
    if not holds(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must lie in [0, 1], got values from {t.min():.6g} to {t.max():.6g}")
    return t


class SDE(ABC):
    r"""A linear SDE `dx = f(t) x dt + g(t) dW` on t in [0, 1], with `f = r'/r` and `g² = r² dσ²/dt`.

    Its solution from x_0 is `x_t = r(t) (x_0 + σ(t) ε)`, ε ~ N(0, I). All functions of `t` take a float, a scalar tensor or a tensor
    of shape (B,), return that shape, and raise `ValueError` for t outside [0, 1].
    Source: Song et al. 2021 (arXiv 2011.13456), section 3; r, σ are s, σ of Karras et al. 2022 (arXiv 2206.00364), appendix B.
    """

    @abstractmethod
    def scale(self, t: float | Tensor) -> Tensor:
        """Signal scale r(t)."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Noise-to-signal ratio σ(t), strictly increasing."""

    @abstractmethod
    def time(self, sigma: float | Tensor) -> Tensor:
        """The inverse of `sigma`; `ValueError` for a σ that is not in [σ(0), σ(1)]."""

    @abstractmethod
    def f(self, t: float | Tensor) -> Tensor:
        """Drift coefficient f(t) = r'(t) / r(t)."""

    @abstractmethod
    def g(self, t: float | Tensor) -> Tensor:
        """Diffusion coefficient g(t) = r(t) sqrt(dσ²/dt)."""

    def perturb(self, x0: Tensor, t: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x_t ~ p(x_t | x_0) = N(r x_0, r² σ² I). x0: (B, *dims); t: scalar or (B,). Returns (B, *dims)."""
        check_batch(x0, "x0")
        return expand(self.scale(t), x0) * (x0 + expand(self.sigma(t), x0) * randn_like(x0, generator))

    def prior(
        self,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_1 ~ N(0, (r(1) σ(1))² I): what is left of any data of much smaller spread than σ(1)."""
        noise = randn_like(torch.empty(tuple(shape), device=device, dtype=dtype), generator)
        return expand(self.scale(1.0) * self.sigma(1.0), noise) * noise

    def denoise(self, denoiser: Denoise, x: Tensor, t: float | Tensor) -> Tensor:
        """E[x_0 | x_t = x] = D(x / r(t), σ(t)). x: (B, *dims). Returns (B, *dims)."""
        check_batch(x)
        return denoiser(x / expand(self.scale(t), x), self.sigma(t).to(x))

    def score(self, denoiser: Denoise, x: Tensor, t: float | Tensor) -> Tensor:
        r"""Tweedie's formula: `∇_x log p_t(x) = (D(z, σ) - z) / (r σ²)`, z = x / r. x: (B, *dims). Returns (B, *dims).

        `ValueError` where σ(t) = 0: the quotient is 0/0 there.
        """
        r, sigma = expand(self.scale(t), x), expand(self.sigma(t), x)
        if not holds((sigma > 0).all()):
            raise ValueError("t must have σ(t) > 0 for a score from a denoiser, got σ(t) = 0")
        return (self.denoise(denoiser, x, t) - x / r) / (r * sigma**2)

    def simulate(self, x0: Tensor, times: Sequence[float] | Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Forward paths at increasing `times`, by the exact transition of the linear SDE.

        `x_t = (r_t / r_s) x_s + r_t sqrt(σ_t² - σ_s²) n`, started from p(x_{t_0} | x_0). x0: (B, *dims). Returns (len(times), B, *dims).
        """
        times = [float(t) for t in times]
        if not times or any(s >= t for s, t in pairwise(times)):
            raise ValueError(f"times must be increasing and not empty, got {times}")
        path = [self.perturb(x0, times[0], generator)]
        for s, t in pairwise(times):
            r_s, r_t, sigma_s, sigma_t = self.scale(s), self.scale(t), self.sigma(s), self.sigma(t)
            noise = expand(r_t * (sigma_t**2 - sigma_s**2).sqrt(), x0) * randn_like(x0, generator)
            path.append(expand(r_t / r_s, x0) * path[-1] + noise)
        return torch.stack(path)

    def _check_sigma(self, sigma: float | Tensor) -> Tensor:
        sigma = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64, device="cpu")
        low, high = self.sigma(0.0), self.sigma(1.0)
        slack = 256 * torch.finfo(sigma.dtype).eps
        if not holds(((sigma >= low * (1 - slack)) & (sigma <= high * (1 + slack))).all()):
            raise ValueError(f"sigma must lie in [{float(low):.6g}, {float(high):.6g}], got {sigma.min():.6g} to {sigma.max():.6g}")
        return sigma


@dataclass(frozen=True)
class VESDE(SDE):
    r"""Variance exploding: `r = 1`, `σ = σ_min (σ_max/σ_min)^t`, so `f = 0` and `g = σ sqrt(2 ln(σ_max/σ_min))`.

    σ(0) = σ_min > 0: at t = 0 a trace of noise is left, which the samplers take off in a last step.
    Raises `ValueError` unless 0 < sigma_min < sigma_max. Source: Song et al. 2021, eq. 9 and appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        check_positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def scale(self, t: float | Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._log_ratio * as_time(t))

    def time(self, sigma: float | Tensor) -> Tensor:
        return (torch.log(self._check_sigma(sigma) / self.sigma_min) / self._log_ratio).clamp(0, 1)

    def f(self, t: float | Tensor) -> Tensor:
        return torch.zeros_like(as_time(t))

    def g(self, t: float | Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)


@dataclass(frozen=True)
class VPSDE(SDE):
    r"""Variance preserving: `β(t) = β_min + (β_max - β_min) t`, `B = ∫₀ᵗ β`; `r = exp(-B/2)`, `σ = sqrt(exp(B) - 1)`, `f = -β/2`, `g = sqrt(β)`.

    Raises `ValueError` unless 0 < beta_min < beta_max. Source: Song et al. 2021, eq. 11 and appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_positive(beta_min=self.beta_min, beta_max=self.beta_max)
        if self.beta_min >= self.beta_max:
            raise ValueError(f"beta_min must be below beta_max, got {self.beta_min} and {self.beta_max}")

    def beta(self, t: float | Tensor) -> Tensor:
        """β(t)."""
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def _integral(self, t: float | Tensor) -> Tensor:
        t = as_time(t)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _inverse_integral(self, integral: Tensor) -> Tensor:
        # the root of a quadratic in the form that does not cancel for small B
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return (2 * integral / (self.beta_min + root)).clamp(0, 1)

    def scale(self, t: float | Tensor) -> Tensor:
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: float | Tensor) -> Tensor:
        return torch.expm1(self._integral(t)).sqrt()

    def time(self, sigma: float | Tensor) -> Tensor:
        return self._inverse_integral(torch.log1p(self._check_sigma(sigma) ** 2))

    def f(self, t: float | Tensor) -> Tensor:
        return -self.beta(t) / 2

    def g(self, t: float | Tensor) -> Tensor:
        return self.beta(t).sqrt()


@dataclass(frozen=True)
class SubVPSDE(VPSDE):
    r"""Sub-VP: r and f of VP with `r σ = 1 - exp(-B)`, that is `σ = 2 sinh(B/2)` and `g = sqrt(β (1 - exp(-2B)))`.

    Raises `ValueError` unless 0 < beta_min < beta_max. Source: Song et al. 2021, eq. 12 and appendix C.
    """

    def sigma(self, t: float | Tensor) -> Tensor:
        return 2 * torch.sinh(self._integral(t) / 2)

    def time(self, sigma: float | Tensor) -> Tensor:
        return self._inverse_integral(2 * torch.asinh(self._check_sigma(sigma) / 2))

    def g(self, t: float | Tensor) -> Tensor:
        return (-self.beta(t) * torch.expm1(-2 * self._integral(t))).sqrt()
