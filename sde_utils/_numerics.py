"""What every room stands on: types, broadcasting, noise, a denoiser's derivative, one solver."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._functorch import config

from . import _check as check

Denoise = Callable[..., Tensor]  # D(z, sigma) -> E[x_0 | z]
Predictor = Callable[..., Tensor]  # (sde, denoiser, x, t, s, generator) -> x_s
Corrector = Callable[..., Tensor]  # (sde, denoiser, x, t, generator) -> x_t
Random = torch.Generator | None
Times = Sequence[float] | Tensor


def expand(value: Tensor, x: Tensor, name: str = "t") -> Tensor:
    """A scalar or (B,) tensor, shaped to broadcast over x of shape (B, *dims), in its dtype."""
    if value.ndim == 0:
        return value.to(x)
    fits = value.shape == x.shape[:1]
    check.require(fits, f"{name} must be a scalar or have shape ({len(x)},)", value)
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1))


def as_level(sigma: float | Tensor, z: Tensor) -> Tensor:
    """σ as `expand` gives it. A number is checked; a tensor's values are trusted, not read."""
    if isinstance(sigma, Tensor):
        return expand(sigma, z, "sigma")
    return z.new_full((), check.number("sigma", sigma, ends="[)"))


def call(denoiser: Denoise, z: Tensor, sigma: float) -> Tensor:
    """D(z, σ), σ as a scalar tensor."""
    check.function("denoiser", denoiser, "a function D(z, sigma)")
    check.tensor("x", z)
    return check.answer(denoiser, z, z.new_full((), sigma))


def widest(*tensors: Tensor) -> torch.dtype:
    """float64 on the CPU; elsewhere (Apple's MPS has none) the widest dtype of the tensors."""
    if tensors[0].device.type == "cpu":
        return torch.float64
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def randn_like(x: Tensor, generator: Random = None) -> Tensor:
    """Standard normal noise like `x`, drawn where the generator lives."""
    check.generator(generator)
    check.tensor("x", x)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def several_products() -> contextlib.AbstractContextManager:
    """A compiled network's graph serves several products if it is compiled, both ways, in here."""
    known = hasattr(config, "donated_buffer")  # not in torch 2.4
    return config.patch(donated_buffer=False) if known else contextlib.nullcontext()


def differentiable(denoiser: Denoise, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of z, and D(z, σ) with the graph between them, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad(), several_products():
        z = z.detach().clone().requires_grad_()
        x0_hat = check.answer(denoiser, z, sigma)
    message = "denoiser must have a graph: not under torch.no_grad, not a guided denoiser"
    check.require(x0_hat.requires_grad, f"{message} (two observations go into one Observation)")
    return z, x0_hat


def product(x0_hat: Tensor, z: Tensor, v: Tensor, last: bool = False) -> Tensor:
    """Jᵀ v, J = ∂x̂/∂z, like z. After the `last` the graph is gone."""
    with several_products():
        return torch.autograd.grad(x0_hat, z, v, retain_graph=not last)[0]


def conjugate_gradient(apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solve S u = b for each row of b, (B, m), given u -> S u on all rows, S positive definite.

    A row that is solved stays where it is.
    """
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
