"""`python -m benchmarks [--parts a1 a2 b1 b2 c] [--out FILE] [--quick]`, from the root.

Markdown tables, one a part.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sde_utils as su

from . import posterior, samplers, training
from .common import (
    Counter,
    Denoise,
    collect,
    distance,
    number,
    quiet,
    section,
    seeded,
    unit,
    versions,
)

BROKEN = (RuntimeError, FloatingPointError, ValueError)  # what a run that diverges may raise
FASTEST = ("sde_utils: Heun", "azula: Heun", "k-diffusion: Heun", "diffusers: Heun")


def report(row: list[str]) -> None:
    print("  ".join(row), file=sys.stderr, flush=True)


def part_a1(quick: bool) -> str:
    budgets = (0.5, 1.0) if quick else (5.0, 10.0, 20.0)
    roll, data = su.swiss_roll_density(), su.swiss_roll(20_000, seed=0)
    methods, notes = collect(*training.GROUPS)

    def looks(method: training.Trainer) -> list[tuple[float, int, float]]:
        return [(training.excess_loss(d, roll), *rest) for d, *rest in method(data, budgets)]

    rows = []
    for name, method in methods.items():
        torch.manual_seed(0)
        found = quiet(lambda method=method: looks(method))
        losses = [f"{loss:.4f} ({seconds:.1f} s)" for loss, _, seconds in found]
        rows.append([name, *losses, f"{found[-1][1]:,}"])
        report(rows[-1])
    head = ["excess loss after", *(f"{b:g} s" for b in budgets), "steps"]
    text = (
        f"E|ε̂ − ε*|²/2, ln σ uniform in [{samplers.LOW}, {samplers.HIGH:g}], 0 for the exact "
        f"score; 20,000 points, batches of {training.BATCH:,}; in brackets the seconds taken; "
        "steps of the longest run. azula has no network for the plane and gets ours."
    )
    return section("(a1) 2-D: excess loss against training time", text, head, rows, notes)


def trained_network(quick: bool) -> su.Denoiser:
    """The lecture's, on the roll."""
    torch.manual_seed(0)
    learned, data = su.Denoiser(su.MLP()), su.swiss_roll(20_000, seed=0)
    levels, steps = su.log_uniform(samplers.LOW, samplers.HIGH), 50 if quick else 3500
    su.train(learned, data, levels, steps=steps, batch_size=768, progress=False)
    return learned


def part_a2(quick: bool) -> str:
    n, runs, budgets = (300, 1, (10, 20)) if quick else (2000, 3, (10, 20, 36, 100))
    roll, learned = su.swiss_roll_density(), trained_network(quick)
    exact = [roll.sample(n, torch.Generator().manual_seed(i)).float() for i in range(6)]
    one = unit(exact)

    def cell(method: samplers.Sampler, denoiser: Denoise, calls: int) -> str:
        far, counter = 0.0, Counter(denoiser)
        for seed in range(runs):
            noise = seeded(seed, n, 2)
            with torch.no_grad():
                x = quiet(lambda noise=noise: method(counter, noise, calls))
            far += distance(x, exact[3:])
        return f"{number(far / runs / one)} ({counter.calls // runs})"

    methods, notes = collect(*samplers.GROUPS)
    rows = []
    for name, method in methods.items():
        cells = [cell(method, roll, calls) for calls in budgets]
        rows.append([name, *cells, cell(method, learned, 36)])
        report(rows[-1])
    columns = [*(f"{c} calls" for c in budgets), "36 calls, trained MLP"]
    head = ["sliced Wasserstein-1, exact against exact = 1, at", *columns]
    text = (
        f"Exact denoiser, {n:,} samples, mean of {runs} starts; the calls that were made in "
        "brackets. Differences below 0.15 say nothing."
    )
    return section("(a2) 2-D: sampling error against network calls", text, head, rows, notes)


class Score:
    """A method's distances, one a problem, by column (d, m), and its calls."""

    def __init__(self, method: posterior.Posterior) -> None:
        self.method, self.far, self.calls = method, {}, 0

    def run(
        self, problem: posterior.Problem, calls: int, noise: Tensor, exact: list[Tensor], one: float
    ) -> str | None:
        """Adds the distance, in units of `one`; returns the error's name if the method broke."""
        column, error = tuple(problem.matrix.T.shape), None
        problem.denoiser.points = 0
        try:
            x = quiet(lambda: self.method(problem, calls, noise))
            far = distance(x, exact) if x.isfinite().all() else float("nan")
        except BROKEN as broken:
            far, error = float("nan"), type(broken).__name__
        self.calls = round(problem.denoiser.points / len(noise))
        self.far.setdefault(column, []).append(far / one)
        return error

    def cells(self) -> list[str]:
        """Mean and standard error of each column, and of the geometric mean of all of them."""
        cells = [with_error(far) for far in self.far.values()]
        runs = zip(*self.far.values(), strict=True)  # one problem of each column
        each = [math.exp(sum(map(math.log, run)) / len(run)) for run in runs]
        return [*cells, with_error(each), str(self.calls)]


def with_error(values: list[float]) -> str:
    """Mean ± standard error; the mean alone of one."""
    mean = number(statistics.mean(values))
    if len(values) == 1 or not math.isfinite(sum(values)):
        return mean
    return f"{mean} ± {number(statistics.stdev(values) / math.sqrt(len(values)))}"


def compare(d: int, m: int, runs: int, n: int, calls: int, scores: dict[str, Score]) -> list[str]:
    """One column: each method on its problems. Notes of what broke."""
    notes = []
    for seed in range(runs):
        problem = posterior.mixture_problem(d, m, seed)
        exact = problem.mixture.posterior(problem.observation)
        sets = [exact.sample(n, torch.Generator().manual_seed(2000 + i)) for i in range(6)]
        one = unit(sets)
        for name, score in scores.items():
            noise = seeded(seed, n, d, dtype=torch.float64)
            if error := score.run(problem, calls, noise, sets[3:], one):
                notes.append(f"{name}, d = {d}, {m} observed: {error}.")
            report([name, f"d = {d}, m = {m}, {seed}", number(score.far[d, m][-1])])
    return notes


def part_b1(quick: bool) -> str:
    sizes, calls = ({8: 200, 80: 200}, 20) if quick else ({8: 2000, 80: 2000, 800: 500}, 100)
    runs = 2 if quick else 8
    methods, notes = collect(*posterior.GROUPS)
    scores = {name: Score(method) for name, method in methods.items()}
    columns = [(d, m) for d in sizes for m in (1, 2, 4)]
    for d, m in columns:
        notes += compare(d, m, runs, sizes[d], calls, scores)
    rows = [[name, *score.cells()] for name, score in scores.items()]
    names = [f"{d}, {m}" for d, m in columns]
    head = ["exact against exact = 1; d, m =", *names, "geometric mean", "calls a draw"]
    draws = ", ".join(f"{n:,} for d = {d}" for d, n in sizes.items())
    text = (
        "Sliced Wasserstein-1 distance to exact posterior draws; 25 Gaussians in d dimensions, m "
        f"numbers observed, σ from 2000 to 0.01. Mean and standard error of {runs} problems a "
        f"column; the geometric mean is that of one problem of each. Draws: {draws}. Calls a draw "
        "are the points that the denoiser was given in the last problem over the draws; tempered "
        "SMC takes as many as it takes."
    )
    return section("(b1) Gaussian mixtures: posterior error", text, head, rows, notes)


def part_b2(quick: bool) -> str:
    (d, n), calls, repeats = ((80, 200), 20, 1) if quick else ((800, 500), 100, 3)
    methods, notes = collect(*posterior.GROUPS)
    problem, taken = posterior.mixture_problem(d, 4, 0), {name: [] for name in methods}
    for repeat in range(repeats):
        for name, method in methods.items():
            noise, start = seeded(repeat, n, d, dtype=torch.float64), time.perf_counter()
            try:
                quiet(lambda method=method, noise=noise: method(problem, calls, noise))
            except BROKEN as broken:
                notes.append(f"{name}: {type(broken).__name__}.")
            taken[name].append(time.perf_counter() - start)
    rows = [[name, f"{statistics.median(times):.1f}"] for name, times in taken.items()]
    text = f"Medians of {repeats}, taken in turn, of the first problem of (b1)'s last column."
    head = [f"{n:,} draws in {d} dimensions", "seconds"]
    return section("(b2) Gaussian mixtures: time", text, head, rows, notes)


def part_c(quick: bool) -> str:
    n, repeats = (4, 1) if quick else (64, 5)
    network = su.load_pretrained("mnist")
    methods, notes = collect(*samplers.GROUPS)
    names = [name for name in (*FASTEST, "smalldiffusion: DDIM") if name in methods]
    taken: dict[str, list[float]] = {name: [] for name in ("bare", *names)}
    counts = dict.fromkeys(names, 0)
    for repeat in range(repeats + 1):  # the first round warms up
        noise = seeded(repeat, n, 1, 28, 28)
        taken["bare"].append(bare(network, noise))
        for name in names:
            counter, calls = Counter(network), 36 if name.startswith("azula") else 35
            x, seconds = timed(methods[name], counter, noise, calls)
            taken[name].append(seconds)
            counts[name] = counter.calls
            if not x.isfinite().all():
                notes.append(f"{name} left the finite numbers.")
    middle = {name: statistics.median(times[1:]) for name, times in taken.items()}

    def row(name: str, calls: int, key: str) -> list[str]:
        ratio = middle[key] / calls * 35 / middle["bare"]
        each = f"{1000 * middle[key] / n:.1f}"
        return [name, str(calls), f"{middle[key]:.2f}", each, f"{ratio:.2f}"]

    rows = [row("35 bare network calls", 35, "bare")]
    rows += [row(name, counts[name], name) for name in names]
    head = [f"{n} digits of 28 x 28", "calls", "seconds", "ms a sample", "of as many bare calls"]
    text = (
        f"18 Heun steps with the shipped network; medians of {repeats}, taken in turn. "
        "smalldiffusion has no Heun and takes 35 DDIM steps."
    )
    return section("(c) Images: time", text, head, rows, notes)


@torch.no_grad()
def bare(network: Denoise, noise: Tensor, calls: int = 35) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        network(noise, torch.tensor(1.0))
    return time.perf_counter() - start


@torch.no_grad()
def timed(
    method: samplers.Sampler, denoiser: Denoise, noise: Tensor, calls: int
) -> tuple[Tensor, float]:
    start = time.perf_counter()
    x = quiet(lambda: method(denoiser, noise, calls))
    return x, time.perf_counter() - start


PARTS: dict[str, Callable[[bool], str]] = {
    "a1": part_a1,
    "a2": part_a2,
    "b1": part_b1,
    "b2": part_b2,
    "c": part_c,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [*PARTS, "a", "b"]
    parser.add_argument(
        "--parts", nargs="+", choices=names, default=list(PARTS), help="a is a1 and a2, b likewise"
    )
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    parser.add_argument("--quick", action="store_true", help="only to see that everything runs")
    settings = parser.parse_args()
    if settings.out and (settings.out.is_dir() or not settings.out.parent.is_dir()):
        parser.error(f"--out must name a file in a folder that exists, got {settings.out}")
    start = time.perf_counter()
    parts = [name for name in PARTS if name in settings.parts or name[0] in settings.parts]
    sections = [PARTS[name](settings.quick) for name in parts]
    where = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    minutes = f"{(time.perf_counter() - start) / 60:.0f} minutes"
    when = f"{datetime.date.today()}; {where}; {versions()}; {minutes}."
    text = "\n\n".join([when, *sections]) + "\n"
    print(text)
    if settings.out:
        settings.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
