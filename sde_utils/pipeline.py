"""Schemes: the lecture as one strip, and the image network."""

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


STAGES = (  # of `su.UNet()` on 28 x 28 pixels: side of the image, channels, what was done
    (28, 1, "$z$"),
    (14, 4, "fold 2 x 2"),
    (14, 32, "block"),
    (7, 32, "mean of 2 x 2"),
    (7, 128, "block*"),
    (7, 128, "blocks*"),
    (14, 128, "double"),
    (14, 32, "blocks"),
    (14, 4, "conv."),
    (28, 1, "unfold: $F$"),
)


def unet() -> None:
    """Show the image network: a box a stage, as high as its image, as wide as its channels."""
    figure, ax = plt.subplots(figsize=(8.6, 2.4))
    left, middles = 0.0, []
    for side, channels, text in STAGES:
        width = 0.25 + channels / 110
        ax.add_patch(plt.Rectangle((left, -side / 20), width, side / 10, color=BLUE, alpha=0.6))
        middles.append(left + width / 2)
        words = f"{text}\n{side} x {side}\nx {channels}"
        ax.text(middles[-1], -1.6, words, ha="center", va="top", linespacing=1.4)
        left += width + 0.95
    for a, b, start, top in ((2, 7, 0.8, 1.4), (4, 5, 0.45, 0.9)):  # what is passed on beside
        bar = ([middles[a], middles[a], middles[b]], [start, top, top])
        ax.plot(*bar, color="grey", marker="none", linewidth=1.2)
        arrow = {"arrowstyle": "-|>", "color": "grey", "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", (middles[b], start), (middles[b], top), arrowprops=arrow)
    ax.set(xlim=(-0.5, left - 0.3), ylim=(-3, 1.7))
    ax.set_axis_off()
    show(figure, "The U-Net: from 28 x 28 pixels down to 7 x 7 and back, copies passed across.")
