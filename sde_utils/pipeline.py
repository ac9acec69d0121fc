"""The lecture as one strip: data, noise, and the way back, with an observation or without."""

from itertools import pairwise

import matplotlib.pyplot as plt

from .plotting import BLACK, BLUE, show

BOXES = {  # of the pipeline: place and text
    "data": (0.6, 1, "data $x_0$"),
    "forward": (2.2, 1, "forward SDE\n$r(t),\\ \\sigma(t)$"),
    "noise": (3.8, 1, "noise $x_1$"),
    "reverse": (5.4, 1, "reverse SDE\nor flow"),
    "weights": (7.2, 1, "weights,\nresampling"),
    "draws": (8.8, 1, "draws of $x_0$,\nof $x_0$ given $y$"),
    "denoiser": (3.8, 0, "denoiser $D$\n= score"),
    "guided": (5.4, 0, "guided\ndenoiser $D_y$"),
    "observation": (7.2, 0, "observation\n$y = A(x_0) + \\sigma_y n$"),
}
STEPS = (
    "data forward noise reverse weights draws",
    "denoiser guided reverse",
    "observation guided",
)


def pipeline(*lit: str) -> None:
    """Show the lecture as a strip of BOXES, these lit."""
    figure, ax = plt.subplots(figsize=(8.6, 1.7))
    for name, (x, y, text) in BOXES.items():
        face, colour = (BLUE, "white") if name in lit else ("#eeeeee", "black")
        box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": "none"}
        ax.text(x, y, text, ha="center", va="center", color=colour, bbox=box)
    for a, b in (pair for names in STEPS for pair in pairwise(names.split())):
        (x, y, _), (x2, y2, _) = BOXES[a], BOXES[b]
        dx, dy = 0.7 * ((x2 > x) - (x2 < x)), 0.32 * ((y2 > y) - (y2 < y))
        arrow = {"arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (x2 - dx, y2 - dy), (x + dx, y + dy), arrowprops=arrow)
    ax.set(xlim=(-0.2, 9.6), ylim=(-0.45, 1.45))
    ax.set_axis_off()
    show(figure, "Data, forward SDE, noise, reverse SDE, weights, draws; denoiser, observation.")
