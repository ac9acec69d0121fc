"""What was measured: `y = A(x_0) + σ_y n`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._numerics import check_batch, check_function, check_linear, check_number, check_shape, kind, widest


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
    y: float | Tensor
    noise_std: float

    def __post_init__(self) -> None:
        check_function("operator", self.operator, "a function (B, *dims) -> (B, *obs_dims)")
        y = self.y
        if not isinstance(y, Tensor):
            y = torch.tensor(check_number("y", y, -math.inf), dtype=torch.float64, device="cpu")
        if not y.is_floating_point():
            raise TypeError(f"y must be a floating-point number or tensor, got {kind(y)}")
        if not y.isfinite().all():
            raise ValueError("y must be finite, but holds NaN or infinity")
        object.__setattr__(self, "y", y)
        noise_std = check_number("noise_std", self.noise_std, 1e-18, ends="[)")
        object.__setattr__(self, "noise_std", noise_std)

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x_0).

        Args: x0: (B, *dims).   Returns: (B, m), m the number of values in one observation.
        """
        x0 = x0.clone() if x0.is_inference() else x0  # no version to compare there
        version = None if x0.is_inference() else x0._version
        predicted = self.operator(x0)
        if version is not None and x0._version != version:
            remedy = "begin it with x = x.clone()"
            raise ValueError(f"operator must not change its argument in place: {remedy}")
        if not isinstance(predicted, Tensor) or predicted.shape[:1] != x0.shape[:1]:
            expected = f"(B, *dims) to (B, *obs_dims) with B = {len(x0)}"
            raise ValueError(f"operator must map {expected}, got {kind(predicted)}")
        if not predicted.is_floating_point():
            remedy = "torch.view_as_real for complex ones"
            raise TypeError(f"operator must return real numbers ({remedy}), got {kind(predicted)}")
        if self.y.shape not in (predicted.shape, predicted.shape[1:]):
            expected = f"{tuple(predicted.shape[1:])} or {tuple(predicted.shape)}"
            found = tuple(self.y.shape)
            raise ValueError(f"y must have shape {expected} to match A(x_0), got {found}")
        if x0.requires_grad and not predicted.requires_grad:
            raise ValueError(
                "operator must be differentiable by autograd, but its result does not depend on x_0"
            )
        return (self.y.to(predicted) - predicted).reshape(len(x0), -1)

    def log_likelihood(self, x0: Tensor) -> Tensor:
        """log N(y; A(x_0), σ_y² I), normalised.

        Args: x0: (B, *dims).   Returns: (B,).
        """
        check_batch("x0", x0)
        r, variance = self.residual(x0), self.noise_std**2
        return -(r.square().sum(1) / variance + r.shape[1] * math.log(2 * math.pi * variance)) / 2

    def matrix(self, shape: Sequence[int]) -> Tensor:
        """A as a matrix, for x_0 of this shape.

        Args: shape: of one x_0, dims.   Returns: (m, d), d the product of dims; float64 on the CPU.
        Raises `ValueError` if A is not linear.
        """
        shape = check_shape(shape)
        like = torch.zeros(1, *shape, dtype=widest(self.y), device=self.y.device)
        check_linear(self.operator, like)
        identity = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            return self.operator(identity.reshape(-1, *shape)).reshape(len(identity), -1).T
