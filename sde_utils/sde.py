"""Three diffusions, each one pair of functions: `x_t = r(t) (x_0 + σ(t) ε)`.

The SDE owns time; everything else sees (z, σ), z = x / r.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._numerics import (
    Denoise,
    check_batch,
    check_number,
    check_shape,
    check_tensor,
    expand,
    kind,
    randn_like,
)


def as_time(t: float | Tensor) -> Tensor:
    """`t` as a floating-point tensor, a number in float64 on the CPU; `ValueError` outside [0, 1]."""
    if not isinstance(t, Tensor):
        return torch.tensor(check_number("t", t, 0, 1, "[]"), dtype=torch.float64, device="cpu")
    check_tensor("t", t)
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"t must lie in [0, 1], got values from {t.min():.6g} to {t.max():.6g}")
    return t


class SDE(ABC):
    r"""A linear SDE on t in [0, 1], and its solution from x_0.

        dx = f(t) x dt + g(t) dW,    f = r'/r,  g² = r² dσ²/dt,
        x_t = r(t) (x_0 + σ(t) ε),   ε ~ N(0, I).

    All functions of `t` take a number, a scalar tensor or a tensor of shape (B,), return that
    shape, and raise `ValueError` for t outside [0, 1].
    Source: Song et al. 2021 (arXiv 2011.13456), section 3; r, σ are s, σ of Karras et al. 2022
    (arXiv 2206.00364), appendix B.
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

    def perturb(
        self, x0: Tensor, t: float | Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x_t ~ p(x_t | x_0).

            x_t = r(t) (x_0 + σ(t) ε).

        Args: x0: (B, *dims). t: scalar or (B,).   Returns: x_t, (B, *dims).
        """
        check_batch("x0", x0)
        noise = expand(self.sigma(t), x0) * randn_like(x0, generator)
        return expand(self.scale(t), x0) * (x0 + noise)

    def prior(
        self,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_1 ~ N(0, (r(1) σ(1))² I): what is left of any data of much smaller size than σ(1)."""
        noise = randn_like(torch.empty(check_shape(shape), device=device, dtype=dtype), generator)
        return expand(self.scale(1.0) * self.sigma(1.0), noise) * noise

    def denoise(self, denoiser: Denoise, x: Tensor, t: float | Tensor) -> Tensor:
        """E[x_0 | x_t = x] = D(x / r(t), σ(t)).

        Args: x: (B, *dims). t: scalar or (B,).   Returns: (B, *dims).
        """
        check_batch("x", x)
        return denoiser(x / expand(self.scale(t), x), self.sigma(t).to(x))

    def score(self, denoiser: Denoise, x: Tensor, t: float | Tensor) -> Tensor:
        r"""The score of the noisy density, by Tweedie's formula.

            ∇_x log p_t(x) = (D(z, σ) - z) / (r σ²),   z = x / r.

        Args: x: (B, *dims). t: scalar or (B,), with σ(t) > 0: the quotient is 0/0 at σ = 0.
        Returns: (B, *dims).
        """
        r, sigma = expand(self.scale(t), x), expand(self.sigma(t), x)
        if not (sigma > 0).all():
            raise ValueError("t must have σ(t) > 0 for a score from a denoiser, got σ(t) = 0")
        return (self.denoise(denoiser, x, t) - x / r) / (r * sigma**2)

    def _check_sigma(self, sigma: float | Tensor) -> Tensor:
        if not isinstance(sigma, Tensor):
            number = check_number("sigma", sigma, ends="[]")
            sigma = torch.tensor(number, dtype=torch.float64, device="cpu")
        check_tensor("sigma", sigma)
        low, high = float(self.sigma(0.0)), float(self.sigma(1.0))
        slack = 256 * torch.finfo(sigma.dtype).eps
        if not ((sigma >= low * (1 - slack)) & (sigma <= high * (1 + slack))).all():
            found = f"{float(sigma.min()):.6g} to {float(sigma.max()):.6g}"
            raise ValueError(f"sigma must lie in [{low:.6g}, {high:.6g}], got {found}")
        return sigma


def check_sde(sde: object) -> None:
    """An SDE, not its class."""
    if not isinstance(sde, SDE):
        raise TypeError(f"sde must be an SDE, as su.VPSDE(), got {kind(sde)}")


def check_ends(sde: SDE, low: str, high: str) -> None:
    """Both ends of a schedule as numbers, 0 < low < high."""
    for name in (low, high):
        object.__setattr__(sde, name, check_number(name, getattr(sde, name)))
    if getattr(sde, low) >= getattr(sde, high):
        found = f"{getattr(sde, low)} and {getattr(sde, high)}"
        raise ValueError(f"{low} must be below {high}, got {found}")


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
        check_ends(self, "sigma_min", "sigma_max")

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def scale(self, t: float | Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._log_ratio * as_time(t))

    def time(self, sigma: float | Tensor) -> Tensor:
        ratio = self._check_sigma(sigma) / self.sigma_min
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
        check_ends(self, "beta_min", "beta_max")

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
    r"""Sub-VP: r and f of VP with less noise.

        r σ = 1 - exp(-B),  so  σ = 2 sinh(B/2),  g = sqrt(β (1 - exp(-2B))).

    Args: beta_min, beta_max: 0 < beta_min < beta_max, else `ValueError`.
    Source: Song et al. 2021, eq. 12 and appendix C.
    """

    def sigma(self, t: float | Tensor) -> Tensor:
        return 2 * torch.sinh(self._integral(t) / 2)

    def time(self, sigma: float | Tensor) -> Tensor:
        return self._inverse_integral(2 * torch.asinh(self._check_sigma(sigma) / 2))

    def g(self, t: float | Tensor) -> Tensor:
        return (-self.beta(t) * torch.expm1(-2 * self._integral(t))).sqrt()
