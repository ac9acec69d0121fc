"""Distributions whose every noisy version has a closed-form density, denoiser and score: the exact counterpart of all that is learned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._checks import check_batch, check_count, check_positive, expand, holds, randn_like
from .data import gauss_legendre, swiss_roll_curve, swiss_roll_scaling

if TYPE_CHECKING:
    from .guidance import Observation

BLOCK = 2**23  # entries of a distance matrix held at once (64 MB in float64)


class GaussianMixture:
    r"""`p(z; σ) = Σ_k w_k N(z; μ_k, Σ + σ² I)`, `Σ = v (I - V Vᵀ) + V diag(c) Vᵀ` the same for all k. A denoiser: `mix(z, sigma)`.

    Args: means: (K, *dims). variance: v >= 0, outside the span of V. weights: (K,), non-negative, normalised here; uniform if None.
    basis: V, (d, m), orthonormal columns, d the product of dims. basis_variance: c, (m,), non-negative.
    Computed in float64 (float32 on MPS, which has no other); results come back in the dtype of the argument.
    Raises `ValueError`/`TypeError` for means that are not finite, a negative variance, weights or a basis that do not fit.
    """

    log_evidence: Tensor | None = None  # log p(y), where the mixture is a posterior

    def __init__(
        self, means: Tensor, variance: float, weights: Tensor | None = None, basis: Tensor | None = None, basis_variance: Tensor | None = None
    ) -> None:
        check_batch(means, "means")
        if variance != 0:
            check_positive(variance=variance)
        weights = torch.ones(len(means), dtype=means.dtype, device=means.device) if weights is None else weights
        if weights.shape != means.shape[:1] or not holds((weights >= 0).all() & (weights.sum() > 0) & weights.isfinite().all()):
            raise ValueError(f"weights must be ({len(means)},), finite, non-negative and not all 0, got shape {tuple(weights.shape)}")
        d = means[0].numel()
        basis = means.new_zeros(d, 0) if basis is None else basis
        basis_variance = means.new_zeros(0) if basis_variance is None else basis_variance
        if basis.ndim != 2 or len(basis) != d or basis_variance.shape != basis.shape[1:]:
            raise ValueError(f"basis must be ({d}, m) and basis_variance (m,), got {tuple(basis.shape)} and {tuple(basis_variance.shape)}")
        self.means, self.variance, self.weights = means, float(variance), weights / weights.sum()
        self.basis, self.basis_variance = basis, basis_variance

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GaussianMixture:
        """The same mixture elsewhere."""
        tensors = (x.to(device, dtype) for x in (self.means, self.weights, self.basis, self.basis_variance))
        means, weights, basis, basis_variance = tensors
        mixture = GaussianMixture.__new__(type(self))
        GaussianMixture.__init__(mixture, means, self.variance, weights, basis, basis_variance)
        return mixture

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n exact draws, (n, *dims)."""
        check_count(n=n)
        weights = self.weights if generator is None else self.weights.to(generator.device)
        centres = self.means[torch.multinomial(weights, n, replacement=True, generator=generator).to(self.means.device)]
        noise = randn_like(centres, generator).flatten(1)
        along = noise @ self.basis * (self.basis_variance.sqrt() - math.sqrt(self.variance))
        return centres + (math.sqrt(self.variance) * noise + along @ self.basis.T).reshape(centres.shape)

    def _blocks(self, z: Tensor, sigma: float | Tensor, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of rows in turn, with S = Σ + σ² I: log w_k + log N(z; μ_k, S), (b, K); the score S⁻¹(E[μ_k | z] - z), (b, d); σ², (b, 1)."""
        check_batch(z, "z")
        if z.shape[1:] != self.means.shape[1:]:
            raise ValueError(f"z must have shape (B, {', '.join(map(str, self.means.shape[1:]))}), got {tuple(z.shape)}")
        wide = torch.float32 if z.device.type == "mps" else torch.float64
        means, basis = self.means.flatten(1).to(z.device, wide), self.basis.to(z.device, wide)
        square = (expand(sigma, z, "sigma") ** 2).to(wide).reshape(-1, 1).expand(len(z), 1)
        if not holds((self.variance + square > 0).all()):
            raise ValueError(f"{name} of atoms (variance 0) needs sigma > 0")
        # all that depends on k is linear in (μ, |μ|², (Vᵀμ)², log w): one product of matrices
        log_w = self.weights.to(z.device, wide).log()[:, None]
        columns = torch.cat([means, (means**2).sum(1, keepdim=True), (means @ basis) ** 2, log_w], dim=1)
        for zb, sb in zip(*(a.split(max(1, BLOCK // len(means))) for a in (z.flatten(1).to(wide), square)), strict=True):
            plain = 1 / (self.variance + sb)  # (b, 1)
            extra = 1 / (self.basis_variance.to(z.device, wide) + sb) - plain  # (b, m)
            inverse = lambda x, plain=plain, extra=extra: plain * x + (extra * (x @ basis)) @ basis.T  # noqa: E731  S⁻¹ x
            scaled = inverse(zb)
            own = (zb * scaled).sum(1) - plain[:, 0].log() * zb.shape[1] - (extra / plain).log1p().sum(1) + zb.shape[1] * math.log(2 * math.pi)
            joint = torch.cat([scaled, -plain / 2, -extra / 2, torch.ones_like(sb)], dim=1) @ columns.T - own[:, None] / 2
            yield joint, inverse(joint.softmax(1) @ means) - scaled, sb

    def log_prob(self, z: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log p(z; σ) in nats. z: (B, *dims); sigma: float, scalar tensor or (B,). Returns (B,)."""
        return torch.cat([joint.logsumexp(1) for joint, _, _ in self._blocks(z, sigma, "log_prob")]).to(z.dtype)

    def score(self, z: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        r"""`∇_z log p(z; σ) = (Σ + σ² I)⁻¹ Σ_k w_k(z) (μ_k - z)`, w_k(z) the posterior weight of component k. Returns (B, *dims)."""
        return torch.cat([score for _, score, _ in self._blocks(z, sigma, "score")]).reshape(z.shape).to(z.dtype)

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        r"""`D(z, σ) = z + σ² ∇_z log p(z; σ)`, Tweedie's formula. z: (B, *dims); sigma: float, scalar tensor or (B,). Returns (B, *dims)."""
        blocks = self._blocks(z, sigma, "denoise")
        shift = torch.cat([sb * score for _, score, sb in blocks]).reshape(z.shape)
        return (z.to(shift) + shift).to(z.dtype)

    __call__ = denoise


class IsotropicMixture(GaussianMixture):
    r"""`p(z; σ) = Σ_k w_k N(z; μ_k, (v + σ²) I)`: a curve smeared by noise, or, with v = 0, a training set. A denoiser.

    Args: means: (K, *dims). variance: v >= 0. weights: (K,), non-negative, normalised here; uniform if None. Errors as `GaussianMixture`.
    """

    def __init__(self, means: Tensor, variance: float, weights: Tensor | None = None) -> None:
        super().__init__(means, variance, weights)

    def posterior(self, obs: Observation) -> GaussianMixture:
        r"""p(x | y) for a linear operator, exactly; its `log_evidence` is log p(y). With A = U diag(s) Vᵀ, e_k = Uᵀ(y - A μ_k):

        `w_k' ∝ w_k N(y; A μ_k, v A Aᵀ + σ_y² I)`, `μ_k' = μ_k + V diag(v s / (v s² + σ_y²)) e_k`, `c = v σ_y² / (v s² + σ_y²)`.

        `ValueError` if the operator is not linear, y is not one observation, or no component gives it a positive density.
        Source: Bishop 2006, Pattern Recognition and Machine Learning, eq. 2.116, applied to each component.
        """
        wide = torch.float32 if self.means.device.type == "mps" else torch.float64
        means, v, noise = self.means.flatten(1).to(wide), self.variance, obs.noise_std**2
        matrix = obs.matrix(self.means).to(wide)  # (m, d)
        if obs.y.numel() != len(matrix):
            raise ValueError(f"y must be one observation of {len(matrix)} numbers, got shape {tuple(obs.y.shape)}")
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        residual = obs.y.reshape(-1).to(means) - means @ matrix.T  # (K, m)
        e = residual @ u
        total = v * s**2 + noise
        outside = ((residual**2).sum(1) - (e**2).sum(1)).clamp(min=0) / noise  # what of y no x can explain
        log_det = total.log().sum() + (len(matrix) - len(s)) * math.log(noise) + len(matrix) * math.log(2 * math.pi)
        log_w = self.weights.to(wide).log() - ((e**2 / total).sum(1) + outside + log_det) / 2
        evidence = log_w.logsumexp(0)
        if not holds(evidence.isfinite()):
            raise ValueError("y is impossible under the prior: every component gives it the density 0")
        moved = (means + (v * s / total * e) @ vh).reshape(self.means.shape)
        dtype = self.means.dtype
        posterior = GaussianMixture(moved.to(dtype), v, (log_w - evidence).exp().to(dtype), vh.T.to(dtype), (v * noise / total).to(dtype))
        posterior.log_evidence = evidence
        return posterior


def swiss_roll_density(noise: float = 0.2, nodes: int = 800) -> IsotropicMixture:
    r"""The population of `swiss_roll(n, noise)`: `p(x) = ∫₀¹ N(x; c(u), (noise/sd)² I) du`, by Gauss-Legendre quadrature over the curve c.

    800 nodes resolve noise 0.2 to 10⁻⁷ nats; their spacing, about 140 / nodes before scaling, has to stay below `noise`.
    """
    check_positive(noise=noise)
    check_count(nodes=nodes)
    u, w = (torch.as_tensor(a, device="cpu") for a in gauss_legendre(nodes))
    return IsotropicMixture(swiss_roll_curve(u, noise), (noise / swiss_roll_scaling(noise)[1]) ** 2, w)


def weighted_posterior(
    density: GaussianMixture, obs: Observation, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""p(x | y) for any operator: n exact draws x_i of the prior with weights `w_i ∝ p(y | x_i)`, and `log p(y) ≈ log mean_i p(y | x_i)`.

    Returns x (n, *dims), log-weights (n,), normalised, and the log-evidence, a scalar. `ValueError` if no draw has a positive likelihood.
    """
    x = density.sample(n, generator)
    log_w = obs.log_likelihood(x)
    total = log_w.logsumexp(0)
    if not holds(total.isfinite()):
        raise ValueError("y is impossible under the prior: every draw gives it the likelihood 0")
    return x, log_w - total, total - math.log(n)


def grid_posterior(density: GaussianMixture, obs: Observation, limit: float = 2.5, n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    r"""p(x | y) in two dimensions for any operator, on an n x n grid over [-limit, limit]²: `log p(x) + log p(y | x) - log p(y)`.

    Returns the points (n², 2), the log-density there (n²,), and the log-evidence, by the trapezoidal rule. The grid has to resolve both factors.
    """
    check_count(n=n)
    check_positive(limit=limit)
    axis = torch.linspace(-limit, limit, n, dtype=density.means.dtype, device=density.means.device)
    x = torch.cartesian_prod(axis, axis)
    log_joint = density.log_prob(x) + obs.log_likelihood(x)
    evidence = log_joint.logsumexp(0) + 2 * math.log(2 * limit / (n - 1))
    if not holds(evidence.isfinite()):
        raise ValueError("y is impossible under the prior on this grid")
    return x, log_joint - evidence, evidence
