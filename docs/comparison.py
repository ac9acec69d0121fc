"""The plot of the READMEs, `docs/comparison.png`, from benchmarks/results.md:
`python docs/comparison.py`."""

import re
from pathlib import Path

import matplotlib.pyplot as plt

from sde_utils import plotting as draw

HERE = Path(__file__).parent
COLOURS = {
    "sde_utils": draw.BLACK,
    "azula": draw.BLUE,
    "smalldiffusion": draw.GREEN,
    "k-diffusion": draw.PURPLE,
    "diffusers": draw.SKY,
    "deepinv": draw.ORANGE,
}
MARKERS = dict(zip(COLOURS, "osD^vP", strict=True))
Table = dict[str, list[str]]


def table(part: str) -> Table:
    """The rows of a part of the results, by their first cell."""
    text = (HERE.parent / "benchmarks" / "results.md").read_text(encoding="utf-8")
    lines = text.split(f"### ({part})")[1].split("###")[0].splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def library(name: str) -> str:
    return name.split(":")[0]


def look(name: str) -> dict:
    return {"color": COLOURS[library(name)], "marker": MARKERS[library(name)]}


def number(cell: str) -> float:
    return float(cell.split(" ")[0].split("(")[0])


def draw_training(ax: plt.Axes) -> None:
    """The best row of each library, at the seconds it took."""
    best: Table = {}
    for name, cells in table("a1").items():
        old = best.get(library(name), ["inf", "inf", "inf"])
        best[library(name)] = min(old, cells[:3], key=lambda c: number(c[2]))
    for name, cells in best.items():
        seconds = [float(re.search(r"\((.*) s\)", c)[1]) for c in cells]
        ax.plot(seconds, [number(c) for c in cells], **look(name))
    ax.set(xscale="log", yscale="log", xlabel="seconds of training", title="Excess loss")
    ax.set_xticks((5, 10, 20), ("5", "10", "20"))
    ax.minorticks_off()


def draw_sampling(ax: plt.Axes) -> None:
    for name, cells in table("a2").items():
        calls = [int(re.search(r"\((\d+)\)", c)[1]) for c in cells[:4]]
        mine = {"zorder": 3, "linewidth": 2} if library(name) == "sde_utils" else {"alpha": 0.6}
        ax.plot(calls, [number(c) for c in cells[:4]], **look(name), **mine)
    ax.set(xscale="log", yscale="log", ylim=(1, 6), xlabel="network calls per sample")
    ax.set_title("Samples: distance, exact against exact = 1")
    ax.set_xticks((10, 20, 36, 100), ("10", "20", "36", "100"))
    ax.set_yticks((1, 2, 4), ("1", "2", "4"))
    ax.minorticks_off()


def draw_posteriors(ax: plt.Axes) -> None:
    """Nine columns a row, pale, and the mean of their geometric mean with its standard error."""
    rows = table("b1")
    mean = {name: [float(a) for a in cells[9].split(" ± ")] for name, cells in rows.items()}
    names = sorted(rows, key=mean.__getitem__, reverse=True)
    for place, name in enumerate(names):
        style = look(name) | {"linestyle": "none"}
        ax.plot([number(c) for c in rows[name][:9]], [place] * 9, **style, alpha=0.4)
        value, error = mean[name]
        ax.errorbar(value, place, xerr=error, **style | {"markersize": 7, "capsize": 4})
    ax.set(xscale="log", title="Posteriors: distance, exact against exact = 1")
    ax.set_yticks(range(len(rows)), names)
    ax.set_xlabel("nine kinds of problems, eight of each (pale), and their geometric mean ± error")
    ax.set_xticks((1, 3, 10, 30, 100), ("1", "3", "10", "30", "100"))
    ax.minorticks_off()


draw.use_style()
figure = plt.figure(figsize=(8.6, 7.2))
top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
left, right = top.subplots(1, 2)
draw_training(left)
draw_sampling(right)
draw_posteriors(bottom.subplots())
keys = [plt.Line2D([], [], **look(name), label=name) for name in COLOURS]
figure.legend(handles=keys, loc="outside lower center", ncols=6)
figure.savefig(HERE / "comparison.png", dpi=130)
print("docs/comparison.png")
