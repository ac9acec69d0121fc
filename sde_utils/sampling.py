r"""Reverse-time sampling: one loop; predictors and correctors are functions of one step.

A predictor goes from a time t to an earlier one, s, a corrector stays at s. `times` are those the
chain visits, all with σ > 0; after the last of them x_0 is told from z by one network call. So n
times cost n calls with every SDE, 2n - 1 with Heun's method.
"""

import math
import sys
import warnings
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from . import _check as check
from ._numerics import Corrector, Denoise, Predictor, Random, Times, call
from .predictors import euler_maruyama
from .sde import SDE, check_sde


def uniform_times(n: int) -> list[float]:
    """1, ..., 2/n, 1/n: n times, equally spaced."""
    n = check.count("n", n)
    return [1 - i / n for i in range(n)]


def karras_levels(top: float, bottom: float, n: int, rho: float = 7.0) -> list[float]:
    r"""σ_i = (a^{1/ρ} + i/(n-1) (b^{1/ρ} - a^{1/ρ}))^ρ, a = top, b = bottom; b alone if n is 1."""
    a, b = top ** (1 / rho), bottom ** (1 / rho)
    return [(a + i / (n - 1) * (b - a)) ** rho for i in range(n)] if n > 1 else [bottom] * n


def karras_times(
    sde: SDE,
    n: int,
    sigma_data: float = 1.0,
    *,
    low: float = 0.01,
    high: float = 20.0,
    rho: float = 7.0,
) -> list[float]:
    r"""Times of n noise levels, dense at small σ, in units of the data's size.

        σ_i = (a^{1/ρ} + i/(k-1) (b^{1/ρ} - a^{1/ρ}))^ρ,   a = high sigma_data,  b = low sigma_data.

    Where a lies below σ(1), the first level is σ(1) and k = n - 1 follow: above twenty times the
    data's size D hardly changes, the flow is a straight line, and one step does. Else a = σ(1) and
    k = n. b gives way to σ(0) where that is higher.
    Args: sigma_data: root mean square of the data. low, high: 0 < low < high. rho: ρ > 0.
    Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5.
    """
    check_sde(sde)
    n = check.count("n", n)
    size, low = check.number("sigma_data", sigma_data), check.number("low", low)
    high, rho = check.number("high", high), check.number("rho", rho)
    top, bottom = float(sde.sigma(1.0)), max(low * size, float(sde.sigma(0.0)))
    found = f"σ from {bottom:g} to {min(high * size, top):g}"
    check.require(bottom < min(high * size, top), f"low must be below high and σ(1), got {found}")
    first = [1.0] if high * size < top * (1 - 1e-9) else []
    levels = karras_levels(min(high * size, top), bottom, n - len(first), rho)
    times = first + [float(sde.time(min(level, top))) for level in levels]
    return [1.0, *times[1:]]  # time(σ(1)) may be one up to rounding only


def check_times(sde: SDE, times: Times) -> list[float]:
    """`times` as a list: decreasing within [0, 1], σ > 0 at the last."""
    good = not isinstance(times, (str, int, float)) and getattr(times, "ndim", 1) == 1
    remedy = "as su.karras_times(sde, 18); for a number of them write steps="
    check.kind(good, f"times must be a sequence, {remedy}", times)
    times = [check.number("times", t, 0, 1, "[]") for t in times]
    for t, s in pairwise(times):
        check.require(t > s, f"times must decrease, but {t:g} is followed by {s:g}")
    ends = bool(times) and float(sde.sigma(times[-1])) > 0
    check.require(ends, "times must end where σ > 0: the step from there to x_0 is made by itself")
    return times


def check_start(sde: SDE, denoiser: Denoise, x: Tensor, t: float) -> None:
    """Warn of noise that is far from r σ, and of σ(1) that is not far above the data's size."""
    r, sigma = float(sde.scale(t)), float(sde.sigma(t))
    size, noise = float(x.float().square().mean().sqrt()), r * sigma
    data = getattr(denoiser, "sigma_data", 0.0)
    if x.numel() >= 16 and (size < 0.3 * noise or (t == 1 and size > 3 * (noise + r * data))):
        found = f"x has the root mean square {size:.3g} at t = {t:.4g}, noise r σ = {noise:.3g}"
        warnings.warn(f"{found}: start from sde.prior(...) or sde.perturb(x0, t)", stacklevel=5)
    if t == 1 and sigma < 10 * data:
        found = f"σ(1) = {sigma:.3g}, below 10 sigma_data = {10 * data:.3g}, still knows the data"
        warnings.warn(f"{found}: scale them, or take an SDE that goes further", stacklevel=5)


def check_run(
    sde: SDE, denoiser: Denoise, x: Tensor, times: Times, generator: Random
) -> list[float]:
    """The doors of a run; the times as a list."""
    check_sde(sde)
    check.batch("x", x)
    check.generator(generator)
    times = check_times(sde, times)
    check_start(sde, denoiser, x, times[0])
    if callable(door := getattr(denoiser, "check", None)):  # a guided denoiser has its own
        door(x)
    return times


@torch.no_grad()
def sample(
    sde: SDE,
    denoiser: Denoise,
    x: Tensor,
    *,
    steps: int = 100,
    times: Times | None = None,
    predictor: Predictor = euler_maruyama,
    corrector: Corrector | None = None,
    last_step: float | None = 1.0,
    generator: Random = None,
    trajectory: bool = False,
    progress: bool = False,
) -> Tensor:
    r"""Run the reverse process from noise at times[0] to data.

    The last step, from the lowest noise level to data, is the same for every predictor:

        x_0 = z + w (D(z, σ) - z),   w = last_step.

    w = 1 gives D, the mean of x_0 given z, as Song and Karras do. Where the data have a fine
    structure of width s it comes out too thin, by the factor s² / (s² + σ²) in variance. w = 1/2
    is right to O(σ⁴) for a smooth density, but leaves half the noise around atoms.

    Args:
        denoiser: D(z, σ), called with z (B, *dims) and a scalar tensor σ, in x's dtype.
        x: (B, *dims), as from `sde.prior`.
        steps: n of `uniform_times(n)`, the times if none are given.
        times: decreasing, with σ > 0.
        predictor, corrector: functions of one step; the corrector is called after each step.
        last_step: w >= 0; None returns x at times[-1].
        trajectory: return all states, x first, x_0 last.
    Returns: x_0, (B, *dims); with `trajectory` (len(times) + 1, B, *dims).
    Raises `TypeError` and `ValueError` before any step, `FloatingPointError` naming a step that
    left the finite numbers; warns of a start, or an end, that cannot be right.
    """
    check.function("predictor", predictor, "a function of one step, as su.heun", 6)
    if corrector is not None:
        check.function("corrector", corrector, "a function of one step, as su.Langevin()", 5)
    w = None if last_step is None else check.number("last_step", last_step, ends="[)")
    times = check_run(sde, denoiser, x, uniform_times(steps) if times is None else times, generator)
    denoiser, path = check.first_answer(denoiser), [x]
    bar = tqdm(list(pairwise(times)), "sampling", file=sys.stdout, disable=not progress)
    for i, (t, s) in enumerate(bar):
        before, x = x, predictor(sde, denoiser, x, t, s, generator)
        if corrector is not None:
            x = corrector(sde, denoiser, x, s, generator)
        if not x.isfinite().all():
            step = f"step {i + 1}, t = {t:.4g} to {s:.4g}, left the finite numbers"
            raise FloatingPointError(f"{step}: {cause(sde, denoiser, before, t, corrector)}")
        path = [*path, x] if trajectory else [x]
    if w is not None:
        x = finish(denoiser, x / float(sde.scale(times[-1])), float(sde.sigma(times[-1])), w)
        path.append(x)
    return torch.stack(path) if trajectory else x


def cause(sde: SDE, denoiser: Denoise, x: Tensor, t: float, corrector: Corrector | None) -> str:
    """Why a step from x at t left the finite numbers, by one more call."""
    z, sigma = x / float(sde.scale(t)), float(sde.sigma(t))
    stiff = "the denoiser's guidance is too stiff for steps like this"
    causes = f"the corrector's moves are too large, or {stiff}" if corrector else stiff
    if z.abs().max() > 1e6 * sigma:
        return f"x had run away before; {causes}"
    if not call(denoiser, z, sigma).isfinite().all():
        return f"the denoiser is not finite there (or the operator; or σ² too large for {x.dtype})"
    return causes


def finish(denoiser: Denoise, z: Tensor, sigma: float, w: float) -> Tensor:
    """The last step; warns if it goes further than noise can have led."""
    move = call(denoiser, z, sigma) - z
    size = float(move.square().mean().sqrt())
    if not math.isfinite(size):
        raise FloatingPointError(f"the last step, from σ = {sigma:.4g}, left the finite numbers")
    if size > 10 * sigma:
        causes = "too few steps, or a denoiser that returns no E[x_0 | z] (a score, a noise?)"
        warnings.warn(f"the last step moves x by {size / sigma:.3g} σ: {causes}", stacklevel=4)
    return z + w * move
