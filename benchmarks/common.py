"""What all parts share: counting calls, finding the other libraries, tables."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
from torch import Tensor

import sde_utils as su

Denoise = Callable[[Tensor, Tensor], Tensor]  # D(z, sigma) -> E[x_0 | z]
T = TypeVar("T")

LIBRARIES = ("azula", "smalldiffusion", "k-diffusion", "diffusers", "deepinv")


class Counter:
    """A denoiser that counts its calls and their points: every library is given one of these."""

    def __init__(self, denoiser: Denoise) -> None:
        self.denoiser, self.calls, self.points = denoiser, 0, 0
        self.sigma_data = getattr(denoiser, "sigma_data", 1.0)

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        self.calls, self.points = self.calls + 1, self.points + len(z)
        return self.denoiser(z, sigma)


def collect(*groups: Callable[[], dict[str, T]]) -> tuple[dict[str, T], list[str]]:
    """The methods of all groups, "library: method" each.

    And a note for every group whose library cannot be imported.
    """
    methods, notes = {}, []
    for group in groups:
        try:
            methods |= quiet(group)
        except ImportError as error:
            notes.append(f"{group.__name__} is left out: {error}.")
    return methods, notes


def quiet(function: Callable[[], T]) -> T:
    """Run without warnings and progress bars."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return function()


def versions() -> str:
    found = []
    for name in ("torch", *LIBRARIES):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def distance(x: Tensor, exact: Sequence[Tensor], projections: int = 300) -> float:
    """Mean sliced Wasserstein-1 distance to the exact sets, along the same directions always."""
    far = 0.0
    for i, draws in enumerate(exact):
        generator = torch.Generator().manual_seed(i)
        far += float(su.sliced_wasserstein(x.to(draws), draws, projections, generator))
    return far / len(exact)


def unit(exact: Sequence[Tensor]) -> float:
    """The distance of the first half of exact sets to the others, which stands for 1."""
    half = len(exact) // 2
    return sum(distance(x, exact[half:]) for x in exact[:half]) / half


def seeded(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise, the same for every method.

    Sets the global seed, too, from which the others draw.
    """
    torch.manual_seed(seed)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=dtype)


def section(
    title: str, text: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
    """A part of the report: heading, words, a table, notes."""
    parts = [f"### {title}", text, table(head, rows), *(f"- {note}" for note in notes)]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Two decimals, fewer for large numbers; what is not finite is named."""
    if not math.isfinite(value):
        return "diverged"
    if value >= 1000:
        return "> 1000"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
