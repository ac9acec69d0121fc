"""A pretended Apple GPU that computes, and refuses float64; and a mode that answers for tensors without values.

    with pretended() as device:      # torch.device("mps"), the default device inside
        x = torch.randn(3, 2)        # computed on the CPU, says that it is on mps:0

What the pretended device copies of the real one: no float64 and no complex128 (also not by `x.to("cpu", torch.float64)`, which Metal
would have to convert), no mixing with CPU tensors of one dimension or more, no random draw by a generator of another device, no NumPy.
What it does not copy: Metal's numbers, its speed, and which operators it lacks.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # torch imports it under its first mode, and it reads what is replaced here
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HERE, META, CPU = torch.device("mps", 0), torch.device("meta"), torch.device("cpu")
WIDE = (torch.float64, torch.complex128)
WHOLE = (torch.quantile, torch.Tensor.quantile, torch.nanquantile)  # in float64 within, but on MPS
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Pretended(torch.Tensor):
    """A tensor that says it is on mps:0 and holds a CPU tensor. To the autograd engine it is on meta, which it takes for a CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: HERE)
    is_mps, is_meta = property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        """Refuse what Metal cannot hold."""
        if inner.dtype in WIDE:
            raise TypeError(f"the pretended MPS device does not support {str(inner.dtype).removeprefix('torch.')}")
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype, "device": META}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """What reaches a pretended tensor when the mode below is not active."""
        return compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"pretended {self.inner!r}"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else repr(self), spec)


def is_pretended(x: object) -> bool:
    """Whether x is a tensor on the pretended device."""
    return isinstance(x, Pretended)


def ours(device: Any) -> bool:
    """Whether a device, its name or None is the pretended one, under either of its names."""
    return device is not None and torch.device(device).type in ("mps", "meta")


def default() -> torch.device:
    """What `torch.set_default_device` has set; its own way to say so makes a tensor."""
    return torch.utils._device.CURRENT_DEVICE or CPU


def over(change: Any, x: Any) -> Any:
    """What `change` makes of each leaf of lists, tuples and dicts."""
    if isinstance(x, (list, tuple)):
        changed = [over(change, a) for a in x]
        return changed if isinstance(x, list) else tuple(changed)
    return {k: over(change, a) for k, a in x.items()} if isinstance(x, dict) else change(x)


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the CPU, and wrap what would be on the pretended device."""
    held, strangers, own = [], [], {}

    def unwrap(a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        inner = a.inner if is_pretended(a) else a
        (held if is_pretended(a) else strangers).append(a)
        own[id(inner)] = a  # an operator in place gives it back
        return inner

    def place(result: Any) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        if result.dtype in WIDE:
            Pretended(result)  # raises: Metal would have to compute it, wherever it is to go
        return own[id(result)] if id(result) in own else result if away else Pretended(result)

    inner_args, inner_kwargs = over(unwrap, args), over(unwrap, kwargs)
    made = ours(kwargs.get("device"))
    away = kwargs.get("device") is not None and not made
    if not held and not made:
        return func(*args, **kwargs)
    if held and strangers:
        check_devices(func, args, strangers)
    if made:
        inner_kwargs["device"] = CPU
    results = over(place, func(*inner_args, **inner_kwargs))
    if any(a.shape != a.inner.shape or a.stride() != a.inner.stride() for a in held):
        raise NotImplementedError(f"{func} changes a tensor's shape in place, which a pretended tensor cannot follow")
    return results


def check_devices(func: Any, args: tuple, strangers: list[torch.Tensor]) -> None:
    """Raise as torch does where a CPU tensor of one dimension or more meets a pretended one. Indices may come from the CPU."""
    if func in INDEXING and is_pretended(args[0]):
        strangers = [a for a in args[2:3] if isinstance(a, torch.Tensor) and not is_pretended(a)]
    least = 0 if func in (aten.cat.default, aten.stack.default) else 1
    found = [a.device for a in strangers if a.ndim >= least]
    if found and func is not aten.copy_.default:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found mps:0 and {found[0]}")


class Dispatch(TorchDispatchMode):
    """Operators that make tensors: on the pretended device, they make pretended ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


class Function(TorchFunctionMode):
    """What torch does before its operators are reached: tensors from Python's numbers, no-op moves, the generator's device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            like = args[0] if args and isinstance(args[0], torch.Tensor) else None
            device = torch.device(kwargs.get("device") or (default() if like is None else like.device))
            if device.type != kwargs["generator"].device.type:
                found = kwargs["generator"].device.type
                raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{found}'")
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], **{"dtype": args[0].dtype, "device": args[0].device} | kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.pop("device", None) or default()
            if is_pretended(args[0]) and func is not torch.tensor:
                return args[0].to(META if ours(device) else device, kwargs.get("dtype") or args[0].dtype)
            grad = kwargs.pop("requires_grad", False)
            data = over(lambda a: a.detach().inner if is_pretended(a) else a, args[0])
            value = func(data, *args[1:], device=CPU, **kwargs)
            return (Pretended(value) if ours(device) else value).requires_grad_(grad)
        if func in WHOLE and is_pretended(args[0]):
            args, kwargs = over(lambda a: a.cpu() if is_pretended(a) else a, (args, kwargs))
            return func(*args, **kwargs).to(META)
        if func is torch.Tensor.to:  # to where it is: no copy
            args, kwargs = over(lambda a: META if isinstance(a, (str, torch.device)) and ours(a) else a, (args, kwargs))
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """Draws on the CPU; says where it was made for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, CPU if ours(device) else device)
        self.place = HERE if ours(device) else torch.device(device)
        return self

    device = property(lambda self: self.place)


@contextlib.contextmanager
def pretended() -> Iterator[torch.device]:
    """The pretended device is there, is found by `torch.backends.mps.is_available()`, and is the default device."""
    before = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: True))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: False))
        stack.enter_context(Dispatch())
        stack.enter_context(Function())
        stack.callback(torch.set_default_device, before and before.device)
        torch.set_default_device("mps")
        yield torch.device("mps")


class answering(TorchDispatchMode):  # noqa: N801
    """Every reading of a value of a fake or meta tensor is answered with True, 1 or 1.0: no value is there to be read.

    To be entered after FakeTensorMode. What asks `if not x.isfinite().all()` goes on; what asks `if x.isnan().any()` does not.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1 + 0j if kind.is_complex else 1
        if func in (aten.equal.default, aten.is_nonzero.default):
            return True
        return func(*args, **kwargs or {})


def run_notebook(path: str | Path, knobs: dict | None = None, replace: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a notebook's code cells in this process on the pretended device; returns their names.

    knobs: new values for the names of the cell that begins with SEED. replace: texts of the cells, each of which must occur, and theirs.
    Figures are drawn, and shown to nobody. An error names its cell as the file.
    """
    import IPython.core.display_functions as shown
    import matplotlib
    import matplotlib.pyplot as plt

    path, replace = Path(path).resolve(), replace or {}
    matplotlib.use("Agg")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells]
    missing = [old for old in replace if not any(old in s for s in sources)]
    if missing or (knobs and not any(s.startswith("SEED") for s in sources)):
        raise ValueError(f"{path.name} has no {missing or 'cell of knobs'}")
    names: dict[str, Any] = {"__name__": "__main__"}
    folder = os.getcwd()
    with pretended(), matplotlib.rc_context(), mock.patch.object(shown, "print", lambda *_: None, create=True):
        os.chdir(path.parent)
        try:
            for i, source in enumerate(sources, 1):
                for old, new in replace.items():
                    source = source.replace(old, new)
                if source.startswith("SEED"):
                    source += "".join(f"\n{name} = {value!r}" for name, value in (knobs or {}).items())
                file = f"{path.name}, code cell {i}"
                linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
                exec(compile(source, file, "exec"), names)
        finally:
            os.chdir(folder)
            plt.close("all")
    return names
