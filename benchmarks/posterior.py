"""Posterior samplers of every library behind one signature: (problem, network calls, standard normal noise) -> draws from p(x | y).

The prior is a Gaussian mixture, whose denoiser and posterior are exact; σ runs from 2000 to 0.01. What a method leaves open (a step size, a
weight) has the best of a few values, found on problems that the table does not use: see `README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sde_utils import DPS, MMPS, VESDE, VPSDE, IsotropicMixture, Observation, PiGDM, ancestral, sample, twisted_smc, uniform_times

from .common import Counter, Denoise
from .samplers import azula_denoiser

LOW, HIGH = 0.01, 2000.0
SIZE = math.sqrt(8**2 * 2 + 1)  # standard deviation of a coordinate under uniform weights


@dataclass(frozen=True)
class Problem:
    """`y = A x + noise ε` for x from a mixture; `denoiser` counts its calls."""

    mixture: IsotropicMixture
    matrix: Tensor  # (m, d)
    y: Tensor  # (m,)
    noise: float
    denoiser: Counter

    @property
    def observation(self) -> Observation:
        return Observation(lambda x: x @ self.matrix.T.to(x), self.y, self.noise)


Posterior = Callable[[Problem, int, Tensor], Tensor]


def mixture_problem(d: int, m: int, seed: int) -> Problem:
    """25 unit Gaussians on a grid of spacing 8 in two coordinates, tiled; random weights; A with m random singular values in (0, 1)."""
    g, axis = torch.Generator().manual_seed(seed), torch.linspace(-16, 16, 5, dtype=torch.float64)
    means = torch.cartesian_prod(axis, axis).repeat(1, d // 2)
    mixture = IsotropicMixture(means, 1.0, torch.rand(25, generator=g, dtype=torch.float64))
    left = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(d, m, generator=g, dtype=torch.float64))[0]
    matrix = left @ torch.diag(torch.rand(m, generator=g, dtype=torch.float64)) @ right.T
    noise = max(0.1, float(torch.rand((), generator=g)))
    y = mixture.sample(1, g)[0] @ matrix.T + noise * torch.randn(m, generator=g, dtype=torch.float64)
    return Problem(mixture, matrix, y, noise, Counter(mixture))


def sde_utils() -> dict[str, Posterior]:
    sde = VESDE(LOW, HIGH)

    def guided(problem: Problem, calls: int, noise: Tensor, kind: Callable[..., Denoise]) -> Tensor:
        return sample(sde, kind(problem.denoiser, problem.observation), HIGH * noise, steps=calls - 1, predictor=ancestral)

    def algorithm_1(problem: Problem, calls: int, noise: Tensor, zeta: float = 0.1) -> Tensor:
        """DPS as its paper runs it: VP, data of unit variance, a step that forgets σ_y."""
        vp, times = VPSDE(0.1, 2 * math.log1p((HIGH / SIZE) ** 2) - 0.1), uniform_times(calls)
        obs = Observation(lambda x: SIZE * x @ problem.matrix.T.to(x), problem.y, problem.noise)
        guided = DPS(lambda z, sigma: problem.denoiser(SIZE * z, SIZE * sigma) / SIZE, obs, zeta=zeta, sde=vp, times=tuple(times))
        return SIZE * sample(vp, guided, (vp.scale(1.0) * vp.sigma(1.0)).to(noise) * noise, times=times, predictor=ancestral)

    def smc(problem: Problem, calls: int, noise: Tensor) -> Tensor:
        return twisted_smc(sde, MMPS(problem.denoiser, problem.observation), HIGH * noise, steps=calls).resample(len(noise))

    return {
        "sde_utils: DPS": partial(guided, kind=DPS),
        "sde_utils: DPS, Algorithm 1": algorithm_1,
        "sde_utils: PiGDM": partial(guided, kind=partial(PiGDM, variance=SIZE**2)),
        "sde_utils: MMPS": partial(guided, kind=MMPS),
        "sde_utils: twisted SMC (MMPS)": smc,
    }


def azula() -> dict[str, Posterior]:
    from azula.guidance import DPSSampler, MMPSDenoiser, PGDMSampler, TDSSampler
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import RectifiedSchedule, VESchedule, VPSchedule
    from azula.sample import DDPMSampler

    low, high = LOW / SIZE, HIGH / SIZE
    ve, vp, rectified = VESchedule(low, high), VPSchedule(1 / high, low), RectifiedSchedule(1 / high, low)  # σ/α from low to high
    double = {"silent": True, "dtype": torch.float64}

    def given(problem: Problem, schedule: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The denoiser and the operator for data of unit variance."""
        scaled = azula_denoiser(lambda z, sigma: problem.denoiser(SIZE * z, SIZE * sigma) / SIZE, schedule)
        return scaled, lambda x: SIZE * x @ problem.matrix.T

    def start(noise: Tensor, schedule: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        return schedule(noise.new_ones(()))[1] * noise

    def dps(problem: Problem, calls: int, noise: Tensor, schedule: Callable = vp, zeta: float = 0.1) -> Tensor:
        """Its norm is that of the whole batch, √n times that of a sample: the step is given back that factor."""
        denoiser, forward = given(problem, schedule)
        step = zeta * math.sqrt(len(noise))
        return SIZE * DPSSampler(denoiser, problem.y, forward, zeta=step, steps=calls, **double)(start(noise, schedule))

    def pigdm(problem: Problem, calls: int, noise: Tensor, schedule: Callable = rectified, eta: float = 1.0) -> Tensor:
        denoiser, forward = given(problem, schedule)
        inverse = torch.linalg.pinv(SIZE * problem.matrix)
        sampler = PGDMSampler(denoiser, problem.y, forward, lambda y: y @ inverse.T, eta=eta, steps=calls, **double)
        return SIZE * sampler(start(noise, schedule))

    def mmps(problem: Problem, calls: int, noise: Tensor, schedule: Callable = ve) -> Tensor:
        denoiser, forward = given(problem, schedule)
        covariance = IsotropicCovariance(torch.tensor(problem.noise**2, dtype=torch.float64))
        guided = MMPSDenoiser(denoiser, problem.y, forward, covariance, iterations=len(problem.y))
        return SIZE * DDPMSampler(guided, steps=calls, **double)(start(noise, schedule))

    def tds(problem: Problem, calls: int, noise: Tensor, schedule: Callable = ve) -> Tensor:
        """Its twist sees x̂ and σ: log N(y; A x̂, σ_y² I + ρ² A Aᵀ), ρ² = σ² / (σ² + 1), as in PiGDM."""
        denoiser, forward = given(problem, schedule)
        u, s, _ = torch.linalg.svd(SIZE * problem.matrix, full_matrices=False)

        def twist(x0_hat: Tensor, sigma: Tensor) -> Tensor:
            total = problem.noise**2 + sigma**2 / (sigma**2 + 1) * s**2
            return -(((problem.y - forward(x0_hat)) @ u) ** 2 / total + total.log()) / 2

        return SIZE * TDSSampler(denoiser, twist, steps=calls, **double)(start(noise, schedule))

    return {"azula: DPS": dps, "azula: PiGDM": pigdm, "azula: MMPS": mmps, "azula: TDS": tds}


def deepinv() -> dict[str, Posterior]:
    from deepinv.optim.data_fidelity import L2
    from deepinv.physics import GaussianNoise, LinearPhysics
    from deepinv.sampling import DDPMSolver, DiffPIR, DPSDataFidelity, PosteriorDiffusion, VarianceExplodingDiffusion
    from deepinv.sampling import noisy_datafidelity as fidelity

    class Given(nn.Module):
        """D for data `(x - shift) / size`."""

        def __init__(self, denoiser: Denoise, size: float, shift: float = 0.0) -> None:
            super().__init__()
            self.denoiser, self.size, self.shift = denoiser, size, shift

        def forward(self, z: Tensor, sigma: float | Tensor, *_: object, **__: object) -> Tensor:
            sigma = torch.as_tensor(sigma, dtype=z.dtype).flatten()
            sigma = sigma[0] if len(sigma) == 1 else sigma
            return (self.denoiser(self.size * z + self.shift, self.size * sigma) - self.shift) / self.size

    def physics(problem: Problem, size: float) -> LinearPhysics:
        a = size * problem.matrix
        forward, adjoint = (lambda x, **_: x @ a.T.to(x)), (lambda y, **_: y @ a.to(y))
        return LinearPhysics(A=forward, A_adjoint=adjoint, noise_model=GaussianNoise(problem.noise))

    def diffusion(problem: Problem, calls: int, noise: Tensor, kind: Callable[..., nn.Module]) -> Tensor:
        """The data of unit variance. It calls the denoiser in single precision."""
        solver = DDPMSolver(timesteps=torch.linspace(1, 0, calls, dtype=torch.float64))
        sde = VarianceExplodingDiffusion(sigma_min=LOW / SIZE, sigma_max=HIGH / SIZE, alpha=1.0)
        model = PosteriorDiffusion(kind(problem), Given(problem.denoiser, SIZE), sde, solver, minus_one_one=False)
        y = problem.y.expand(len(noise), -1).float()
        return SIZE * model(y, physics(problem, SIZE), x_init=HIGH / SIZE * noise).to(noise)

    def moments(problem: Problem) -> nn.Module:
        return fidelity.MomentMatchingDataFidelity(cg_max_iter=len(problem.y))

    def diffpir(problem: Problem, calls: int, noise: Tensor, zeta: float = 1.0, weight: float = 2.0) -> Tensor:
        """The data in [0, 1], outside which it clips: x = 44 u - 22. It starts from its own noise."""
        size, shift = 44.0, -22.0
        given = Given(problem.denoiser, size, shift)
        model = DiffPIR(given, L2(), max_iter=calls, zeta=zeta, lambda_=weight)
        y = (problem.y - shift * problem.matrix.sum(1)).expand(len(noise), -1).float()
        start = torch.full_like(noise, 0.5, dtype=torch.float32)
        return (size * model(y, physics(problem, size), x_init=start) + shift).to(noise)

    return {
        "deepinv: DPS": partial(diffusion, kind=lambda _: DPSDataFidelity(weight=1.0)),
        "deepinv: DPS, annealed": partial(diffusion, kind=lambda _: DPSDataFidelity(weight=0.5, guidance="annealed")),
        "deepinv: moment matching": partial(diffusion, kind=moments),
        "deepinv: DiffPIR": diffpir,
    }


GROUPS = (sde_utils, azula, deepinv)
