"""Learning the Swiss roll in so many seconds: every library's own loss and loop.

The data, the size of a batch and the noise levels are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import sde_utils as su

from .common import Denoise
from .samplers import HIGH, LOW

BATCH = 1024
Look = tuple[Denoise, int, float]  # a denoiser, after so many steps and seconds
Trainer = Callable[[Tensor, Sequence[float]], Iterator[Look]]  # (data, budgets) -> one look each


def excess_loss(denoiser: Denoise, exact: su.GaussianMixture, n: int = 20_000) -> float:
    """`E |ε̂ - ε*|² / 2`, ln σ uniform, z from the exact density: a loss less its floor."""
    generator = torch.Generator().manual_seed(1000)
    sigma = su.log_uniform(LOW, HIGH)(n, generator)
    z = exact.sample(n, generator).float() + sigma[:, None] * torch.randn(n, 2, generator=generator)
    with torch.no_grad():
        gap = (denoiser(z, sigma) - exact(z, sigma)) / sigma[:, None]
    return float(gap.square().mean())


def batches(data: Tensor) -> DataLoader:
    """Random batches, each gathered by one indexing: the default loader would stack points."""
    points = RandomSampler(data, replacement=True, num_samples=10**9)
    sampler = BatchSampler(points, BATCH, drop_last=True)
    return DataLoader(TensorDataset(data), batch_size=None, sampler=sampler, collate_fn=None)


def snapshots(
    denoiser: Denoise, steps: Iterator[object], budgets: Sequence[float]
) -> Iterator[Look]:
    """Take steps, and stop at each budget for a look; the clock stands still meanwhile."""
    spent, count = 0.0, 0
    for budget in budgets:
        while spent < budget:
            start = time.perf_counter()
            next(steps)
            spent, count = spent + time.perf_counter() - start, count + 1
        yield denoiser, count, spent


def sde_utils() -> dict[str, Trainer]:
    def run(data: Tensor, budgets: Sequence[float]) -> Iterator[Look]:
        """`train` is told its steps, for its schedule: one run a budget.

        Their number is told from the time of 100 steps, which is not counted.
        """

        def learn(steps: int) -> tuple[Denoise, float]:
            denoiser, start = su.Denoiser(su.MLP()), time.perf_counter()
            levels, settings = su.log_uniform(LOW, HIGH), {"batch_size": BATCH, "progress": False}
            su.train(denoiser, data, levels, steps=steps, **settings)
            return denoiser, time.perf_counter() - start

        learn(10)
        for budget in budgets:
            steps = max(1, int(100 * budget / learn(100)[1]))
            denoiser, seconds = learn(steps)
            yield denoiser, steps, seconds

    return {"sde_utils: train, MLP": run}


def azula() -> dict[str, Trainer]:
    from azula.denoise import KarrasDenoiser
    from azula.noise import VESchedule

    class Backbone(nn.Module):
        """Our network behind azula's log σ."""

        def __init__(self) -> None:
            super().__init__()
            self.network = su.MLP()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t.flatten().expand(len(x)) / 4)

    def run(data: Tensor, budgets: Sequence[float], lr: float) -> Iterator[Look]:
        model = KarrasDenoiser(Backbone(), VESchedule(LOW, HIGH))
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)

        def loop() -> Iterator[None]:
            while True:
                x = data[torch.randint(len(data), (BATCH,))]
                loss = model.loss(x, torch.rand(BATCH))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield

        def denoiser(z: Tensor, sigma: Tensor) -> Tensor:
            return model(z, (sigma / LOW).log() / torch.tensor(HIGH / LOW).log()).mean

        return snapshots(denoiser, loop(), budgets)

    name = "azula: KarrasDenoiser around our MLP, Adam"
    return {f"{name}, lr {lr}": partial(run, lr=lr) for lr in (0.001, 0.005)}


def smalldiffusion() -> dict[str, Trainer]:
    from accelerate import Accelerator
    from smalldiffusion import ScheduleLogLinear, TimeInputMLP, training_loop
    from smalldiffusion.model import Scaled

    def run(
        data: Tensor, budgets: Sequence[float], kind: Callable[[], nn.Module], lr: float
    ) -> Iterator[Look]:
        model, levels = kind(), ScheduleLogLinear(1000, LOW, HIGH)
        loader = (batch for (batch,) in batches(data))
        loop = training_loop(loader, model, levels, Accelerator(cpu=True), epochs=1, lr=lr)

        def denoiser(z: Tensor, sigma: Tensor) -> Tensor:
            sigma = sigma.expand(len(z))[:, None]
            return z - sigma * model(z, sigma)

        return snapshots(denoiser, loop, budgets)

    name, plain, ready = "smalldiffusion: training_loop", TimeInputMLP, Scaled(TimeInputMLP)
    return {
        f"{name}, TimeInputMLP, lr 0.001": partial(run, kind=plain, lr=0.001),
        f"{name}, Scaled(TimeInputMLP), lr 0.005": partial(run, kind=ready, lr=0.005),
    }


GROUPS = (sde_utils, azula, smalldiffusion)
