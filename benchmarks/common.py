"""What all parts share: counting calls, finding the other libraries, tables."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
from torch import Tensor

from sde_utils import sliced_wasserstein

Denoise = Callable[[Tensor, Tensor], Tensor]  # D(z, sigma) -> E[x_0 | z]
T = TypeVar("T")

LIBRARIES = ("azula", "smalldiffusion", "k-diffusion", "diffusers", "deepinv")


class Counter:
    """A denoiser that counts its calls: every library is given one of these."""

    def __init__(self, denoiser: Denoise) -> None:
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.denoiser(z, sigma)


def collect(*groups: Callable[[], dict[str, T]]) -> tuple[dict[str, T], list[str]]:
    """The methods of all groups, "library: method" each, and a note for every group whose library cannot be imported."""
    methods, notes = {}, []
    for group in groups:
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                methods |= group()
        except ImportError as error:
            notes.append(f"{group.__name__} is left out: {error}.")
    return methods, notes


def quiet(function: Callable[[], T]) -> T:
    """Run without the warnings and progress bars of others."""
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
    """Mean sliced Wasserstein-1 distance of x to each exact set, along the same directions in every call."""
    return sum(float(sliced_wasserstein(x.to(e), e, projections, torch.Generator().manual_seed(i))) for i, e in enumerate(exact)) / len(exact)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Two decimals, fewer for large numbers; what is not finite is named."""
    if value != value or value == float("inf"):
        return "diverged"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1000 else "> 1000"
