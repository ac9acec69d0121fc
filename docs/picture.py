"""The moving picture of the README, `docs/posterior.png`: `python docs/picture.py`.

It runs the README's ten lines, and watches where they ask the prior's denoiser.
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

import sde_utils as su
from sde_utils import plotting as draw

FRAMES, HERE, roll = 30, Path(__file__).parent, su.swiss_roll_density()
runs: list[list[tuple[float, Tensor]]] = []  # (σ, z) of each step; σ rises from run to run


class Watched(su.GaussianMixture):
    """The roll's density, which keeps what its denoiser is asked."""

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma)
        if not runs or level > runs[-1][-1][0]:
            runs.append([])
        runs[-1].append((level, z.detach()))
        return super().__call__(z, sigma)


torch.manual_seed(0)
watched = roll.__class__.__new__(Watched)
watched.__dict__.update(vars(roll))
su.swiss_roll_density = lambda: watched
found: dict = {}
text = (HERE.parent / "README.md").read_text(encoding="utf-8")
exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], found)

many, weights = found["many"], found["weights"].exp()
right = su.roll_mass(many, weights)
posterior = many[torch.multinomial(weights, 2000, replacement=True)].float()
noise = torch.randn_like(posterior)
names = ("exact", *found["draws"])
ends = {"exact": posterior, **found["draws"]}
assert len(runs) == 3
levels = torch.logspace(0.6, -2, FRAMES - 1).tolist()


def state(name: str, sigma: float) -> Tensor:
    """z at the level nearest to σ; of the exact posterior its draws, with that noise."""
    if name == "exact":
        return posterior + sigma * noise
    run = runs[names.index(name) - 1]
    return min(run, key=lambda step: abs(step[0] / sigma - 1))[1]


def frame(i: int) -> Figure:
    figure, axes = plt.subplots(1, 4, figsize=(8.6, 2.6))
    for ax, name in zip(axes, names, strict=True):
        if i == FRAMES - 1:
            x = ends[name]
            mass = right if name == "exact" else su.roll_mass(x)
            wrong = float(su.total_variation(mass, right))
            draw.draw_pieces(ax, x[:600], mass, right, name)
            note = f"{100 * wrong:.0f} % in the wrong piece"
            note = "posterior, shares in %" if name == "exact" else note
            ax.set_title(f"{name}\n{note}", color=draw.RED if wrong > 0.1 else draw.BLACK)
        else:
            size = (1 + levels[i] ** 2) ** 0.5
            log_p = roll.log_prob(size * draw.plane(n=100), levels[i]).unflatten(0, (100, 100)).T
            bands = [float(log_p.max()) - depth for depth in (5, 3, 1, -1)]
            ax.contourf(axis, axis, log_p, levels=bands, colors=("#eeeeee", "#dddddd", "#cccccc"))
            x = state(name, levels[i])[:600] / size
            draw.draw_points(ax, x, color=draw.look(name)["color"])
            ax.set_title(f"{name}\n$\\sigma$ = {levels[i]:.2f}")
        ax.set(xticks=[], yticks=[])
    return figure


draw.use_style()
axis = torch.linspace(-draw.LIMIT, draw.LIMIT, 100)
png = draw.animated_png(frame, FRAMES, milliseconds=110, dpi=100, hold=4000)
(HERE / "posterior.png").write_bytes(png)
print(f"docs/posterior.png, {len(png) / 1000:.0f} KB")
