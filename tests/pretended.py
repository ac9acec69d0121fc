"""A pretended Apple GPU that computes, and refuses float64; and answers for tensors without values.

    with pretended() as device:  # torch.device("mps"), the default device inside
        x = torch.randn(3, 2)  # computed on the CPU, says that it is on mps:0

As on the real one: no float64 and no complex128, also by `x.to("cpu", torch.float64)`, which Metal
would have to convert (torch 2.14 writes zeros, other versions raise); no mixing with CPU tensors of
a dimension or more; no draw by another device's generator; no NumPy. Not as on the real one: its
numbers, and which operators it lacks. torch itself turns a TypeError in `a / b` of two numbers into
"unsupported operand type(s)": that is float64 too.
"""

from __future__ import annotations

import contextlib
import linecache
from unittest import mock

import torch
import torch._dynamo  # torch imports it under its first mode, and it reads what is replaced below
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HERE, META, CPU = torch.device("mps", 0), torch.device("meta"), torch.device("cpu")
WIDE = (torch.float64, torch.complex128)
WHOLE = (torch.quantile, torch.Tensor.quantile)  # torch computes ranks in float64, but on MPS
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Pretended(torch.Tensor):
    """Says that it is on mps:0 and holds a CPU tensor. To the autograd engine it is on meta."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: HERE)
    is_mps, is_meta = property(lambda self: True), property(lambda self: False)

    @staticmethod
    def __new__(cls, inner):
        """Refuse what Metal cannot hold."""
        if inner.dtype in WIDE:
            raise TypeError(f"the pretended MPS device does not support {str(inner.dtype)[6:]}")
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        options = {"dtype": inner.dtype, "device": META}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **place, **options)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """What reaches a pretended tensor where the mode below is not active."""
        return compute(func, args, kwargs or {})

    def tolist(self):
        """torch's own is not for subclasses."""
        return self.inner.tolist()

    def numpy(self, **_):
        """Refused, as for every tensor that is not on the CPU."""
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self):
        """That of the CPU's tensor, after a word of warning."""
        return f"pretended {self.inner!r}"

    def __format__(self, spec):
        """A number's, if it is one."""
        return format(repr(self) if self.ndim else self.item(), spec)


def is_pretended(x):
    """Whether x is a tensor on the pretended device."""
    return isinstance(x, Pretended)


def ours(device):
    """Whether a device or its name, or None, is the pretended one, by either of its two names."""
    return device is not None and torch.device(device).type in ("mps", "meta")


def default():
    """The default device; `torch.get_default_device` would make a tensor to learn of it."""
    return torch.utils._device.CURRENT_DEVICE or CPU


def over(change, x):
    """What `change` makes of each leaf of lists, tuples and dicts."""
    if isinstance(x, (list, tuple)):
        changed = [over(change, a) for a in x]
        return changed if isinstance(x, list) else tuple(changed)
    return {k: over(change, a) for k, a in x.items()} if isinstance(x, dict) else change(x)


def compute(func, args, kwargs):
    """Run an operator on the CPU, and wrap what would be on the pretended device."""
    held, strangers, own = [], [], {}
    made = ours(kwargs.get("device"))
    away = kwargs.get("device") is not None and not made

    def unwrap(a):
        if not isinstance(a, torch.Tensor):
            return a
        inner = a.inner if is_pretended(a) else a
        (held if is_pretended(a) else strangers).append(a)
        own[id(inner)] = a  # an operator in place gives it back
        return inner

    def wrap(result):
        if not isinstance(result, torch.Tensor):
            return result
        if result.dtype in WIDE:
            Pretended(result)  # raises: Metal would have to compute it, wherever it is to go
        return own[id(result)] if id(result) in own else result if away else Pretended(result)

    plain, options = over(unwrap, args), over(unwrap, kwargs)
    if not held and not made:
        return func(*args, **kwargs)
    if held and strangers:
        check_devices(func, args, strangers)
    results = over(wrap, func(*plain, **options | ({"device": CPU} if made else {})))
    if torch.Tag.inplace_view in func.tags:  # x.squeeze_(): the wrapper's own shape changes too
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
    if any(a.shape != a.inner.shape or a.stride() != a.inner.stride() for a in held):
        raise NotImplementedError(f"{func} of pretended tensors: it changes the shape of one")
    return results


def check_devices(func, args, strangers):
    """Raise as torch does where a pretended tensor meets CPU tensors that are not numbers."""
    if func in INDEXING and is_pretended(args[0]):  # the indices may come from the CPU
        strangers = [a for a in args[2:3] if isinstance(a, torch.Tensor) and not is_pretended(a)]
    least = 0 if func in (aten.cat.default, aten.stack.default) else 1
    if func is not aten.copy_.default and any(a.ndim >= least for a in strangers):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} found mps:0 and cpu"
        )


class Dispatch(TorchDispatchMode):
    """Operators that make tensors: on the pretended device, they make pretended ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """All operators."""
        return compute(func, args, kwargs or {})


class Function(TorchFunctionMode):
    """What torch does before its operators: numbers to tensors, no-op moves, checks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """All functions and methods."""
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            here = args[0].device if isinstance(args[0], torch.Tensor) else default()
            wanted, found = torch.device(kwargs.get("device") or here), kwargs["generator"].device
            if wanted.type != found.type:
                text = f"Expected a '{wanted.type}' device type for generator but found '{found}'"
                raise RuntimeError(text)
        if func is torch.Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device} | kwargs
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            grad, device = (
                kwargs.pop("requires_grad", False),
                kwargs.pop("device", None) or default(),
            )
            device = META if ours(device) else device
            if is_pretended(args[0]) and func is not torch.tensor:
                return args[0].to(device, kwargs.get("dtype") or args[0].dtype)
            data = over(lambda a: a.detach().inner if is_pretended(a) else a, args[0])
            value = func(data, *args[1:], device=CPU if device is META else device, **kwargs)
            return (Pretended(value) if device is META else value).requires_grad_(grad)
        if func in WHOLE and is_pretended(args[0]):
            args, kwargs = over(lambda a: a.cpu() if is_pretended(a) else a, (args, kwargs))
            return func(*args, **kwargs).to(META)
        if func is torch.Tensor.to:  # to where it is: no copy
            named = (str, torch.device)
            args, kwargs = over(
                lambda a: META if isinstance(a, named) and ours(a) else a, (args, kwargs)
            )
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """Draws on the CPU, and says which device it was made for."""

    def __new__(cls, device="cpu"):
        """For the pretended device, one for the CPU."""
        self = super().__new__(cls, CPU if ours(device) else device)
        self.place = HERE if ours(device) else torch.device(device)
        return self

    device = property(lambda self: self.place)


@contextlib.contextmanager
def pretended():
    """The pretended device is the default one, and `torch.backends.mps.is_available()`."""
    before = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        for place, there in ((torch.backends.mps, True), (torch.cuda, False)):
            stack.enter_context(mock.patch.object(place, "is_available", return_value=there))
        stack.enter_context(Dispatch())
        stack.enter_context(Function())
        stack.callback(torch.set_default_device, before and before.device)
        torch.set_default_device("mps")
        yield torch.device("mps")


class answering(TorchDispatchMode):
    """Every reading of a fake or meta tensor's value is answered with True, 1 or 1.0.

    To be entered after FakeTensorMode. What asks `if not x.isfinite().all()` goes on; what asks
    `if x.isnan().any()` does not.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """All operators."""
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind is torch.bool else 1.0 if kind.is_floating_point else 1
        if func in (aten.equal.default, aten.is_nonzero.default):
            return True
        return func(*args, **kwargs or {})


def run_notebook(notebook, name="notebook"):
    """Run a notebook's code cells in this process on the pretended device; returns their names.

    Figures are drawn, and shown to nobody. An error has its cell as the file.
    """
    import IPython.core.display_functions as shown
    import matplotlib.pyplot as plt

    sources = [c.source for c in notebook.cells if c.cell_type == "code"]
    names = {"__name__": "__main__"}
    plt.switch_backend("Agg")
    quiet = mock.patch.object(shown, "print", create=True)  # display() prints where no notebook is
    with pretended(), plt.rc_context(), quiet:
        for i, source in enumerate(sources, 1):
            file = f"{name}, code cell {i}"
            linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
            exec(compile(source, file, "exec"), names)
    plt.close("all")
    return names
