"""Figures of the lecture: one palette, density maps, fields, and moving pictures that play wherever a PNG is shown."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .exact import IsotropicMixture
from .sde import Denoise

# Okabe & Ito 2008: told apart by readers of any colour vision
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"
MARKERS = ["o", "s", "^", "D", "v", "P"]


def use_style() -> None:
    """Set matplotlib's defaults for the lecture."""
    colours = cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]) + cycler(marker=MARKERS)
    plt.rcParams.update(
        {"axes.prop_cycle": colours, "figure.dpi": 100, "lines.markersize": 4, "image.cmap": "cividis", "axes.grid": True, "grid.alpha": 0.3}
        | {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False, "figure.constrained_layout.use": True}
    )


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def _display(png: bytes, alt: str) -> None:
    bundle = {"image/png": b64encode(png).decode(), "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def show(figure: Figure, alt: str, dpi: int = 100, colours: int = 128) -> None:
    """Display a figure as a PNG of `colours` colours with its description `alt`, and close it."""
    image = Image.open(io.BytesIO(_png(figure, dpi))).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    _display(buffer.getvalue(), alt)


def animated_png(draw: Callable[[int], Figure], frames: int, milliseconds: int = 120, dpi: int = 70, hold: int = 1500) -> bytes:
    """`draw(0), ..., draw(frames - 1)` as one animated PNG that loops, the last frame held for `hold` milliseconds."""
    images = [Image.open(io.BytesIO(_png(draw(i), dpi))).convert("RGB") for i in range(frames)]
    ends = Image.new("RGB", (images[0].width, 2 * images[0].height))  # one palette for all frames, of the first and the last
    ends.paste(images[0])
    ends.paste(images[-1], (0, images[0].height))
    palette = ends.quantize(32, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [milliseconds] * (frames - 1) + [hold]
    buffer = io.BytesIO()
    images[0].save(buffer, format="PNG", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    return buffer.getvalue()


def animate(draw: Callable[[int], Figure], frames: int, alt: str) -> None:
    """Display `animated_png(draw, frames)` with its description `alt`."""
    _display(animated_png(draw, frames), alt)


def plane(limit: float = 2.3, n: int = 200) -> Tensor:
    """A grid of n x n points over [-limit, limit]², (n², 2), second coordinate fastest."""
    axis = torch.linspace(-limit, limit, n)
    return torch.cartesian_prod(axis, axis)


def draw_map(ax: Axes, values: Tensor, limit: float = 2.3, floor: float | None = 6.0, **options: Any) -> None:
    """An image of values on `plane(limit, n)`, (n²,). For log-densities: nothing is drawn further than `floor` nats below the maximum."""
    n = round(len(values) ** 0.5)
    image = values.reshape(n, n).T.cpu()
    if floor is not None:
        options = {"vmin": float(image.max()) - floor, "vmax": float(image.max())} | options
    ax.imshow(image, origin="lower", extent=(-limit, limit, -limit, limit), interpolation="bilinear", **options)
    ax.grid(False)


def draw_points(ax: Axes, x: Tensor, limit: float = 2.3, **options: Any) -> None:
    """A rasterised scatter of points (B, 2) on square axes."""
    options = {"s": 2, "linewidths": 0, "color": BLUE, "rasterized": True, "marker": "o"} | options
    ax.scatter(*x.detach().cpu().T, **options)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


def draw_field(ax: Axes, denoiser: Denoise, sigma: float, limit: float = 2.3, n: int = 18, **options: Any) -> None:
    """Arrows of σ ∇log p(z; σ) = (D(z, σ) - z) / σ, shortened to at most the spacing of the n x n grid."""
    z = plane(limit, n)
    with torch.no_grad():
        arrows = (denoiser(z, sigma) - z) / sigma
    arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1) * 2 * limit / n
    ax.quiver(*z.T, *arrows.T, angles="xy", scale_units="xy", scale=1, width=0.005, **options)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


def draw_density(ax: Axes, density: IsotropicMixture, sigma: float = 0.0, limit: float = 2.3, n: int = 200, **options: Any) -> None:
    """A map of log p(z; σ)."""
    draw_map(ax, density.log_prob(plane(limit, n), sigma), limit, **options)


def draw_mass(ax: Axes, masses: dict[str, Tensor], label: str = "parameter of the roll, inside to outside") -> None:
    """Shares of samples per bin of the roll, one line of steps per method."""
    styles: Sequence[str] = ["-", "--", "-.", ":"]
    for i, (name, mass) in enumerate(masses.items()):
        edges = torch.linspace(0, 1, len(mass) + 1)
        ax.stairs(mass.cpu(), edges, label=name, color=[BLACK, BLUE, ORANGE, GREEN, RED, PURPLE][i % 6], linestyle=styles[i % 4], linewidth=1.8)
    ax.set(xlabel=label, ylabel="share of samples", xlim=(0, 1))
    ax.legend()


def draw_images(ax: Axes, x: Tensor, columns: int, **options: Any) -> None:
    """Images (B, 1, H, W) in [-1, 1] as a grid, row by row, a light line around each if there are several; white is ink."""
    rows, line = -(-len(x) // columns), int(len(x) > 1)
    x = torch.nn.functional.pad(x[:, 0].detach().cpu(), (line,) * 4, value=1.0)
    x = torch.cat([x, x.new_ones(rows * columns - len(x), *x.shape[1:])]).reshape(rows, columns, *x.shape[1:])
    ax.imshow(x.movedim(1, 2).reshape(rows * x.shape[2], -1), **{"vmin": -1, "vmax": 1, "cmap": "gray", "interpolation": "nearest"} | options)
    ax.set_axis_off()


def posterior_figure(truth: Tensor, baseline: Tensor | None, results: dict[str, Tensor], draws: int = 4, data: Tensor | None = None) -> Figure:
    """One row a method: truth, baseline, some draws, their mean, sd and |mean - truth|. truth, baseline: (1, 1, H, W); results: (B, 1, H, W).

    baseline None leaves its column out. data: what was observed as an image, (1, 1, h, w), a square here, from its least to its largest value.
    """
    given = {name: x for name, x in {"truth": truth, "data": data, "baseline": baseline}.items() if x is not None}
    titles = [*given, *[f"draw {i + 1}" for i in range(draws)], "mean", "sd", "|error|"]
    figure, axes = plt.subplots(len(results), len(titles), figsize=(0.95 * len(titles), 1.02 * len(results) + 0.25), squeeze=False)
    for row, (name, x) in zip(axes, results.items(), strict=True):
        mean = x.mean(0, keepdim=True)
        for ax, title, image in zip(row, titles, [*given.values(), *x[:draws].split(1), mean], strict=False):
            own = {"vmin": image.min(), "vmax": image.max(), "aspect": "auto"} if title == "data" else {}
            draw_images(ax, image, 1, **own)
            ax.set_box_aspect(1)
        for ax, image in zip(row[-2:], (x.std(0, keepdim=True), (mean - truth).abs()), strict=True):
            draw_images(ax, image, 1, vmin=0, vmax=1, cmap="cividis")
        row[0].text(-0.15, 0.5, name, rotation=90, ha="right", va="center", transform=row[0].transAxes, fontsize=8)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    return figure
