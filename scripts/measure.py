"""How good the shipped digit network is: `python scripts/measure.py` writes the numbers that the
notebooks plot, sde_utils/pretrained/mnist.json.

Fréchet distance of samples to real digits, in the features of a small classifier trained here,
against the number of network calls. (Posteriors: calibrate.py.)

Takes half an hour on two CPU cores. What is in the file is kept, so that a run cut short goes on;
--fresh starts anew.
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

RESULTS = PRETRAINED / "mnist.json"
SDES = {"VE": su.VESDE(), "VP": su.VPSDE()}
CALLS = {
    "Euler–Maruyama": (25, 50, 100, 250),
    "predictor–corrector": (50, 100, 250, 1000),
    "ancestral": (10, 25, 50, 100),
    "Heun": (5, 9, 17, 35, 69),
    "multistep": (5, 9, 17, 35),
}
SHAPE = (1, 28, 28)
SAMPLES = 500
# of names in the file, below the first
DEPTHS = {"real": 1, "quality of twice as many": 1, "quality": 3}


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
    sdes = list(SDES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget what is in the file")
    parser.add_argument("--sdes", nargs="+", choices=sdes, default=sdes)
    settings = parser.parse_args(arguments)
    try:
        results = Results(settings.out, DEPTHS, settings.fresh)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = su.load_pretrained("mnist").to(device)
    split = (*su.mnist(split="train"), *su.mnist(split="test"))
    digits = Digits(*(a.to(device) for a in split))
    measure_quality(results, denoiser, digits, settings.sdes)


if __name__ == "__main__":
    main()
