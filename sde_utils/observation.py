"""What was measured: `y = A(x_0) + σ_y n`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check as check
from ._numerics import widest


@dataclass(frozen=True, eq=False)
class Observation:
    r"""An observation, and its likelihood.

        y = A(x_0) + σ_y n,   n ~ N(0, I).

    Args:
        operator: A, any batched differentiable callable, (B, *dims) -> (B, *obs_dims).
        y: a number, one observation, obs_dims, or one per sample, (B, *obs_dims); finite.
        noise_std: σ_y, at least 1e-18 (its square has to be a number in float32).
    Raises `TypeError` or `ValueError` for arguments that are not this.
    """

    operator: Callable[[Tensor], Tensor]
    y: Tensor
    noise_std: float

    def __post_init__(self) -> None:
        check.function("operator", self.operator, "a function (B, *dims) -> (B, *obs_dims)")
        y = self.y
        if not isinstance(y, Tensor):
            y = torch.tensor(check.number("y", y, -math.inf), dtype=torch.float64, device="cpu")
        check.tensor("y", y)
        check.require(y.isfinite().all(), "y must be finite, but holds NaN or infinity")
        noise_std = check.number("noise_std", self.noise_std, 1e-18, ends="[)")
        vars(self).update(y=y, noise_std=noise_std)

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x_0).

        Args: x0: (B, *dims).   Returns: (B, m), m the number of values in one observation.
        """
        predicted = check.applied(self.operator, x0)
        one, every = tuple(predicted.shape[1:]), tuple(predicted.shape)
        fits = self.y.shape in (one, every)
        check.require(fits, f"y must have shape {one} or {every} to match A(x_0)", self.y)
        sloped = predicted.requires_grad or not x0.requires_grad
        check.require(sloped, "operator must be differentiable, but A(x_0) has no graph")
        return (self.y.to(predicted) - predicted).reshape(len(x0), -1)

    def check_single(self, x0: Tensor) -> None:
        """`ValueError` unless y is one observation.   Args: x0: (B, *dims), as A takes them."""
        one = check.applied(self.operator, x0[:1].clone())[0]
        fits = self.y.squeeze().shape == one.squeeze().shape
        check.require(fits, f"y must be one observation, of shape {tuple(one.shape)}", self.y)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log N(y; A(x_0), σ_y² I), normalised.

        Args: x0: (B, *dims).   Returns: (B,).
        """
        check.batch("x0", x0)
        r, variance = self.residual(x0), self.noise_std**2
        return -(r.square().sum(1) / variance + r.shape[1] * math.log(2 * math.pi * variance)) / 2

    def matrix(self, shape: Sequence[int]) -> Tensor:
        """A as a matrix, for x_0 of this shape.

        In float64; in the default dtype if A holds numbers of it and takes no other.
        Args: shape: of one x_0, dims.   Returns: (m, d), d the product of dims, float64, CPU.
        Raises `ValueError` if A is not linear.
        """
        shape = check.shape(shape)
        check.require(len(shape) > 0, "shape must have at least one size, got ()")
        like = torch.zeros(1, *shape, dtype=widest(self.y), device=self.y.device)
        try:
            check.applied(self.operator, like)
        except RuntimeError:  # of a dtype
            like = like.to(torch.get_default_dtype())
        check.linear(self.operator, like)
        identity = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            columns = self.operator(identity.reshape(-1, *shape)).reshape(len(identity), -1)
        return columns.T.cpu().double()
