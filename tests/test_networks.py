import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rng
from safetensors import safe_open

import sde_utils
from sde_utils import (
    MLP,
    VESDE,
    VPSDE,
    Denoiser,
    UNet,
    heun,
    load_denoiser,
    load_pretrained,
    mnist,
    sample,
    save_denoiser,
)
from sde_utils.networks import Attention


def moved(network):
    """Away from the zero function it starts as."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng(1)))
    return network


def small(**options):
    torch.manual_seed(0)
    return moved(UNet(widths=(8, 16), **options))


def test_gradient_reaches_every_parameter():
    network, c = small(), torch.tensor([-1.0, 0.0, 1.0])
    network(torch.randn(3, 1, 28, 28, generator=rng()), c).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("channels", "size", "options"),
    [(1, (28, 28), {}), (3, (32, 16), {}), (2, (12, 8), {"patch": 1, "blocks": 2})],
)
def test_shapes_and_dtypes(channels, size, options):
    network = small(channels=channels, **options)
    x, c = torch.randn(2, channels, *size, generator=rng()), torch.tensor([-1.0, 0.5])
    out = network(x, c)
    assert out.shape == x.shape
    wide = network.double()(x.double(), c.double())
    assert wide.dtype == torch.float64
    assert (wide - out).abs().max() < 1e-4 * wide.abs().max()


def test_samples_of_a_batch_do_not_meet():
    network = small().double()
    x = torch.randn(5, 1, 28, 28, generator=rng(), dtype=torch.float64)
    c = torch.linspace(-1, 1, 5, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 2, 1])
    out = network(x, c)
    assert torch.allclose(network(x[order], c[order]), out[order], atol=1e-12)
    alone = torch.cat([network(x[i : i + 1], c[i : i + 1]) for i in range(5)])
    assert torch.allclose(alone, out, atol=1e-12)


def test_output_scale_at_both_ends_of_sigma():
    """D -> z as σ -> 0, with an error of σ |F|; at large σ, |D| stays at the data's size."""
    denoiser, x = Denoiser(small(), 0.6), mnist()[0][:8]
    near = small()(x, torch.zeros(8)).abs().max().clamp(min=1)
    assert (denoiser(x, 1e-4) - x).abs().max() < 1e-3 * near
    noise = torch.randn(x.shape, generator=rng())
    size = small()(noise, torch.full((8,), 1.7)).abs().max().clamp(min=1)
    assert denoiser(1000 * noise, 1000.0).abs().max() < 10 * 0.6 * size


def test_denoiser_is_its_formula():
    """Karras et al., table 1, written out; σ as a number, a scalar and one per sample; D(z, 0)."""
    network, s = moved(MLP(dim=3, width=8)).double(), 0.7
    denoiser, z = Denoiser(network, s), torch.randn(4, 3, generator=rng(), dtype=torch.float64)
    for sigma in (1e-3, 0.5, 20.0):
        norm = (sigma**2 + s**2) ** 0.5
        c = torch.full((4,), np.log(sigma) / 4, dtype=torch.float64)
        expected = (s / norm) ** 2 * z + sigma * s / norm * network(z / norm, c)
        for given in (sigma, torch.tensor(sigma).double(), torch.full((4,), sigma).double()):
            assert torch.allclose(denoiser(z, given), expected, rtol=1e-7, atol=1e-7)
        assert torch.allclose(denoiser(z, sigma), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(denoiser(z, 0.0), z, rtol=1e-15, atol=0)
    assert torch.allclose(denoiser(z, torch.zeros(4)), z, rtol=1e-15, atol=0)


def test_mlp_is_its_formula():
    """h = W x + E (c, cos πkc, sin πkc), k = 1..4; h + block(h); then out of silu(h)."""
    network = moved(MLP(dim=3, width=8, depth=1, frequencies=4)).double()
    x = torch.randn(5, 3, generator=rng(), dtype=torch.float64)
    c = torch.linspace(-1.5, 1, 5, dtype=torch.float64)[:, None]
    angles = np.pi * c * torch.arange(1, 5)
    h = network.first(x) + network.embed(torch.cat([c, angles.cos(), angles.sin()], dim=1))
    h = h + network.blocks[0](h)
    expected = network.last(h * h.sigmoid())
    torch.testing.assert_close(network(x, c[:, 0]), expected, rtol=1e-6, atol=1e-6)


def test_unet_sees_the_noise_level_as_eight_waves():
    network, seen = small(), []
    network.embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    c = torch.linspace(-1.5, 1, 5)[:, None]
    network(torch.randn(5, 1, 28, 28, generator=rng()), c[:, 0])
    angles = np.pi * c * torch.arange(1, 9)
    torch.testing.assert_close(seen[0], torch.cat([c, angles.cos(), angles.sin()], dim=1))


def test_attention_is_torchs():
    torch.manual_seed(0)
    attention = moved(Attention(16, 2)).double()
    x = torch.randn(2, 16, 3, 4, generator=rng(), dtype=torch.float64)
    parts = attention.qkv(attention.norm(x)).reshape(2, 3, 2, 8, 12).mT.unbind(1)
    h = torch.nn.functional.scaled_dot_product_attention(*parts)
    torch.testing.assert_close(attention(x), x + attention.out(h.mT.reshape(x.shape)))


def test_numbers_of_any_kind_are_numbers():
    data = torch.tensor([1.0, 3.0])
    for value in (data.std(), data.numpy().std(ddof=1), np.float64(2**0.5), 2**0.5):
        found = Denoiser(MLP(), value).sigma_data
        assert type(found) is float
        assert found == pytest.approx(2**0.5)
    config = UNet(widths=(np.int64(8), torch.tensor(16)), blocks=np.int64(1)).config
    assert json.loads(json.dumps(config)) == UNet(widths=(8, 16)).config


torch.manual_seed(0)
BOTH = [(MLP(), (4, 2)), (UNet(widths=(8, 16)), (4, 1, 8, 8))]
SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    ("network", "shape", "backend"),
    [
        (*BOTH[0], "aot_eager"),
        pytest.param(*BOTH[1], "aot_eager", **SLOW),
        pytest.param(*BOTH[0], "inductor", **SLOW),
        pytest.param(*BOTH[1], "inductor", **SLOW),
    ],
)
def test_denoiser_compiles_as_one_graph(network, shape, backend):
    """No branch depends on a tensor's values: fullgraph=True, and the numbers are the same."""
    torch._dynamo.reset()
    denoiser = Denoiser(moved(copy.deepcopy(network)))
    z = torch.randn(shape, generator=rng())
    compiled = torch.compile(denoiser, fullgraph=True, backend=backend)
    for sigma in (0.5, torch.tensor(2.0), torch.tensor([0.1, 1.0, 5.0, 50.0])):
        with torch.no_grad():
            # float32 sums in another order: 1e-5 of values of size 3 was seen
            assert torch.allclose(compiled(z, sigma), denoiser(z, sigma), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(("network", "shape"), BOTH)
def test_denoiser_reads_no_values(network, shape):
    """On `meta` there are none to read."""
    z = torch.empty(shape, device="meta")
    denoiser = Denoiser(copy.deepcopy(network)).to("meta")
    for sigma in (0.5, torch.empty((), device="meta"), torch.empty(4, device="meta")):
        assert denoiser(z, sigma).shape == z.shape


def test_bad_arguments_are_named():
    for options, name in [
        ({"widths": ()}, "levels"),
        ({"widths": (12, 16)}, "multiples of 8"),
        ({"heads": 3}, "heads"),
        ({"blocks": 0}, "blocks"),
    ]:
        with pytest.raises(ValueError, match=name):
            UNet(**options)
    for shape in [(2, 1, 27, 28), (2, 3, 28, 28), (2, 784)]:
        with pytest.raises(ValueError, match="x must have shape"):
            small()(torch.zeros(shape), torch.zeros(2))
    with pytest.raises(ValueError, match="width"):
        MLP(width=0)
    with pytest.raises(TypeError, match="dim"):
        MLP(dim=2.0)


def test_what_is_no_network_and_no_z_is_named():
    class Half(torch.nn.Module):
        def forward(self, x, c):
            return x[:, :1]

    denoiser, z = Denoiser(MLP()), torch.zeros(3, 2)
    for bad in (MLP, denoiser, lambda x, c: x, None):
        with pytest.raises(TypeError, match="network must be"):
            Denoiser(bad)
    for sigma_data in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma_data"):
            Denoiser(MLP(), sigma_data)
    with pytest.raises(TypeError, match="sigma_data"):
        Denoiser(MLP(), "1")
    with pytest.raises(ValueError, match=r"network must return \(3, 2\)"):
        Denoiser(Half())(z, 1.0)
    with pytest.raises(TypeError, match=r"network's dtype torch.float32.*float64"):
        denoiser(z.double(), 1.0)
    with pytest.raises(TypeError, match="z must be a floating-point tensor"):
        denoiser(z.numpy(), 1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\)"):
        denoiser(torch.zeros(3, 3), 1.0)
    for sigma in (-1.0, float("nan"), torch.zeros(2)):
        with pytest.raises(ValueError, match="sigma"):
            denoiser(z, sigma)
    for sigma in (None, "1"):
        with pytest.raises(TypeError, match="sigma"):
            denoiser(z, sigma)


def test_half_precision_file(tmp_path):
    denoiser = Denoiser(small(), 0.6)
    save_denoiser(denoiser, tmp_path / "a.safetensors", torch.float16, seed=3)
    back = load_denoiser(tmp_path / "a.safetensors")
    z = torch.randn(2, 1, 28, 28, generator=rng())
    assert next(back.parameters()).dtype == torch.float32
    assert (back(z, 0.5) - denoiser(z, 0.5)).abs().max() < 1e-2
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_shipped_weights():
    """At most 4 MB, training facts in the header, and better on held-out digits than linear."""
    denoiser = load_pretrained("mnist")
    path = Path(sde_utils.__file__).parent / "pretrained" / "mnist.safetensors"
    assert path.stat().st_size < 4e6
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["sde_utils"])["facts"]
    assert {"steps", "batch", "lr", "seed", "digits", "images", "seconds"} <= facts.keys()
    held_out, train = mnist(split="test")[0], mnist(split="train")[0]
    for sigma in (0.3, 1.0, 3.0):
        z = held_out + sigma * torch.randn(held_out.shape, generator=rng())
        mean, variance = train.mean(0), train.var(0)
        linear = mean + variance / (variance + sigma**2) * (z - mean)
        with torch.no_grad():
            error = (denoiser(z, sigma) - held_out).square().mean()
        bound = (linear - held_out).square().mean()
        print(f"σ = {sigma}: mean square error {error:.4f}, pixelwise linear {bound:.4f}")
        assert error < 0.75 * bound
    with pytest.raises(ValueError, match="mnist"):
        load_pretrained("cifar")


def test_bfloat16_keeps_the_results():
    """Autocast, as sampling on CUDA uses it: float32 comes out, the error grows by under 6 %."""
    denoiser, x = load_pretrained("mnist"), mnist(split="test")[0][:64]
    for sigma in (0.01, 0.2, 5.0):
        z = x + sigma * torch.randn(x.shape, generator=rng())
        with torch.no_grad():
            plain = denoiser(z, sigma)
            with torch.autocast("cpu", torch.bfloat16):
                half = denoiser(z, sigma)
        assert half.dtype == torch.float32
        assert not half.equal(plain)
        assert (half - x).square().mean().sqrt() < 1.06 * (plain - x).square().mean().sqrt()


@pytest.mark.parametrize("sde", [VESDE(), VPSDE()])
def test_one_network_serves_both_sdes(sde):
    """18 Heun steps: digits whose pixels are as dark and as bright as real ones."""
    real, start = mnist()[0], sde.prior((64, 1, 28, 28), generator=rng(3))
    x = sample(sde, load_pretrained("mnist"), start, steps=18, predictor=heun)
    assert float(x.mean()) == pytest.approx(float(real.mean()), abs=0.06)
    assert float(x.std()) == pytest.approx(float(real.std()), abs=0.06)
    assert float((x.abs() < 1.1).float().mean()) > 0.99
