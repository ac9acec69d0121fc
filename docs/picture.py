"""The moving picture of the README, `docs/posterior.png`: `python docs/picture.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

import sde_utils as su
from sde_utils import plotting as draw

FRAMES, STEPS, POINTS = 28, 200, 1500

draw.use_style()
generator = torch.Generator().manual_seed(0)
sde, roll = su.VESDE(), su.swiss_roll_density()
obs = su.Observation(lambda x: x[:, :1], torch.tensor([0.5]), 0.05)
posterior = roll.posterior(obs)
reference = su.roll_mass(posterior.sample(100_000, generator).float())
levels = [float(sde.sigma(t)) for t in su.uniform_times(STEPS)] + [0.0]  # of the states; 0: clean
shown = [k for k, sigma in enumerate(levels) if sigma < 3]  # before, all is noise
start = sde.prior((POINTS, 2), generator=generator)
denoisers = {
    "DPS": su.DPS(roll, obs),
    "PiGDM": su.PiGDM(roll, obs, (2,)),
    "MMPS": su.MMPS(roll, obs),
    "exact posterior": posterior,
}
options = {"steps": STEPS, "predictor": su.ancestral, "generator": generator, "trajectory": True}
paths = {name: su.sample(sde, d, start, **options) for name, d in denoisers.items()}


def frame(i: int) -> Figure:
    k = shown[round(i * (len(shown) - 1) / (FRAMES - 1))]
    figure, axes = plt.subplots(1, 4, figsize=(8.4, 2.5))
    for ax, (name, path) in zip(axes, paths.items(), strict=True):
        draw.draw_density(ax, roll, levels[k], n=100, alpha=0.3)
        ax.axvline(0.5, color=draw.BLACK, marker="none", linewidth=0.8, linestyle=":")
        colour = draw.BLUE if name == "exact posterior" else draw.RED
        draw.draw_points(ax, path[k], s=2, color=colour)
        wrong = float(su.total_variation(su.roll_mass(path[-1]), reference))
        title = f"{name}: {100 * wrong:.0f} % misplaced" if k == STEPS else name
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[], xlabel=f"$\\sigma$ = {levels[k]:.2f}" if ax is axes[0] else "")
    return figure


png = draw.animated_png(frame, FRAMES, milliseconds=110, dpi=90, hold=3000)
Path(__file__).with_name("posterior.png").write_bytes(png)
print(f"docs/posterior.png, {len(png) / 1000:.0f} KB")
