"""The Swiss roll: draws, the curve they lie about, their exact density, shares of its pieces."""

import math

import numpy as np
import torch
from sklearn.datasets import make_swiss_roll
from torch import Tensor

from . import _check as check
from ._numerics import Random
from .exact import GaussianMixture, IsotropicMixture


def spiral(u: np.ndarray) -> np.ndarray:
    """Centre line of scikit-learn's roll, u in [0, 1]: φ (cos φ, sin φ), φ = 1.5 π (1 + 2u)."""
    phi = 1.5 * math.pi * (1 + 2 * u)
    return np.stack([phi * np.cos(phi), phi * np.sin(phi)], axis=-1)


def quadrature(panels: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (summing to 1) on [0, 1]: 64-point Gauss-Legendre rules on panels.

    The panels' ends are equally spaced in (1 + 2u)², and so nearly in the spiral's arc length.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    ends = (np.sqrt(1 + 8 * np.arange(panels + 1) / panels) - 1) / 2
    start, length = ends[:-1, None], np.diff(ends)[:, None]
    return (start + length * (nodes + 1) / 2).reshape(-1), (length * weights / 2).reshape(-1)


def swiss_roll_scaling(noise: float = 0.2) -> tuple[float, float]:
    """Population mean and sd of all coordinates together, the two scalars that standardise it."""
    noise = check.number("noise", noise, ends="[)")
    u, w = quadrature(1)
    mean = (w @ spiral(u)).mean()
    return float(mean), math.sqrt((w @ spiral(u) ** 2).mean() + noise**2 - mean**2)


def swiss_roll_curve(u: Tensor, noise: float = 0.2) -> Tensor:
    """Centre line of the standardised roll.

    Args: u: (n,), in [0, 1].   Returns: (n, 2).
    """
    mean, sd = swiss_roll_scaling(noise)
    check.tensor("u", u)
    curve = (spiral(u.detach().cpu().double().numpy()) - mean) / sd
    return torch.tensor(curve, dtype=u.dtype, device="cpu").to(u.device)


def swiss_roll_parameter(x: Tensor, noise: float = 0.2, nodes: int = 2000) -> Tensor:
    """Parameter u in [0, 1] of the centre line's point nearest to each sample.

    Args: x: (B, 2).   Returns: (B,).
    """
    check.batch("x", x)
    check.require(x.shape[1:] == (2,), "x must have shape (B, 2)", x)
    u = torch.linspace(0, 1, nodes, dtype=x.dtype, device=x.device)
    curve = swiss_roll_curve(u, noise)
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for block, index in zip(x.split(4096), nearest.split(4096), strict=True):
        index.copy_(torch.cdist(block, curve).argmin(dim=1))  # in place, or the heap grows
    return u[nearest]


def swiss_roll(
    n: int, noise: float = 0.2, generator: Random = None, seed: int | None = None
) -> Tensor:
    r"""n points of scikit-learn's Swiss roll, coordinates 0 and 2, standardised.

        x = (φ (cos φ, sin φ) + noise ε - mean) / sd,   φ ~ U(1.5π, 4.5π).

    Args: seed: drawn from `generator` if None.   Returns: (n, 2), float32, on the CPU.
    """
    n = check.count("n", n, most=10**9)
    check.generator(generator)
    mean, sd = swiss_roll_scaling(noise)
    if seed is None:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**31, (), generator=generator, device=device))
    seed = check.count("seed", seed, 0, 2**32 - 1)
    points, _ = make_swiss_roll(n, noise=float(noise), random_state=seed)
    return torch.tensor((points[:, [0, 2]] - mean) / sd, dtype=torch.float32, device="cpu")


def swiss_roll_density(noise: float = 0.2) -> GaussianMixture:
    r"""The population of `swiss_roll(n, noise)`, by quadrature over the curve c.

        p(x) = ∫₀¹ N(x; c(u), (noise/sd)² I) du.

    About 154 / noise nodes, whose spacing stays below the noise: exact to 1e-8 nats. Float64, CPU.
    """
    noise = check.number("noise", noise, 0.002)
    u, w = (torch.from_numpy(a) for a in quadrature(math.ceil(2.4 / noise)))
    variance = (noise / swiss_roll_scaling(noise)[1]) ** 2
    return IsotropicMixture(swiss_roll_curve(u, noise), variance, w)


def roll_mass(x: Tensor, weights: Tensor | None = None, bins: int = 20) -> Tensor:
    """Share of (weighted) samples nearest to each of equal intervals of the roll's parameter.

    Args: x: (B, 2). weights: (B,), non-negative; equal if None. bins: their number.
    Returns: (bins,), summing to 1.
    """
    bins = check.count("bins", bins)
    index = (swiss_roll_parameter(x) * bins).long().clamp(max=bins - 1)
    weights = torch.ones_like(x[:, 0]) if weights is None else weights
    check.weights("weights", weights, len(x))
    shares = (weights / weights.sum()).to(x.dtype).to(x.device)
    return torch.zeros(bins, dtype=x.dtype, device=x.device).index_add(0, index, shares)


def roll_pieces(mass: Tensor, least: float = 0.01) -> list[slice]:
    """Runs of neighbouring bins with shares, (bins,) as of `roll_mass`, of at least `least`."""
    check.tensor("mass", mass)
    found: list[slice] = []
    for i, share in enumerate(mass.tolist()):
        if share >= least:
            begin = found.pop().start if found and found[-1].stop == i else i
            found.append(slice(begin, i + 1))
    return found
