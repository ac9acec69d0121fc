"""Distributions whose every noisy version has a closed-form density, denoiser and score: the exact counterpart of all that is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_batch, check_count, check_positive, expand, holds, randn_like
from .data import gauss_legendre, swiss_roll_curve, swiss_roll_scaling

BLOCK = 2**23  # entries of a distance matrix held at once (64 MB in float64)


class IsotropicMixture:
    r"""`p(x) = Σ_k w_k N(x; μ_k, v I)`; with noise, `p(z; σ) = Σ_k w_k N(z; μ_k, (v + σ²) I)`. Itself a denoiser: `mix(z, sigma)`.

    Args: means: (K, *dims). variance: v >= 0 (0: atoms, as for a training set). weights: (K,), non-negative, normalised here; uniform if None.
    Distances are computed in float64 (float32 on MPS, which has no other), results come back in the dtype of the argument.
    Raises `ValueError`/`TypeError` for means that are not finite, a negative variance, weights that do not fit.
    """

    def __init__(self, means: Tensor, variance: float, weights: Tensor | None = None) -> None:
        check_batch(means, "means")
        if variance != 0:
            check_positive(variance=variance)
        weights = torch.ones(len(means), dtype=means.dtype, device=means.device) if weights is None else weights
        if weights.shape != means.shape[:1] or not holds((weights >= 0).all() & (weights.sum() > 0) & weights.isfinite().all()):
            raise ValueError(f"weights must be ({len(means)},), finite, non-negative and not all 0, got shape {tuple(weights.shape)}")
        self.means, self.variance, self.weights = means, float(variance), weights / weights.sum()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> IsotropicMixture:
        """The same mixture elsewhere."""
        return IsotropicMixture(self.means.to(device, dtype), self.variance, self.weights.to(device, dtype))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n exact draws, (n, *dims)."""
        check_count(n=n)
        weights = self.weights if generator is None else self.weights.to(generator.device)
        centres = self.means[torch.multinomial(weights, n, replacement=True, generator=generator).to(self.means.device)]
        return centres + math.sqrt(self.variance) * randn_like(centres, generator)

    def _blocks(self, z: Tensor, sigma: float | Tensor, name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of rows of (z, v + σ²), each with log w_k + log N(z; μ_k, (v + σ²) I) up to `_own`, (b, K)."""
        check_batch(z, "z")
        if z.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"z must have shape (B, {', '.join(map(str, self.means.shape[1:]))}), got {tuple(z.shape)}")
        wide = torch.float32 if z.device.type == "mps" else torch.float64
        means, z = self.means.flatten(1).to(z.device, wide), z.flatten(1).to(wide)
        variance = (self.variance + expand(sigma, z, "sigma") ** 2).expand(len(z), 1)
        if not holds((variance > 0).all()):
            raise ValueError(f"{name} of atoms (variance 0) needs sigma > 0")
        # joint = z·μ/v - |μ|²/(2v) + log w - |z|²/(2v) - d/2 log(2πv): all that depends on k in one product of matrices
        columns = torch.cat([means, (means**2).sum(1, keepdim=True), self.weights.to(z.device, wide).log()[:, None]], dim=1)
        blocks = []
        for zb, vb in zip(*(a.split(max(1, BLOCK // len(means))) for a in (z, variance)), strict=True):
            rows = torch.cat([zb / vb, -0.5 / vb, torch.ones_like(vb)], dim=1)  # (b, d + 2)
            blocks.append((zb, vb, rows @ columns.T))
        return blocks

    @staticmethod
    def _own(z: Tensor, variance: Tensor) -> Tensor:
        """The part of the joint log-density that all components share, (b,)."""
        return -((z**2).sum(1) / variance[:, 0] + z.shape[1] * (2 * math.pi * variance[:, 0]).log()) / 2

    def log_prob(self, z: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log p(z; σ) in nats. z: (B, *dims); sigma: float, scalar tensor or (B,). Returns (B,)."""
        return torch.cat([joint.logsumexp(1) + self._own(zb, vb) for zb, vb, joint in self._blocks(z, sigma, "log_prob")]).to(z.dtype)

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        r"""`D(z, σ) = (v z + σ² Σ_k w_k(z) μ_k) / (v + σ²)`, w_k(z) the posterior weight of component k. z: (B, *dims). Returns (B, *dims)."""
        means = self.means.flatten(1)
        out = []
        for zb, vb, joint in self._blocks(z, sigma, "denoise"):
            shrink = self.variance / vb
            out.append(shrink * zb + (1 - shrink) * (joint.softmax(1) @ means.to(zb)))
        return torch.cat(out).reshape(z.shape).to(z.dtype)

    __call__ = denoise

    def score(self, z: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        r"""`∇_z log p(z; σ) = Σ_k w_k(z) (μ_k - z) / (v + σ²)`. z: (B, *dims). Returns (B, *dims)."""
        means = self.means.flatten(1)
        out = [(joint.softmax(1) @ means.to(zb) - zb) / vb for zb, vb, joint in self._blocks(z, sigma, "score")]
        return torch.cat(out).reshape(z.shape).to(z.dtype)


def swiss_roll_density(noise: float = 0.2, nodes: int = 800) -> IsotropicMixture:
    r"""The population of `swiss_roll(n, noise)`: `p(x) = ∫₀¹ N(x; c(u), (noise/sd)² I) du`, by Gauss-Legendre quadrature over the curve c.

    800 nodes resolve noise 0.2 to 10⁻⁷ nats; their spacing, about 140 / nodes before scaling, has to stay below `noise`.
    """
    check_positive(noise=noise)
    check_count(nodes=nodes)
    u, w = (torch.as_tensor(a) for a in gauss_legendre(nodes))
    return IsotropicMixture(swiss_roll_curve(u, noise), (noise / swiss_roll_scaling(noise)[1]) ** 2, w)
