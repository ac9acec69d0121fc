"""How good the shipped digit network is: `python -m sde_utils.evaluate` writes the numbers that the notebooks plot, `pretrained/mnist.json`.

Quality: Fréchet distance of samples to real digits, in the features of a small classifier trained here, against the number of network calls.
Problems: 16 held-out digits for each of four tasks and each method: PSNR, residual and the coverage of 90 % intervals.
Takes about half an hour on two CPU cores. What is in the file is kept, so that a run cut short goes on; `--fresh` starts anew.
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
from .guidance import DPS, MMPS, Annealed, Observation, PiGDM
from .metrics import frechet_distance, psnr
from .networks import Denoiser, load_pretrained
from .operators import Blur, Downsampling, Inpainting, Radon, box_mask, motion_kernel
from .sampling import Langevin, ancestral, euler_maruyama, heun, karras_times, sample
from .sde import SDE, VESDE, VPSDE
from .smc import twisted_smc

RESULTS = Path(__file__).parent / "pretrained" / "mnist.json"
SDES = {"VE": VESDE(), "VP": VPSDE()}
CALLS = {
    "Euler–Maruyama": (25, 50, 100, 250, 1000),
    "predictor–corrector": (26, 50, 100, 250, 1000),
    "ancestral": (5, 10, 25, 50, 100, 250),
    "Heun": (5, 9, 17, 35, 69),
}
TASKS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # operator and σ_y
    "inpainting": (Inpainting(box_mask(28, 28, 8, 8, 20, 20)), 0.1),
    "super-resolution": (Downsampling(4), 0.1),
    "deblurring": (Blur(motion_kernel(9, 45.0)), 0.1),
    "tomography": (Radon(28, [0.0, 45.0, 90.0, 135.0]), 1.0),
}
METHODS = ("Annealed", "DPS", "MMPS", "twisted SMC")
STEPS, DRAWS, PARTICLES, PROBLEMS, SAMPLES = 50, 20, 64, 16, 500


def generate(sde: SDE, denoiser: Denoiser, name: str, calls: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Samples from noise x by the named sampler, at `calls` network calls each."""
    last = int(float(sde.sigma(0.0)) > 0)  # VE's step from σ_min to clean data is one call more
    if name == "Heun":
        return sample(sde, denoiser, x, times=karras_times(sde, (calls + 1) // 2), predictor=heun)
    if name == "ancestral":
        return sample(sde, denoiser, x, times=karras_times(sde, calls), predictor=ancestral, generator=generator)
    if name == "Euler–Maruyama":
        return sample(sde, denoiser, x, steps=calls - last, predictor=euler_maruyama, generator=generator)
    return sample(sde, denoiser, x, steps=calls // 2, predictor=euler_maruyama, corrector=Langevin(), generator=generator)


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


def judge(x: Tensor, truth: Tensor, obs: Observation) -> dict[str, float]:
    """PSNR of the draws and of their mean, residual in units of σ_y, and how often a pixel's 90 % interval holds the truth, its noise in count.

    Pixels whose draws agree to 0.02 are left out: they are background in every digit.
    """
    low, high = x.quantile(0.05, dim=0), x.quantile(0.95, dim=0)
    told = high - low > 0.02
    inside = ((truth >= low) & (truth <= high))[told].float().mean() if told.any() else torch.tensor(float("nan"))
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
    parser.add_argument("--parts", nargs="+", choices=["quality", "problems"], default=["quality", "problems"])
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
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(1)).to(device)
        keep(round(float(accuracy), 4), "real", "accuracy of the classifier on held-out digits")
        keep(round(float(frechet_distance(real[order[:SAMPLES]], real)), 3), "real", f"{SAMPLES} training digits")
        keep(round(float(frechet_distance(features(held_out), real)), 3), "real", f"{len(held_out)} held-out digits")
        for calls, name, key in sorted((c, n, k) for n, all_ in CALLS.items() for c in all_ for k in settings.sdes):
            if not known("quality", key, name, str(calls)):
                generator = torch.Generator(device).manual_seed(calls)
                start = SDES[key].prior((SAMPLES, 1, 28, 28), device=device, generator=generator)
                x = generate(SDES[key], denoiser, name, calls, start, generator)
                keep(round(float(frechet_distance(features(x.clamp(-1, 1)), real)), 3), "quality", key, name, str(calls))
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
