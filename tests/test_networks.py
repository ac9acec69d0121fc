import json

import pytest
import torch
from conftest import rng
from safetensors import safe_open

from sde_utils import VESDE, VPSDE, Denoiser, UNet, heun, load_denoiser, load_pretrained, mnist, sample, save_denoiser


def small(**options):
    torch.manual_seed(0)
    network = UNet(widths=(8, 16), **options)
    with torch.no_grad():  # away from the zero function it starts as
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng(1)))
    return network


def test_gradient_reaches_every_parameter():
    network = small()
    network(torch.randn(3, 1, 28, 28, generator=rng()), torch.tensor([-1.0, 0.0, 1.0])).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("channels", "size", "options"), [(1, (28, 28), {}), (3, (32, 16), {}), (2, (12, 8), {"patch": 1, "blocks": 2})])
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
    x, c = torch.randn(5, 1, 28, 28, generator=rng(), dtype=torch.float64), torch.linspace(-1, 1, 5, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 2, 1])
    out = network(x, c)
    assert torch.allclose(network(x[order], c[order]), out[order], atol=1e-12)
    assert torch.allclose(torch.cat([network(x[i : i + 1], c[i : i + 1]) for i in range(5)]), out, atol=1e-12)


def test_output_scale_at_both_ends_of_sigma():
    """Whatever F is, D -> z as σ -> 0, with an error of σ |F|; at large σ, |D| stays at the data's size while |z| grows."""
    denoiser, x = Denoiser(small(), 0.6), mnist()[0][:8]
    assert ((denoiser(x, 1e-4) - x).abs().max()) < 1e-3 * small()(x, torch.zeros(8)).abs().max().clamp(min=1)
    far = denoiser(1000 * torch.randn(x.shape, generator=rng()), 1000.0)
    assert far.abs().max() < 10 * 0.6 * small()(torch.randn(x.shape, generator=rng()), torch.full((8,), 1.7)).abs().max().clamp(min=1)


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


def test_half_precision_file(tmp_path):
    denoiser = Denoiser(small(), 0.6)
    save_denoiser(denoiser, tmp_path / "a.safetensors", torch.float16, seed=3)
    back = load_denoiser(tmp_path / "a.safetensors")
    z = torch.randn(2, 1, 28, 28, generator=rng())
    assert next(back.parameters()).dtype == torch.float32
    assert (back(z, 0.5) - denoiser(z, 0.5)).abs().max() < 1e-2
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_shipped_weights():
    """At most 4 MB, training facts in the header, and a denoiser: its error on digits it never saw against the pixelwise linear one's."""
    denoiser = load_pretrained("mnist")
    from sde_utils import networks

    path = next((networks.Path(networks.__file__).parent / "pretrained").glob("mnist.safetensors"))
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
        print(f"σ = {sigma}: mean square error {error:.4f}, pixelwise linear {(linear - held_out).square().mean():.4f}")
        assert error < 0.75 * (linear - held_out).square().mean()
    with pytest.raises(ValueError, match="mnist"):
        load_pretrained("cifar")


def test_bfloat16_keeps_the_results():
    """Autocast, as sampling on CUDA uses it: float32 comes out, and the error on held-out digits grows by less than 6 % at any noise level."""
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
    real = mnist()[0]
    x = sample(sde, load_pretrained("mnist"), sde.prior((64, 1, 28, 28), generator=rng(3)), steps=18, predictor=heun)
    assert float(x.mean()) == pytest.approx(float(real.mean()), abs=0.06)
    assert float(x.std()) == pytest.approx(float(real.std()), abs=0.06)
    assert float((x.abs() < 1.1).float().mean()) > 0.99
