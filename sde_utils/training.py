"""Denoising score matching: the loss, draws of noise levels, the loop."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _check as check
from ._numerics import Denoise, Random, as_level, randn_like
from .loop import Run, SigmaSampler, Weight, squares


def dsm_loss(
    denoiser: Denoise, x0: Tensor, sigma: float | Tensor, generator: Random = None
) -> Tensor:
    """How well the denoiser tells the noise from z = x_0 + σ ε.

        mean over dims of |ε̂ - ε|²,   ε̂ = (z - D(z, σ)) / σ.

    Its expectation over ε and x_0 is mean |ε̂ - ε*|² + const, least for the exact score.
    Args: x0: (B, *dims). sigma: σ > 0, scalar or (B,), else `ValueError`.   Returns: (B,).
    Source: Vincent 2011; Song et al. 2021, eq. 7, with weight λ(t) = (r σ)².
    """
    check.batch("x0", x0)
    level = as_level(sigma, x0)
    check.require((level > 0).all(), "sigma must be positive")
    return squares(check.first_answer(denoiser), x0, level, randn_like(x0, generator))


def log_uniform(low: float, high: float) -> SigmaSampler:
    """Draws of σ, ln σ stratified over [ln low, ln high]: one in each of n equal cells.

    For VE from σ_min to σ_max, it is uniform in t. `ValueError` unless 0 < low < high.
    """
    low = check.number("low", low)
    high = check.number("high", high, low)
    return lambda n, generator=None: low * (high / low) ** _stratified(n, generator)


def log_normal(mean: float, sd: float, low: float, high: float, wide: float = 0.1) -> SigmaSampler:
    """Draws of σ, ln σ ~ N(mean, sd²) stratified and clipped to [ln low, ln high].

    A share `wide` is `log_uniform(low, high)`, so that no level is unknown to the network.
    `ValueError` unless 0 < low < high and 0 <= wide <= 1.
    Source: Karras et al. 2022, table 1 and section 5.
    """
    mean, sd = check.number("mean", mean, -math.inf), check.number("sd", sd)
    wide, uniform = check.number("wide", wide, 0, 1, "[]"), log_uniform(low, high)

    def sampler(n: int, generator: Random = None) -> Tensor:
        count = round(wide * n)
        normal = torch.special.ndtri(_stratified(n - count, generator).clamp(1e-6, 1 - 1e-6))
        near = (mean + sd * normal).exp().clamp(low, high)
        sigma = torch.cat([near, uniform(count, generator)])
        return sigma[torch.randperm(n, generator=generator, device=sigma.device)]

    return sampler


def _stratified(n: int, generator: Random) -> Tensor:
    """n numbers in [0, 1], one drawn in each of n equal cells, in random order."""
    check.generator(generator)
    device = "cpu" if generator is None else generator.device
    cells = torch.randperm(n, generator=generator, device=device)
    return (cells + torch.rand(n, generator=generator, device=device)) / n


def train(
    denoiser: nn.Module, data: Tensor, sigma_sampler: SigmaSampler, *,
    steps: int, batch_size: int = 1024, lr: float = 5e-3, warmup: float = 0.02, fall: float = 1.0,
    weight: Weight | None = None, clip: float | None = None, ema_decay: float = 0.99,
    ema_every: int = 5, generator: Random = None, progress: bool = True,
    checkpoint: str | Path | None = None, save_every: float = 180.0,
) -> Tensor:  # fmt: skip
    """Minimise `dsm_loss` with Adam; at the end the denoiser holds the average of its weights.

        θ̄ <- d θ̄ + (1 - d) θ,   d = min(ema_decay, (1 + k)/(10 + k)) at turn k; 0 at turn 0.

    Args:
        data: (N, *dims).   sigma_sampler: (n, generator) -> (n,), as `log_uniform(0.01, 50.0)`.
        warmup, fall: shares of the steps; lr rises over the first, falls to 0 over the last ones.
        weight: sigma (B,) -> (B,), factors of the loss.   clip: norm that gradients are cut to.
        ema_every: steps from turn to turn.
        checkpoint: file, written every `save_every` seconds; a run goes on from it, bit for bit.
    Returns: the losses, (steps,).
    Raises: `FloatingPointError` for a loss that is not finite, `OSError` for a full disk; before
        the first step `TypeError` and `ValueError`, also for the checkpoint of another run.
    Under torch.distributed, processes that start alike do a share of each batch.
    """
    settings: dict[str, Any] = {
        "steps": check.count("steps", steps), "batch_size": check.count("batch_size", batch_size),
        "lr": check.number("lr", lr), "warmup": check.number("warmup", warmup, 0, 1, "[)"),
        "fall": check.number("fall", fall, 0, 1, "(]"),
        "clip": None if clip is None else check.number("clip", clip),
        "ema_decay": check.number("ema_decay", ema_decay, 0, 1, "[)"),
        "ema_every": check.count("ema_every", ema_every),
    }  # fmt: skip
    save_every = check.number("save_every", save_every, ends="[)")
    named = checkpoint is None or isinstance(checkpoint, (str, Path))
    check.kind(named, "checkpoint must be a path", checkpoint)
    path = None if checkpoint is None else Path(checkpoint)
    check.generator(generator)
    _check_data(denoiser, data)
    run = Run(denoiser, data, sigma_sampler, weight, generator, settings)
    _check_functions(run)
    if path is not None:
        run.resume(path)
    try:
        run.go_on(progress, path, save_every)
    finally:
        run.finish()
    return run.losses


def _check_data(denoiser: nn.Module, data: Tensor) -> None:
    """A network with weights, and data of its dtype, device and size."""
    module = isinstance(denoiser, nn.Module)
    check.kind(module, "denoiser must be an nn.Module, as su.Denoiser(su.MLP())", denoiser)
    grad = torch.is_grad_enabled()
    check.require(grad, "train needs gradients: not under torch.no_grad or torch.inference_mode")
    check.batch("data", data)
    own = [p for p in denoiser.parameters() if p.requires_grad]
    check.require(len(own) > 0, "denoiser must have parameters that require a gradient")
    for name, remedy in (("dtype", "data.float()"), ("device", "data.to(device)")):
        wanted, found = getattr(own[0], name), getattr(data, name)
        if found != wanted:
            raise TypeError(f"data must have the network's {name} {wanted}, got {found}: {remedy}")
    size, unit = float(data.square().mean().sqrt()), getattr(denoiser, "sigma_data", None)
    if unit and not unit / 3 <= size <= 3 * unit:
        found = f"data has root mean square {size:.3g}, denoiser has sigma_data {unit:.3g}"
        warnings.warn(f"{found}: scale the data, or write sigma_data={size:.2g}", stacklevel=3)


def _check_functions(run: Run) -> None:
    """A first look at what the functions return; it costs the run no random number."""
    example = "a function (n, generator) -> (n,), as su.log_uniform(0.01, 50.0)"
    check.function("sigma_sampler", run.sigma_sampler, example)
    data, n = run.data, run.settings["batch_size"]
    other = None if run.generator is None else torch.Generator(run.generator.device)
    with torch.no_grad(), torch.random.fork_rng([data.device] if data.is_cuda else []):
        check.first_answer(copy.deepcopy(run.denoiser).eval())(data[:2], data.new_full((), 1.0))
        try:
            sigma = run.sigma_sampler(n, other)
        except TypeError as error:
            raise TypeError(f"sigma_sampler must be {example}: {error}") from error
    check.tensor("what sigma_sampler returns", sigma)
    good = sigma.shape == (n,) and ((sigma > 0) & sigma.isfinite()).all()
    check.require(good, f"sigma_sampler must return ({n},) positive numbers, got {sigma}")
    if run.weight is not None:
        check.function("weight", run.weight, "a function sigma (B,) -> (B,)")
        found = check.what(run.weight(sigma))
        check.require(found == check.what(sigma), f"weight must return ({n},), got {found}")
