"""How good the shipped digit network is: `python -m sde_utils.evaluate` writes the numbers that the notebooks plot, `pretrained/mnist.json`.

Quality: Fréchet distance of samples to real digits, in the features of a small classifier trained here, against the number of network calls.
Problems: 16 held-out digits for each of four tasks and each method: PSNR, residual and the coverage of 90 % intervals.
Exact: 4 digits, lower half hidden, the training digits as prior: total variation of each method's class probabilities from the exact ones.
Takes about an hour on two CPU cores. What is in the file is kept, so that a run cut short goes on; `--fresh` starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .data import mnist
from .exact import IsotropicMixture
from .guidance import DPS, MMPS, Annealed, Observation, PiGDM
from .metrics import central_interval, frechet_distance, psnr, total_variation
from .networks import Denoiser, load_pretrained
from .operators import Blur, Downsampling, Inpainting, Radon, box_mask, motion_kernel
from .sampling import Langevin, Multistep, ancestral, euler_maruyama, heun, karras_times, sample
from .sde import SDE, VESDE, VPSDE
from .smc import twisted_smc

RESULTS = Path(__file__).parent / "pretrained" / "mnist.json"
SDES = {"VE": VESDE(), "VP": VPSDE()}
CALLS = {
    "Euler–Maruyama": (25, 50, 100, 250),
    "predictor–corrector": (50, 100, 250, 1000),
    "ancestral": (10, 25, 50, 100),
    "Heun": (5, 9, 17, 35, 69),
    "multistep": (5, 9, 17, 35),
}
PARTS = ("problems", "exact", "quality")
TASKS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # operator and σ_y
    "inpainting": (Inpainting(box_mask(28, 28, 8, 8, 20, 20)), 0.1),
    "super-resolution": (Downsampling(4), 0.1),
    "deblurring": (Blur(motion_kernel(9, 45.0)), 0.1),
    "tomography": (Radon(28, [0.0, 45.0, 90.0, 135.0]), 1.0),
}
METHODS = ("Annealed", "DPS", "MMPS", "twisted SMC")
STEPS, DRAWS, PARTICLES, PROBLEMS, SAMPLES = 30, 19, 32, 16, 500


def generate(sde: SDE, denoiser: Denoiser, name: str, calls: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Samples from noise x by the named sampler, at `calls` network calls each; on CUDA the network runs in bfloat16, the steps do not."""

    def network(z: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=z.is_cuda):
            return denoiser(z, sigma)

    last = int(float(sde.sigma(0.0)) > 0)  # VE's step from σ_min to clean data is one call more
    if name == "Heun":
        return sample(sde, network, x, times=karras_times(sde, (calls + 1) // 2), predictor=heun)
    if name == "multistep":
        return sample(sde, network, x, steps=calls, predictor=Multistep())
    if name == "ancestral":
        return sample(sde, network, x, times=karras_times(sde, calls), predictor=ancestral, generator=generator)
    if name == "Euler–Maruyama":
        return sample(sde, network, x, steps=calls - last, predictor=euler_maruyama, generator=generator)
    return sample(sde, network, x, steps=calls // 2, predictor=euler_maruyama, corrector=Langevin(), generator=generator)


def classifier(images: Tensor, labels: Tensor, epochs: int = 12) -> nn.Sequential:
    """A small convolutional network trained on shifted digits; all but its last layer gives 32 features."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 32), nn.ReLU(), nn.Linear(32, 10)),
    ).to(images)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(64):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            loss = nn.functional.cross_entropy(network(images[index].roll(shift, dims=(2, 3))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


def solve(sde: SDE, denoiser: Denoiser, method: str, obs: Observation, draws: int, steps: int, generator: torch.Generator) -> Tensor:
    """`draws` images for one observation by a method of METHODS, (draws, 1, 28, 28), `steps` network calls each."""
    times = karras_times(sde, steps)
    x = sde.prior((PARTICLES if method == "twisted SMC" else draws, 1, 28, 28), device=obs.y.device, generator=generator)
    if method == "twisted SMC":
        guided = PiGDM(denoiser, obs, variance=denoiser.sigma_data**2)
        return twisted_smc(sde, guided, x, times=times, generator=generator).resample(draws, generator)
    options = {"Annealed": {}, "DPS": {}, "MMPS": {"iterations": 3, "dense": 1, "probes": 0}}[method]
    guided = {"Annealed": Annealed, "DPS": DPS, "MMPS": MMPS}[method](denoiser, obs, **options)
    return sample(sde, guided, x, times=times, predictor=ancestral, generator=generator)


def upper_half(x: Tensor) -> Tensor:
    """A: the first 14 of 28 rows."""
    return x[:, :, :14]


def class_probabilities(x: Tensor, digits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of (weighted) draws x (B, 1, 28, 28) whose nearest digit has each of the ten labels, (10,)."""
    nearest = labels[torch.cdist(x.flatten(1), digits.flatten(1)).argmin(dim=1)]
    weights = torch.full((len(x),), 1 / len(x), device=x.device) if weights is None else weights.to(x)
    return torch.zeros(10, device=x.device).index_add(0, nearest, weights)


def exact_problem(sde: SDE, digits: Tensor, labels: Tensor, truth: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Total variation from the exact class probabilities: 200 draws of each method, twisted SMC with more particles, exact draws."""
    prior = IsotropicMixture(digits, 0.01)
    y = upper_half(truth) + 4.0 * torch.randn(1, 1, 14, 28, generator=generator, device=truth.device)
    obs = Observation(upper_half, y[0], 4.0)
    posterior, times, found = prior.posterior(obs), karras_times(sde, STEPS), {}
    right = torch.zeros(10, device=truth.device).index_add(0, labels, posterior.weights.to(truth))
    for guided in (Annealed(prior, obs), DPS(prior, obs), MMPS(prior, obs, iterations=2, probes=0)):
        start = sde.prior((200, 1, 28, 28), device=truth.device, generator=generator)
        x = sample(sde, guided, start, times=times, predictor=ancestral, generator=generator)
        found[type(guided).__name__] = class_probabilities(x, digits, labels)
    for n in (400, 1600):
        start = sde.prior((n, 1, 28, 28), device=truth.device, generator=generator)
        particles = twisted_smc(sde, Annealed(prior, obs), start, times=times, generator=generator)
        found[f"twisted SMC, {n} particles"] = class_probabilities(particles.x, digits, labels, particles.log_weights.exp())
    found["200 exact draws"] = class_probabilities(posterior.sample(200, generator), digits, labels)
    return {name: float(total_variation(p, right)) for name, p in found.items()}


def judge(x: Tensor, truth: Tensor, obs: Observation) -> dict[str, float]:
    """PSNR of the draws and of their mean, residual in units of σ_y, and how often a pixel's 90 % interval holds the truth, its noise in count.

    Pixels whose draws agree to 0.02 are left out: they are background in every digit.
    """
    low, high = central_interval(x)
    told = high - low > 0.02
    inside = ((truth[0] >= low) & (truth[0] <= high))[told].float().mean() if told.any() else torch.tensor(float("nan"))
    residual = obs.residual(x).square().mean().sqrt() / obs.noise_std
    return {
        "psnr_draw": float(psnr(x, truth).mean()),
        "psnr_mean": float(psnr(x.mean(0, keepdim=True), truth)),
        "residual": float(residual),
        "coverage": float(inside),
        "told": float(told.float().mean()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sde_utils.evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget what is in the file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sdes", nargs="+", choices=list(SDES), default=list(SDES), help="of the quality part")
    settings = parser.parse_args(arguments)
    results = json.loads(settings.out.read_text()) if settings.out.exists() and not settings.fresh else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = load_pretrained("mnist").to(device)
    (train, labels), (held_out, held_labels) = mnist(split="train"), mnist(split="test")
    train, held_out = train.to(device), held_out.to(device)

    def keep(value: object, *path: str) -> None:
        place = results
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
        partial = settings.out.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, settings.out)
        print(*path, value, flush=True)

    def known(*path: str) -> bool:
        place = results
        for name in path:
            if name not in place:
                return False
            place = place[name]
        return True

    if "quality" in settings.parts:
        network = classifier(train, labels.to(device))
        with torch.no_grad():
            accuracy = (network(held_out).argmax(1).cpu() == held_labels).float().mean()
        features = torch.no_grad()(network[:-1])
        real = features(train)
        keep(round(float(accuracy), 4), "real", "accuracy on held-out digits")
        for n in (SAMPLES, 2 * SAMPLES):  # mean over ten subsets
            orders = [torch.randperm(len(real), generator=torch.Generator().manual_seed(i))[:n].to(device) for i in range(10)]
            keep(round(sum(float(frechet_distance(real[order], real)) for order in orders) / 10, 2), "real", f"{n} training digits")
        keep(round(float(frechet_distance(features(held_out), real)), 2), "real", f"{len(held_out)} held-out digits")
        for key in settings.sdes:
            if not known("quality of twice as many", key):
                generator = torch.Generator(device).manual_seed(0)
                start = SDES[key].prior((2 * SAMPLES, 1, 28, 28), device=device, generator=generator)
                x = generate(SDES[key], denoiser, "Heun", 35, start, generator)
                keep(round(float(frechet_distance(features(x.clamp(-1, 1)), real)), 2), "quality of twice as many", key)
        for calls, name, key in sorted((c, n, k) for n, of in CALLS.items() for k in settings.sdes for c in of):
            if not known("quality", key, name, str(calls)):
                generator = torch.Generator(device).manual_seed(calls)
                start = SDES[key].prior((SAMPLES, 1, 28, 28), device=device, generator=generator)
                x = generate(SDES[key], denoiser, name, calls, start, generator)
                keep(round(float(frechet_distance(features(x.clamp(-1, 1)), real)), 2), "quality", key, name, str(calls))
    if "exact" in settings.parts and not known("exact"):
        rows = []
        for i in range(4):
            generator = torch.Generator(device).manual_seed(2000 + i)
            sde = SDES["VE" if i % 2 else "VP"]
            rows.append(exact_problem(sde, train, labels.to(device), held_out[60 * i + 27][None], generator))
        keep({name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]}, "exact")
    if "problems" in settings.parts:
        for task, (operator, noise) in TASKS.items():
            sde = SDES["VE" if task in ("inpainting", "super-resolution") else "VP"]
            for method in METHODS:
                if known("problems", task, method):
                    continue
                rows = []
                for i in range(PROBLEMS):
                    generator = torch.Generator(device).manual_seed(1000 + i)
                    truth = held_out[15 * i + 7][None]
                    y = operator(truth)
                    obs = Observation(operator, (y + noise * torch.randn(y.shape, generator=generator, device=device))[0], noise)
                    rows.append(judge(solve(sde, denoiser, method, obs, DRAWS, STEPS, generator), truth, obs))
                keep({name: round(sum(row[name] for row in rows) / PROBLEMS, 3) for name in rows[0]}, "problems", task, method)


if __name__ == "__main__":
    main()
