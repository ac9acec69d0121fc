"""How far a set of samples is from another, or from where it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_batch, check_count, randn_like
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
