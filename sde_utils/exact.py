"""Distributions whose every noisy version has a closed-form density, denoiser and score."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Random, as_level, randn_like, widest
from .observation import Observation

BLOCK = 2**23  # entries of a distance matrix held at once (64 MB in float64)


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""A mixture of Gaussians of one covariance, at any noise level. A denoiser: `mix(z, sigma)`.

        p(z; σ) = Σ_k w_k N(z; μ_k, Σ + σ² I),   Σ = v (I - V Vᵀ) + V diag(c) Vᵀ.

    Args:
        means: μ, (K, *dims).
        variance: v >= 0, outside the span of V.
        weights: w, (K,), non-negative, normalised here; uniform if None.
        basis: V, (d, m), orthonormal columns, d the product of dims; none if None.
        basis_variance: c, (m,), non-negative.
        log_evidence: log p(y), where the mixture is a posterior.
    Computed in float64 on the CPU, in the widest dtype given elsewhere; results come back in the
    dtype of the argument. σ as a tensor is trusted to be positive where v = 0.
    """

    means: Tensor
    variance: float
    weights: Tensor = None  # type: ignore[assignment]
    basis: Tensor = None  # type: ignore[assignment]
    basis_variance: Tensor = None  # type: ignore[assignment]
    log_evidence: Tensor | None = None
    _kept: dict[object, tuple[Tensor, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check.batch("means", self.means)
        n, d = len(self.means), self.means[0].numel()
        weights = self.means.new_ones(n) if self.weights is None else self.weights
        check.weights("weights", weights, n)
        basis = self.means.new_zeros(d, 0) if self.basis is None else self.basis
        c = self.means.new_zeros(0) if self.basis_variance is None else self.basis_variance
        for name, a in (("basis", basis), ("basis_variance", c)):
            check.tensor(name, a)
        fits = basis.ndim == 2 and len(basis) == d and c.shape == basis.shape[1:]
        check.require(fits, f"basis must be ({d}, m) and basis_variance (m,)", basis, c)
        gram = basis.T @ basis - torch.eye(len(c), dtype=basis.dtype, device=basis.device)
        check.require((gram.abs() < 1e-4).all(), "basis must have orthonormal columns")
        good = ((c >= 0) & c.isfinite()).all()
        check.require(good, "basis_variance must be non-negative and finite")
        vars(self).update(weights=weights / weights.sum(), basis=basis, basis_variance=c)
        vars(self).update(variance=check.number("variance", self.variance, ends="[)"), _kept={})

    @property
    def sigma_data(self) -> float:
        """Root mean square, over all coordinates, of the distance to the mixture's mean."""
        means, d = self.means.flatten(1), self.means[0].numel()
        spread = self.weights @ (means - self.weights @ means).square().sum(1)
        inside = self.basis_variance.sum() + self.variance * (d - len(self.basis_variance))
        return math.sqrt(float(spread + inside) / d)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "GaussianMixture":
        """The same mixture elsewhere; float64 becomes float32 where the device is Apple's."""
        device = self.means.device if device is None else torch.device(device)
        if dtype is None and device.type not in ("cpu", "cuda"):
            dtype = torch.float32
        names = ("means", "weights", "basis", "basis_variance")
        return replace(self, **{name: getattr(self, name).to(device, dtype) for name in names})

    def sample(self, n: int, generator: Random = None) -> Tensor:
        """n exact draws, (n, *dims)."""
        n = check.count("n", n, most=10**9)
        check.generator(generator)
        weights = self.weights if generator is None else self.weights.to(generator.device)
        index = torch.multinomial(weights, n, replacement=True, generator=generator)
        centres = self.means[index.to(self.means.device)]
        noise, sd = randn_like(centres, generator).flatten(1), math.sqrt(self.variance)
        along = noise @ self.basis * (self.basis_variance.sqrt() - sd)
        return centres + (sd * noise + along @ self.basis.T).reshape(centres.shape)

    def _prepared(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """μ, V, c, and (μ, |μ|², (Vᵀμ)², log w)ᵀ, in which all that depends on k is linear."""
        if (device, dtype) not in self._kept:  # for the next call
            with torch.inference_mode(False), torch.no_grad():
                own = (self.means.flatten(1), self.basis, self.basis_variance, self.weights)
                means, basis, c, w = (a.to(device, dtype) for a in own)
                squares = (means**2).sum(1, keepdim=True), (means @ basis) ** 2
                columns = torch.cat([means, *squares, w.log()[:, None]], dim=1).T
                self._kept[device, dtype] = means, basis, c, columns
        return self._kept[device, dtype]

    def _blocks(self, z: Tensor, sigma: float | Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of rows in turn, with S = Σ + σ² I.

        log w_k + log N(z; μ_k, S), (b, K); the score S⁻¹ (E[μ_k | z] - z), (b, d); σ², (b, 1).
        """
        check.batch("z", z, finite=False)
        dims = self.means.shape[1:]
        check.require(z.shape[1:] == dims, f"z must have shape (B, *{tuple(dims)})", z)
        means, basis, c, columns = self._prepared(z.device, widest(z, self.means))
        level = as_level(sigma, z)
        if not isinstance(sigma, Tensor):
            level = level.to(means).fill_(sigma)  # a small number keeps its square
            check.require(self.variance + sigma**2 > 0, "atoms (variance 0) need sigma > 0")
        squares = (level.to(means) ** 2).reshape(-1, 1).expand(len(z), 1)
        rows, n = z.flatten(1).to(means), len(means)
        for x, square in zip(*(a.split(max(1, BLOCK // n)) for a in (rows, squares)), strict=True):
            plain = 1 / (self.variance + square)  # (b, 1), of S⁻¹ outside V
            extra = 1 / (c + square) - plain  # (b, m), what S⁻¹ has more inside
            scaled = plain * x + extra * (x @ basis) @ basis.T  # S⁻¹ x
            log_det = -plain.log()[:, 0] * x.shape[1] - (extra / plain).log1p().sum(1)
            own = (x * scaled).sum(1) + log_det + x.shape[1] * math.log(2 * math.pi)
            left = [scaled, -plain / 2, -extra / 2, torch.ones_like(square)]
            joint = torch.cat(left, dim=1) @ columns - own[:, None] / 2
            mean = joint.softmax(1) @ means
            yield joint, plain * mean + extra * (mean @ basis) @ basis.T - scaled, square

    def log_prob(self, z: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log p(z; σ) in nats, (B,).   Args: z: (B, *dims). sigma: number, scalar or (B,)."""
        check.batch("z", z)
        return torch.cat([joint.logsumexp(1) for joint, _, _ in self._blocks(z, sigma)]).to(z.dtype)

    def score(self, z: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        r"""∇_z log p(z; σ) = (Σ + σ² I)⁻¹ (E[μ_k | z] - z), (B, *dims). Arguments as `log_prob`."""
        check.batch("z", z)
        blocks = [score for _, score, _ in self._blocks(z, sigma)]
        return torch.cat(blocks).reshape(z.shape).to(z.dtype)

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        r"""D(z, σ) = z + σ² ∇_z log p(z; σ), Tweedie's formula. Arguments as `log_prob`."""
        blocks = [square * score for _, score, square in self._blocks(z, sigma)]
        shift = torch.cat(blocks).reshape(z.shape)
        return (z.to(shift) + shift).to(z.dtype)

    __call__ = denoise

    def posterior(self, obs: Observation) -> "GaussianMixture":
        r"""p(x | y) for a linear operator, exactly, where Σ = v I. With A = U diag(s) Vᵀ,

            w_k' ∝ w_k N(y; A μ_k, v A Aᵀ + σ_y² I),   e_k = Uᵀ(y - A μ_k),
            μ_k' = μ_k + V diag(v s / (v s² + σ_y²)) e_k,   c = v σ_y² / (v s² + σ_y²).

        Returns: a mixture; its `log_evidence` is log p(y).
        Raises `ValueError` if A is not linear, y not one observation, or impossible.
        Source: Bishop 2006, Pattern Recognition and Machine Learning, eq. 2.116, per component.
        """
        check.require(self.basis.shape[1] == 0, "posterior needs an isotropic mixture, no basis")
        v, noise = self.variance, obs.noise_std**2
        obs.check_single(self.means)
        matrix = obs.matrix(self.means.shape[1:])
        means, y, m = self.means.flatten(1).cpu().double(), obs.y.cpu().double(), len(matrix)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        residual = y.reshape(-1) - means @ matrix.T  # (K, m)
        e, total = residual @ u, v * s**2 + noise
        outside = (residual.square().sum(1) - e.square().sum(1)).clamp(min=0) / noise
        log_det = total.log().sum() + (m - len(s)) * math.log(noise) + m * math.log(2 * math.pi)
        log_w = self.weights.cpu().double().log() - ((e**2 / total).sum(1) + outside + log_det) / 2
        evidence = log_w.logsumexp(0)
        check.require(evidence.isfinite(), "y is impossible: all components give it density 0")
        moved = (means + (v * s / total * e) @ vh).reshape(self.means.shape)
        parts = (moved, (log_w - evidence).exp(), vh.T, v * noise / total)
        moved, weights, basis, c = (a.to(self.means.dtype).to(self.means.device) for a in parts)
        return GaussianMixture(moved, v, weights, basis, c, evidence)


def IsotropicMixture(
    means: Tensor, variance: float, weights: Tensor = None  # type: ignore[assignment]
) -> GaussianMixture:
    r"""Equal round Gaussians: a curve smeared by noise, or, with v = 0, a training set.

        p(z; σ) = Σ_k w_k N(z; μ_k, (v + σ²) I).   Arguments as for `GaussianMixture`.
    """
    return GaussianMixture(means, variance, weights)


def weighted_posterior(
    density: GaussianMixture, obs: Observation, n: int, generator: Random = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""p(x | y) for any operator: n exact draws of the prior, weighted.

        w_i ∝ p(y | x_i),   log p(y) ≈ log mean_i p(y | x_i).

    Returns: x (n, *dims); log-weights (n,), normalised; the log-evidence, a scalar.
    Raises `ValueError` if y is not one observation, or impossible for all draws.
    """
    x = density.sample(n, generator)
    obs.check_single(x)
    log_w = obs.log_likelihood(x)
    check.require(not log_w.isnan().any(), "operator returned NaN for some draws")
    total = log_w.logsumexp(0)
    check.require(total.isfinite(), "y is impossible: every draw gives it the likelihood 0")
    return x, log_w - total, total - math.log(n)
