"""How far a set of samples is from another, or from where it should be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import check_batch, check_count, check_positive, randn_like
from .data import swiss_roll_parameter


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 100, generator: torch.Generator | None = None) -> Tensor:
    r"""Mean over random directions θ of the Wasserstein-1 distance of θᵀx and θᵀy, `mean_i |sort(θᵀx)_i - sort(θᵀy)_i|`.

    x, y: (n, *dims), the same shape. Returns a scalar tensor. `ValueError` if the shapes differ.
    Source: Bonneel et al. 2015, J. Math. Imaging Vis. 51, definition 2.
    """
    check_batch(x)
    check_batch(y, "y")
    check_count(projections=projections)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    directions = randn_like(x.new_empty(x[0].numel(), projections), generator)
    directions = directions / directions.norm(dim=0)
    return ((x.flatten(1) @ directions).sort(dim=0)[0] - (y.flatten(1) @ directions).sort(dim=0)[0]).abs().mean()


def roll_mass(x: Tensor, weights: Tensor | None = None, bins: int = 20) -> Tensor:
    """Share of (weighted) samples nearest to each of `bins` equal intervals of the roll's parameter. x: (B, 2). Returns (bins,)."""
    check_count(bins=bins)
    index = (swiss_roll_parameter(x) * bins).long().clamp(max=bins - 1)
    weights = torch.ones_like(x[:, 0]) if weights is None else weights.to(x)
    return torch.zeros(bins, dtype=x.dtype, device=x.device).index_add(0, index, weights / weights.sum())


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of |p - q|, in [0, 1]. p, q: (bins,), each summing to 1. Returns a scalar tensor."""
    return (p - q).abs().sum() / 2


def calibration_ranks(truth: Tensor, draws: Tensor) -> Tensor:
    r"""Ranks for simulation-based calibration: how many of L posterior draws lie below the truth they should be exchangeable with.

    Over truths x_i ~ p(x), y_i ~ p(y | x_i) and draws from p(x | y_i), the ranks are uniform on 0..L.
    truth: (N,) one scalar per problem. draws: (N, L). Returns (N,), int64. Source: Talts et al. 2018 (arXiv 1804.06788), theorem 1.
    """
    _check_problems(truth, draws)
    return (draws < truth[:, None]).sum(1)


def central_interval(draws: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
    """Lower and upper end of the interval that holds a further, exchangeable draw with probability `level`. draws: (L, *dims); (*dims) each.

    The ends stand at the places p (L + 1), p = (1 ∓ level)/2, among the ordered draws, between two of them by linear interpolation;
    the quantiles of the L draws themselves would be too narrow, at level 0.9 and 19 draws by 0.09. `ValueError` if L < 2/(1 - level) - 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    n, p = len(draws), (1 - level) / 2
    share = (p * (n + 1) - 1) / max(n - 1, 1)
    if share < -1e-9:
        raise ValueError(f"draws must be at least {math.ceil(1 / p - 1 - 1e-9)} for an interval of level {level}, got {n}")
    share = max(share, 0.0)
    return draws.quantile(share, dim=0), draws.quantile(1 - share, dim=0)


def coverage(truth: Tensor, draws: Tensor, level: float = 0.9) -> Tensor:
    """Share of truths inside the `central_interval` of their draws; `level`, if both are exchangeable. truth: (N,); draws: (N, L). A scalar."""
    _check_problems(truth, draws)
    low, high = central_interval(draws.T, level)
    return ((truth >= low) & (truth <= high)).to(draws.dtype).mean()


def _check_problems(truth: Tensor, draws: Tensor) -> None:
    if truth.ndim != 1 or draws.ndim != 2 or len(truth) != len(draws):
        raise ValueError(f"truth must be (N,) and draws (N, L), got {tuple(truth.shape)} and {tuple(draws.shape)}")


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    r"""`|μ_x - μ_y|² + tr(C_x + C_y - 2 (C_x C_y)^{1/2})`, the squared Wasserstein-2 distance of two Gaussians with the moments of x and y.

    x: (n, d), y: (m, d), features of samples; n, m > 1. Returns a scalar tensor, float64.
    Samples of one law, its covariance C with eigenvalues λ, come not to 0 but to about, for m much larger than n,
    `(tr C + ½ Σ_ij λ_i λ_j (1 + δ_ij) / (λ_i + λ_j)) / n`.
    Source: Dowson & Landau 1982, J. Multivariate Anal. 12, eq. 4; for images Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    check_batch(x)
    check_batch(y, "y")
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"x and y must be (n, d) and (m, d) with n, m > 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double(), y.double()
    cx, cy = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    root = torch.linalg.eigvals(cx @ cy).real.clamp(min=0).sqrt().sum()  # eigenvalues of a product of two positive matrices are positive
    return (x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * root


def psnr(x: Tensor, truth: Tensor, peak: float = 2.0) -> Tensor:
    """`10 log10(peak² / mean |x - truth|²)` in dB for each sample; peak 2 is that of images in [-1, 1]. Returns (B,).

    x, truth: (B, *dims), or one of them (1, *dims). Raises `ValueError` where they do not fit.
    """
    check_batch(x)
    check_batch(truth, "truth")
    check_positive(peak=peak)
    if x.shape[1:] != truth.shape[1:] or min(len(x), len(truth)) not in (1, max(len(x), len(truth))):
        raise ValueError(
            f"x and truth must have the same shape (B, *dims), B = 1 for one of them, got {tuple(x.shape)} and {tuple(truth.shape)}"
        )
    return 10 * torch.log10(peak**2 / (x - truth).square().flatten(1).mean(1))
