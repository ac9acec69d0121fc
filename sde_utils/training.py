"""Denoising score matching: the loss, draws of noise levels, the loop."""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from . import _check as check
from ._numerics import Denoise, Random, as_level, expand, randn_like

SigmaSampler = Callable[..., Tensor]  # (n, generator) -> (n,) noise levels
Weight = Callable[[Tensor], Tensor]  # sigma (B,) -> (B,)


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
    return _loss(check.first_answer(denoiser), x0, level, randn_like(x0, generator))


def _loss(denoiser: Denoise, x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    z = x0 + level * noise
    eps_hat = (z - denoiser(z, level.flatten() if level.ndim else level)) / level
    return ((eps_hat - noise) ** 2).flatten(1).mean(1)


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
    mean, sd = check.number("mean", mean, -float("inf")), check.number("sd", sd)
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
    if checkpoint is not None and not isinstance(checkpoint, (str, Path)):
        raise TypeError(f"checkpoint must be a path, got {check.what(checkpoint)}")
    path = None if checkpoint is None else Path(checkpoint)
    _check_data(denoiser, data)
    _check_functions(denoiser, data, sigma_sampler, weight, settings["batch_size"], generator)
    run = _Run(denoiser, data, sigma_sampler, weight, generator, settings)
    if path is not None:
        run.resume(path)
    try:
        run.go_on(progress, path, save_every)
    finally:
        run.finish()
    return run.losses


def _check_data(denoiser: nn.Module, data: Tensor) -> None:
    """A network with weights, and data of its dtype, device and size."""
    if not isinstance(denoiser, nn.Module):
        found = check.what(denoiser)
        raise TypeError(f"denoiser must be an nn.Module, as su.Denoiser(su.MLP()), got {found}")
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


def _check_functions(
    denoiser: nn.Module, data: Tensor, sigma_sampler: SigmaSampler, weight: Weight | None, n: int,
    generator: Random,
) -> None:  # fmt: skip
    """A first look at what the functions return; it costs the run no random number."""
    example = "a function (n, generator) -> (n,), as su.log_uniform(0.01, 50.0)"
    check.generator(generator)
    check.function("sigma_sampler", sigma_sampler, example)
    other = None if generator is None else torch.Generator(generator.device)
    with torch.no_grad(), torch.random.fork_rng([data.device] if data.is_cuda else []):
        check.first_answer(copy.deepcopy(denoiser).eval())(data[:2], data.new_full((), 1.0))
        try:
            sigma = sigma_sampler(n, other)
        except TypeError as error:
            raise TypeError(f"sigma_sampler must be {example}: {error}") from error
    check.tensor("what sigma_sampler returns", sigma)
    good = sigma.shape == (n,) and ((sigma > 0) & sigma.isfinite()).all()
    check.require(good, f"sigma_sampler must return ({n},) positive numbers, got {sigma}")
    if weight is not None:
        check.function("weight", weight, "a function sigma (B,) -> (B,)")
        found = check.what(weight(sigma))
        check.require(found == check.what(sigma), f"weight must return ({n},), got {found}")


def _processes() -> tuple[int, int]:
    """How many there are, and which of them this one is."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


@dataclass
class _Run:
    """A run under way. The moving average of a weight stands beside it, in Adam's state."""

    denoiser: nn.Module
    data: Tensor
    sigma_sampler: SigmaSampler
    weight: Weight | None
    generator: Any
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        parameters = list(self.denoiser.parameters())
        self.optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)
        self.losses, self.step = self.data.new_zeros(self.settings["steps"]), 0
        self.settings["data"] = tuple(self.data.shape)
        self.settings["parameters"] = sum(p.numel() for p in parameters)
        self.settings["seed"] = self.generator and self.generator.initial_seed()
        ranks, whole = _processes()[0], self.settings["batch_size"]
        check.require(whole % ranks == 0, f"batch_size must be a multiple of {ranks}, got {whole}")

    def go_on(self, progress: bool, path: Path | None, save_every: float) -> None:
        """The steps that are left."""
        steps, every, (_, rank) = self.settings["steps"], self.settings["ema_every"], _processes()
        bar = tqdm(range(self.step, steps), "training", steps, initial=self.step, file=sys.stdout,
                   mininterval=1.0, disable=not progress or rank > 0)  # fmt: skip
        self.denoiser.train()
        saved = time.monotonic()
        for i in bar:
            self.losses[i] = self.descend()
            self.step = i + 1
            if self.step % every == 0:
                self.turn(self.step // every - 1)
            due = self.step == steps or time.monotonic() - saved >= save_every
            if due or self.step % 100 == 0:  # one look at the device in 100 steps
                recent = self.losses[max(0, i - 99) : i + 1].mean()
                if not recent.isfinite():
                    remedy = f"lower lr (now {self.settings['lr']:g}), or look at the data's size"
                    raise FloatingPointError(f"the loss is not finite by step {i + 1}: {remedy}")
                bar.set_postfix_str(f"loss {recent:.4f}", refresh=False)
            if due and path is not None and rank == 0:
                self.save(path)
            saved = time.monotonic() if due else saved

    def descend(self) -> Tensor:
        """One step of Adam; the loss of its batch."""
        s, i = self.settings, self.step
        rise = min((i + 1) / max(1, round(s["warmup"] * s["steps"])), 1)
        fall = min((1 - i / s["steps"]) / s["fall"], 1)
        self.optimizer.param_groups[0]["lr"] = s["lr"] * (rise * fall)
        n, device = s["batch_size"], (self.generator or self.data).device
        index = torch.randint(len(self.data), (n,), generator=self.generator, device=device)
        x0 = self.data[index.to(self.data.device)]
        sigma = self.sigma_sampler(n, self.generator).to(x0)
        noise = randn_like(x0, self.generator)
        loss = self.gradient(x0, sigma, noise)
        if s["clip"]:
            nn.utils.clip_grad_norm_(self.denoiser.parameters(), s["clip"])
        self.optimizer.step()
        return loss

    def gradient(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, its gradient in place; each process does its share."""
        ranks, rank = _processes()
        x0, sigma, noise = (a.chunk(ranks)[rank] for a in batch)
        losses = _loss(self.denoiser, x0, expand(sigma, x0), noise)
        loss = (losses if self.weight is None else self.weight(sigma) * losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.clear_autocast_cache()  # a caller's autocast would keep the weights as they were
        loss = loss.detach()
        if ranks > 1:
            for a in (loss, *(p.grad for p in self.denoiser.parameters() if p.grad is not None)):
                distributed.all_reduce(a)
                a /= ranks
        return loss

    @torch.no_grad()
    def turn(self, k: int) -> None:
        d = min(self.settings["ema_decay"], (1 + k) / (10 + k))
        for p, state in self.optimizer.state.items():
            state["average"] = p.lerp(state["average"], d) if "average" in state else p.clone()

    @torch.no_grad()
    def finish(self) -> None:
        for p, state in self.optimizer.state.items():
            p.copy_(state.get("average", p))
        self.denoiser.eval()

    def save(self, path: Path) -> None:
        """Write beside the file, then replace it: after a crash it is the old one, whole."""
        state = {name: getattr(self, name) for name in ("settings", "step", "losses")}
        state |= {name: getattr(self, name).state_dict() for name in ("denoiser", "optimizer")}
        state |= {"generator": self.generator.get_state()}
        partial = Path(f"{path}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            remedy = "free some space and train again; the checkpoint before it is whole"
            raise OSError(f"{path} could not be written ({error}): {remedy}") from error
        finally:
            partial.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint where there is one; another run's is left alone."""
        check.require(self.generator is not None, "checkpoint needs a generator, to keep its state")
        check.require(path.parent.is_dir(), f"checkpoint must lie in a folder, got {path}")
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            pairs = {k: (saved["settings"][k], v) for k, v in self.settings.items()}
            other = [f"{k} = {a} there, {b} here" for k, (a, b) in pairs.items() if a != b]
            for name in () if other else ("denoiser", "optimizer"):
                getattr(self, name).load_state_dict(saved[name])
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            kind = f"not a checkpoint of this network's training ({type(error).__name__})"
            raise ValueError(f"{path} is {kind}: move it away, or name another file") from None
        said = f"{path} is a checkpoint of another run ({', '.join(other)}): name another file"
        check.require(not other, said)
        self.generator.set_state(saved["generator"])
        self.losses.copy_(saved["losses"])
        self.step = saved["step"]
