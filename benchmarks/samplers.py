"""Samplers of every library behind one signature: (denoiser, noise, network calls) -> samples.

`noise` is standard normal. All run from σ = 50 to about 0.01, each on the best of the grids that
its library offers. Libraries are imported where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import sde_utils as su

from .common import Denoise

LOW, HIGH = 0.01, 50.0
Sampler = Callable[[Denoise, Tensor, int], Tensor]


def rectified_times(sde: su.SDE, n: int) -> list[float]:
    """n times, σ/(1 + σ) equally spaced from σ = 50 to 0.01, as in azula's rectified schedule."""
    u = torch.linspace(HIGH / (1 + HIGH), LOW / (1 + LOW), n, dtype=torch.float64)
    return sde.time(u / (1 - u)).tolist()


def sde_utils() -> dict[str, Sampler]:
    ve, vp = su.VESDE(LOW, HIGH), su.VPSDE(0.1, 2 * math.log1p(HIGH**2) - 0.1)  # σ(1) = 50 in both

    def maruyama(denoiser: Denoise, noise: Tensor, calls: int) -> Tensor:
        return su.sample(ve, denoiser, HIGH * noise, steps=calls)

    def ancestral_vp(denoiser: Denoise, noise: Tensor, calls: int) -> Tensor:
        x = vp.scale(1.0).to(noise) * HIGH * noise
        return su.sample(vp, denoiser, x, steps=calls, predictor=su.ancestral)

    def ode(denoiser: Denoise, noise: Tensor, calls: int) -> Tensor:
        times = su.karras_times(ve, (calls + 1) // 2)
        return su.sample(ve, denoiser, HIGH * noise, times=times, predictor=su.heun)

    def multistep(denoiser: Denoise, noise: Tensor, calls: int, order: int) -> Tensor:
        times, predictor = rectified_times(ve, calls), su.multistep(order, sigma_data=1.0)
        return su.sample(ve, denoiser, HIGH * noise, times=times, predictor=predictor)

    return {
        "sde_utils: Euler–Maruyama": maruyama,
        "sde_utils: ancestral (VP)": ancestral_vp,
        "sde_utils: Heun": ode,
        "sde_utils: multistep, order 2": partial(multistep, order=2),
        "sde_utils: multistep, order 3": partial(multistep, order=3),
    }


def azula_denoiser(
    denoiser: Denoise, schedule: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> nn.Module:
    """D as azula's: of α (x_0 + σ/α ε), at a time of its schedule."""
    from azula.denoise import Denoiser, DiracPosterior

    class Given(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t: Tensor, t: Tensor) -> DiracPosterior:
            alpha, sigma = (a.to(x_t) for a in self.schedule(t))
            return DiracPosterior(mean=denoiser(x_t / alpha, sigma / alpha))

    return Given()


def azula() -> dict[str, Sampler]:
    from azula.noise import RectifiedSchedule
    from azula.sample import (
        DDIMSampler,
        DDPMSampler,
        HeunSampler,
        vABSampler,
        xEABSampler,
        zABSampler,
    )

    # of its five the best for most samplers here; σ/α from 0.01 to 50
    schedule = RectifiedSchedule(1 / HIGH, LOW)

    def run(
        denoiser: Denoise,
        noise: Tensor,
        calls: int,
        kind: Callable[..., Callable[[Tensor], Tensor]],
        calls_a_step: int = 1,
    ) -> Tensor:
        given, steps = azula_denoiser(denoiser, schedule), calls // calls_a_step
        return kind(given, steps=steps, silent=True)(schedule.sigma(torch.ones(())) * noise)

    return {
        "azula: DDPM": partial(run, kind=DDPMSampler),
        "azula: DDIM": partial(run, kind=DDIMSampler),
        "azula: Heun": partial(run, kind=HeunSampler, calls_a_step=2),
        "azula: vAB, order 2": partial(run, kind=partial(vABSampler, order=2)),
        "azula: vAB, order 3": partial(run, kind=partial(vABSampler, order=3)),
        "azula: zAB, order 3": partial(run, kind=partial(zABSampler, order=3)),
        "azula: xEAB, order 2": partial(run, kind=partial(xEABSampler, order=2)),
    }


def k_diffusion() -> dict[str, Sampler]:
    from k_diffusion import sampling

    def run(denoiser: Denoise, noise: Tensor, calls: int, kind: Callable[..., Tensor]) -> Tensor:
        levels = (calls + 1) // 2 if kind is sampling.sample_heun else calls
        sigmas = sampling.get_sigmas_karras(levels, LOW, HIGH)
        return kind(denoiser, HIGH * noise, sigmas, disable=True)

    return {
        "k-diffusion: Euler ancestral": partial(run, kind=sampling.sample_euler_ancestral),
        "k-diffusion: Heun": partial(run, kind=sampling.sample_heun),
        "k-diffusion: DPM++ 2M": partial(run, kind=sampling.sample_dpmpp_2m),
    }


def diffusers() -> dict[str, Sampler]:
    from diffusers import EDMDPMSolverMultistepScheduler, HeunDiscreteScheduler

    def dpm(denoiser: Denoise, noise: Tensor, calls: int, algorithm: str = "dpmsolver++") -> Tensor:
        scheduler = EDMDPMSolverMultistepScheduler(
            sigma_min=LOW, sigma_max=HIGH, sigma_data=1.0, algorithm_type=algorithm
        )
        scheduler.set_timesteps(calls)
        x = scheduler.init_noise_sigma * noise
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i].to(x)
            norm = (sigma**2 + 1).sqrt()
            f = (denoiser(x, sigma) - x / norm**2) * norm / sigma  # the network behind D
            x = scheduler.step(f, t, x).prev_sample
        return x

    low, high = torch.tensor(LOW).log10(), torch.tensor(HIGH).log10()
    kept = 1 / (1 + torch.logspace(low, high, 1000, dtype=torch.float64) ** 2)
    # the discrete chain whose noise levels are these
    betas = (1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])).numpy()

    def heun(denoiser: Denoise, noise: Tensor, calls: int) -> Tensor:
        scheduler = HeunDiscreteScheduler(trained_betas=betas, use_karras_sigmas=True)
        scheduler.set_timesteps((calls + 1) // 2)
        x = HIGH * noise
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i + i % 2].to(x)  # a step's second call is at its end
            x = scheduler.step((x - denoiser(x, sigma)) / sigma, t, x).prev_sample
        return x

    return {
        "diffusers: Heun": heun,
        "diffusers: EDM DPM++ 2M": dpm,
        "diffusers: EDM DPM++ 2M SDE": partial(dpm, algorithm="sde-dpmsolver++"),
    }


def smalldiffusion() -> dict[str, Sampler]:
    from accelerate import Accelerator
    from smalldiffusion import ModelMixin, ScheduleLogLinear, samples

    class Given(nn.Module, ModelMixin):
        def __init__(self, denoiser: Denoise, dims: tuple[int, ...]) -> None:
            super().__init__()
            self.denoiser, self.input_dims = denoiser, dims

        def predict_eps(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
            return (x - self.denoiser(x, sigma)) / sigma

    def run(denoiser: Denoise, noise: Tensor, calls: int, gam: float, mu: float) -> Tensor:
        sigmas = ScheduleLogLinear(1000, LOW, HIGH).sample_sigmas(calls)
        model, place = Given(denoiser, noise.shape[1:]), Accelerator(cpu=True)
        *_, x = samples(model, sigmas, gam, mu, xt=HIGH * noise, accelerator=place)
        return x

    return {
        "smalldiffusion: DDPM": partial(run, gam=1.0, mu=0.5),
        "smalldiffusion: DDIM": partial(run, gam=1.0, mu=0.0),
        "smalldiffusion: accelerated": partial(run, gam=2.0, mu=0.0),
    }


GROUPS = (sde_utils, azula, k_diffusion, diffusers, smalldiffusion)
