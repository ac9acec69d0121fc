"""Networks F(x, c), and the preconditioning that makes one a denoiser D(z, σ)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _check as check
from ._numerics import as_level

silu = nn.functional.silu


def waves(c: Tensor, frequencies: Tensor) -> Tensor:
    """c, cos(f c), sin(f c) for each frequency f.   c: (B,). Returns: (B, 2 len(f) + 1)."""
    angles = c[:, None] * frequencies
    return torch.cat([c[:, None], angles.cos(), angles.sin()], dim=1)


class MLP(nn.Module):
    """A residual network F(x, c) for low-dimensional data: x (B, dim), c (B,) -> (B, dim).

    It starts as the zero function: the untrained denoiser is the best linear one.
    Args: dim: of the data. width: channels. depth: blocks. frequencies: number of waves.
    """

    frequencies: Tensor

    def __init__(self, dim: int = 2, width: int = 64, depth: int = 3, frequencies: int = 8) -> None:
        super().__init__()
        sizes = {"dim": dim, "width": width, "depth": depth, "frequencies": frequencies}
        self.config = {name: check.count(name, n) for name, n in sizes.items()}
        dim, width, depth, n = self.config.values()
        self.register_buffer("frequencies", math.pi * torch.arange(1, n + 1), persistent=False)
        self.embed = nn.Linear(2 * n + 1, width)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            inner, outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.blocks.append(nn.Sequential(nn.SiLU(), inner, nn.SiLU(), outer))
        self.last = nn.Linear(width, dim)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        dim = self.config["dim"]
        check.require(x.shape[1:] == (dim,), f"x must have shape (B, {dim})", x)
        h = self.first(x) + self.embed(waves(c, self.frequencies))
        for block in self.blocks:
            h = h + block(h)
        return self.last(silu(h))


class ResidualBlock(nn.Module):
    """x + conv(silu((1 + a) norm(conv(silu(norm x))) + b)), then attention if there are heads.

    (a, b) is linear in the embedded noise level. Args: inner, outer: channels.
    """

    def __init__(self, inner: int, outer: int, embedding: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outer)
        self.past = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        self.attention = Attention(outer, heads) if heads else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        a, b = self.modulate(embedding)[..., None, None].chunk(2, dim=1)  # (B, outer, 1, 1)
        h = self.norm2(self.conv1(silu(self.norm1(x))))
        return self.attention(self.past(x) + self.conv2(silu((1 + a) * h + b)))


class Attention(nn.Module):
    """x + W softmax(Q Kᵀ / sqrt(c)) V over the pixels, in parts of c = channels / heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.shape[2] * x.shape[3]
        qkv = self.qkv(self.norm(x)).reshape(len(x), 3, self.heads, -1, pixels)
        q, k, v = qkv.mT.unbind(1)  # (B, heads, pixels, c)
        h = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return x + self.out(h.mT.reshape(x.shape))


def u_shape(widths: Sequence[int], blocks: int, heads: int, wide: int) -> list[nn.ModuleList]:
    """The residual blocks of each level on the way down, and on the way up."""
    levels = [(w, 0) for w in widths[:-1]] + [(widths[-1], heads)]
    down, up, passed, width = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
    for w, attention in levels:
        sizes = [width] + [w] * (blocks - 1)
        down.append(nn.ModuleList(ResidualBlock(size, w, wide, attention) for size in sizes))
        passed, width = passed + [w] * blocks, w
    for w, attention in reversed(levels):
        last = len(up) + 1 == len(widths)  # has one block more
        sizes = [size + passed.pop() for size in [width] + [w] * (blocks - 1 + last)]
        up.append(nn.ModuleList(ResidualBlock(size, w, wide, attention) for size in sizes))
        width = w
    return [down, up]


class UNet(nn.Module):
    """A U-Net F(x, c) for images: x (B, channels, H, W), c (B,) -> like x. It starts as zero.

    H and W are multiples of patch 2^(levels - 1).
    Args: channels: of the image. widths: channels at each level, of half the resolution of the
    one before. blocks: per level, down and up, one more at the end. heads: of the coarsest
    level's self-attention. patch: side of the squares of pixels that become channels.
    """

    frequencies: Tensor

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (32, 128),
        blocks: int = 1,
        heads: int = 4,
        patch: int = 2,
    ) -> None:
        super().__init__()
        check.kind(isinstance(widths, Sequence), "widths must be several, as (32, 128)", widths)
        check.count("levels", len(widths))
        sizes = {"channels": channels, "blocks": blocks, "heads": heads, "patch": patch}
        self.config: dict[str, object] = {name: check.count(name, n) for name, n in sizes.items()}
        widths = [check.count("widths", w) for w in widths]
        good = not any(w % 8 for w in widths) and widths[-1] % heads == 0
        check.require(good, f"widths must be multiples of 8, the last of {heads} (heads): {widths}")
        self.config["widths"] = widths
        self.patch, self.multiple = patch, patch * 2 ** (len(widths) - 1)
        self.register_buffer("frequencies", math.pi * torch.arange(1, 9), persistent=False)
        wide, inside = 2 * widths[-1], channels * patch**2
        self.embed = nn.Sequential(nn.Linear(17, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU())
        self.first = nn.Conv2d(inside, widths[0], 3, padding=1)
        self.down, self.up = u_shape(widths, blocks, heads, wide)
        self.norm = nn.GroupNorm(8, widths[0])
        self.last = nn.Conv2d(widths[0], inside, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        channels, n = self.config["channels"], self.multiple
        good = x.ndim == 4 and x.shape[1] == channels and not (x.shape[2] % n or x.shape[3] % n)
        check.require(good, f"x must have shape (B, {channels}, {n} i, {n} j)", x)
        embedding = self.embed(waves(c, self.frequencies))
        h = nn.functional.pixel_unshuffle(x, self.patch)
        h = self.first(h.contiguous(memory_format=torch.channels_last))
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
        return nn.functional.pixel_shuffle(self.last(silu(self.norm(h))), self.patch)


class Denoiser(nn.Module):
    """E[x_0 | x_0 + σ ε = z], as far as a network F has learned it.

        D(z, σ) = c_skip z + c_out F(c_in z, c_noise),
        c_skip = s² / (σ² + s²),        c_out = σ s / sqrt(σ² + s²),
        c_in = 1 / sqrt(σ² + s²),       c_noise = ln(σ) / 4;       D(z, 0) = z.

    Args: network: F(x, c), c (B,) -> like x. sigma_data: s, the size of the data.
    denoiser(z, sigma): z (B, *dims), sigma >= 0 a number, a scalar tensor or (B,) -> like z.
    No tensor's values are read: it compiles, and a σ < 0 in a tensor passes.
    Source: Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 1.0) -> None:
        super().__init__()
        inner = getattr(network, "_orig_mod", network)  # torch.compile's
        good = isinstance(inner, nn.Module) and not isinstance(inner, Denoiser)
        check.kind(good, "network must be an F(x, c), as su.MLP()", network)
        self.network, self.sigma_data = network, check.number("sigma_data", sigma_data)

    def forward(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        check.batch("z", z, finite=False)
        own = next(self.parameters(), z).dtype
        if z.dtype != own:
            raise TypeError(f"z must have the network's dtype {own}, got {z.dtype}: z.to({own})")
        sigma, s = as_level(sigma, z), self.sigma_data
        norm = (sigma**2 + s**2).sqrt()
        c_noise = sigma.clamp(min=1e-6).log().flatten().expand(len(z)) / 4
        f = self.network(z / norm, c_noise)
        if not isinstance(f, Tensor) or f.shape != z.shape:
            raise ValueError(f"network must return {tuple(z.shape)}, as x, got {check.what(f)}")
        return (s / norm) ** 2 * z + sigma * s / norm * f
