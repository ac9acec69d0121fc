"""Posterior samplers of every library behind one signature: (problem, calls, noise) -> draws.

`noise` is standard normal. The prior is a Gaussian mixture, whose denoiser and posterior are
exact; σ runs from 2000 to about 0.01. What a method leaves open (a step size, a weight) has the
best of a few values, found on problems that the table does not use: see `README.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

import sde_utils as su

from .common import Counter, Denoise
from .samplers import azula_denoiser

LOW, HIGH = 0.01, 2000.0
SIZE = math.sqrt(8**2 * 2 + 1)  # standard deviation of a coordinate under uniform weights


@dataclass(frozen=True)
class Problem:
    """`y = A x + noise ε` for x from a mixture; `denoiser` counts its calls."""

    mixture: su.GaussianMixture
    matrix: Tensor  # (m, d)
    y: Tensor  # (m,)
    noise: float
    denoiser: Counter

    @property
    def observation(self) -> su.Observation:
        return su.Observation(lambda x: x @ self.matrix.T.to(x), self.y, self.noise)


Posterior = Callable[[Problem, int, Tensor], Tensor]


def mixture_problem(d: int, m: int, seed: int) -> Problem:
    """25 unit Gaussians on a grid of spacing 8 in two coordinates, tiled, with random weights.

    A has m random singular values in (0, 1).
    """
    g, axis = torch.Generator().manual_seed(seed), torch.linspace(-16, 16, 5, dtype=torch.float64)
    random = {"generator": g, "dtype": torch.float64}
    means = torch.cartesian_prod(axis, axis).repeat(1, d // 2)
    mixture = su.IsotropicMixture(means, 1.0, torch.rand(25, **random))
    left = torch.linalg.qr(torch.randn(m, m, **random))[0]
    right = torch.linalg.qr(torch.randn(d, m, **random))[0]
    matrix = left @ torch.diag(torch.rand(m, **random)) @ right.T
    noise = max(0.1, float(torch.rand((), generator=g)))
    y = mixture.sample(1, g)[0] @ matrix.T + noise * torch.randn(m, **random)
    return Problem(mixture, matrix, y, noise, Counter(mixture))


def scaled(problem: Problem) -> tuple[Denoise, Callable[[Tensor], Tensor]]:
    """The denoiser and the operator for data of unit variance, x / SIZE."""

    def denoiser(z: Tensor, sigma: Tensor) -> Tensor:
        return problem.denoiser(SIZE * z, SIZE * sigma) / SIZE

    return denoiser, lambda x: SIZE * x @ problem.matrix.T.to(x)


def sde_utils() -> dict[str, Posterior]:
    sde = su.VESDE(LOW, HIGH)

    def guided(
        problem: Problem, calls: int, noise: Tensor, kind: Callable[..., su.Guided]
    ) -> Tensor:
        d_y = kind(problem.denoiser, problem.observation)
        return su.sample(sde, d_y, HIGH * noise, steps=calls, predictor=su.ancestral)

    def pigdm(problem: Problem, calls: int, noise: Tensor) -> Tensor:
        kind = partial(su.PiGDM, shape=noise.shape[1:], variance=SIZE**2)
        return guided(problem, calls, noise, kind)

    def algorithm_1(problem: Problem, calls: int, noise: Tensor, zeta: float = 0.1) -> Tensor:
        """DPS as its paper runs it: VP, data of unit variance, a step that forgets σ_y."""
        vp = su.VPSDE(0.1, 2 * math.log1p((HIGH / SIZE) ** 2) - 0.1)  # σ(1) = HIGH / SIZE
        denoiser, forward = scaled(problem)
        obs = su.Observation(forward, problem.y, problem.noise)
        x = (vp.scale(1.0) * vp.sigma(1.0)).to(noise) * noise
        step = su.dps_step(su.ancestral, obs, zeta)
        return SIZE * su.sample(vp, denoiser, x, steps=calls, predictor=step)

    def smc(problem: Problem, calls: int, noise: Tensor) -> Tensor:
        twist = su.MMPS(problem.denoiser, problem.observation)
        particles = su.twisted_smc(sde, twist, HIGH * noise, times=su.uniform_times(calls))
        return particles.resample(len(noise))

    def tempered(problem: Problem, calls: int, noise: Tensor) -> Tensor:
        pool, n = HIGH * torch.randn(4 * len(noise), *noise.shape[1:]).to(noise), len(noise)
        options = {"times": su.karras_times(sde, 16, SIZE), "predictor": su.moment_matched}
        pool = su.sample(sde, problem.denoiser, pool, **options)
        return su.tempered_smc(sde, problem.denoiser, problem.observation, pool, n).resample(n)

    return {
        "sde_utils: DPS": partial(guided, kind=su.DPS),
        "sde_utils: DPS, Algorithm 1": algorithm_1,
        "sde_utils: PiGDM": pigdm,
        "sde_utils: MMPS": partial(guided, kind=su.MMPS),
        "sde_utils: twisted SMC (MMPS)": smc,
        "sde_utils: tempered SMC": tempered,
    }


# azula, on data of unit variance; σ/α from AZULA[0] to AZULA[1]

AZULA = (LOW / SIZE, HIGH / SIZE)
DOUBLE = {"silent": True, "dtype": torch.float64}
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]
Operator = Callable[[Tensor], Tensor]


def azula() -> dict[str, Posterior]:
    import_module("azula.guidance")
    return {
        "azula: DPS": azula_dps,
        "azula: PiGDM": azula_pigdm,
        "azula: MMPS": azula_mmps,
        "azula: TDS": azula_tds,
    }


def for_azula(problem: Problem, schedule: Schedule) -> tuple[nn.Module, Operator]:
    denoiser, forward = scaled(problem)
    return azula_denoiser(denoiser, schedule), forward


def azula_run(sampler: Callable[[Tensor], Tensor], schedule: Schedule, noise: Tensor) -> Tensor:
    return SIZE * sampler(schedule(noise.new_ones(()))[1] * noise)


def azula_dps(problem: Problem, calls: int, noise: Tensor, zeta: float = 0.1) -> Tensor:
    """Its norm is the batch's, √n times that of a sample: the step gets that factor back."""
    from azula.guidance import DPSSampler
    from azula.noise import VPSchedule

    schedule = VPSchedule(1 / AZULA[1], AZULA[0])
    denoiser, forward = for_azula(problem, schedule)
    options = {"zeta": zeta * math.sqrt(len(noise)), "steps": calls, **DOUBLE}
    return azula_run(DPSSampler(denoiser, problem.y, forward, **options), schedule, noise)


def azula_pigdm(problem: Problem, calls: int, noise: Tensor, eta: float = 1.0) -> Tensor:
    from azula.guidance import PGDMSampler
    from azula.noise import RectifiedSchedule

    schedule = RectifiedSchedule(1 / AZULA[1], AZULA[0])
    denoiser, forward = for_azula(problem, schedule)
    inverse, options = torch.linalg.pinv(SIZE * problem.matrix), {"eta": eta, "steps": calls}
    given = denoiser, problem.y, forward, lambda y: y @ inverse.T
    return azula_run(PGDMSampler(*given, **options, **DOUBLE), schedule, noise)


def azula_mmps(problem: Problem, calls: int, noise: Tensor) -> Tensor:
    """It solves its system exactly, in as many iterations as there are observed numbers."""
    from azula.guidance import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import VESchedule
    from azula.sample import DDPMSampler

    schedule, m = VESchedule(*AZULA), len(problem.y)
    denoiser, forward = for_azula(problem, schedule)
    covariance = IsotropicCovariance(torch.tensor(problem.noise**2, dtype=torch.float64))
    guided = MMPSDenoiser(denoiser, problem.y, forward, covariance, iterations=m)
    return azula_run(DDPMSampler(guided, steps=calls, **DOUBLE), schedule, noise)


def azula_tds(problem: Problem, calls: int, noise: Tensor) -> Tensor:
    """Its twist sees x̂ and σ and is PiGDM's.

    log N(y; A x̂, σ_y² I + ρ² A Aᵀ), ρ² = σ² / (σ² + 1).
    """
    from azula.guidance import TDSSampler
    from azula.noise import VESchedule

    schedule = VESchedule(*AZULA)
    denoiser, forward = for_azula(problem, schedule)
    u, s, _ = torch.linalg.svd(SIZE * problem.matrix, full_matrices=False)

    def twist(x0_hat: Tensor, sigma: Tensor) -> Tensor:
        total = problem.noise**2 + sigma**2 / (sigma**2 + 1) * s**2
        return -(((problem.y - forward(x0_hat)) @ u) ** 2 / total + total.log()) / 2

    return azula_run(TDSSampler(denoiser, twist, steps=calls, **DOUBLE), schedule, noise)


# deepinv, which calls the denoiser in single precision


def deepinv() -> dict[str, Posterior]:
    from deepinv.sampling import DPSDataFidelity
    from deepinv.sampling.noisy_datafidelity import MomentMatchingDataFidelity

    def dps(problem: Problem) -> nn.Module:
        return DPSDataFidelity(weight=1.0)

    def annealed(problem: Problem) -> nn.Module:
        return DPSDataFidelity(weight=0.5, guidance="annealed")

    def moments(problem: Problem) -> nn.Module:
        return MomentMatchingDataFidelity(cg_max_iter=len(problem.y))

    return {
        "deepinv: DPS": partial(deepinv_diffusion, kind=dps),
        "deepinv: DPS, annealed": partial(deepinv_diffusion, kind=annealed),
        "deepinv: moment matching": partial(deepinv_diffusion, kind=moments),
        "deepinv: DiffPIR": deepinv_diffpir,
    }


class Given(nn.Module):
    """D as deepinv's, for data `(x - shift) / size`."""

    def __init__(self, denoiser: Denoise, size: float, shift: float = 0.0) -> None:
        super().__init__()
        self.denoiser, self.size, self.shift = denoiser, size, shift

    def forward(self, z: Tensor, sigma: float | Tensor, *_: object, **__: object) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=z.dtype).flatten()
        sigma = sigma[0] if len(sigma) == 1 else sigma
        x0_hat = self.denoiser(self.size * z + self.shift, self.size * sigma)
        return (x0_hat - self.shift) / self.size


def physics(problem: Problem, size: float) -> nn.Module:
    from deepinv.physics import GaussianNoise, LinearPhysics

    a = size * problem.matrix
    forward, adjoint = (lambda x, **_: x @ a.T.to(x)), (lambda y, **_: y @ a.to(y))
    return LinearPhysics(A=forward, A_adjoint=adjoint, noise_model=GaussianNoise(problem.noise))


def deepinv_diffusion(
    problem: Problem, calls: int, noise: Tensor, kind: Callable[[Problem], nn.Module]
) -> Tensor:
    """The data of unit variance."""
    from deepinv.sampling import DDPMSolver, PosteriorDiffusion, VarianceExplodingDiffusion

    solver = DDPMSolver(timesteps=torch.linspace(1, 0, calls, dtype=torch.float64))
    sde = VarianceExplodingDiffusion(sigma_min=LOW / SIZE, sigma_max=HIGH / SIZE, alpha=1.0)
    given = Given(problem.denoiser, SIZE)
    model = PosteriorDiffusion(kind(problem), given, sde, solver, minus_one_one=False)
    y, x = problem.y.expand(len(noise), -1).float(), HIGH / SIZE * noise
    return SIZE * model(y, physics(problem, SIZE), x_init=x).to(noise)


def deepinv_diffpir(
    problem: Problem, calls: int, noise: Tensor, zeta: float = 1.0, weight: float = 2.0
) -> Tensor:
    """The data in [0, 1], outside which it clips: x = 44 u - 22. It starts from its own noise."""
    from deepinv.optim.data_fidelity import L2
    from deepinv.sampling import DiffPIR

    size, shift = 44.0, -22.0
    given = Given(problem.denoiser, size, shift)
    model = DiffPIR(given, L2(), max_iter=calls, zeta=zeta, lambda_=weight)
    y = (problem.y - shift * problem.matrix.sum(1)).expand(len(noise), -1).float()
    start = torch.full_like(noise, 0.5, dtype=torch.float32)
    return (size * model(y, physics(problem, size), x_init=start) + shift).to(noise)


GROUPS = (sde_utils, azula, deepinv)
