"""The loop of `train`: one step of Adam, the moving average, checkpoints, several processes."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from . import _check as check
from ._numerics import Denoise, expand, randn_like

SigmaSampler = Callable[..., Tensor]  # (n, generator) -> (n,) noise levels
Weight = Callable[[Tensor], Tensor]  # sigma (B,) -> (B,)


def squares(denoiser: Denoise, x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """mean over dims of |ε̂ - ε|², (B,), σ as `expand` gives it."""
    z = x0 + level * noise
    eps_hat = (z - denoiser(z, level.flatten() if level.ndim else level)) / level
    return ((eps_hat - noise) ** 2).flatten(1).mean(1)


def processes() -> tuple[int, int]:
    """How many there are, and which of them this one is."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


@dataclass
class Run:
    """A run under way. The moving average of a weight stands beside it, in Adam's state."""

    denoiser: nn.Module
    data: Tensor
    sigma_sampler: SigmaSampler
    weight: Weight | None
    generator: Any  # torch.Generator or None
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        parameters = list(self.denoiser.parameters())
        self.optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99), fused=True)
        self.losses, self.step = self.data.new_zeros(self.settings["steps"]), 0
        self.settings["data"] = tuple(self.data.shape)
        self.settings["parameters"] = sum(p.numel() for p in parameters)
        self.settings["seed"] = self.generator and self.generator.initial_seed()
        ranks, whole = processes()[0], self.settings["batch_size"]
        check.require(whole % ranks == 0, f"batch_size must be a multiple of {ranks}, got {whole}")

    def go_on(self, progress: bool, path: Path | None, save_every: float) -> None:
        """The steps that are left."""
        steps, every, (_, rank) = self.settings["steps"], self.settings["ema_every"], processes()
        bar = tqdm(range(self.step, steps), "training", steps, initial=self.step, file=sys.stdout,
                   mininterval=1.0, disable=not progress or rank > 0)  # fmt: skip
        self.denoiser.train()
        saved = time.monotonic()
        for i in bar:
            self.losses[i] = self.descend()
            self.step = i + 1
            if self.step % every == 0:
                self.turn(self.step // every - 1)
            due = self.step == steps or time.monotonic() - saved >= save_every
            if due or self.step % 100 == 0:  # one look at the device in 100 steps
                recent = self.losses[max(0, i - 99) : i + 1].mean()
                if not recent.isfinite():
                    remedy = f"lower lr (now {self.settings['lr']:g}), or look at the data's size"
                    raise FloatingPointError(f"the loss is not finite by step {i + 1}: {remedy}")
                bar.set_postfix_str(f"loss {recent:.4f}", refresh=False)
            if due and path is not None and rank == 0:
                self.save(path)
            saved = time.monotonic() if due else saved

    def descend(self) -> Tensor:
        """One step of Adam; the loss of its batch."""
        s, i = self.settings, self.step
        rise = min((i + 1) / max(1, round(s["warmup"] * s["steps"])), 1)
        fall = min((1 - i / s["steps"]) / s["fall"], 1)
        self.optimizer.param_groups[0]["lr"] = s["lr"] * (rise * fall)
        n, device = s["batch_size"], (self.generator or self.data).device
        index = torch.randint(len(self.data), (n,), generator=self.generator, device=device)
        x0 = self.data[index.to(self.data.device)]
        sigma = self.sigma_sampler(n, self.generator).to(x0)
        noise = randn_like(x0, self.generator)
        loss = self.gradient(x0, sigma, noise)
        if s["clip"]:
            nn.utils.clip_grad_norm_(self.denoiser.parameters(), s["clip"])
        self.optimizer.step()
        return loss

    def gradient(self, *batch: Tensor) -> Tensor:
        """The loss of a batch, its gradient in place; each process does its share."""
        ranks, rank = processes()
        x0, sigma, noise = (a.chunk(ranks)[rank] for a in batch)
        losses = squares(self.denoiser, x0, expand(sigma, x0), noise)
        loss = (losses if self.weight is None else self.weight(sigma) * losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.clear_autocast_cache()  # a caller's autocast would keep the weights as they were
        loss = loss.detach()
        if ranks > 1:
            for a in (loss, *(p.grad for p in self.denoiser.parameters() if p.grad is not None)):
                distributed.all_reduce(a)
                a /= ranks
        return loss

    @torch.no_grad()
    def turn(self, k: int) -> None:
        d = min(self.settings["ema_decay"], (1 + k) / (10 + k))
        for p, state in self.optimizer.state.items():
            state["average"] = p.lerp(state["average"], d) if "average" in state else p.clone()

    @torch.no_grad()
    def finish(self) -> None:
        for p, state in self.optimizer.state.items():
            p.copy_(state.get("average", p))
        self.denoiser.eval()

    def save(self, path: Path) -> None:
        """Write beside the file, then replace it: after a crash it is the old one, whole."""
        state = {name: getattr(self, name) for name in ("settings", "step", "losses")}
        state |= {name: getattr(self, name).state_dict() for name in ("denoiser", "optimizer")}
        state |= {"generator": self.generator.get_state()}
        partial = Path(f"{path}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            remedy = "free some space and train again; the checkpoint before it is whole"
            raise OSError(f"{path} could not be written ({error}): {remedy}") from error
        finally:
            partial.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint where there is one; another run's is left alone."""
        check.require(self.generator is not None, "checkpoint needs a generator, to keep its state")
        check.require(path.parent.is_dir(), f"checkpoint must lie in a folder, got {path}")
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            pairs = {k: (saved["settings"][k], v) for k, v in self.settings.items()}
            other = [f"{k} = {a} there, {b} here" for k, (a, b) in pairs.items() if a != b]
            for name in () if other else ("denoiser", "optimizer"):
                getattr(self, name).load_state_dict(saved[name])
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            kind = f"not a checkpoint of this network's training ({type(error).__name__})"
            raise ValueError(f"{path} is {kind}: move it away, or name another file") from None
        said = f"{path} is a checkpoint of another run ({', '.join(other)}): name another file"
        check.require(not other, said)
        self.generator.set_state(saved["generator"])
        self.losses.copy_(saved["losses"])
        self.step = saved["step"]
