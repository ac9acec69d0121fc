"""The data of the lecture."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.datasets import make_swiss_roll
from torch import Tensor

from ._checks import check_count, check_positive


def _spiral(u: np.ndarray) -> np.ndarray:
    """Centre line of scikit-learn's Swiss roll, coordinates 0 and 2, for u in [0, 1]: φ (cos φ, sin φ), φ = 1.5 π (1 + 2u)."""
    phi = 1.5 * math.pi * (1 + 2 * u)
    return np.stack([phi * np.cos(phi), phi * np.sin(phi)], axis=-1)


def gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (summing to 1) of the Gauss-Legendre rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


def swiss_roll_scaling(noise: float = 0.2) -> tuple[float, float]:
    """Population mean and standard deviation of all coordinates together, the two scalars that standardise the roll."""
    check_positive(noise=noise)
    u, w = gauss_legendre(64)
    mean = (w @ _spiral(u)).mean()
    return float(mean), math.sqrt((w @ _spiral(u) ** 2).mean() + noise**2 - mean**2)


def swiss_roll_curve(u: Tensor, noise: float = 0.2) -> Tensor:
    """Centre line of the standardised roll at parameters u in [0, 1]. u: (n,). Returns (n, 2)."""
    mean, sd = swiss_roll_scaling(noise)
    return torch.as_tensor((_spiral(u.detach().cpu().double().numpy()) - mean) / sd).to(u)


def swiss_roll_parameter(x: Tensor, noise: float = 0.2, nodes: int = 2000) -> Tensor:
    """Parameter u in [0, 1] of the centre line's point nearest to each sample. x: (B, 2). Returns (B,)."""
    u = torch.linspace(0, 1, nodes, dtype=x.dtype, device=x.device)
    curve = swiss_roll_curve(u, noise)
    return u[torch.cat([torch.cdist(block, curve).argmin(dim=1) for block in x.split(4096)])]


def swiss_roll(n: int, noise: float = 0.2, generator: torch.Generator | None = None, seed: int | None = None) -> Tensor:
    r"""n points of scikit-learn's Swiss roll, coordinates 0 and 2, standardised by the population's scalar mean and sd.

    `x = (φ (cos φ, sin φ) + noise ε - mean) / sd`, φ ~ U(1.5π, 4.5π). Returns float32 (n, 2). The seed is `seed`, else drawn from `generator`.
    """
    check_count(n=n)
    mean, sd = swiss_roll_scaling(noise)
    if seed is None:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**31, (), generator=generator, device=device))
    points, _ = make_swiss_roll(n, noise=noise, random_state=seed)
    return torch.as_tensor((points[:, [0, 2]] - mean) / sd, dtype=torch.float32)
