"""Operators A of image inverse problems: differentiable functions of (B, C, H, W).

All are linear but `PhaseRetrieval`. Each computes in the dtype and on the device of its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from . import _check as check
from ._numerics import conjugate_gradient

Operator = Callable[[Tensor], Tensor]


def check_images(x: Tensor, height: int | None = None, width: int | None = None) -> None:
    """Images (B, C, H, W), of this size if there is one; no value is read."""
    check.batch("x", x, finite=False)
    found = tuple(x.shape)
    check.require(x.ndim == 4, f"x must be images (B, C, H, W), got {found}")
    good = height is None or found[2:] == (height, width)
    check.require(good, f"x must have images of {height} x {width}, got {found}")


@dataclass(frozen=True, eq=False)
class Inpainting:
    """The pixels where `mask` is True, in a row: (B, C, H, W) -> (B, C, n).

    Args: mask: (H, W), bool, not all False; copied.
    """

    mask: Tensor
    kept: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool:
            remedy = "values > 0.5 makes one"
            raise TypeError(f"mask must be a bool tensor ({remedy}), got {check.what(self.mask)}")
        good = self.mask.ndim == 2 and self.mask.any()
        check.require(good, f"mask must be (H, W), not all False, got {check.what(self.mask)}")
        object.__setattr__(self, "mask", self.mask.clone())
        object.__setattr__(self, "kept", self.mask.flatten().nonzero()[:, 0])

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x, *self.mask.shape)
        return x.flatten(2).index_select(2, self.kept.to(x.device))


def box_mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> Tensor:
    """True outside the box of rows top..bottom-1 and columns left..right-1.

    Returns: (height, width), bool. `ValueError` if the box is empty or sticks out.
    """
    good = 0 <= top < bottom <= height and 0 <= left < right <= width
    box = f"({top}, {left}, {bottom}, {right})"
    check.require(good, f"the box {box} must lie in {height} x {width} and not be empty")
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = False
    return mask


@dataclass(frozen=True)
class Downsampling:
    """Means over squares of pixels: (B, C, H, W) -> (B, C, H/factor, W/factor).

    Args: factor: side of a square. `ValueError` for images whose H or W is not a multiple.
    """

    factor: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", check.count("factor", self.factor))

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        good = not any(side % self.factor for side in x.shape[2:])
        expected = f"height and width that are multiples of {self.factor}"
        check.require(good, f"x must have {expected}, got {tuple(x.shape)}")
        return functional.avg_pool2d(x, self.factor)


@dataclass(frozen=True, eq=False)
class Blur:
    """Convolution, the border's pixels repeated outside: (B, C, H, W) -> the same shape.

    Args: kernel: (k, l), floating-point, odd sides; copied.
    """

    kernel: Tensor

    def __post_init__(self) -> None:
        check.batch("kernel", self.kernel)
        sides = tuple(self.kernel.shape)
        good = len(sides) == 2 and all(side % 2 for side in sides)
        check.require(good, f"kernel must be (k, l) with odd sides, got {sides}")
        object.__setattr__(self, "kernel", self.kernel.clone())

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        channels, (height, width) = x.shape[1], self.kernel.shape
        border = (width // 2, width // 2, height // 2, height // 2)
        kernel = self.kernel.flip(0, 1).to(x)  # conv2d correlates
        kernel = kernel.expand(channels, 1, height, width)
        return functional.conv2d(functional.pad(x, border, "replicate"), kernel, groups=channels)


def motion_kernel(length: int, angle: float) -> Tensor:
    """Uniform along a segment, each point shared between the four pixels around it.

    Args: length: in pixels. angle: in degrees from the x axis, anti-clockwise.
    Returns: (k, k), bilinear weights of sum 1, k the next odd number; float64 on the CPU.
    """
    length = check.count("length", length)
    radians = math.radians(check.number("angle", angle, -math.inf))
    half, pixels = length // 2, {"dtype": torch.float64, "device": "cpu"}
    s = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 64 * length, **pixels)[:, None]
    grid = torch.arange(-half, half + 1, **pixels)
    rows = (1 - (grid + s * math.sin(radians)).abs()).clamp(min=0)  # (points, k), as y goes up
    columns = (1 - (grid - s * math.cos(radians)).abs()).clamp(min=0)
    return rows.T @ columns / len(s)


@dataclass(frozen=True, eq=False)
class Radon:
    r"""Parallel-beam projections: (B, C, H, H) -> (B, C, number of angles, H).

        y[a, k] = ∫ x(k cos θ_a + l sin θ_a, l cos θ_a - k sin θ_a) dl,

    x(column, row) in pixels from the centre, rows counted downwards. Detectors k are one pixel
    apart, the middle one through the centre. Pixels are summed along each ray with bilinear
    interpolation, as in scikit-image.

    Args: size: H. angles: θ, in degrees.
    Source: Kak & Slaney 1988, Principles of Computerized Tomographic Imaging, chapter 3.
    """

    size: int
    angles: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        angles = torch.as_tensor(self.angles, dtype=torch.float64, device="cpu").flatten()
        good = len(angles) and angles.isfinite().all()
        check.require(good, "angles must be finite, and at least one")
        object.__setattr__(self, "size", check.count("size", self.size))
        object.__setattr__(self, "angles", angles.clone())

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x, self.size, self.size)
        x = functional.pad(x, (1, 2, 1, 2))  # a ray outside meets zeros
        some = max(1, 2**18 // self.size**2)  # angles at a time: memory
        return torch.cat([self.project(x, angles) for angles in self.angles.split(some)], dim=2)

    def project(self, x: Tensor, angles: Tensor) -> Tensor:
        """y at some of the angles, x with a border of zeros."""
        n, side = self.size, x.shape[3]
        line = torch.arange(n, dtype=torch.float64, device="cpu") - n // 2
        k, along, theta = line[:, None], line, angles.deg2rad()[:, None, None]
        column = (k * theta.cos() + along * theta.sin() + n // 2).clamp(-1, n) + 1
        row = (along * theta.cos() - k * theta.sin() + n // 2).clamp(-1, n) + 1
        top, left = row.floor(), column.floor()
        first = (top * side + left).long().flatten().to(x.device)
        total = x.new_zeros(())
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (1 - (row - top - i).abs()) * (1 - (column - left - j).abs())
            pixels = x.flatten(2)[..., side * i + j :].index_select(2, first)
            total = total + (pixels.unflatten(2, weight.shape) * weight.to(x)).sum(-1)
        return total


@dataclass(frozen=True)
class PhaseRetrieval:
    """The moduli of the orthonormal Fourier transform F of x padded to twice its sides.

        sqrt(|F x|² + 10⁻⁶): smooth, so that the derivative exists at 0.

    (B, C, H, W) -> (B, C, 2H, 2W). Not linear.
    """

    def __call__(self, x: Tensor) -> Tensor:
        check_images(x)
        height, width = x.shape[2:]
        wave = torch.fft.fft2(x, s=(2 * height, 2 * width), norm="ortho")
        return (wave.abs() ** 2 + 1e-6).sqrt()


def pull(operator: Operator, u: Tensor, shape: Sequence[int]) -> Tensor:
    """Aᵀ u, nothing checked."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(tuple(shape), dtype=u.dtype, device=u.device, requires_grad=True)
        return torch.autograd.grad(operator(x), x, u.clone())[0]


def check_pair(operator: Operator, name: str, u: Tensor, shape: Sequence[int]) -> None:
    """A linear operator that takes images of this shape to tensors like u."""
    check.function("operator", operator, "a function (B, *dims) -> (B, *obs_dims)")
    check.batch(name, u)
    x = u.new_zeros(check.shape(shape))
    check.linear(operator, x[:1])
    found, expected = tuple(u.shape), tuple(operator(x).shape)
    check.require(found == expected, f"{name} must have A(x)'s shape {expected}, got {found}")


def adjoint(operator: Operator, u: Tensor, shape: Sequence[int]) -> Tensor:
    """Aᵀ u for a linear operator, by automatic differentiation.

    Args: u: (B, *obs_dims). shape: of the result, (B, *dims).
    Returns: (B, *dims). `ValueError` if A is not linear.
    """
    check_pair(operator, "u", u, shape)
    return pull(operator, u, shape)


def pseudo_inverse(
    operator: Operator,
    y: Tensor,
    shape: Sequence[int],
    *,
    ridge: float = 0.0,
    iterations: int = 200,
) -> Tensor:
    """The least-squares solution for a linear operator, by conjugate gradients from 0.

        argmin_x |A x - y|² + ridge |x|²;   with ridge = 0, A⁺ y.

    Args: y: (B, *obs_dims). shape: of the result, (B, *dims). ridge: >= 0.
    Returns: (B, *dims). `ValueError` if A is not linear.
    """
    ridge = check.number("ridge", ridge, ends="[)")
    iterations = check.count("iterations", iterations)
    check_pair(operator, "y", y, shape)

    def normal(x: Tensor) -> Tensor:
        return pull(operator, operator(x.reshape(shape)), shape).flatten(1) + ridge * x

    return conjugate_gradient(normal, pull(operator, y, shape).flatten(1), iterations).reshape(shape)
