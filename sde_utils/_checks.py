"""What every public function asks of its arguments, how noise is drawn, one solver. Errors name the argument, what it was, what was expected."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def holds(condition: Tensor | bool) -> bool:
    """`bool(condition)`; fake and meta tensors carry no values, so nothing can be held against them."""
    try:
        return bool(condition)
    except (NotImplementedError, RuntimeError):
        return True


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not (value > 0 and value < float("inf")):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_count(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_batch(x: Tensor, name: str = "x") -> None:
    """A finite floating-point tensor of shape (B, *dims)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, *dims) with at least one sample, got {tuple(x.shape)}")
    if not holds(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, but holds NaN or infinity")


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        got = f"{type(generator).__name__} {generator!r}"
        raise TypeError(f"generator must be a torch.Generator, as torch.Generator().manual_seed(0), got {got}")


def expand(value: float | Tensor, x: Tensor, name: str = "t") -> Tensor:
    """A float, scalar tensor or (B,) tensor, shaped to broadcast over x of shape (B, *dims), in its dtype and device."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if value.ndim == 0:
        return value
    if value.shape != x.shape[:1]:
        raise ValueError(f"{name} must be a scalar or have shape ({len(x)},), got {tuple(value.shape)}")
    return value.reshape(-1, *[1] * (x.ndim - 1))


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise like `x`, drawn where the generator lives."""
    check_generator(generator)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def conjugate_gradient(apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve S u = b for each row of b, (B, m), S symmetric positive definite, given u -> S u on all rows; a solved row stays where it is."""
    u, r = torch.zeros_like(b), b
    p, rr = r, (r * r).sum(1, keepdim=True)
    start = rr
    for _ in range(iterations):
        done = rr <= torch.finfo(b.dtype).eps ** 2 * start
        sp = apply(p)
        alpha = torch.where(done, 0, rr / (p * sp).sum(1, keepdim=True))
        u, r = u + alpha * p, r - alpha * sp
        new = (r * r).sum(1, keepdim=True)
        p, rr = r + torch.where(done, 0, new / rr) * p, new
    return u
