"""How far a set of samples is from another, or from where it should be."""

import math

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Random, randn_like


def check_problems(truth: Tensor, draws: Tensor) -> None:
    """One truth for each row of draws, all finite."""
    check.tensor("truth", truth)
    check.batch("draws", draws)
    check.require(truth.isfinite().all(), "truth must be finite, but holds NaN or infinity")
    good = truth.shape == draws.shape[:1] and draws.ndim == 2
    check.require(good, "truth must be (N,), draws (N, L)", truth, draws)


def sliced_wasserstein(
    x: Tensor, y: Tensor, projections: int = 100, generator: Random = None
) -> Tensor:
    """Mean over random directions θ of the Wasserstein-1 distance of θᵀx and θᵀy.

        mean_i |sort(θᵀx)_i - sort(θᵀy)_i|.

    Args: x, y: (n, *dims), the same shape and dtype. projections: number of directions.
    Returns: a scalar tensor.
    Source: Bonneel et al. 2015, J. Math. Imaging Vis. 51, there of the squares.
    """
    check.batch("x", x)
    check.batch("y", y)
    check.require(x.shape == y.shape, "x and y must have the same shape", x, y)
    if x.dtype != y.dtype:
        raise TypeError(f"x and y must have one dtype, got {x.dtype}, {y.dtype}: y.to(x.dtype)")
    projections = check.count("projections", projections)
    directions = randn_like(x.new_empty(x[0].numel(), projections), generator)
    directions = directions / directions.norm(dim=0)
    x, y = (a.flatten(1) @ directions for a in (x, y))
    return (x.sort(dim=0)[0] - y.sort(dim=0)[0]).abs().mean()


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of |p - q|, in [0, 1].

    Args: p, q: (bins,), shares, each summing to 1.   Returns: a scalar tensor.
    """
    check.tensor("p", p)
    for name, share in (("p", p), ("q", q)):
        check.weights(name, share, p.numel())
        total = share.sum()
        check.require(abs(total - 1) < 1e-3, f"{name} must sum to 1, got {total:.6g}")
    return (p - q).abs().sum() / 2


def calibration_ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """For simulation-based calibration: how many of L posterior draws lie below their truth.

    Over truths x_i ~ p(x), y_i ~ p(y | x_i), draws from p(x | y_i), ranks are uniform on 0..L.

    Args: truth: (N,), one scalar per problem. draws: (N, L).   Returns: (N,), int64.
    Source: Talts et al. 2018 (arXiv 1804.06788), theorem 1.
    """
    check_problems(truth, draws)
    return (draws < truth[:, None]).sum(1)


def ecdf_band(
    n: int, draws: int, level: float = 0.95, simulations: int = 10_000, generator: Random = None
) -> tuple[Tensor, Tensor]:
    """Where the empirical distribution function of n `calibration_ranks` has to stay.

    With probability `level` low_j <= share of ranks <= j  is  <= high_j at all j = 0..draws - 1,
    if ranks are uniform on 0..draws. At each j the count is binomial; all intervals leave out the
    same tail probability, found by simulation.

    Args: n: number of ranks. draws: L, the largest rank.
    Returns: low and high, (draws,) each, float64 on the CPU.
    Source: Säilynoja, Bürkner & Vehtari 2022 (arXiv 2103.10522), their method by simulation.
    """
    n, draws = check.count("n", n, most=10**5), check.count("draws", draws, most=10**4)
    level = check.number("level", level, 0, 1)
    simulations = check.count("simulations", simulations, 100)
    check.generator(generator)
    device = "cpu" if generator is None else generator.device
    k = torch.arange(n + 1, dtype=torch.float64, device="cpu")
    z = torch.arange(1, draws + 1, dtype=torch.float64, device="cpu")[:, None] / (draws + 1)
    choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    chance = (choose + k * z.log() + (n - k) * (-z).log1p()).exp()  # binomial, (draws, n + 1)
    tail = 2 * torch.minimum(chance.cumsum(1), chance.flip(1).cumsum(1).flip(1))
    least = []
    for _ in range(simulations):
        ranks = torch.randint(draws + 1, (n,), generator=generator, device=device).cpu()
        counts = ranks.bincount(minlength=draws + 1).cumsum(0)[:-1, None]
        least.append(tail.gather(1, counts).min())
    inside = tail >= torch.stack(least).sort()[0][int((1 - level) * simulations)]
    low, high = inside.int().argmax(1), n - inside.flip(1).int().argmax(1)
    return low / n, high / n


def central_interval(draws: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
    """Ends of the interval that holds a further, exchangeable draw with probability `level`.

    They stand at the places p (L + 1), p = (1 ∓ level)/2, among the ordered draws, between two
    of them by linear interpolation. The quantiles of the L draws themselves would be too narrow,
    at level 0.9 and 19 draws by 0.09.

    Args: draws: (L, *dims), L >= 2/(1 - level) - 1, else `ValueError`.
    Returns: lower and upper end, dims each.
    """
    level = check.number("level", level, 0, 1)
    check.batch("draws", draws)
    n, p = len(draws), (1 - level) / 2
    share = (p * (n + 1) - 1) / max(n - 1, 1)
    least = math.ceil(1 / p - 1 - 1e-9)
    check.require(share > -1e-9, f"draws must be at least {least} for level {level}, got {n}")
    share = max(share, 0.0)
    return draws.quantile(share, dim=0), draws.quantile(1 - share, dim=0)


def coverage(truth: Tensor, draws: Tensor, level: float = 0.9) -> Tensor:
    """Share of truths in the `central_interval` of their draws; `level` if exchangeable.

    Args: truth: (N,). draws: (N, L).   Returns: a scalar tensor.
    """
    check_problems(truth, draws)
    low, high = central_interval(draws.T, level)
    return ((truth >= low) & (truth <= high)).to(draws.dtype).mean()


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """The squared Wasserstein-2 distance of two Gaussians with the moments of x and y.

        |μ_x - μ_y|² + tr(C_x + C_y - 2 (C_x C_y)^{1/2}).

    Samples of one law, its covariance C with eigenvalues λ, come not to 0 but to about

        (tr C + ½ Σ_ij λ_i λ_j (1 + δ_ij) / (λ_i + λ_j)) / n,   m much larger than n.

    Args: x: (n, d), y: (m, d), features of samples; n, m > 1.
    Returns: a scalar tensor, float64 on the CPU.
    Source: Dowson & Landau 1982, J. Multivariate Anal. 12; for images Heusel et al. 2017
    (arXiv 1706.08500).
    """
    check.batch("x", x)
    check.batch("y", y)
    good = x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] and min(len(x), len(y)) > 1
    check.require(good, "x and y must be (n, d) and (m, d) with n, m > 1", x, y)
    x, y = x.cpu().double(), y.cpu().double()  # MPS has no float64
    cx, cy = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(x.shape[1], -1)
    roots = torch.linalg.eigvals(cx @ cy).real.clamp(min=0).sqrt()  # of a product: positive
    return (x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * roots.sum()


def psnr(x: Tensor, truth: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each sample, in dB.

        10 log10(peak² / mean |x - truth|²).

    Args:
        x, truth: (B, *dims), or one of them (1, *dims).
        peak: of the values; 2 is that of images in [-1, 1].
    Returns: (B,).
    """
    check.batch("x", x)
    check.batch("truth", truth)
    peak = check.number("peak", peak)
    good = x.shape[1:] == truth.shape[1:] and (len(x) == len(truth) or 1 in (len(x), len(truth)))
    check.require(good, "x and truth must be (B, *dims), B = 1 for one of them", x, truth)
    return 10 * torch.log10(peak**2 / (x - truth).square().flatten(1).mean(1))
