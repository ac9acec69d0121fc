"""Train the shipped digit network: `python scripts/pretrain.py --out FOLDER`.

On several devices: `accelerate launch scripts/pretrain.py --out FOLDER`. The folder keeps
`checkpoint.pt`: a run that was killed goes on from it, to the same weights, bit for bit. At the
end come `denoiser.safetensors`, `log.csv` and `samples.png`. Needs the extra sde_utils[pretrain].
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import save_image

import sde_utils as su

SIGMA_DATA = 0.6


def parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    options = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = options.add_argument
    add("--out", type=Path, required=True, help="folder")
    add("--steps", type=int, default=20_000, help="batches")
    add("--batch", type=int, default=128, help="images a step, over all processes")
    add("--lr", type=float, default=3e-3, help="falls to 0 over the last 30 %% of the steps")
    add("--warmup", type=int, default=300, help="steps over which lr rises")
    add("--ema", type=float, default=0.999, help="decay of the moving average a step")
    add("--widths", type=int, nargs="+", default=[32, 128], help="channels at each level")
    add("--precision", choices=["no", "bf16"], default="bf16", help="of the arithmetic")
    add("--full", action="store_true", help="train on torchvision's 60,000 digits")
    add("--seed", type=int, default=0, help="of the first weights and of every draw")
    add("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    add("--log-every", type=int, default=100, help="steps that a line of the log is the mean of")
    return options


def read(arguments: list[str] | None = None) -> tuple[argparse.Namespace, su.Denoiser]:
    """The settings, and the network as it begins. Ends the program where one cannot be."""
    options = parser()
    s, processes = options.parse_args(arguments), int(os.environ.get("WORLD_SIZE", "1"))
    for holds, said in [
        (min(s.steps, s.batch, s.log_every) > 0, "--steps, --batch, --log-every are at least 1"),
        (max(s.steps, s.batch) <= 10**6, "--steps and --batch are at most 1,000,000"),
        (s.batch % processes == 0, f"--batch is a multiple of {processes}, the processes"),
        (0 < s.lr < float("inf"), "--lr is positive and finite"),
        (0 <= s.warmup < s.steps, "--warmup is at least 0 and less than --steps"),
        (0 <= s.ema < 1, "--ema lies in [0, 1)"),
        (0 <= s.save_every < float("inf"), "--save-every is at least 0 and finite"),
        (0 <= s.seed < 2**63, "--seed lies in [0, 2^63)"),
    ]:
        if not holds:
            options.error(said)
    torch.manual_seed(s.seed)
    try:
        network = su.UNet(widths=s.widths)
        network(torch.zeros(1, 1, 28, 28), torch.zeros(1))
        s.out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        options.error(f"--widths: {error}")
    except OSError as error:
        options.error(f"--out: {error}")
    return s, su.Denoiser(network, SIGMA_DATA)


def weight(sigma: Tensor) -> Tensor:
    """Gives the network's own output, F, the same weight at every σ."""
    return 1 + (sigma / SIGMA_DATA) ** 2


def write(out: Path, denoiser: su.Denoiser, losses: Tensor, log_every: int) -> None:
    """The log, and 72 samples by 18 steps of Heun's method, from the same noise every time."""
    with (out / "log.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss"])
        for i, part in enumerate(losses.split(log_every)):
            rows.writerow([i * log_every + len(part), f"{part.mean():.6f}"])
    sde, device = su.VPSDE(), losses.device
    x = sde.prior((72, 1, 28, 28), device=device, generator=torch.Generator().manual_seed(0))
    x = su.sample(sde, denoiser, x, times=su.karras_times(sde, 18), predictor=su.heun)
    save_image((x.clamp(-1, 1) + 1) / 2, out / "samples.png", nrow=12, padding=1)


def main() -> None:
    s, denoiser = read()
    began = time.monotonic()
    accelerator = Accelerator(mixed_precision=s.precision)
    device = accelerator.device
    denoiser = denoiser.to(device).to(memory_format=torch.channels_last)
    images = su.mnist(full=s.full, split="train")[0].to(device)
    with accelerator.autocast():
        losses = su.train(
            denoiser, images, su.log_normal(-0.6, 1.2, 0.005, 200.0), steps=s.steps,
            batch_size=s.batch, lr=s.lr, warmup=s.warmup / s.steps, fall=0.3, weight=weight,
            clip=1.0, ema_decay=s.ema, ema_every=1, save_every=s.save_every,
            generator=torch.Generator().manual_seed(s.seed), checkpoint=s.out / "checkpoint.pt",
        )  # fmt: skip
    if accelerator.is_main_process:
        write(s.out, denoiser, losses, s.log_every)
        facts = vars(s) | {"out": s.out.name, "digits": len(images), "images": s.steps * s.batch}
        facts["seconds"] = round(time.monotonic() - began)  # since the last checkpoint taken up
        su.save_denoiser(denoiser, s.out / "denoiser.safetensors", torch.float16, **facts)
    accelerator.end_training()


if __name__ == "__main__":
    main()
