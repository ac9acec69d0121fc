"""The pretended device computes as the CPU does, refuses what Apple's refuses, leaves nothing."""

import nbformat
import numpy as np
import pytest
import torch
from pretended import answering, is_pretended, pretended, run_notebook
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

PLAIN = torch.Generator


def both(compute):
    """`compute(random, device)` gives the same on the CPU and on the pretended device."""
    plain = compute(torch.Generator().manual_seed(0), torch.device("cpu"))
    with pretended() as device:
        held = compute(torch.Generator(device).manual_seed(0), device)
    plain, held = (x if isinstance(x, (list, tuple)) else [x] for x in (plain, held))
    assert len(plain) == len(held)
    for a, b in zip(plain, held, strict=True):
        assert is_pretended(b)
        assert not is_pretended(a)
        assert (b.requires_grad, b.stride()) == (a.requires_grad, a.stride())
        torch.testing.assert_close(b.detach().cpu(), a.detach())


FACTORIES = {
    "zeros": lambda: torch.zeros(3, 2),
    "ones": lambda: torch.ones(3, dtype=torch.bool),
    "full": lambda: torch.full((2,), 7),
    "empty": lambda: torch.empty(2, 3).fill_(1.0),
    "arange": lambda: torch.arange(4),
    "linspace": lambda: torch.linspace(0, 1, 5),
    "logspace": lambda: torch.logspace(-1, 1, 5),
    "eye": lambda: torch.eye(3),
    "tensor": lambda: torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "tensor of tensors": lambda: torch.tensor([torch.ones(3).sum(), torch.tensor(2.0)]),
    "tensor with a gradient": lambda: torch.tensor(1.0, requires_grad=True),
    "as_tensor": lambda: torch.as_tensor(1.5),
    "as_tensor of an array": lambda: torch.as_tensor(np.ones(3, dtype=np.float32)),
    "new_tensor": lambda: torch.zeros(2).new_tensor([1.0, 2.0]),
    "new_zeros": lambda: torch.ones(2).new_zeros(3),
    "like": lambda: torch.ones_like(torch.zeros(2, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name):
    both(lambda random, device: FACTORIES[name]())


DRAWS = {
    "randn": lambda g, d: torch.randn((3, 2), generator=g, device=d),
    "rand": lambda g, d: torch.rand(3, generator=g, device=d),
    "randint": lambda g, d: torch.randint(9, (5,), generator=g, device=d),
    "randperm": lambda g, d: torch.randperm(9, generator=g, device=d),
    "multinomial": lambda g, d: torch.multinomial(torch.ones(5, device=d), 9, True, generator=g),
    "normal_": lambda g, d: torch.empty(4, device=d).normal_(generator=g),
    "twice": lambda g, d: [torch.rand(2, generator=g, device=d) for _ in range(2)],
    "state": lambda g, d: (
        s := g.get_state(),
        torch.rand(9, generator=g, device=d),
        g.set_state(s),
        torch.rand(9, generator=g, device=d),
    )[1::2],
    "default generator": lambda g, d: (torch.manual_seed(3), torch.randn(3))[1:],
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws(name):
    both(DRAWS[name])


OPERATORS = {
    "matmul": lambda x: x @ x[0],
    "norm": lambda x: x.norm(dim=1),
    "mask": lambda x: x[x[:, 0] > 0],
    "index": lambda x: x[torch.tensor([0, 2]), None],
    "set by mask": lambda x: x.clone().index_put_((x > 0,), torch.tensor(5.0)),
    "view in place": lambda x: (y := x.clone(), y[:2].add_(1), y.T[0].mul_(2)),
    "in place shape": lambda x: x.clone().unsqueeze_(1),
    "sort": lambda x: x.sort(dim=0),
    "quantile": lambda x: x.quantile(torch.tensor([0.1, 0.5]), dim=0),
    "searchsorted": lambda x: torch.searchsorted(torch.linspace(-1, 1, 9), x),
    "cdist": lambda x: torch.cdist(x, 2 * x),
    "bincount": lambda x: torch.bincount((x.flatten() > 0).long(), minlength=4),
    "index_add": lambda x: torch.zeros(2).index_add(0, torch.tensor([0, 1, 0, 1]), x[:, 0]),
    "softmax": lambda x: (x / 3).log_softmax(1).exp(),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    "eigh": lambda x: torch.linalg.eigh(x @ x.T)[0],
    "svd": lambda x: torch.linalg.svd(x, full_matrices=False),
    "solve": lambda x: torch.linalg.solve(x @ x.T + torch.eye(4), x),
    "fft": lambda x: torch.fft.fft2(x, s=(8, 8)).abs(),
    "conv2d": lambda x: functional.conv2d(x.reshape(1, 1, 4, 4), torch.ones(1, 1, 3, 3)),
    "avg_pool2d": lambda x: functional.avg_pool2d(x.reshape(1, 1, 4, 4), 2),
    "interpolate": lambda x: functional.interpolate(x.reshape(1, 1, 4, 4), scale_factor=2.0),
    "group_norm": lambda x: functional.group_norm(x.reshape(1, 4, 2, 2), 2),
    "pad": lambda x: functional.pad(x.reshape(1, 1, 4, 4), (1, 1, 1, 1), mode="replicate"),
    "channels last": lambda x: x.reshape(1, 4, 2, 2).to(memory_format=torch.channels_last),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0], x[1]),
    "number": lambda x: x * torch.tensor(2.0, dtype=torch.float64, device="cpu"),
    "CPU indices": lambda x: x[torch.tensor([0, 2], device="cpu")],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    both(lambda g, d: OPERATORS[name](torch.randn((4, 4), generator=g, device=d)))


DERIVATIVES = {
    "backward": lambda f, x: (f(x).sum().backward(), x.grad)[1:],
    "twice": lambda f, x: torch.autograd.grad(
        torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].square().sum(), x
    ),
    "kept graph": lambda f, x: [
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
        for y in [f(x)]
        for _ in range(2)
    ],
    "jvp": lambda f, x: torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),)),
    "jvp by two": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda z: f(z).sum()))(x.detach()),
    "checkpoint": lambda f, x: torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).sum(), x
    ),
    "through the CPU": lambda f, x: torch.autograd.grad(f(x.cpu()).to(x.device).sum(), x),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name):
    def compute(random, device):
        x = torch.randn((3, 2), generator=random, device=device).requires_grad_()
        return DERIVATIVES[name](lambda x: x.sin() ** 3 * x.norm() + x.softmax(-1), x)

    both(compute)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("made", ["here", "on the CPU"])
def test_training(options, made):
    def compute(random, device):
        torch.manual_seed(0)
        place = torch.device("cpu") if made == "on the CPU" else device
        model = nn.Sequential(
            nn.Linear(2, 8, device=place), nn.SiLU(), nn.Linear(8, 1, device=place)
        )
        model = model.to(device)
        assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
        average = torch.optim.swa_utils.AveragedModel(model)
        x = torch.randn((5, 2), generator=random, device=device)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        before = [p.detach().clone() for p in model.parameters()]
        model.load_state_dict(average.module.state_dict())
        return [*before, *model.parameters()]

    both(compute)


WIDE = {
    "made": lambda x: torch.zeros(3, dtype=torch.float64),
    "made complex": lambda x: torch.zeros(3, dtype=torch.complex128),
    "drawn": lambda x: torch.randn(3, dtype=torch.float64),
    "of numbers": lambda x: torch.tensor([1.0], dtype=torch.float64),
    "of a NumPy number": lambda x: torch.tensor(np.float64(1.0)),
    "of an array": lambda x: torch.as_tensor(np.ones(3)),
    "converted": lambda x: x.double(),
    "converted like": lambda x: x.to(torch.zeros(1, dtype=torch.float64, device="cpu").dtype),
    "summed": lambda x: x.sum(dtype=torch.float64),
    "moved": lambda x: torch.zeros(3, dtype=torch.float64, device="cpu").to("mps"),
    "moved away": lambda x: x.to("cpu", torch.float64),  # torch 2.14 writes zeros, others raise
    "copied away": lambda x: torch.zeros(3, dtype=torch.float64, device="cpu").copy_(x),
    "module": lambda x: nn.Linear(2, 2).double(),
    "module moved": lambda x: nn.Linear(2, 2, device="cpu").double().to("mps"),
    "two numbers": lambda x: torch.add(x[0], torch.ones((), dtype=torch.float64, device="cpu")),
}


@pytest.mark.parametrize("name", WIDE)
def test_float64_is_refused(name):
    with pretended():
        x = torch.ones(3)
        with pytest.raises(TypeError, match=r"does not support (float64|complex128)"):
            WIDE[name](x)


def test_float64_on_the_cpu_is_allowed():
    with pretended():
        x = torch.ones(3)
        assert x.cpu().double().dtype == torch.float64
        assert x.copy_(torch.zeros(3, dtype=torch.float64, device="cpu")).tolist() == [0, 0, 0]
        assert is_pretended(
            torch.zeros(3, dtype=torch.float64, device="cpu").to("mps", torch.float32)
        )


STRANGERS = {
    "sum": lambda x, c: x + c,
    "in place on the CPU": lambda x, c: c.add_(x),
    "one number times a CPU tensor": lambda x, c: c * x[0],
    "cat": lambda x, c: torch.cat([x, c]),
    "stack of numbers": lambda x, c: torch.stack([x[0], c[0]]),
    "mask of a CPU tensor": lambda x, c: c[x > 0],
    "values": lambda x, c: x.index_put_((torch.arange(3),), c),
    "matmul": lambda x, c: x @ c,
    "linear": lambda x, c: nn.Linear(3, 1)(c),
    "where": lambda x, c: torch.where(c > 0, x, x),
    "out": lambda x, c: torch.add(x, x, out=c),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_devices_do_not_mix(name):
    with pretended(), pytest.raises(RuntimeError, match="same device"):
        STRANGERS[name](torch.ones(3), torch.ones(3, device="cpu"))


def test_generators():
    with pretended() as device:
        ours, plain = torch.Generator(device), torch.Generator()
        assert (ours.device, plain.device) == (torch.zeros(1).device, torch.device("cpu"))
        assert isinstance(ours, torch.Generator)
        assert isinstance(plain, torch.Generator)
        for generator, place in ((plain, device), (ours, "cpu"), (plain, None)):
            with pytest.raises(RuntimeError, match="device type for generator"):
                torch.randn(3, generator=generator, device=place)
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.multinomial(torch.ones(3), 2, generator=plain)


def test_moves():
    with pretended() as device:
        x, c = torch.ones(3), torch.ones(3, device="cpu")
        assert str(x.device) == "mps:0"
        assert (x.is_mps, x.is_meta, x.is_cpu) == (True, False, False)
        for same in (
            x.to(device),
            x.to("mps"),
            x.to(x),
            x.float(),
            torch.as_tensor(x, device=device),
        ):
            assert same is x
        for there in (
            c.to(device),
            c.to(x),
            torch.as_tensor(c),
            torch.as_tensor(c, device=x.device),
        ):
            assert is_pretended(there)
        for back in (x.cpu(), x.to("cpu"), x.to(c), torch.zeros_like(x, device="cpu")):
            assert type(back) is torch.Tensor
        assert not is_pretended(torch.from_numpy(np.ones(3)))
        with torch.device("cpu"):
            assert not is_pretended(torch.ones(3))


def test_values_are_read():
    with pretended():
        x = torch.arange(3.0)
        assert x.tolist() == [0, 1, 2]
        assert (float(x.sum()), int(x.sum()), x[1].item(), bool((x >= 0).all())) == (
            3.0,
            3,
            1.0,
            True,
        )
        assert f"{x.mean():.2f}" == "1.00"
        assert "pretended" in repr(x)
        assert x.cpu().numpy().sum() == 3
        assert torch.equal(x, x.clone())
        assert [float(a) for a in x] == [0, 1, 2]
        for read in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="numpy"):
                read()


def test_nothing_is_left():
    with pretended():
        assert torch.get_default_device() == torch.zeros(1).device
        assert torch.backends.mps.is_available()
    with pytest.raises(ZeroDivisionError), pretended():
        _ = 1 / 0
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.Generator is PLAIN
    assert not is_pretended(torch.ones(1))
    with torch.device("meta"), pretended():
        torch.set_default_device("cpu")
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_answering(device):
    fake = FakeTensorMode() if device == "cuda" else torch.no_grad()
    with fake, answering():
        x = torch.randn(3, device=device)
        assert x.isfinite().all()
        assert (float(x.sum()), int(x.argmax()), (x > 0).any().item()) == (1.0, 1, True)
        assert torch.equal(x, x + 1)
        assert x.device.type == device
        assert (x + 1).shape == (3,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(x.isfinite().all())


CELLS = [
    "import torch\nmps = torch.backends.mps.is_available()",
    "torch.set_default_device('mps' if mps else 'cpu')",
    "SEED = 0\nN = 7",
    "import matplotlib.pyplot as plt\nx = torch.randn(N)\nplt.plot(x.cpu())\nsteps = 5_000",
    "from IPython.display import display\ndisplay({'image/png': 'AAAA'}, raw=True)",
]


def notebook(cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])


def test_run_notebook(capsys):
    names = run_notebook(notebook(CELLS))
    assert is_pretended(names["x"])
    assert (len(names["x"]), names["steps"], names["SEED"]) == (7, 5_000, 0)
    assert capsys.readouterr().out == ""
    assert torch.get_default_device() == torch.device("cpu")
    with pytest.raises(TypeError, match="float64") as error:
        run_notebook(notebook([*CELLS, "torch.zeros(1).double()"]))
    assert any("code cell 6" in str(entry.path) for entry in error.traceback)
