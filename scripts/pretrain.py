"""Train the shipped digit network: `python -m sde_utils.pretrain --out FOLDER`; on several devices by `accelerate launch -m ...`.

In the folder: `checkpoint.pt` (all that is needed to go on), `log.csv`, `samples.png`, `denoiser.safetensors` (the moving average so far).
What step i draws, images, noise levels and noise, depends on the seed and i alone. So a run that was killed goes on from its last checkpoint to
the same weights, bit for bit, and several processes, each taking its share of the same batch, do what one process does, up to rounding.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ._checks import check_count, check_positive
from .data import mnist
from .networks import Denoiser, UNet, save_denoiser
from .sampling import heun, sample
from .sde import VPSDE
from .training import dsm_loss, log_normal

SIGMA_DATA, LOW, HIGH = 0.6, 0.005, 200.0
FREE = {"out", "steps", "save_every", "log_every"}  # settings that may change when a run is taken up again


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sde_utils.pretrain", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log, samples and weights")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128, help="images a step, over all processes")
    parser.add_argument("--lr", type=float, default=3e-3, help="Adam's, after warm-up; falls linearly to 0 over the last 30 %% of the steps")
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the moving average a step")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16", help="of the network's arithmetic in training")
    parser.add_argument("--full", action="store_true", help="train on torchvision's 60,000 digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--log-every", type=int, default=100, help="steps between lines of the log; checkpoints fall on one of them")
    settings = parser.parse_args(arguments)
    check_count(**{name: getattr(settings, name) for name in ("steps", "batch", "warmup", "log_every")})
    check_positive(lr=settings.lr)
    if not (0 <= settings.ema < 1 and settings.save_every >= 0):
        raise ValueError(f"--ema must lie in [0, 1) and --save-every be non-negative, got {settings.ema} and {settings.save_every}")
    return settings


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of --lr at a step: rises linearly over `warmup` steps, stays, falls linearly to 0 over the last 30 % of the steps."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (0.3 * steps))


def batch(images: Tensor, step: int, settings: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise levels and noise of one step: a function of the seed and the step."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    index = torch.randint(len(images), (settings.batch,), generator=generator)
    sigma = log_normal(-0.6, 1.2, LOW, HIGH)(settings.batch, generator)
    noise = torch.randn(settings.batch, *images.shape[1:], generator=generator)
    return images[index.to(images.device)], sigma.to(images), noise.to(images)


def write(state: object, path: Path) -> None:
    """Save and replace atomically: after a crash or on a full disk the file is the old one, whole. `OSError` names the remedy."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        remedy = "free some space and run the same command again; the last checkpoint is whole"
        raise OSError(f"could not write {path} ({error}): {remedy}") from error


def read(path: Path, settings: dict[str, object]) -> dict:
    """A checkpoint of a run with these settings. `ValueError` if it is unreadable or of another run; nothing is overwritten."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = json.loads(state["settings"])
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(f"{path} is not a checkpoint of this program ({error}): move it away or give another --out") from error
    other = {k: (found.get(k), v) for k, v in settings.items() if k not in FREE and found.get(k) != v}
    if other:
        said = ", ".join(f"{k} = {a} there, {b} here" for k, (a, b) in other.items())
        raise ValueError(f"{path} is of another run ({said}): repeat its settings or give another --out")
    return state


def save_grid(denoiser: nn.Module, path: Path, rows: int = 6, columns: int = 12) -> None:
    """A PNG of samples by 18 Heun steps, from the same noise every time."""
    from torchvision.utils import save_image

    device = next(denoiser.parameters()).device
    start = VPSDE().prior((rows * columns, 1, 28, 28), device=device, generator=torch.Generator().manual_seed(0))
    save_image((sample(VPSDE(), denoiser, start, steps=18, predictor=heun).clamp(-1, 1) + 1) / 2, path, nrow=columns, padding=1)


def main(arguments: list[str] | None = None) -> None:
    settings = parse(arguments)
    accelerator = Accelerator(mixed_precision=settings.precision)
    ranks, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if settings.batch % ranks:
        raise ValueError(f"--batch must be a multiple of the number of processes, got {settings.batch} for {ranks}")
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}
    settings.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = settings.out / "checkpoint.pt", settings.out / "log.csv"
    state = read(checkpoint, facts) if checkpoint.exists() else None

    torch.manual_seed(settings.seed)
    denoiser = Denoiser(UNet(widths=settings.widths), SIGMA_DATA).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to torch 2.4's stubs
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=settings.lr, betas=(0.9, 0.99))
    first, seconds = 0, 0.0
    if state is not None:
        denoiser.load_state_dict(state["denoiser"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    images = mnist(settings.full, "train")[0].to(device)
    mine = slice(rank * settings.batch // ranks, (rank + 1) * settings.batch // ranks)

    rows = list(csv.reader(log.open()))[1:] if first and log.exists() else []
    rows, recent = [row for row in rows if int(row[0]) <= first], torch.zeros(0)
    began = saved = time.monotonic()
    bar = tqdm(range(first, settings.steps), file=sys.stdout, initial=first, total=settings.steps, mininterval=10, disable=rank > 0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(step, settings.steps, settings.warmup)
        x0, sigma, noise = (a[mine] for a in batch(images, step, settings))
        weight = 1 + (sigma / SIGMA_DATA) ** 2  # gives the network's own output, F, the same weight at every σ
        with accelerator.autocast():
            loss = (weight * dsm_loss(model, x0, sigma, noise=noise)).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(denoiser)
        recent = torch.cat([recent, accelerator.gather(loss.detach().float().reshape(1)).mean().reshape(1).cpu()])
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            if not math.isfinite(mean := float(recent.mean())):
                raise FloatingPointError(f"the loss is not finite by step {done}: lower --lr (now {settings.lr})")
            spent = seconds + time.monotonic() - began
            rows.append([done, done * settings.batch, f"{mean:.6f}", f"{optimizer.param_groups[0]['lr']:.3g}", f"{spent:.0f}"])
            recent = recent[:0]
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
        if (time.monotonic() - saved >= settings.save_every and done % settings.log_every == 0) or done == settings.steps:
            saved = time.monotonic()
            if rank == 0:
                tensors = {"denoiser": denoiser.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
                write({"settings": json.dumps(facts), "step": done, "seconds": seconds + saved - began, **tensors}, checkpoint)
                with log.open("w", newline="") as file:
                    csv.writer(file).writerows([["step", "images", "loss", "lr", "seconds"], *rows])
                smooth = cast(Denoiser, average.module.eval())
                seen = {"digits": len(images), "images": done * settings.batch, "seconds": round(seconds + saved - began)}
                save_denoiser(smooth, settings.out / "denoiser.safetensors", torch.float16, **facts | {"out": settings.out.name} | seen)
                save_grid(smooth, settings.out / "samples.png")
    accelerator.end_training()


if __name__ == "__main__":
    main()
