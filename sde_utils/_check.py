"""What doors ask of a user's arguments, once. Errors name the argument and what it was.

`TypeError` for a wrong kind of thing, `ValueError` for a wrong value. Only `batch`, `weights`,
`linear` and `first_answer` look at the values in a tensor.
"""

import contextlib
import inspect
import operator
from collections.abc import Callable, Sequence
from math import inf
from numbers import Real

import torch
from torch import Tensor


def require(holds: bool | Tensor, message: str, *about: Tensor) -> None:
    """`ValueError` unless it holds, with the shapes of the tensors it is about."""
    if not holds:
        shapes = " and ".join(str(tuple(x.shape)) for x in about)
        raise ValueError(f"{message}, got {shapes}" if about else message)


def kind(holds: bool, message: str, value: object) -> None:
    """`TypeError` unless it holds, with what the value was."""
    if not holds:
        raise TypeError(f"{message}, got {what(value)}")


def what(value: object) -> str:
    """What an argument was, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}: write {value.__name__}(...)"
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]


def number(name: str, value: float, low: float = 0, high: float = inf, ends: str = "()") -> float:
    """The number as a float, in the interval; 0-d tensors and numpy's numbers are numbers."""
    if not isinstance(value, Real) and getattr(value, "ndim", None) == 0:
        value = value.item()  # type: ignore[attr-defined]
    real = isinstance(value, Real) and not isinstance(value, bool)
    kind(real, f"{name} must be a number", value)
    x = float(value)
    above = x > low or (ends[0] == "[" and x == low)
    below = x < high or (ends[1] == "]" and x == high)
    if not (above and below):  # spelled out: compiled for every number, but for the message
        raise ValueError(f"{name} must lie in {ends[0]}{low:g}, {high:g}{ends[1]}, got {x:g}")
    return x


def count(name: str, value: int, least: int = 1, most: int = 10**6) -> int:
    """The integer as an int; numpy's and 0-d tensors are integers."""
    try:
        n = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {what(value)}") from None
    kind(not isinstance(value, bool), f"{name} must be an int", value)
    require(least <= n <= most, f"{name} must lie in [{least}, {most:,}], got {n}")
    return n


def tensor(name: str, x: object) -> None:
    """A real floating-point tensor."""
    good = isinstance(x, Tensor) and x.is_floating_point()
    kind(good, f"{name} must be a floating-point tensor, as torch.as_tensor(x).float()", x)


def batch(name: str, x: Tensor, finite: bool = True) -> None:
    """A floating-point tensor of shape (B, *dims), with finite values."""
    tensor(name, x)
    require(x.ndim > 1 and x.numel() > 0, f"{name} must have shape (B, *dims), B > 0", x)
    require(not finite or x.isfinite().all(), f"{name} must be finite, but holds NaN or infinity")


def weights(name: str, w: Tensor, n: int) -> None:
    """Weights (n,), finite, non-negative, not all 0."""
    tensor(name, w)
    require(w.shape == (n,), f"{name} must have shape ({n},)", w)
    good = w.isfinite().all() & (w >= 0).all() & (w.sum() > 0)
    require(good, f"{name} must be finite, non-negative, not all 0 (log-weights: take .exp())")


def generator(value: object) -> None:
    """A torch.Generator or None."""
    good = value is None or isinstance(value, torch.Generator)
    kind(good, "generator must be a torch.Generator, as torch.Generator().manual_seed(0)", value)


def function(name: str, value: object, example: str, takes: int = 0) -> None:
    """Callable with so many arguments, and no class: `Langevin` is not `Langevin()`."""
    good = callable(value) and not isinstance(value, type)
    if good and takes:
        with contextlib.suppress(ValueError):  # a builtin may have no signature
            try:
                inspect.signature(value).bind(*range(takes))  # type: ignore[arg-type]
            except TypeError:
                good = False
    kind(good, f"{name} must be {example}", value)


def shape(value: Sequence[int]) -> tuple[int, ...]:
    """A tuple of sizes."""
    good = isinstance(value, (tuple, list)) and all(isinstance(n, int) for n in value)
    kind(good, "shape must be a tuple of ints, as (1000, 2)", value)
    return tuple(value)


def applied(operator: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """A(x_0): a floating-point tensor of as many rows, x_0 as it was."""
    tensor("x0", x0)
    x0 = x0.clone() if x0.is_inference() else x0  # an inference tensor has no version
    version = -1 if x0.is_inference() else x0._version
    predicted = operator(x0)
    kept = x0.is_inference() or x0._version == version
    require(kept, "operator must not change x_0 in place: begin it with x = x.clone()")
    if not isinstance(predicted, Tensor) or predicted.shape[:1] != x0.shape[:1]:
        expected = f"(B, *dims) to (B, *obs_dims), B = {len(x0)}"
        raise ValueError(f"operator must map {expected}, got {what(predicted)}")
    tensor("A(x_0) (torch.view_as_real for complex numbers)", predicted)
    return predicted


def linear(operator: Callable[[Tensor], Tensor], like: Tensor) -> None:
    """A(0) = 0 and A(u + v) = A(u) + A(v), up to rounding, for 64 random u and v like (1, *dims).

    64 rows: an operator of few outputs can be additive on a few by luck. Their entries are ten
    times cubes of normals, small and large, so that a clipped operator shows itself too.
    """
    sizes, random = (2, 64, *like.shape[1:]), torch.Generator().manual_seed(0)
    normal = torch.randn(sizes, generator=random, dtype=torch.float64, device="cpu")
    u, v = (10 * normal**3).to(like.dtype).to(like.device)
    with torch.no_grad():
        points = (u, v, u + v, torch.zeros_like(u[:1]))
        a, b, both, zero = (applied(operator, x) for x in points)
    bound = 1e3 * torch.finfo(like.dtype).eps * (a.abs().max() + b.abs().max())
    good = ((both - a - b).abs().max() <= bound) & (zero == 0).all()
    require(good, "operator must be linear here, but A(u + v) is not A(u) + A(v), or A(0) not 0: "
                  "use MMPS, DPS or Annealed, or move an offset into y")  # fmt: skip


def denoised(x0_hat: object, z: Tensor) -> None:
    """What a denoiser returned: a tensor like z."""
    good = isinstance(x0_hat, Tensor) and x0_hat.shape == z.shape and x0_hat.dtype == z.dtype
    kind(good, f"denoiser must return E[x_0 | z], {what(z)} as z", x0_hat)


def answer(denoiser: Callable[..., Tensor], z: Tensor, sigma: Tensor) -> Tensor:
    """D(z, σ), a tensor like z."""
    try:
        x0_hat = denoiser(z, sigma)
    except (IndexError, AttributeError) as error:
        if sigma.ndim:
            raise
        remedy = "use sigma.expand(len(z)); a bare network F(x, c) goes into su.Denoiser(F)"
        message = f"denoiser must take a scalar sigma, too ({error}): {remedy}"
        raise TypeError(message) from error
    denoised(x0_hat, z)
    return x0_hat


def first_answer(denoiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The denoiser, the values of its first answer looked at."""
    seen = False

    def watched(z: Tensor, sigma: Tensor) -> Tensor:
        nonlocal seen
        x0_hat = answer(denoiser, z, sigma)
        if not seen and not x0_hat.isfinite().all():
            inner = getattr(denoiser, "denoiser", None)  # of a guided one
            right = inner is not None and inner(z, sigma).isfinite().all()
            name = "operator (or its derivative)" if right else "denoiser"
            raise FloatingPointError(f"{name} returned NaN or infinity, sigma = {sigma}")
        seen = True
        return x0_hat

    function("denoiser", denoiser, "a function D(z, sigma)")
    return watched


def drawn(chain: Callable[..., Tensor], z: Tensor, rho: float, random: object) -> Tensor:
    """chain(z, ρ, generator): a finite tensor like z."""
    x = chain(z, rho, random)
    good = isinstance(x, Tensor) and x.shape == z.shape and x.dtype == z.dtype
    kind(good, f"chain must return x like z, {what(z)}", x)
    if not x.isfinite().all():
        raise FloatingPointError(f"chain returned NaN or infinity, rho = {rho:g}")
    return x


def at_level(x: Tensor, dims: Sequence[int], rho: float) -> float:
    """x is (n, *dims) and finite, ρ > 0. Returns ρ."""
    batch("x", x)
    require(x.shape[1:] == tuple(dims), f"x must have shape (n, *{tuple(dims)})", x)
    return number("rho", rho)
