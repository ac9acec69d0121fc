"""A diffusion is one pair of functions, r and σ: `x_t = r(t) (x_0 + σ(t) ε)`.

The SDE owns time; everything else sees (z, σ), z = x / r.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Denoise, Random, expand, randn_like


def as_time(t: float | Tensor) -> Tensor:
    """`t` in [0, 1] as a floating-point tensor; a number in float64 on the CPU."""
    if not isinstance(t, Tensor):
        return torch.tensor(check.number("t", t, 0, 1, "[]"), dtype=torch.float64, device="cpu")
    check.tensor("t", t)
    check.require(((t >= 0) & (t <= 1)).all(), "t must lie in [0, 1], but some value does not")
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

    def perturb(self, x0: Tensor, t: float | Tensor, generator: Random = None) -> Tensor:
        """Draw x_t ~ p(x_t | x_0).

            x_t = r(t) (x_0 + σ(t) ε).

        Args: x0: (B, *dims). t: scalar or (B,).   Returns: x_t, (B, *dims).
        """
        check.batch("x0", x0)
        noise = expand(self.sigma(t), x0) * randn_like(x0, generator)
        return expand(self.scale(t), x0) * (x0 + noise)

    def prior(
        self,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: Random = None,
    ) -> Tensor:
        """x_1 ~ N(0, (r(1) σ(1))² I): what is left of any data of much smaller size than σ(1)."""
        noise = randn_like(torch.empty(check.shape(shape), device=device, dtype=dtype), generator)
        return expand(self.scale(1.0) * self.sigma(1.0), noise) * noise

    def denoise(self, denoiser: Denoise, x: Tensor, t: float | Tensor) -> Tensor:
        """E[x_0 | x_t = x] = D(x / r(t), σ(t)).

        Args: x: (B, *dims). t: scalar or (B,).   Returns: (B, *dims).
        """
        check.batch("x", x)
        return check.answer(denoiser, x / expand(self.scale(t), x), self.sigma(t).to(x))

    def score(self, denoiser: Denoise, x: Tensor, t: float | Tensor) -> Tensor:
        r"""The score of the noisy density, by Tweedie's formula.

            ∇_x log p_t(x) = (D(z, σ) - z) / (r σ²),   z = x / r.

        Args: x: (B, *dims). t: scalar or (B,), with σ(t) > 0: the quotient is 0/0 at σ = 0.
        Returns: (B, *dims).
        """
        check.batch("x", x)
        r, sigma = expand(self.scale(t), x), expand(self.sigma(t), x)
        check.require((sigma > 0).all(), "t must have σ(t) > 0 for a score, got σ(t) = 0")
        return (self.denoise(denoiser, x, t) - x / r) / (r * sigma**2)

    def _within(self, sigma: float | Tensor) -> Tensor:
        """σ as a tensor; `ValueError` outside [σ(0), σ(1)]."""
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor(check.number("sigma", sigma), dtype=torch.float64, device="cpu")
        check.tensor("sigma", sigma)
        low, high = float(self.sigma(0.0)), float(self.sigma(1.0))
        slack = 256 * torch.finfo(sigma.dtype).eps
        inside = (sigma >= low * (1 - slack)) & (sigma <= high * (1 + slack))
        check.require(inside.all(), f"sigma must lie in [{low:.6g}, {high:.6g}], but does not")
        return sigma


def check_sde(sde: object) -> None:
    """An SDE, not its class."""
    check.kind(isinstance(sde, SDE), "sde must be an SDE, as su.VPSDE()", sde)
