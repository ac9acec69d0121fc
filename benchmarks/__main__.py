"""`python -m benchmarks [--parts a1 a2 b c] [--out FILE] [--quick]`, from the repository's root: Markdown tables, one a part."""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sde_utils import MLP, Denoiser, load_pretrained, log_uniform, swiss_roll, swiss_roll_density, train

from . import posterior, samplers, training
from .common import Counter, Denoise, collect, distance, number, quiet, table, versions

QUICK = False  # sizes that only show that everything runs


def seeded(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise, the same for every method; sets the global seed too, from which the others draw."""
    torch.manual_seed(seed)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=dtype)


def part_a1() -> str:
    budgets = (0.5, 1.0) if QUICK else (5.0, 10.0, 20.0)
    roll, data = swiss_roll_density(), swiss_roll(20_000, seed=0)
    methods, notes = collect(*training.GROUPS)
    rows = []
    for name, method in methods.items():
        torch.manual_seed(0)
        looks = quiet(lambda run=method: [(training.excess_loss(d, roll), *rest) for d, *rest in run(data, budgets)])
        rows.append([name, *(f"{loss:.4f} ({seconds:.1f} s)" for loss, _, seconds in looks), f"{looks[-1][1]:,}"])
        report(rows[-1])
    head = ["excess loss after", *(f"{b:g} s" for b in budgets), "steps"]
    text = (
        f"E|ε̂ − ε*|²/2, ln σ uniform in [{samplers.LOW}, {samplers.HIGH:g}], 0 for the exact score; 20,000 points, batches of "
        f"{training.BATCH:,}; in brackets the seconds taken; steps of the longest run. azula has no network for the plane and gets ours."
    )
    return section("(a1) 2-D: excess loss against training time", text, head, rows, notes)


def part_a2() -> str:
    n, runs, budgets = (300, 1, (20, 36)) if QUICK else (2000, 3, (20, 36, 100))
    roll = swiss_roll_density()
    torch.manual_seed(0)
    learned = Denoiser(MLP())
    levels = log_uniform(samplers.LOW, samplers.HIGH)
    train(learned, swiss_roll(20_000, seed=0), levels, steps=50 if QUICK else 3500, batch_size=768, progress=False)
    exact = [roll.sample(n, torch.Generator().manual_seed(i)).float() for i in range(6)]
    unit = sum(distance(x, exact[3:]) for x in exact[:3]) / 3
    methods, notes = collect(*samplers.GROUPS)
    rows = []
    for name, method in methods.items():
        row = [name]
        for denoiser, calls in [(roll, calls) for calls in budgets] + [(learned, 36)]:
            far, counter = 0.0, Counter(denoiser)
            for seed in range(runs):
                noise = seeded(seed, n, 2)
                with torch.no_grad():
                    far += distance(quiet(lambda f=method, c=counter, z=noise, k=calls: f(c, z, k)), exact[3:])
            row.append(f"{number(far / runs / unit)} ({counter.calls // runs})")
        rows.append(row)
        report(row)
    head = ["sliced Wasserstein-1, exact against exact = 1, at", *(f"{c} calls" for c in budgets), "36 calls, trained MLP"]
    text = f"Exact denoiser, {n:,} samples, mean of {runs} starts; the calls that were made in brackets. Differences below 0.15 say nothing."
    return section("(a2) 2-D: sampling error against network calls", text, head, rows, notes)


def part_b() -> str:
    problems, calls = ({8: 1, 80: 1}, 20) if QUICK else ({8: 3, 80: 2, 800: 1}, 100)
    size = {d: 200 if QUICK else 1000 if d == 800 else 2000 for d in problems}
    cases = [(d, m) for d in problems for m in (1, 2, 4)]
    methods, notes = collect(*posterior.GROUPS)
    far: dict[str, dict[tuple[int, int], float]] = {name: dict.fromkeys(cases, 0.0) for name in methods}
    unit, counts, seconds = dict.fromkeys(cases, 0.0), dict.fromkeys(methods, 0), dict.fromkeys(methods, 0.0)
    for d, m in cases:
        n = size[d]
        for seed in range(problems[d]):
            problem = posterior.mixture_problem(d, m, seed)
            exact = problem.mixture.posterior(problem.observation)
            sets = [exact.sample(n, torch.Generator().manual_seed(2000 + i)) for i in range(6)]
            unit[d, m] += sum(distance(x, sets[3:]) for x in sets[:3]) / 3
            for name, method in methods.items():
                noise, problem.denoiser.calls, start = seeded(seed, n, d, dtype=torch.float64), 0, time.perf_counter()
                try:
                    x = quiet(lambda f=method, p=problem, z=noise: f(p, calls, z))
                    far[name][d, m] += distance(x, sets[3:]) if x.isfinite().all() else float("nan")
                except (RuntimeError, FloatingPointError, ValueError) as error:
                    far[name][d, m] = float("nan")
                    notes.append(f"{name}, d = {d}, {m} observed: {type(error).__name__}.")
                counts[name], seconds[name] = problem.denoiser.calls, time.perf_counter() - start
        for name in methods:
            report([name, f"d = {d}, m = {m}", number(far[name][d, m] / unit[d, m]), f"{seconds[name]:.1f} s"])
    rows = [[name, *(number(far[name][case] / unit[case]) for case in cases), str(counts[name]), f"{seconds[name]:.1f}"] for name in methods]
    head = ["exact against exact = 1; d, m =", *(f"{d}, {m}" for d, m in cases), "calls", "seconds"]
    each = ", ".join(f"{k} for d = {d} ({size[d]:,} draws)" for d, k in problems.items())
    text = (
        "Mean sliced Wasserstein-1 distance to exact posterior draws; 25 Gaussians in d dimensions, m numbers observed, σ from 2000 to 0.01. "
        f"Problems a column: {each}. Calls and seconds are those of the last column's runs."
    )
    return section("(b) Gaussian mixtures: posterior error", text, head, rows, notes)


def part_c() -> str:
    n, repeats = (4, 1) if QUICK else (64, 5)
    network = load_pretrained("mnist")
    names = ("sde_utils: Heun", "azula: Heun", "k-diffusion: Heun", "diffusers: Heun", "smalldiffusion: DDIM")
    methods, notes = collect(*samplers.GROUPS)
    methods = {name: methods[name] for name in names if name in methods}
    taken: dict[str, list[float]] = {name: [] for name in ("bare", *methods)}
    counts = dict.fromkeys(methods, 0)
    with torch.no_grad():
        for repeat in range(repeats + 1):  # the first round warms up
            noise = seeded(repeat, n, 1, 28, 28)
            taken["bare"].append(bare(network, noise))
            for name, method in methods.items():
                counter, start = Counter(network), time.perf_counter()
                calls = 36 if name.startswith("azula") else 35
                x = quiet(lambda f=method, c=counter, z=noise, k=calls: f(c, z, k))
                taken[name].append(time.perf_counter() - start)
                counts[name] = counter.calls
                if not x.isfinite().all():
                    notes.append(f"{name} left the finite numbers.")
    middle = {name: statistics.median(times[1:]) for name, times in taken.items()}
    rows = [["35 bare network calls", "35", f"{middle['bare']:.2f}", f"{1000 * middle['bare'] / n:.1f}", "1.00"]]
    for name in methods:
        ratio = middle[name] / counts[name] * 35 / middle["bare"]
        rows.append([name, str(counts[name]), f"{middle[name]:.2f}", f"{1000 * middle[name] / n:.1f}", f"{ratio:.2f}"])
        report(rows[-1])
    head = [f"{n} digits of 28 x 28", "calls", "seconds", "ms a sample", "of as many bare calls"]
    text = f"18 Heun steps with the shipped network; medians of {repeats}, taken in turn. smalldiffusion has no Heun and takes 35 DDIM steps."
    return section("(c) Images: time", text, head, rows, notes)


def bare(network: Denoise, noise: Tensor, calls: int = 35) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        network(noise, torch.tensor(1.0))
    return time.perf_counter() - start


def section(title: str, text: str, head: list[str], rows: list[list[str]], notes: list[str]) -> str:
    return "\n\n".join([f"### {title}", text, table(head, rows), *(f"- {note}" for note in notes)])


def report(row: list[str]) -> None:
    print("  ".join(row), file=sys.stderr, flush=True)


PARTS = {"a1": part_a1, "a2": part_a2, "b": part_b, "c": part_c}


def main() -> None:
    global QUICK
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "a"], default=list(PARTS), help="a is a1 and a2")
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    arguments = parser.parse_args()
    QUICK = arguments.quick
    start = time.perf_counter()
    parts = [name for name in PARTS if name in arguments.parts or name[0] in arguments.parts]
    sections = [PARTS[name]() for name in parts]
    where = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    when = f"{datetime.date.today()}; {where}; {versions()}; {(time.perf_counter() - start) / 60:.0f} minutes."
    text = "\n\n".join([when, *sections]) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
