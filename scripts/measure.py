"""How good the shipped digit network is: `python scripts/measure.py` writes the numbers that the
notebooks plot, sde_utils/pretrained/mnist.json.

chains: draws of x given z = x + σ ε, no observation: coverage, spread and error. The ceiling of
    all that follows.
problems: for each of four tasks and each method PSNR, residual, coverage of 90 % intervals and
    ranks of three scalars; of digits drawn from the network, where only the sampler can be wrong,
    and of held-out ones, where the network can be, too.
exact: four digits, the training digits as prior: total variation of each method's class
    probabilities from the exact ones, and the error of its log-evidence.
quality: Fréchet distance of samples to real digits, in the features of a small classifier trained
    here, against the number of network calls.

Lists have one entry a problem. Takes about five hours on two CPU cores. What is in the file is
kept, so that a run cut short goes on; --fresh starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sde_utils as su
from sde_utils.digits import PRETRAINED
from sde_utils.operators import Blur, Downsampling, Inpainting, Radon, box_mask, motion_kernel

RESULTS = PRETRAINED / "mnist.json"
SDES = {"VE": su.VESDE(), "VP": su.VPSDE()}
CALLS = {
    "Euler–Maruyama": (25, 50, 100, 250),
    "predictor–corrector": (50, 100, 250, 1000),
    "ancestral": (10, 25, 50, 100),
    "Heun": (5, 9, 17, 35, 69),
    "multistep": (5, 9, 17, 35),
}
TASKS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # operator and σ_y
    "inpainting": (Inpainting(box_mask(28, 28, 8, 8, 20, 20)), 0.1),
    "super-resolution": (Downsampling(4), 0.1),
    "deblurring": (Blur(motion_kernel(9, 45.0)), 0.1),
    "tomography": (Radon(28, [0.0, 45.0, 90.0, 135.0]), 1.0),
}
METHODS = ("Annealed", "DPS", "MMPS", "twisted SMC", "tempered SMC")
CHAINS = {  # levels from σ downward
    "ancestral": (su.ancestral, (8, 16, 32)),
    "moment-matched": (su.moment_matched, (4, 8, 16)),
}
SIGMAS = (0.1, 0.4, 1.0, 4.0)
SHAPE = (1, 28, 28)
STEPS, DRAWS, PROBLEMS, SAMPLES = 30, 19, 32, 500
PARTICLES = {"twisted SMC": 32, "tempered SMC": 128}
RESOLUTION = 0.02  # 2.5 of 255 grey levels
# of names in the file, below the first
DEPTHS = {
    "chains": 5, "problems": 4, "exact": 3, "real": 1, "quality of twice as many": 1, "quality": 3
}  # fmt: skip


class Digits(NamedTuple):
    """Training digits, which the network knows, and those held out, with their labels."""

    train: Tensor
    labels: Tensor
    held_out: Tensor
    held_labels: Tensor

    @property
    def pixels(self) -> Tensor:
        """(1, 28, 28), True where training digits differ: sd above 0.1."""
        return self.train.std(0) > 0.1


class Results:
    """Numbers by name, in a JSON file that is written anew, atomically, with each of them.

    Raises `ValueError`, naming the file, for one that cannot be read, is not ours or cannot be
    written, before there is anything to lose.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path, self.partial = path, Path(f"{path}.partial")
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"--out must name a file in a folder that exists, got {path}")
        self.found: dict[str, Any] = {} if fresh or not path.exists() else read(path)
        try:
            self.partial.touch()
            self.partial.unlink()
        except OSError as error:
            raise ValueError(f"--out cannot be written: {path} ({error.strerror})") from error

    def known(self, *names: str) -> bool:
        """Whether there is something under these names, from the outermost to the innermost."""
        place = self.found
        for name in names:
            if name not in place:
                return False
            place = place[name]
        return True

    def get(self, *names: str) -> dict[str, Any]:
        """What is under these names; an empty one if nothing is."""
        place = self.found
        for name in names:
            place = place.get(name, {})
        return place

    def keep(self, value: object, *names: str) -> None:
        """Put it there, and write the file."""
        place = self.found
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = value
        text = json.dumps(self.found, indent=1, ensure_ascii=False) + "\n"
        self.partial.write_text(text, encoding="utf-8")
        os.replace(self.partial, self.path)
        print(*names, shown(value), flush=True)


def read(path: Path) -> dict[str, Any]:
    """The numbers in a file of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--out cannot be read, {path}: {error}; --fresh starts anew") from error
    ours = isinstance(found, dict) and all(
        name in DEPTHS and nested(value, DEPTHS[name]) for name, value in found.items()
    )
    if not ours:
        raise ValueError(f"--out holds something else than measures, {path}: name another file")
    return found


def shown(value: object) -> object:
    """The last entry of lists, of many problems."""
    if isinstance(value, dict):
        return {name: shown(v) for name, v in value.items()}
    return value[-1] if isinstance(value, list) else value


def nested(value: object, depth: int) -> bool:
    """Whether it is a dict of dicts of ... of numbers or lists of them."""
    if depth == 0:
        values = value if isinstance(value, list) else [value]
        return all(isinstance(v, (int, float)) for v in values)
    return isinstance(value, dict) and all(nested(v, depth - 1) for v in value.values())


# chains


def measure_chains(results: Results, denoiser: su.Denoiser, digits: Digits) -> None:
    """Each chain from each σ, of PROBLEMS truths."""
    for truths, every in truths_of(denoiser, digits).items():
        for sigma in SIGMAS:
            for name, (predictor, counts) in CHAINS.items():
                for levels in counts:
                    place = ("chains", truths, str(sigma), name, str(levels))
                    if results.known(*place):
                        continue
                    generator = torch.Generator(every.device).manual_seed(3000)
                    noise = torch.randn(every.shape, generator=generator, device=every.device)
                    chain = su.reverse_chain(SDES["VE"], denoiser, levels, predictor)
                    z = (every + sigma * noise).repeat_interleave(DRAWS, dim=0)
                    x = chain(z, sigma, generator).unflatten(0, (PROBLEMS, DRAWS))
                    rows = [
                        spread(draws, truth[None], digits.pixels, generator)
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
    """PROBLEMS digits drawn from the network, by 47 calls, and as many that it has never seen."""
    sde = SDES["VE"]
    generator = torch.Generator(digits.train.device).manual_seed(4000)
    x = sde.prior((PROBLEMS, *SHAPE), device=digits.train.device, generator=generator)
    times = su.karras_times(sde, 24)
    options = {"times": times, "predictor": su.moment_matched, "generator": generator}
    held_out = digits.held_out[7 :: (len(digits.held_out) - 7) // PROBLEMS][:PROBLEMS]
    return {"network": su.sample(sde, denoiser, x, **options), "held-out": held_out}


def columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """One list a measure, to four digits."""
    return {name: [float(f"{row[name]:.4g}") for row in rows] for name in rows[0]}


# problems


def measure_problems(results: Results, denoiser: su.Denoiser, digits: Digits) -> None:
    """Each method on each task, problem by problem, for both kinds of truths."""
    every, probability = truths_of(denoiser, digits), classifier(digits.train, digits.labels)
    for i in range(PROBLEMS):
        for truths, of in every.items():
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
                    x, told = solve(sde, denoiser, method, obs, DRAWS, STEPS, generator)
                    row = judge(x, truth, obs, digits, probability, i % 10, generator) | told
                    new = columns([row])
                    results.keep({k: rows.get(k, []) + v for k, v in new.items()}, *place)


def solve(
    sde: su.SDE,
    denoiser: su.Denoiser,
    method: str,
    obs: su.Observation,
    draws: int,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """`draws` images for one observation by one of METHODS; of particles what became of them.

    `steps` network calls a draw, of tempered SMC as many as it takes.
    """
    times = su.karras_times(sde, steps)
    n = PARTICLES.get(method, draws)
    x = sde.prior((n, *SHAPE), device=obs.y.device, generator=generator)
    if method in PARTICLES:
        if method == "twisted SMC":
            guided = su.PiGDM(denoiser, obs, SHAPE)
            particles = su.twisted_smc(sde, guided, x, times=times, generator=generator)
        else:
            particles = su.tempered_smc(sde, denoiser, obs, x, generator=generator)
        ancestors = float(len(particles.ancestors.unique()))
        told = {"least effective": float(particles.ess.min()), "ancestors": ancestors}
        return particles.resample(draws, generator), told
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
        **spread(x, truth, digits.pixels, generator),
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

    Of 200 draws of each method, of both kinds of particles, and of as many exact draws.
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
    counted = Counted(prior)
    for name, n in (("twisted SMC", 800), ("tempered SMC", 800)):
        x, counted.calls = sde.prior((n, *SHAPE), device=images.device, generator=generator), 0
        if name == "twisted SMC":
            twist = su.Annealed(counted, obs)
            particles = su.twisted_smc(sde, twist, x, times=times, generator=generator)
        else:
            options = {"keep": 0.9, "final": 3, "generator": generator}
            particles = su.tempered_smc(sde, counted, obs, x, **options)
        gap = float(particles.log_evidence - posterior.log_evidence)
        weights = particles.log_weights.exp()
        note(name, particles.x, weights, **{"log-evidence": gap}, calls=counted.calls)
    note("exact draws", posterior.sample(800, generator))
    return found


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, denoiser: su.GaussianMixture) -> None:
        self.denoiser, self.sigma_data, self.calls = denoiser, denoiser.sigma_data, 0

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.denoiser(z, sigma)


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


def class_probabilities(
    x: Tensor, images: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Share of (weighted) draws x, (B, *dims), nearest to an image of each label, (10,)."""
    nearest = labels[torch.cdist(x.flatten(1), images.flatten(1)).argmin(dim=1)]
    weights = torch.full((len(x),), 1 / len(x)) if weights is None else weights
    return torch.zeros(10, device=x.device).index_add(0, nearest, weights.to(x))


# quality


def measure_quality(
    results: Results, denoiser: su.Denoiser, digits: Digits, sdes: Iterable[str]
) -> None:
    """Distances of real digits to real digits, then of each sampler's at each number of calls."""
    features, real = learned_features(results, digits)

    def far(name: str, key: str, calls: int, seed: int, n: int) -> float:
        generator = torch.Generator(real.device).manual_seed(seed)
        x = SDES[key].prior((n, *SHAPE), device=real.device, generator=generator)
        x = generate(SDES[key], denoiser, name, calls, x, generator)
        return round(float(su.frechet_distance(features(x.clamp(-1, 1)), real)), 2)

    for key in sdes:
        if not results.known("quality of twice as many", key):
            results.keep(far("Heun", key, 35, 0, 2 * SAMPLES), "quality of twice as many", key)
    runs = [(calls, name, key) for name, of in CALLS.items() for key in sdes for calls in of]
    for calls, name, key in sorted(runs):
        if not results.known("quality", key, name, str(calls)):
            found = far(name, key, calls, calls, SAMPLES)
            results.keep(found, "quality", key, name, str(calls))


def learned_features(results: Results, digits: Digits) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The classifier's features, and those of the training digits; notes how far real ones are."""
    network = classifier(digits.train, digits.labels)

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        return network[:-1](x)

    right = network[-1](features(digits.held_out)).argmax(1) == digits.held_labels
    accuracy = round(float(right.float().mean()), 4)
    results.keep(accuracy, "real", "accuracy on held-out digits")
    real = features(digits.train)
    for n in (SAMPLES, 2 * SAMPLES):  # mean over ten subsets
        seeds = [torch.Generator().manual_seed(i) for i in range(10)]
        subsets = [real[torch.randperm(len(real), generator=seed)[:n]] for seed in seeds]
        far = sum(float(su.frechet_distance(subset, real)) for subset in subsets) / 10
        results.keep(round(far, 2), "real", f"{n} training digits")
    far = round(float(su.frechet_distance(features(digits.held_out), real)), 2)
    results.keep(far, "real", f"{len(digits.held_out)} held-out digits")
    return features, real


def classifier(images: Tensor, labels: Tensor, epochs: int = 12) -> nn.Sequential:
    """A small convolutional network trained on shifted digits; all but its last layer gives 32
    features."""
    torch.manual_seed(0)
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    last = (nn.Flatten(), nn.Linear(32 * 49, 32), nn.ReLU(), nn.Linear(32, 10))
    network = nn.Sequential(*first, *second, *last).to(images)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(64):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            logits = network(images[index].roll(shift, dims=(2, 3)))
            loss = nn.functional.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def generate(
    sde: su.SDE,
    denoiser: su.Denoiser,
    name: str,
    calls: int,
    x: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Samples from noise x by the named sampler, at `calls` network calls each.

    On CUDA the network runs in bfloat16, the steps do not.
    """

    def network(z: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=z.is_cuda):
            return denoiser(z, sigma)

    run: dict[str, Any] = {"steps": calls}
    if name == "predictor–corrector":  # two calls a step
        run = {"steps": calls // 2, "corrector": su.Langevin()}
    if name == "ancestral":
        run = {"times": su.karras_times(sde, calls), "predictor": su.ancestral}
    if name == "Heun":  # two calls a step
        run = {"times": su.karras_times(sde, (calls + 1) // 2), "predictor": su.heun}
    if name == "multistep":
        predictor = su.multistep(sigma_data=denoiser.sigma_data)
        run = {"times": su.karras_times(sde, calls), "predictor": predictor}
    return su.sample(sde, network, x, generator=generator, **run)


def main(arguments: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parts, sdes = ("chains", "exact", "problems", "quality"), list(SDES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget what is in the file")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--sdes", nargs="+", choices=sdes, default=sdes, help="of the quality part")
    settings = parser.parse_args(arguments)
    try:
        results = Results(settings.out, settings.fresh)
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
    if "quality" in settings.parts:
        measure_quality(results, denoiser, digits, settings.sdes)


if __name__ == "__main__":
    main()
