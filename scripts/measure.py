"""How good the shipped digit network is: `python scripts/measure.py` writes the numbers that the
notebooks plot, sde_utils/pretrained/mnist.json.

problems: 16 held-out digits for each of four tasks and each method: PSNR, residual and the
    coverage of 90 % intervals.
exact: 4 digits, lower half hidden, the training digits as prior: total variation of each method's
    class probabilities from the exact ones.
quality: Fréchet distance of samples to real digits, in the features of a small classifier trained
    here, against the number of network calls.

Takes about an hour on two CPU cores. What is in the file is kept, so that a run cut short goes on;
--fresh starts anew.
"""

from __future__ import annotations

import argparse
import json
import math
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
METHODS = ("Annealed", "DPS", "MMPS", "twisted SMC")
SHAPE = (1, 28, 28)
STEPS, DRAWS, PARTICLES, PROBLEMS, SAMPLES = 30, 19, 32, 16, 500
# of names in the file, below the first
DEPTHS = {"problems": 3, "exact": 1, "real": 1, "quality of twice as many": 1, "quality": 3}


class Digits(NamedTuple):
    """Training digits, which the network knows, and those held out, with their labels."""

    train: Tensor
    labels: Tensor
    held_out: Tensor
    held_labels: Tensor


class Results:
    """Numbers by name, in a JSON file that is written anew, atomically, with each of them.

    Raises `ValueError`, naming the file, for one that cannot be read, is not ours or cannot be
    written, before there is anything to lose.
    """

    def __init__(self, path: Path, depths: dict[str, int], fresh: bool = False) -> None:
        self.path, self.partial = path, Path(f"{path}.partial")
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"--out must name a file in a folder that exists, got {path}")
        self.found: dict[str, Any] = {} if fresh or not path.exists() else read(path, depths)
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


def read(path: Path, depths: dict[str, int]) -> dict[str, Any]:
    """The numbers in a file of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--out cannot be read, {path}: {error}; --fresh starts anew") from error
    ours = isinstance(found, dict) and all(
        name in depths and nested(value, depths[name]) for name, value in found.items()
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


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each column."""
    return {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]}


# problems


def measure_problems(results: Results, denoiser: su.Denoiser, digits: Digits) -> None:
    """Each method on each task."""
    for task, (operator, noise) in TASKS.items():
        sde = SDES["VE" if task in ("inpainting", "super-resolution") else "VP"]
        for method in METHODS:
            if results.known("problems", task, method):
                continue
            rows = []
            for i in range(PROBLEMS):
                truth = digits.held_out[15 * i + 7][None]
                generator = torch.Generator(truth.device).manual_seed(1000 + i)
                y = operator(truth)
                y = y + noise * torch.randn(y.shape, generator=generator, device=y.device)
                obs = su.Observation(operator, y[0], noise)
                x = solve(sde, denoiser, method, obs, DRAWS, STEPS, generator)
                rows.append(judge(x, truth, obs))
            results.keep(mean(rows), "problems", task, method)


def solve(
    sde: su.SDE,
    denoiser: su.Denoiser,
    method: str,
    obs: su.Observation,
    draws: int,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """`draws` images for one observation by one of METHODS, `steps` network calls each."""
    times = su.karras_times(sde, steps)
    n = PARTICLES if method == "twisted SMC" else draws
    x = sde.prior((n, *SHAPE), device=obs.y.device, generator=generator)
    if method == "twisted SMC":
        guided = su.PiGDM(denoiser, obs, SHAPE)
        particles = su.twisted_smc(sde, guided, x, times=times, generator=generator)
        return particles.resample(draws, generator)
    if method == "MMPS":
        guided = su.MMPS(denoiser, obs, iterations=3, dense=1)
    else:
        guided = {"Annealed": su.Annealed, "DPS": su.DPS}[method](denoiser, obs)
    return su.sample(sde, guided, x, times=times, predictor=su.ancestral, generator=generator)


def judge(x: Tensor, truth: Tensor, obs: su.Observation) -> dict[str, float]:
    """PSNR of the draws and of their mean, residual over σ_y, and coverage.

    That is how often a pixel's 90 % interval holds the truth. Pixels whose draws agree to 0.02
    are left out: they are background in every digit; `told` is the share of the others.
    """
    low, high = su.central_interval(x)
    told = high - low > 0.02
    inside = ((truth[0] >= low) & (truth[0] <= high))[told]
    return {
        "psnr_draw": float(su.psnr(x, truth).mean()),
        "psnr_mean": float(su.psnr(x.mean(0, keepdim=True), truth)),
        "residual": float(obs.residual(x).square().mean().sqrt()) / obs.noise_std,
        "coverage": float(inside.float().mean()) if told.any() else math.nan,
        "told": float(told.float().mean()),
    }


# exact


def measure_exact(results: Results, digits: Digits) -> None:
    """Four digits, by VP and VE in turn."""
    if results.known("exact"):
        return
    rows = []
    for i in range(4):
        truth, sde = digits.held_out[60 * i + 27][None], SDES["VE" if i % 2 else "VP"]
        generator = torch.Generator(truth.device).manual_seed(2000 + i)
        rows.append(exact_problem(sde, digits.train, digits.labels, truth, generator))
    results.keep(mean(rows), "exact")


def exact_problem(
    sde: su.SDE, images: Tensor, labels: Tensor, truth: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Total variation from the exact class probabilities.

    Of 200 draws of each method, of twisted SMC with more particles, and of exact draws.
    """
    prior, device = su.IsotropicMixture(images, 0.01), truth.device
    y = upper_half(truth) + 4.0 * torch.randn(1, 1, 14, 28, generator=generator, device=device)
    obs = su.Observation(upper_half, y[0], 4.0)
    posterior, times = prior.posterior(obs), su.karras_times(sde, STEPS)
    right = torch.zeros(10, device=device).index_add(0, labels, posterior.weights.to(truth))
    found = {}
    for guided in (su.Annealed(prior, obs), su.DPS(prior, obs), su.MMPS(prior, obs, iterations=2)):
        x = sde.prior((200, *SHAPE), device=device, generator=generator)
        x = su.sample(sde, guided, x, times=times, predictor=su.ancestral, generator=generator)
        found[type(guided).__name__] = class_probabilities(x, images, labels)
    for n in (400, 1600):
        x = sde.prior((n, *SHAPE), device=device, generator=generator)
        twist = su.Annealed(prior, obs)
        particles = su.twisted_smc(sde, twist, x, times=times, generator=generator)
        weights = particles.log_weights.exp()
        shares = class_probabilities(particles.x, images, labels, weights)
        found[f"twisted SMC, {n} particles"] = shares
    x = posterior.sample(200, generator)
    found["200 exact draws"] = class_probabilities(x, images, labels)
    return {name: float(su.total_variation(p, right)) for name, p in found.items()}


def upper_half(x: Tensor) -> Tensor:
    """A: the first 14 of 28 rows."""
    return x[:, :, :14]


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
        far = torch.tensor([float(su.frechet_distance(subset, real)) for subset in subsets])
        results.keep(round(float(far.mean()), 2), "real", f"{n} training digits")
        results.keep(round(float(far.std()), 2), "real", f"{n} training digits, sd")
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
    parts, sdes = ("problems", "exact", "quality"), list(SDES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget what is in the file")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--sdes", nargs="+", choices=sdes, default=sdes, help="of the quality part")
    settings = parser.parse_args(arguments)
    try:
        results = Results(settings.out, DEPTHS, settings.fresh)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = su.load_pretrained("mnist").to(device)
    split = (*su.mnist(split="train"), *su.mnist(split="test"))
    digits = Digits(*(a.to(device) for a in split))
    if "problems" in settings.parts:
        measure_problems(results, denoiser, digits)
    if "exact" in settings.parts:
        measure_exact(results, digits)
    if "quality" in settings.parts:
        measure_quality(results, denoiser, digits, settings.sdes)


if __name__ == "__main__":
    main()
