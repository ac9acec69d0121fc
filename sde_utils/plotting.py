"""Figures of the lecture: one palette, one look a method, maps, fields, images, shares."""

from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from . import _check as check
from ._numerics import Denoise
from .png import animate as animate
from .png import animated_png as animated_png
from .png import show as show
from .roll import roll_pieces, swiss_roll_curve

Extra = Tensor | None
LIMIT = 2.3  # of the lecture's plane
# Okabe & Ito 2008, and two of Tol's muted: told apart by readers of any colour vision
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, INDIGO, WINE = "#CC79A7", "#56B4E9", "#000000", "#332288", "#882255"
LOOKS = {  # colour, marker and line of each, everywhere, in this order; RED is for what is wrong
    "exact": (BLACK, "o", "-"),
    "network": (BLUE, "X", "-"),
    "Annealed": (SKY, "s", "-"),
    "DPS": (ORANGE, "D", "-"),
    "DPS, Algorithm 1": (ORANGE, "d", "--"),
    "PiGDM": (PURPLE, "v", "-"),
    "MMPS": (GREEN, "^", "-"),
    "twisted SMC": (INDIGO, "P", "-"),
    "tempered SMC": (WINE, "*", "-"),
    "Euler–Maruyama": (ORANGE, "o", "-"),
    "ancestral": (GREEN, "s", "-"),
    "predictor–corrector": (PURPLE, "D", "-"),
    "Euler": (SKY, "v", "--"),
    "Heun": (BLUE, "^", "--"),
    "multistep": (INDIGO, "P", "--"),
}


def use_style() -> None:
    """Set matplotlib's defaults for the lecture."""
    colours = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY]
    plt.rc("axes", prop_cycle=plt.cycler(color=colours, marker=list("os^DvP")), grid=True)
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3})
    plt.rcParams.update({"image.cmap": "cividis", "legend.frameon": False, "font.size": 10})
    plt.rcParams.update({"lines.markersize": 4, "figure.constrained_layout.use": True})


def look(name: str) -> dict[str, str]:
    """Colour, marker and line of one of LOOKS, and its name as a label."""
    check.require(name in LOOKS, f"name must be one of {', '.join(LOOKS)}: {name!r}")
    colour, marker, line = LOOKS[name]
    return {"color": colour, "marker": marker, "linestyle": line, "label": name}


def plane(limit: float = LIMIT, n: int = 200) -> Tensor:
    """n x n points over [-limit, limit]², second coordinate fastest.   Returns: (n², 2)."""
    axis = torch.linspace(-limit, limit, n)
    return torch.cartesian_prod(axis, axis)


def on_plane(function: Denoise, z: Tensor, sigma: float) -> Tensor:
    """function(z, σ) at points of the plane, without a graph."""
    try:
        with torch.no_grad():
            return function(z, sigma)
    except ValueError as error:
        raise ValueError(f"only what is two-dimensional can be drawn: {error}") from error


def on_cpu(name: str, x: Tensor, *last: int) -> Tensor:
    """x of shape (n, *last), on the CPU."""
    check.tensor(name, x)
    check.require(x.shape[1:] == last, f"{name} must have shape {('n', *last)}", x)
    return x.detach().cpu()


def draw_map(
    ax: Axes, values: Tensor, limit: float = LIMIT, floor: float | None = 6.0, **look: Any
) -> AxesImage:
    """An image of values on `plane(limit, n)`, (n²,); all alike below the maximum - floor."""
    image = on_cpu("values", values).unflatten(0, (round(len(values) ** 0.5), -1)).T
    if floor is not None:
        top = float(image.max())
        look = {"vmin": top - floor, "vmax": top} | look
    style = {"extent": (-limit, limit, -limit, limit), "interpolation": "bilinear"}
    ax.grid(False)
    return ax.imshow(image, origin="lower", **style | look)


def draw_points(ax: Axes, x: Tensor, limit: float = LIMIT, **look: Any) -> None:
    """A rasterised scatter of points (B, 2) on square axes."""
    look = {"s": 2, "linewidths": 0, "color": BLUE, "marker": "o"} | look
    ax.scatter(*on_cpu("x", x, 2).T, rasterized=True, **look)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


def draw_field(ax: Axes, denoiser: Denoise, sigma: float, n: int = 18, **look: Any) -> None:
    """Arrows of σ ∇log p(z; σ) = (D(z, σ) - z) / σ, at most as long as the grid's spacing."""
    z = plane(n=n)
    arrows = (on_plane(denoiser, z, sigma) - z) / check.number("sigma", sigma)
    arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1) * 2 * LIMIT / n
    look = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005} | look
    ax.quiver(*z.cpu().T, *arrows.cpu().T, **look)
    ax.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")


def draw_density(ax: Axes, density: Denoise, sigma: float = 0, n: int = 200, **look: Any) -> None:
    """A map of log p(z; σ), by the density's `log_prob`."""
    log_prob = density.log_prob  # type: ignore[attr-defined]
    draw_map(ax, on_plane(log_prob, plane(n=n), sigma), **look)


def draw_pieces(
    ax: Axes, x: Tensor, mass: Tensor, right: Tensor, name: str, off: float = 0.04
) -> None:
    """Draws (B, 2) on the roll, and at each piece of the posterior their share, in per cent.

    Args: mass, right: (bins,), theirs and the exact; RED where `off` by more. name: of LOOKS.
    """
    mass, right = on_cpu("mass", mass), on_cpu("right", right)
    u = torch.linspace(0, 1, 20 * len(right), device="cpu")
    ax.plot(*swiss_roll_curve(u).T, color="lightgrey", linewidth=4, marker="none", zorder=0)
    draw_points(ax, x, color=look(name)["color"])
    rest = 1 - float(sum(mass[piece].sum() for piece in roll_pieces(right)))
    for piece in roll_pieces(right):
        share, exact = float(mass[piece].sum()), float(right[piece].sum())
        place = swiss_roll_curve(u.new_tensor([(piece.start + piece.stop) / len(right) / 2]))[0]
        style = {"color": RED, "weight": "bold"} if abs(share - exact) > off else {"color": BLACK}
        place = (place * (1 + 0.4 / place.norm())).tolist()
        ax.text(*place, f"{100 * share:.0f}", ha="center", va="center", **style)
    ax.set_title(f"{name}, {100 * abs(rest):.0f} elsewhere", color=RED if rest > off else BLACK)


def draw_shares(ax: Axes, shares: dict[str, Tensor]) -> None:
    """Shares of classes 0, 1, ..., (k,), by names of LOOKS: bars for the first, else marks."""
    for i, (name, share) in enumerate(shares.items()):
        classes, share = torch.arange(len(share), device="cpu"), on_cpu(f"shares[{name!r}]", share)
        if i == 0:
            ax.bar(classes, share, width=0.9, color="lightgrey", label=name)
        else:
            place = classes + 0.7 * (i - len(shares) / 2) / len(shares)
            ax.plot(place, share, **look(name) | {"linestyle": "none"})
    ax.set(xticks=classes, xlabel="class", ylabel="share")
    ax.legend()


def draw_images(ax: Axes, x: Tensor, columns: int, **look: Any) -> None:
    """Images (B, 1 or 3, H, W) in [-1, 1], row by row, a light line around each if several."""
    check.batch("x", x)
    good = x.ndim == 4 and x.shape[1] in (1, 3)
    check.require(good, "x must be images (B, 1 or 3, H, W)", x)
    rows, line = -(-len(x) // check.count("columns", columns)), int(len(x) > 1)
    x = torch.nn.functional.pad(x.detach().cpu(), (line,) * 4, value=1.0)
    x = torch.cat([x, x.new_ones(rows * columns - len(x), *x.shape[1:])])
    x = x.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    x = x[..., 0] if x.shape[-1] == 1 else ((x + 1) / 2).clamp(0, 1)
    style = {"vmin": -1, "vmax": 1, "cmap": "gray", "interpolation": "nearest"}
    ax.imshow(x, **style | look)
    ax.set_axis_off()


def posterior_figure(
    truth: Tensor, baseline: Extra, results: dict[str, Tensor], draws: int = 4, data: Extra = None
) -> Figure:
    """One row a method: truth, data, baseline, some draws, their mean, sd and |mean - truth|.

    Args: truth, baseline (None leaves it out): (1, 1 or 3, H, W). results: (B, like truth).
    data: what was observed as an image, (1, 1, h, w), from its least to its largest value.
    """
    given = {"truth": truth, "data": data, "baseline": baseline}
    given = {name: x for name, x in given.items() if x is not None}
    for name, x in given.items():
        check.batch(name, x)
    titles = [*given, *(names := [f"draw {i + 1}" for i in range(draws)]), "mean", "sd", "|error|"]
    size = (0.86 * len(titles), 0.93 * len(results) + 0.25)
    figure, axes = plt.subplots(len(results), len(titles), figsize=size, squeeze=False)
    styles = {name: {"vmin": 0, "vmax": 1, "cmap": "cividis"} for name in titles[-2:]}
    if data is not None:
        styles["data"] = {"vmin": float(data.min()), "vmax": float(data.max()), "aspect": "auto"}
    for row, (method, x) in zip(axes, results.items(), strict=True):
        check.batch(f"results[{method!r}]", x)
        mean, sd = x.mean(0, keepdim=True), x.std(0, keepdim=True, correction=min(1, len(x) - 1))
        images = given | dict(zip(names, x.split(1), strict=False)) | {"mean": mean}
        images |= {"sd": sd.mean(1, True), "|error|": (mean - truth).abs().mean(1, True)}
        for ax, title in zip(row, titles, strict=True):
            ax.set_axis_off()
            ax.set_box_aspect(1)
            if title in images:
                draw_images(ax, images[title], 1, **styles.get(title, {}))
        place = {"ha": "right", "va": "center", "transform": row[0].transAxes}
        row[0].text(-0.15, 0.5, method, rotation=90, fontsize=8, **place)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    return figure
