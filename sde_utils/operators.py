"""Operators A of image inverse problems: differentiable functions of (B, C, H, W).

All are linear but `PhaseRetrieval`. Each computes in the dtype and on the device of its argument.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from . import _check as check
from ._numerics import conjugate_gradient

Map = Callable[[Tensor], Tensor]


def check_images(x: Tensor, *size: int) -> None:
    """Images (B, C, H, W), of this size if one is given; no value is read."""
    check.batch("x", x, finite=False)
    good = x.ndim == 4 and size in ((), x.shape[2:])
    expected = f"(B, C, {size[0]}, {size[1]})" if size else "(B, C, H, W)"
    check.require(good, f"x must be images {expected}", x)


class Inpainting:
    """The pixels where `mask` is True, in a row: (B, C, H, W) -> (B, C, n).

    Args: mask: (H, W), bool, not all False; copied.
    """

    def __init__(self, mask: Tensor) -> None:
        boolean = isinstance(mask, Tensor) and mask.dtype == torch.bool
        check.kind(boolean, "mask must be a bool tensor, as x > 0.5", mask)
        check.require(mask.ndim == 2 and mask.any(), "mask must be (H, W) and keep a pixel", mask)
        self.mask = mask.clone()
        self.pixels = mask.flatten().nonzero()[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x, *self.mask.shape)
        return x.flatten(2).index_select(2, self.pixels.to(x.device))


def box_mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> Tensor:
    """(height, width), True outside the box of rows top..bottom-1 and columns left..right-1."""
    for n in (height, width, top, left, bottom, right):
        check.count("box_mask's arguments", n, -(10**6))
    good = 0 <= top < bottom <= height and 0 <= left < right <= width
    found = f"rows {top} to {bottom}, columns {left} to {right}"
    check.require(good, f"the box must lie in {height} x {width} and not be empty, got {found}")
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = False
    return mask


class Downsampling:
    """Means over squares of pixels: (B, C, H, W) -> (B, C, H/factor, W/factor).

    Args: factor: side of a square; H and W are multiples of it.
    """

    def __init__(self, factor: int) -> None:
        self.factor = check.count("factor", factor)

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        good = not any(side % self.factor for side in x.shape[2:])
        check.require(good, f"x must have sides multiples of {self.factor}", x)
        return functional.avg_pool2d(x, self.factor)


class Blur:
    """Convolution, the border's pixels repeated outside: (B, C, H, W) -> the same shape.

    Args: kernel: (k, l), floating-point, odd sides; copied.
    """

    def __init__(self, kernel: Tensor) -> None:
        check.batch("kernel", kernel)
        good = kernel.ndim == 2 and not any(side % 2 == 0 for side in kernel.shape)
        check.require(good, "kernel must be (k, l) with odd sides", kernel)
        self.kernel = kernel.clone()

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        channels, (height, width) = x.shape[1], self.kernel.shape
        border = (width // 2, width // 2, height // 2, height // 2)
        kernel = self.kernel.flip(0, 1).to(x)  # conv2d correlates
        kernel = kernel.expand(channels, 1, height, width)
        return functional.conv2d(functional.pad(x, border, "replicate"), kernel, groups=channels)


def motion_kernel(length: int, angle: float) -> Tensor:
    """Uniform along a segment, each of its points shared between the four pixels around it.

    Args: length: in pixels. angle: in degrees from the x axis, anti-clockwise.
    Returns: (k, k), float64 on the CPU; its sum 1, k the next odd number.
    """
    length = check.count("length", length)
    radians = math.radians(check.number("angle", angle, -math.inf))
    half, end, n = length // 2, (length - 1) / 2, 64 * length
    s = torch.linspace(-end, end, n, dtype=torch.float64, device="cpu")[:, None]
    pixels = torch.arange(-half, half + 1, device="cpu")
    rows = (1 - (pixels + s * math.sin(radians)).abs()).clamp(min=0)  # (n, k), counted downwards
    columns = (1 - (pixels - s * math.cos(radians)).abs()).clamp(min=0)
    return rows.T @ columns / n


class Radon:
    """Parallel-beam projections: (B, C, H, H) -> (B, C, number of angles, H).

        y[a, k] = ∫ x(k cos θ_a + l sin θ_a, l cos θ_a - k sin θ_a) dl,

    x(column, row) in pixels from the centre, rows counted downwards. Detectors k are one pixel
    apart, the middle one through the centre. Pixels are summed along each ray with bilinear
    interpolation, as in scikit-image; no matrix is kept.
    Args: size: H. angles: θ, in degrees.
    Source: Kak & Slaney 1988, Principles of Computerized Tomographic Imaging, chapter 3.
    """

    def __init__(self, size: int, angles: Sequence[float] | Tensor) -> None:
        self.size = check.count("size", size)
        self.angles = torch.as_tensor(angles, dtype=torch.float64, device="cpu").flatten().clone()
        good = self.angles.numel() > 0 and self.angles.isfinite().all()
        check.require(good, f"angles must be finite, and at least one, got {angles}")

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x, self.size, self.size)
        some = max(1, 2**18 // self.size**2)  # angles at a time
        return torch.cat([self.project(x, angles) for angles in self.angles.split(some)], dim=2)

    def project(self, x: Tensor, angles: Tensor) -> Tensor:
        """y at these angles."""
        n, side, centre = self.size, self.size + 3, self.size // 2 + 1
        x = functional.pad(x, (1, 2, 1, 2)).flatten(2)  # outside, a ray meets zeros
        line = torch.arange(n, device="cpu") - n // 2
        k, theta = line[:, None], angles.deg2rad()[:, None, None]
        column = (k * theta.cos() + line * theta.sin() + centre).clamp(0, n + 1)
        row = (line * theta.cos() - k * theta.sin() + centre).clamp(0, n + 1)
        top, left = row.floor(), column.floor()
        first = (top * side + left).long().flatten().to(x.device)
        down, right = (row - top).to(x), (column - left).to(x)
        shifts = (0, 1, side, side + 1)  # to the four pixels around a point
        a, b, c, d = (x[..., i:].index_select(2, first).unflatten(2, row.shape) for i in shifts)
        return a.lerp(b, right).lerp(c.lerp(d, right), down).sum(-1)


class PhaseRetrieval:
    """Moduli of the orthonormal Fourier transform F of x padded to twice its sides; not linear.

    sqrt(|F x|² + 10⁻⁶): smooth at 0.   (B, C, H, W) -> (B, C, 2H, 2W).
    """

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        height, width = x.shape[2:]
        wave = torch.fft.fft2(x, s=(2 * height, 2 * width), norm="ortho")
        return (wave.abs() ** 2 + 1e-6).sqrt()


def check_linear(operator: Map, name: str, u: Tensor, shape: Sequence[int]) -> None:
    """A linear operator that takes images of this shape to tensors like u."""
    check.batch(name, u)
    x = u.new_zeros(check.shape(shape))
    check.linear(operator, x[:1])
    expected = tuple(operator(x).shape)
    check.require(u.shape == expected, f"{name} must have A(x)'s shape {expected}", u)


def transpose(operator: Map, u: Tensor, shape: Sequence[int]) -> Tensor:
    """`adjoint`, nothing checked."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(tuple(shape), dtype=u.dtype, device=u.device, requires_grad=True)
        return torch.autograd.grad(operator(x), x, u.clone())[0]


def adjoint(operator: Map, u: Tensor, shape: Sequence[int]) -> Tensor:
    """Aᵀ u for a linear operator.   Args: u: (B, *obs_dims). shape: (B, *dims), of the result."""
    check_linear(operator, "u", u, shape)
    return transpose(operator, u, shape)


def pseudo_inverse(
    operator: Map, y: Tensor, shape: Sequence[int], *, ridge: float = 0.0, iterations: int = 200
) -> Tensor:
    """argmin_x |A x - y|² + ridge |x|² for a linear operator; with ridge = 0, A⁺ y.

    By conjugate gradients from 0. Args: y: (B, *obs_dims). shape: (B, *dims), of the result.
    """
    ridge = check.number("ridge", ridge, ends="[)")
    iterations = check.count("iterations", iterations)
    check_linear(operator, "y", y, shape)

    def normal(x: Tensor) -> Tensor:
        return transpose(operator, operator(x.reshape(shape)), shape).flatten(1) + ridge * x

    start = transpose(operator, y, shape).flatten(1)
    return conjugate_gradient(normal, start, iterations).reshape(shape)
