"""Score networks F(x, c) and the preconditioning that turns one into a denoiser D(z, σ)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ._checks import check_batch, check_count, check_positive, expand, holds


class MLP(nn.Module):
    r"""A residual network for low-dimensional data, conditioned on c through `cos(π k c), sin(π k c)`, k = 1..frequencies, and c itself.

    F(x, c): x (B, dim), c (B,) -> (B, dim). It starts as the zero function, so that the untrained denoiser is the best linear one.
    """

    frequencies: Tensor

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
        if x.ndim != 2 or x.shape[1] != self.config["dim"]:
            raise ValueError(f"x must have shape (B, {self.config['dim']}) for this MLP, got {tuple(x.shape)}")
        angles = c[:, None] * self.frequencies  # (B, frequencies)
        h = self.first(x) + self.embed(torch.cat([c[:, None], angles.cos(), angles.sin()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.last(nn.functional.silu(h))


class ResidualBlock(nn.Module):
    """`x + conv(silu((1 + a) norm(conv(silu(norm x))) + b))`, (a, b) linear in the embedded noise level.

    Where the number of channels changes, x passes by a 1 x 1 convolution. With `heads`, self-attention over the pixels follows."""

    def __init__(self, inner: int, outer: int, embedding: int, heads: int = 0) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outer)
        self.past = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        self.attention = Attention(outer, heads) if heads else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        silu = nn.functional.silu
        a, b = self.modulate(embedding)[..., None, None].chunk(2, dim=1)  # (B, outer, 1, 1)
        h = self.norm2(self.conv1(silu(self.norm1(x))))
        return self.attention(self.past(x) + self.conv2(silu((1 + a) * h + b)))


class Attention(nn.Module):
    """`x + W softmax(QᵀK / sqrt(c)) V`, every pixel looking at every other, in `heads` parts of the channels."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), 3, self.heads, -1, x.shape[2] * x.shape[3]).mT.unbind(1)  # (B, heads, pixels, c)
        h = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return x + self.out(h.mT.reshape(x.shape))


class UNet(nn.Module):
    r"""A U-Net for images, conditioned on c. Squares of `patch` x `patch` pixels become channels first: no layer works at full resolution.

    Args: channels: of the image. widths: channels at each level, of half the resolution of the one before. blocks: residual blocks per level on
    the way down and up, one more at the end. heads: of the self-attention in the coarsest level's blocks. patch: side of a square.
    F(x, c): x (B, channels, H, W), c (B,) -> like x; `ValueError` unless H and W are multiples of patch 2^(levels - 1). It starts as zero.
    """

    frequencies: Tensor

    def __init__(self, channels: int = 1, widths: Sequence[int] = (32, 128), blocks: int = 1, heads: int = 4, patch: int = 2) -> None:
        check_count(channels=channels, blocks=blocks, heads=heads, patch=patch, levels=len(widths), widths=min(widths, default=1))
        if any(w % 8 for w in widths) or widths[-1] % heads:
            raise ValueError(f"widths must be multiples of 8, the last one of heads = {heads}, got {tuple(widths)}")
        super().__init__()
        self.config = {"channels": channels, "widths": list(widths), "blocks": blocks, "heads": heads, "patch": patch}
        self.patch, self.multiple, embedding = patch, patch * 2 ** (len(widths) - 1), 2 * widths[-1]
        self.register_buffer("frequencies", math.pi * torch.arange(1, 9), persistent=False)
        self.embed = nn.Sequential(nn.Linear(17, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.first = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        down, up = [], []
        passed, width = [widths[0]], widths[0]
        for i, w in enumerate(widths):
            level = [ResidualBlock(width if j == 0 else w, w, embedding, heads if i == len(widths) - 1 else 0) for j in range(blocks)]
            down.append(nn.ModuleList(level))
            width, passed = w, passed + [w] * blocks
        for i, w in reversed(list(enumerate(widths))):
            coarse = heads if i == len(widths) - 1 else 0
            level = []
            for _ in range(blocks + (i == 0)):
                level.append(ResidualBlock(width + passed.pop(), w, embedding, coarse))
                width = w
            up.append(nn.ModuleList(level))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, channels * patch**2, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.config["channels"] or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            expected = f"(B, {self.config['channels']}, H, W), H and W multiples of {self.multiple}"
            raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
        angles = c[:, None] * self.frequencies
        embedding = self.embed(torch.cat([c[:, None], angles.cos(), angles.sin()], dim=1))
        h = nn.functional.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        h = self.first(h)
        passed = [h]
        for i, level in enumerate(self.down):
            h = nn.functional.avg_pool2d(h, 2) if i else h
            for block in level.children():
                h = block(h, embedding)
                passed.append(h)
        for i, level in enumerate(self.up):
            h = nn.functional.interpolate(h, scale_factor=2.0) if i else h
            for block in level.children():
                h = block(torch.cat([h, passed.pop()], dim=1), embedding)
        return nn.functional.pixel_shuffle(self.last(nn.functional.silu(self.norm(h))), self.patch)


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
        own = next(self.parameters(), z).dtype
        if z.dtype != own:
            raise TypeError(f"z must have the network's dtype, {own}, got {z.dtype}: data.float(), or denoiser.double()")
        sigma = expand(sigma, z, "sigma")
        if not holds((sigma >= 0).all()):
            raise ValueError("sigma must be non-negative")
        norm = (sigma**2 + self.sigma_data**2).sqrt()
        c_noise = sigma.clamp(min=1e-6).log().flatten().expand(len(z)) / 4
        return (self.sigma_data / norm) ** 2 * z + sigma * self.sigma_data / norm * self.network(z / norm, c_noise)


NETWORKS = {"MLP": MLP, "UNet": UNet}


def save_denoiser(denoiser: Denoiser, path: str | Path, dtype: torch.dtype | None = None, **facts: object) -> None:
    """Write weights as safetensors, atomically; the architecture, sigma_data and any JSON-able `facts` go in its header.

    dtype: of the stored numbers, the denoiser's own if None; half precision halves the file, and `load_denoiser` returns float32.
    """
    from safetensors.torch import save_file

    network = denoiser.network
    header = {"network": type(network).__name__, "config": network.config, "sigma_data": denoiser.sigma_data, "facts": facts}
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in denoiser.state_dict().items()}
    partial = Path(f"{path}.partial")
    save_file(tensors, str(partial), metadata={"sde_utils": json.dumps(header)})
    os.replace(partial, path)


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


def load_pretrained(name: str) -> Denoiser:
    """A denoiser that comes with the package: "mnist", a `UNet` trained by `python -m sde_utils.pretrain`. `ValueError` for another name."""
    folder = Path(__file__).parent / "pretrained"
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    if name not in names:
        raise ValueError(f"name must be one of {names}, got {name!r}")
    return load_denoiser(folder / f"{name}.safetensors")
