"""Denoising score matching."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ._checks import check_batch, check_count, check_positive, expand, holds, randn_like
from .sde import Denoise

SigmaSampler = Callable[[int, torch.Generator | None], Tensor]  # (n, generator) -> (n,) noise levels


def dsm_loss(
    denoiser: Denoise, x0: Tensor, sigma: float | Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
) -> Tensor:
    r"""`mean over dims of |ε̂ - ε|²` with `z = x_0 + σ ε` and `ε̂ = (z - D(z, σ)) / σ`. x0: (B, *dims). Returns (B,). noise: ε, drawn if None.

    Its expectation over ε and x_0 is `mean |ε̂ - ε*|² + const`, least for the exact score. `ValueError` unless σ > 0.
    Source: Vincent 2011; Song et al. 2021, eq. 7, with weight λ(t) = (r σ)².
    """
    check_batch(x0, "x0")
    level = expand(sigma, x0, "sigma")
    if not holds((level > 0).all()):
        raise ValueError("sigma must be positive")
    noise = randn_like(x0, generator) if noise is None else noise
    z = x0 + level * noise
    eps_hat = (z - denoiser(z, level.flatten() if level.ndim else level)) / level
    return ((eps_hat - noise) ** 2).flatten(1).mean(1)


def log_uniform(low: float, high: float) -> SigmaSampler:
    """ln σ stratified over [ln low, ln high], one draw in each of n equal cells; for VE from σ_min to σ_max, uniform in t.

    `ValueError` unless 0 < low < high.
    """
    check_positive(low=low, high=high)
    if low >= high:
        raise ValueError(f"low must be below high, got {low} and {high}")

    def sampler(n: int, generator: torch.Generator | None = None) -> Tensor:
        return low * (high / low) ** _stratified(n, generator)

    return sampler


def log_normal(mean: float, sd: float, low: float, high: float, wide: float = 0.1) -> SigmaSampler:
    """ln σ ~ N(mean, sd²) clipped to [ln low, ln high], stratified; a share `wide` is uniform in ln σ over the whole range instead, so that
    no level the samplers visit is unknown to the network. `ValueError` unless 0 < low < high and 0 <= wide <= 1.
    Source: Karras et al. 2022, table 1 and section 5.
    """
    check_positive(sd=sd)
    if not 0 <= wide <= 1:
        raise ValueError(f"wide must lie in [0, 1], got {wide}")
    uniform = log_uniform(low, high)

    def sampler(n: int, generator: torch.Generator | None = None) -> Tensor:
        count = round(wide * n)
        normal = torch.special.ndtri(_stratified(n - count, generator).clamp(1e-6, 1 - 1e-6))
        sigma = torch.cat([(mean + sd * normal).exp().clamp(low, high), uniform(count, generator)])
        return sigma[torch.randperm(n, generator=generator, device=sigma.device)]

    return sampler


def _stratified(n: int, generator: torch.Generator | None) -> Tensor:
    """n numbers in [0, 1], one drawn in each of n equal cells, in random order."""
    device = "cpu" if generator is None else generator.device
    return (torch.randperm(n, generator=generator, device=device) + torch.rand(n, generator=generator, device=device)) / n


def _moving_average(decay: float) -> Callable[..., None]:
    """The k-th update, in place, of a list of tensors towards another, as `AveragedModel` calls it."""

    @torch.no_grad()
    def update(average: list[Tensor], current: list[Tensor], k: Tensor) -> None:
        share = 1 - ((1 + k) / (10 + k)).clamp(max=decay)
        for a, b in zip(average, current, strict=True):
            a.lerp_(b, share.to(a))

    return update


def train(
    denoiser: nn.Module,
    data: Tensor,
    sigma_sampler: SigmaSampler,
    *,
    steps: int,
    batch_size: int = 1024,
    lr: float = 5e-3,
    warmup: float = 0.02,
    ema_decay: float = 0.99,
    ema_every: int = 5,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Tensor:
    r"""Minimise `dsm_loss` over random mini-batches with Adam; afterwards the denoiser holds the moving average of its weights.

    The learning rate rises linearly over the first `warmup` share of the steps, then falls linearly to 0. The average
    `θ̄ <- d θ̄ + (1 - d) θ`, `d = min(ema_decay, (1 + k)/(10 + k))` at its k-th turn, is taken every `ema_every` steps: while it is young it
    forgets fast, so that a short run does not keep its first weights.
    Args: data: (N, *dims), on the denoiser's device. sigma_sampler: (n, generator) -> (n,). Returns the losses, (steps,), on its device.
    Raises `ValueError`/`TypeError` for bad arguments before the first step, `FloatingPointError` if the loss leaves the finite numbers.
    """
    check_batch(data, "data")
    check_count(steps=steps, batch_size=batch_size, ema_every=ema_every)
    check_positive(lr=lr)
    if not (0 <= ema_decay < 1 and 0 <= warmup < 1):
        raise ValueError(f"ema_decay and warmup must lie in [0, 1), got {ema_decay} and {warmup}")
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=lr, betas=(0.9, 0.99), fused=not data.is_meta)
    rise = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / rise, 1) * (1 - i / steps))
    average = AveragedModel(denoiser, multi_avg_fn=_moving_average(ema_decay))
    losses = torch.empty(steps, device=data.device)
    denoiser.train()
    device = data.device if generator is None else generator.device
    bar = tqdm(range(steps), desc="training", file=sys.stdout, disable=not progress, mininterval=1.0)
    for i in bar:
        batch = data[torch.randint(len(data), (batch_size,), generator=generator, device=device).to(data.device)]
        loss = dsm_loss(denoiser, batch, sigma_sampler(batch_size, generator), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[i] = loss.detach()
        if (i + 1) % ema_every == 0:
            average.update_parameters(denoiser)
        if (i + 1) % 100 == 0 or i + 1 == steps:  # one look at the device in 100 steps
            recent = losses[max(0, i - 99) : i + 1].mean()
            if not holds(recent.isfinite()):
                raise FloatingPointError(f"the loss is not finite by step {i + 1}: lower lr (now {lr}) or check the data's scale")
            bar.set_postfix_str(f"loss {recent:.4f}" if progress else "", refresh=False)
    if steps >= ema_every:
        denoiser.load_state_dict(average.module.state_dict())
    denoiser.eval()
    return losses
