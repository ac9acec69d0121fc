"""Three diffusions: variance exploding, variance preserving, sub-VP."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check as check
from .sde import SDE, as_time


def keep_ends(sde: SDE, low: str, high: str) -> None:
    """Both ends of a schedule as floats, 0 < low < high."""
    a, b = check.number(low, getattr(sde, low)), check.number(high, getattr(sde, high))
    check.require(a < b, f"{low} must be below {high}, got {a} and {b}")
    vars(sde).update({low: a, high: b})


@dataclass(frozen=True)
class VESDE(SDE):
    r"""Variance exploding.

        r = 1,  σ = σ_min (σ_max/σ_min)^t;   f = 0,  g = σ sqrt(2 ln(σ_max/σ_min)).

    σ(0) = σ_min > 0: at t = 0 a trace of noise is left, which the samplers' last step takes off.
    Args: sigma_min, sigma_max: 0 < sigma_min < sigma_max, else `ValueError`.
    Source: Song et al. 2021, eq. 9 and appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        keep_ends(self, "sigma_min", "sigma_max")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def scale(self, t: float | Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._log_ratio * as_time(t))

    def time(self, sigma: float | Tensor) -> Tensor:
        ratio = self._within(sigma) / self.sigma_min
        return (torch.log(ratio) / self._log_ratio).clamp(0, 1)

    def f(self, t: float | Tensor) -> Tensor:
        return torch.zeros_like(as_time(t))

    def g(self, t: float | Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)


@dataclass(frozen=True)
class VPSDE(SDE):
    r"""Variance preserving.

        β(t) = β_min + (β_max - β_min) t,  B = ∫₀ᵗ β;
        r = exp(-B/2),  σ = sqrt(exp(B) - 1);   f = -β/2,  g = sqrt(β).

    Args: beta_min, beta_max: 0 < beta_min < beta_max, else `ValueError`.
    Source: Song et al. 2021, eq. 11 and appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        keep_ends(self, "beta_min", "beta_max")

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
        return self._inverse_integral(torch.log1p(self._within(sigma) ** 2))

    def f(self, t: float | Tensor) -> Tensor:
        return -self.beta(t) / 2

    def g(self, t: float | Tensor) -> Tensor:
        return self.beta(t).sqrt()


@dataclass(frozen=True)
class SubVPSDE(VPSDE):
    r"""Sub-VP: r and f of VP with less noise.

        r σ = 1 - exp(-B),  so  σ = 2 sinh(B/2),  g = sqrt(β (1 - exp(-2B))).

    Args: beta_min, beta_max: 0 < beta_min < beta_max, else `ValueError`.
    Source: Song et al. 2021, eq. 12 and appendix C.
    """

    def sigma(self, t: float | Tensor) -> Tensor:
        return 2 * torch.sinh(self._integral(t) / 2)

    def time(self, sigma: float | Tensor) -> Tensor:
        return self._inverse_integral(2 * torch.asinh(self._within(sigma) / 2))

    def g(self, t: float | Tensor) -> Tensor:
        return (-self.beta(t) * torch.expm1(-2 * self._integral(t))).sqrt()
