"""Whether posteriors of digits are right: `python scripts/calibrate.py` writes the numbers to
sde_utils/pretrained/calibration.json.

chains: draws of x given z = x + σ ε, no observation: coverage, spread and error. The ceiling of
    all that follows.
exact: four digits, the training digits as prior: total variation of each method's class
    probabilities from the exact ones, and the error of its log-evidence.
problems: for each of four tasks and each method PSNR, residual, coverage of 90 % intervals and
    ranks of three scalars; of digits drawn from the network, where only the sampler can be wrong,
    and of held-out ones, where the network can be, too.

Lists have one entry a problem. Takes about six hours on two CPU cores. What is in the file is
kept, so that a run cut short goes on; --fresh starts anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import SDES, SHAPE, Digits, Results, classifier
from torch import Tensor, nn

import sde_utils as su
from sde_utils.digits import PRETRAINED
from sde_utils.operators import Blur, Downsampling, Inpainting, Radon, box_mask, motion_kernel

RESULTS = PRETRAINED / "calibration.json"
TASKS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # operator and σ_y
    "inpainting": (Inpainting(box_mask(28, 28, 8, 8, 20, 20)), 0.1),
    "super-resolution": (Downsampling(4), 0.1),
    "deblurring": (Blur(motion_kernel(9, 45.0)), 0.1),
    "tomography": (Radon(28, [0.0, 45.0, 90.0, 135.0]), 1.0),
}
METHODS = ("Annealed", "DPS", "MMPS", "twisted SMC", "tempered SMC")
CHAINS = {  # levels for each factor of ten from σ downward
    "ancestral": (su.ancestral, (4, 8, 16)),
    "moment-matched": (su.moment_matched, (2, 4, 8)),
}
SIGMAS = (0.1, 0.4, 1.0, 4.0)
STEPS, DRAWS, PROBLEMS = 30, 19, 32
POOL = 1024  # draws of the prior, the same for every problem
PARTICLES = {"twisted SMC": 32, "tempered SMC": 128}
RESOLUTION = 0.02  # 2.5 of 255 grey levels
DEPTHS = {"chains": 5, "problems": 4, "exact": 3}  # of names in the file, below the first


def told(digits: Digits) -> Tensor:
    """(1, 28, 28), True where training digits differ: sd above 0.1."""
    return digits.train.std(0) > 0.1


# chains


def measure_chains(results: Results, denoiser: su.Denoiser, digits: Digits) -> None:
    """Each chain from each σ, of PROBLEMS truths."""
    for truths, every in truths_of(denoiser, digits).items():
        for sigma in SIGMAS:
            for name, (predictor, counts) in CHAINS.items():
                for steps in counts:
                    place = ("chains", truths, str(sigma), name, str(steps))
                    if results.known(*place):
                        continue
                    generator = torch.Generator(every.device).manual_seed(3000)
                    noise = torch.randn(every.shape, generator=generator, device=every.device)
                    counted = Counted(denoiser)
                    chain = su.reverse_chain(SDES["VE"], counted, steps, predictor)
                    z = (every + sigma * noise).repeat_interleave(DRAWS, dim=0)
                    x = chain(z, sigma, generator).unflatten(0, (PROBLEMS, DRAWS))
                    rows = [
                        spread(draws, truth[None], told(digits), generator)
                        | {"calls": counted.images / len(z)}
                        for draws, truth in zip(x, every, strict=True)
                    ]
                    results.keep(columns(rows), *place)


def spread(
    x: Tensor, truth: Tensor, pixels: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Coverage, variance of draws, and squared error of their mean made comparable to it.

    Over these pixels. Truth and draws are both seen at a resolution of 0.02: exact draws have
    coverage 0.9 whatever the background, which else is a matter of differences nobody sees.
    """
    shown = RESOLUTION * torch.randn(
        (len(x) + 1, *x.shape[1:]), generator=generator, device=x.device
    )
    seen = torch.cat([truth, x]) + shown
    covered = su.coverage(seen[0][pixels], seen[1:, pixels].T)
    error = (x.mean(0) - truth[0])[pixels].square().mean() * len(x) / (len(x) + 1)
    variance = x[:, pixels].var(0).mean()
    return {"coverage": float(covered), "variance": float(variance), "error": float(error)}


def truths_of(denoiser: su.Denoiser, digits: Digits) -> dict[str, Tensor]:
    """PROBLEMS digits drawn from the network, and as many that it has never seen."""
    held_out = digits.held_out[7 :: (len(digits.held_out) - 7) // PROBLEMS][:PROBLEMS]
    drawn = prior_draws(denoiser, PROBLEMS, torch.Generator(held_out.device).manual_seed(4000))
    return {"network": drawn, "held-out": held_out}


def prior_draws(denoiser: su.Denoiser, n: int, generator: torch.Generator) -> Tensor:
    """n digits drawn from the network, by 47 calls."""
    x = SDES["VE"].prior((n, *SHAPE), device=generator.device, generator=generator)
    options = {"times": su.karras_times(SDES["VE"], 24), "generator": generator}
    return su.sample(SDES["VE"], denoiser, x, predictor=su.moment_matched, **options)


def columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """One list a measure, to four digits."""
    return {name: [float(f"{row[name]:.4g}") for row in rows] for name in rows[0]}


# problems


def measure_problems(results: Results, denoiser: su.Denoiser, digits: Digits) -> None:
    """Each method on each task, problem by problem, for both kinds of truths."""
    every, probability = truths_of(denoiser, digits), classifier(digits.train, digits.labels)
    pool = prior_draws(denoiser, POOL, torch.Generator(digits.train.device).manual_seed(5000))
    for truths, of in every.items():
        for i in range(PROBLEMS):
            for task, (operator, noise) in TASKS.items():
                sde = SDES["VE" if task in ("inpainting", "super-resolution") else "VP"]
                for method in METHODS:
                    place = ("problems", truths, task, method)
                    rows = results.get(*place)
                    if rows and len(rows["coverage"]) > i:
                        continue
                    generator = torch.Generator(of.device).manual_seed(1000 + i)
                    truth = of[i : i + 1]
                    y = operator(truth)
                    y = y + noise * torch.randn(y.shape, generator=generator, device=y.device)
                    obs = su.Observation(operator, y[0], noise)
                    x, facts = solve(sde, denoiser, method, obs, pool, generator)
                    row = judge(x, truth, obs, digits, probability, i % 10, generator) | facts
                    new = columns([row])
                    results.keep({k: rows.get(k, []) + v for k, v in new.items()}, *place)


def solve(
    sde: su.SDE,
    denoiser: su.Denoiser,
    method: str,
    obs: su.Observation,
    pool: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """DRAWS images for one observation by one of METHODS; of particles what became of them.

    STEPS network calls a draw; tempered SMC takes as many as it takes, and the pool.
    """
    times, n = su.karras_times(sde, STEPS), PARTICLES.get(method, DRAWS)
    x = sde.prior((n, *SHAPE), device=obs.y.device, generator=generator)
    if method in PARTICLES:
        if method == "twisted SMC":
            guided = su.PiGDM(denoiser, obs, SHAPE)
            particles = su.twisted_smc(sde, guided, x, times=times, generator=generator)
        else:
            particles = su.tempered_smc(sde, denoiser, obs, pool, n, generator=generator)
        ancestors = float(len(particles.ancestors.unique()))
        facts = {"least effective": float(particles.ess.min()), "ancestors": ancestors}
        return particles.resample(DRAWS, generator), facts
    if method == "MMPS":
        guided = su.MMPS(denoiser, obs, iterations=3, dense=1)
    else:
        guided = {"Annealed": su.Annealed, "DPS": su.DPS}[method](denoiser, obs)
    options = {"times": times, "predictor": su.ancestral, "generator": generator}
    return su.sample(sde, guided, x, **options), {}


def judge(
    x: Tensor,
    truth: Tensor,
    obs: su.Observation,
    digits: Digits,
    probability: nn.Module,
    label: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """PSNR of the draws and of their mean, residual over σ_y, `spread`, and ranks of the truth.

    Ranks, in 0..len(x), of the mean over all pixels, of the pixel where training digits differ
    most, and of a classifier's log-probability of one class.
    """
    noise = torch.randn((len(x) + 1, *SHAPE), generator=generator, device=x.device)
    seen = torch.cat([truth, x]) + RESOLUTION * noise
    with torch.no_grad():
        chance = probability(seen).log_softmax(1)[:, label]
    stroke = seen.flatten(1)[:, digits.train.std(0).argmax()]
    scalars = {"brightness": seen.flatten(1).mean(1), "stroke": stroke, "class": chance}
    ranks = {
        f"rank of {name}": float(su.calibration_ranks(value[:1], value[None, 1:]))
        for name, value in scalars.items()
    }
    return {
        "psnr_draw": float(su.psnr(x, truth).mean()),
        "psnr_mean": float(su.psnr(x.mean(0, keepdim=True), truth)),
        "residual": float(obs.residual(x).square().mean().sqrt()) / obs.noise_std,
        **spread(x, truth, told(digits), generator),
        **ranks,
    }


# exact


def measure_exact(results: Results, digits: Digits) -> None:
    """Four digits, by VP and VE in turn."""
    for name, (operator, noise) in EXACT.items():
        for i in range(4):
            truth, sde = digits.held_out[60 * i + 27][None], SDES["VE" if i % 2 else "VP"]
            generator = torch.Generator(truth.device).manual_seed(2000 + i)
            kept = results.get("exact", name)
            if kept and len(kept["exact draws"]["total variation"]) > i:
                continue
            y = operator(truth)
            y = y + noise * torch.randn(y.shape, generator=generator, device=y.device)
            obs = su.Observation(operator, y[0], noise)
            found = exact_problem(sde, digits.train, digits.labels, obs, generator)
            for method, row in found.items():
                old = kept.get(method, {})
                kept[method] = {k: old.get(k, []) + v for k, v in columns([row]).items()}
            results.keep(kept, "exact", name)


def exact_problem(
    sde: su.SDE, images: Tensor, labels: Tensor, obs: su.Observation, generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """Total variation from the exact class probabilities, error of the log-evidence, calls a draw.

    Of 200 draws of each method, of 800 particles of both kinds, and of as many exact draws.
    """
    prior = su.IsotropicMixture(images, 0.01)
    posterior, times = prior.posterior(obs), su.karras_times(sde, STEPS)
    right = torch.zeros(10, device=images.device)
    right = right.index_add(0, labels, posterior.weights.to(images))
    found = {}

    def note(name: str, x: Tensor, weights: Tensor | None = None, **more: float) -> None:
        shares = class_probabilities(x, images, labels, weights)
        found[name] = {"total variation": float(su.total_variation(shares, right)), **more}

    for guided in (su.Annealed(prior, obs), su.DPS(prior, obs), su.MMPS(prior, obs, iterations=2)):
        x = sde.prior((200, *SHAPE), device=images.device, generator=generator)
        x = su.sample(sde, guided, x, times=times, predictor=su.ancestral, generator=generator)
        note(type(guided).__name__, x, calls=STEPS)
    n, counted = 800, Counted(prior)

    def twisted() -> su.Particles:
        x = sde.prior((n, *SHAPE), device=images.device, generator=generator)
        twist = su.Annealed(counted, obs)
        return su.twisted_smc(sde, twist, x, times=times, generator=generator)

    def tempered() -> su.Particles:
        pool, chain = prior.sample(16 * n, generator), su.reverse_chain(sde, counted, 3)
        options = {"final": 1, "chain": chain, "generator": generator}
        return su.tempered_smc(sde, counted, obs, pool, n, **options)

    for name, method in (("twisted SMC", twisted), ("tempered SMC", tempered)):
        counted.images, start = 0, time.perf_counter()
        particles = method()
        facts = {
            "log-evidence": float(particles.log_evidence - posterior.log_evidence),
            "calls": counted.images / n,
            "seconds": time.perf_counter() - start,
        }
        note(name, particles.x, particles.log_weights.exp(), **facts)
    note("exact draws", posterior.sample(n, generator))
    return found


class Counted:
    """A denoiser that counts the images it is asked for."""

    def __init__(self, denoiser: su.Denoiser | su.GaussianMixture) -> None:
        self.denoiser, self.sigma_data, self.images = denoiser, denoiser.sigma_data, 0

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        self.images += len(z)
        return self.denoiser(z, sigma)


def class_probabilities(
    x: Tensor, images: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Share of (weighted) draws x, (B, *dims), nearest to an image of each label, (10,)."""
    nearest = labels[torch.cdist(x.flatten(1), images.flatten(1)).argmin(dim=1)]
    weights = torch.full((len(x),), 1 / len(x)) if weights is None else weights
    return torch.zeros(10, device=x.device).index_add(0, nearest, weights.to(x))


def upper_half(x: Tensor) -> Tensor:
    """A: the first 14 of 28 rows."""
    return x[:, :, :14]


def four_rows(x: Tensor) -> Tensor:
    """A: rows 10 to 13."""
    return x[:, :, 10:14]


EXACT = {  # operator and σ_y
    "upper half, 4": (upper_half, 4.0),
    "four rows, 1": (four_rows, 1.0),
    "four rows, 0.5": (four_rows, 0.5),
}


def main(arguments: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parts = ("chains", "exact", "problems")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget what is in the file")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    settings = parser.parse_args(arguments)
    try:
        results = Results(settings.out, DEPTHS, settings.fresh)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = su.load_pretrained("mnist").to(device)
    split = (*su.mnist(split="train"), *su.mnist(split="test"))
    digits = Digits(*(a.to(device) for a in split))
    if "chains" in settings.parts:
        measure_chains(results, denoiser, digits)
    if "exact" in settings.parts:
        measure_exact(results, digits)
    if "problems" in settings.parts:
        measure_problems(results, denoiser, digits)


if __name__ == "__main__":
    main()
