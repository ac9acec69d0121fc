"""Operators A of image inverse problems: plain differentiable callables on (B, C, H, W). All here are linear but `PhaseRetrieval`.

Each computes in the dtype and on the device of its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ._checks import check_batch, check_count, check_positive, conjugate_gradient


def check_images(x: Tensor) -> None:
    check_batch(x)
    if x.ndim != 4:
        raise ValueError(f"x must be images (B, C, H, W), got {tuple(x.shape)}")


@dataclass(frozen=True)
class Inpainting:
    """The pixels where `mask` is True, in a row: (B, C, H, W) -> (B, C, n). mask: (H, W), bool, not all False."""

    mask: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool or self.mask.ndim != 2 or not self.mask.any():
            raise ValueError("mask must be a bool tensor (H, W) that keeps at least one pixel")

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        if x.shape[2:] != self.mask.shape:
            raise ValueError(f"x must have images of {tuple(self.mask.shape)}, got {tuple(x.shape)}")
        return x[:, :, self.mask.to(x.device)]


def box_mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> Tensor:
    """(height, width), True outside the box of rows top..bottom-1 and columns left..right-1. `ValueError` if the box is empty or sticks out."""
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(f"the box ({top}, {left}, {bottom}, {right}) must lie in {height} x {width} and not be empty")
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = False
    return mask


def random_mask(height: int, width: int, keep: float, generator: torch.Generator | None = None) -> Tensor:
    """(height, width), True at round(keep · height · width) random pixels. `ValueError` unless that is at least one and at most all."""
    count = round(keep * height * width) if math.isfinite(keep) else 0
    if not 1 <= count <= height * width:
        raise ValueError(f"keep must leave at least one pixel and at most all, got {keep}")
    device = "cpu" if generator is None else generator.device
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[torch.randperm(height * width, generator=generator, device=device)[:count].cpu()] = True
    return mask.reshape(height, width)


@dataclass(frozen=True)
class Downsampling:
    """Means over `factor` x `factor` pixels: (B, C, H, W) -> (B, C, H/factor, W/factor). `ValueError` if H or W is not a multiple."""

    factor: int

    def __post_init__(self) -> None:
        check_count(factor=self.factor)

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must have height and width that are multiples of {self.factor}, got {tuple(x.shape)}")
        return functional.avg_pool2d(x, self.factor)


@dataclass(frozen=True)
class Blur:
    """Convolution with `kernel`, the border's pixels repeated outside: (B, C, H, W) -> the same shape. kernel: (k, l), floats, odd sides."""

    kernel: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, Tensor) or self.kernel.ndim != 2 or not self.kernel.is_floating_point():
            raise ValueError("kernel must be a floating-point tensor (k, l)")
        if any(k % 2 == 0 for k in self.kernel.shape):
            raise ValueError(f"kernel must have odd sides, got {tuple(self.kernel.shape)}")

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        kernel = self.kernel.flip(0, 1).to(x).expand(x.shape[1], 1, *self.kernel.shape)  # conv2d correlates
        rows, columns = (side // 2 for side in self.kernel.shape)
        return functional.conv2d(functional.pad(x, (columns, columns, rows, rows), mode="replicate"), kernel, groups=x.shape[1])


def gaussian_kernel(sd: float, truncate: float = 3.0) -> Tensor:
    """(k, k), `exp(-(i² + j²) / 2sd²)` normalised to sum 1, sides 2 ceil(truncate sd) + 1; float64."""
    check_positive(sd=sd, truncate=truncate)
    i = torch.arange(-math.ceil(truncate * sd), math.ceil(truncate * sd) + 1, dtype=torch.float64)
    line = torch.exp(-(i**2) / (2 * sd**2))
    return torch.outer(line, line) / line.sum() ** 2


def motion_kernel(length: int, angle: float) -> Tensor:
    """(k, k), uniform along `length` pixels at `angle` degrees from the x axis, anti-clockwise; sum 1, k the next odd number; float64.

    The segment's points are shared between the four pixels around each (bilinear weights).
    """
    check_count(length=length)
    side = length + 1 - length % 2
    s = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 64 * length, dtype=torch.float64)
    radians = math.radians(angle)
    return _spread(side // 2 - s * math.sin(radians), side // 2 + s * math.cos(radians), side, side) / len(s)


def _spread(row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Points of weight 1 at (row, column), shared between the four pixels around each, (height, width); what falls outside is lost."""
    grid = torch.zeros(height + 2, width + 2, dtype=row.dtype)
    top, left = row.floor(), column.floor()
    for i in (0, 1):
        for j in (0, 1):
            weight = (1 - (row - top - i).abs()) * (1 - (column - left - j).abs())
            place = (((top + i + 1).clamp(0, height + 1)).long(), ((left + j + 1).clamp(0, width + 1)).long())
            grid.index_put_(place, weight, accumulate=True)
    return grid[1:-1, 1:-1]


class Radon:
    r"""Parallel-beam projections: `y[a, k] = ∫ x(k cos θ_a + l sin θ_a, l cos θ_a - k sin θ_a) dl`, x(column, row) in pixels from the centre:
    (B, C, H, H) -> (B, C, len(angles), H). Detectors k one pixel apart, the middle one through the image's centre.

    Pixels are summed along each ray with bilinear interpolation, as in scikit-image.
    Args: size: H. angles: in degrees. `ValueError` for other images or no angles. Source: Kak & Slaney 1988, eq. 3.4.
    """

    def __init__(self, size: int, angles: Sequence[float] | Tensor) -> None:
        check_count(size=size)
        self.size, self.angles = size, torch.as_tensor(angles, dtype=torch.float64).flatten()
        if not len(self.angles) or not self.angles.isfinite().all():
            raise ValueError("angles must be finite, and at least one")
        centre = size // 2
        k, along = torch.meshgrid(torch.arange(size) - centre, torch.arange(size) - centre, indexing="ij")
        rows = torch.arange(len(self.angles) * size).reshape(-1, size, 1).expand(-1, size, size)
        theta = self.angles.deg2rad()[:, None, None]
        column, row = k * theta.cos() + along * theta.sin() + centre, along * theta.cos() - k * theta.sin() + centre
        entries = []
        for i in (0, 1):
            for j in (0, 1):
                r, c = row.floor() + i, column.floor() + j
                weight = (1 - (row - r).abs()) * (1 - (column - c).abs())
                inside = (r >= 0) & (r < size) & (c >= 0) & (c < size) & (weight > 0)
                entries.append((rows[inside], (r * size + c).long()[inside], weight[inside]))
        self.rays, self.pixels, self.weights = (torch.cat(part) for part in zip(*entries, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        if x.shape[2:] != (self.size, self.size):
            raise ValueError(f"x must have images of {self.size} x {self.size}, got {tuple(x.shape)}")
        if self.rays.device != x.device:
            self.rays, self.pixels = self.rays.to(x.device), self.pixels.to(x.device)
        terms = x.flatten(2)[..., self.pixels] * self.weights.to(x)
        sums = x.new_zeros(*x.shape[:2], len(self.angles) * self.size).index_add(2, self.rays, terms)
        return sums.reshape(*x.shape[:2], len(self.angles), self.size)


@dataclass(frozen=True)
class PhaseRetrieval:
    r"""`|F x|`, the moduli of the orthonormal Fourier transform of x padded to twice its sides, (B, C, H, W) -> (B, C, 2H, 2W). Not linear.

    The modulus is smoothed, `sqrt(|F x|² + 10⁻⁶)`, so that its derivative exists at 0.
    """

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        height, width = x.shape[2:]
        return (torch.fft.fft2(x, s=(2 * height, 2 * width), norm="ortho").abs() ** 2 + 1e-6).sqrt()


def adjoint(operator: Callable[[Tensor], Tensor], u: Tensor, shape: Sequence[int]) -> Tensor:
    """Aᵀ u for a linear operator, by automatic differentiation. u: (B, *obs_dims). shape: (B, C, H, W), of the result."""
    x = u.new_zeros(tuple(shape)).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(operator(x), x, u)[0]


def pseudo_inverse(operator: Callable[[Tensor], Tensor], y: Tensor, shape: Sequence[int], ridge: float = 0.0, iterations: int = 200) -> Tensor:
    r"""`argmin_x |A x - y|² + ridge |x|²` for a linear operator, by conjugate gradients from 0; with ridge = 0, A⁺ y. Shapes as in `adjoint`."""
    shape = tuple(shape)

    def normal(x: Tensor) -> Tensor:
        return adjoint(operator, operator(x.reshape(shape)), shape).flatten(1) + ridge * x

    return conjugate_gradient(normal, adjoint(operator, y, shape).flatten(1), iterations).reshape(shape)
