"""Score networks F(x, c) and the preconditioning that turns one into a denoiser D(z, σ)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ._checks import check_batch, check_count, check_positive, expand, holds


class MLP(nn.Module):
    r"""A residual network for low-dimensional data, conditioned on c through `cos(π k c), sin(π k c)`, k = 1..frequencies, and c itself.

    F(x, c): x (B, dim), c (B,) -> (B, dim). It starts as the zero function, so that the untrained denoiser is the best linear one.
    """

    def __init__(self, dim: int = 2, width: int = 64, depth: int = 3, frequencies: int = 8) -> None:
        check_count(dim=dim, width=width, depth=depth, frequencies=frequencies)
        super().__init__()
        self.config = {"dim": dim, "width": width, "depth": depth, "frequencies": frequencies}
        self.register_buffer("frequencies", math.pi * torch.arange(1, frequencies + 1), persistent=False)
        self.embed = nn.Linear(2 * frequencies + 1, width)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        angles = c[:, None] * self.frequencies  # (B, frequencies)
        h = self.first(x) + self.embed(torch.cat([c[:, None], angles.cos(), angles.sin()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.last(nn.functional.silu(h))


class Denoiser(nn.Module):
    r"""`D(z, σ) = c_skip z + c_out F(c_in z, c_noise)`, with s = sigma_data:

    `c_skip = s²/(σ² + s²)`, `c_out = σ s / sqrt(σ² + s²)`, `c_in = 1/sqrt(σ² + s²)`, `c_noise = ln(σ)/4`.

    z: (B, *dims); sigma: float, scalar tensor or (B,), σ >= 0 (D(z, 0) = z). Returns E[x_0 | z] as far as F has learned it, (B, *dims).
    Source: Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 1.0) -> None:
        check_positive(sigma_data=sigma_data)
        super().__init__()
        self.network, self.sigma_data = network, float(sigma_data)

    def forward(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        check_batch(z, "z")
        sigma = expand(sigma, z, "sigma")
        if not holds((sigma >= 0).all()):
            raise ValueError("sigma must be non-negative")
        norm = (sigma**2 + self.sigma_data**2).sqrt()
        c_noise = sigma.clamp(min=1e-6).log().flatten().expand(len(z)) / 4
        return (self.sigma_data / norm) ** 2 * z + sigma * self.sigma_data / norm * self.network(z / norm, c_noise)


NETWORKS = {"MLP": MLP}


def save_denoiser(denoiser: Denoiser, path: str | Path, **facts: object) -> None:
    """Write weights as safetensors; the architecture, sigma_data and any JSON-able `facts` go in its header."""
    from safetensors.torch import save_file

    network = denoiser.network
    header = {"network": type(network).__name__, "config": network.config, "sigma_data": denoiser.sigma_data, "facts": facts}
    tensors = {name: value.detach().cpu().contiguous() for name, value in denoiser.state_dict().items()}
    save_file(tensors, str(path), metadata={"sde_utils": json.dumps(header)})


def load_denoiser(path: str | Path) -> Denoiser:
    """Read what `save_denoiser` wrote. `FileNotFoundError` if there is nothing, `ValueError` if the file is not one of these."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no denoiser at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["sde_utils"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        denoiser = Denoiser(NETWORKS[header["network"]](**header["config"]), header["sigma_data"])
        denoiser.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a denoiser written by save_denoiser: {error}") from error
    return denoiser.eval()
