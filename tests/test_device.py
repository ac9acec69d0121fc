"""Every public function where float64 is refused, on a pretended GPU, and with compiled networks.

No GPU is needed. On the pretended Apple device the numbers are computed; under FakeTensorMode, on
`cuda`, a tensor made on the wrong device is an error. Autograd asks for a real device there, so
that what differentiates runs on `meta`.
"""

import warnings

import nbformat
import pytest
import torch
from conftest import SDES, rng
from notebooks import NOTEBOOKS, turn_down
from pretended import answering, is_pretended, pretended, run_notebook
from torch._subclasses.fake_tensor import FakeTensorMode

import sde_utils as su
from sde_utils import operators as ops
from sde_utils import plotting as draw

PREDICTORS = ("euler_maruyama", "ancestral", "moment_matched", "euler", "heun", "multistep")


def product(x):
    return x[:, 0] * x[:, 1]


def first(x):
    return x[:, :1]


def guides(denoiser, y):
    """Each method, and its observation of y, (1,)."""
    linear, curved = su.Observation(first, y, 0.3), su.Observation(product, 0.2, 0.3)
    return {
        "DPS": su.DPS(denoiser, curved),
        "annealed": su.Annealed(denoiser, curved),
        "PiGDM": su.PiGDM(denoiser, linear, (2,)),
        "MMPS": su.MMPS(denoiser, curved, probes=4),
        "MMPS, conjugate": su.MMPS(
            denoiser, su.Observation(lambda x: x, y.expand(2), 0.3), dense=1
        ),
    }


def network():
    torch.manual_seed(0)
    net = su.Denoiser(su.MLP(width=8))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def check(x, *shape, dtype=torch.float32):
    assert is_pretended(x)
    assert tuple(x.shape) == shape
    assert x.dtype == dtype
    assert x.isfinite().all()


@pytest.fixture
def device():
    with pretended() as device:
        yield device


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_the_sde_without_float64(device, sde):
    x, mix = torch.randn(4, 2), su.swiss_roll_density().to(device)
    for t in (0.5, torch.tensor(0.5), torch.rand(4)):
        for y in (sde.perturb(x, t), sde.score(mix, x, t), sde.denoise(mix, x, t)):
            check(y, 4, 2)
    t = torch.rand(4)
    for y in (sde.scale(t), sde.sigma(t), sde.f(t), sde.g(t), sde.time(t + 0.5)):
        check(y, 4)
    check(sde.prior((4, 2)), 4, 2)
    check(sde.prior((4, 2), generator=torch.Generator(device).manual_seed(0)), 4, 2)


def test_the_exact_and_the_measures_without_float64(device):
    mix = su.IsotropicMixture(torch.randn(3, 2), 0.1, torch.rand(3))
    z, g = torch.randn(64, 2), torch.Generator(device).manual_seed(0)
    for sigma in (0.3, torch.rand(64)):
        check(mix(z, sigma), 64, 2)
        check(mix.score(z, sigma), 64, 2)
        check(mix.log_prob(z, sigma), 64)
    check(mix.sample(5, g), 5, 2)
    obs = su.Observation(first, torch.tensor([0.3]), 0.2)
    posterior = mix.posterior(obs)
    check(posterior.sample(5, g), 5, 2)
    x, log_w, evidence = su.weighted_posterior(mix, obs, 64, g)
    check(x, 64, 2)
    check(log_w, 64)
    assert abs(float(evidence) - float(posterior.log_evidence)) < 3
    roll = su.swiss_roll(64, seed=0).to(device)
    mass = su.roll_mass(roll, torch.rand(64))
    check(mass, 20)
    check(su.swiss_roll_curve(torch.rand(5)), 5, 2)
    check(su.swiss_roll_density().to(device).sample(3, g), 3, 2)
    check(su.sliced_wasserstein(z, roll, generator=g))
    check(su.total_variation(mass, mass))
    assert float(su.frechet_distance(z, roll)) > 0
    check(su.psnr(z, roll), 64)
    ranks = su.calibration_ranks(z[:, 0], torch.randn(64, 19))
    assert is_pretended(ranks)
    check(su.coverage(z[:, 0], torch.randn(64, 19)))
    low, high = su.ecdf_band(20, 9, simulations=200)
    assert ((low >= 0) & (low < high)).all()
    images, labels = su.mnist(split="test")
    assert images.to(device).shape[0] == len(labels)


@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_sampling_and_guidance_without_float64(device, kind):
    denoiser = su.IsotropicMixture(torch.randn(3, 2), 0.1) if kind == "mixture" else network()
    g = torch.Generator(device).manual_seed(0)
    for sde in (su.VESDE(), su.VPSDE()):
        x, times = sde.prior((30, 2), generator=g), su.karras_times(sde, 6)
        for name in PREDICTORS:
            step = su.multistep() if name == "multistep" else getattr(su, name)
            options = {"times": times, "predictor": step, "corrector": su.Langevin()}
            check(su.sample(sde, denoiser, x, **options, generator=g), 30, 2)
        check(su.sample(sde, denoiser, x, steps=8, trajectory=True, generator=g), 9, 30, 2)
        for name, guided in guides(denoiser, torch.tensor([0.3])).items():
            options = {"times": times, "predictor": su.ancestral, "generator": g}
            check(su.sample(sde, guided, x, **options), 30, 2)
            check(guided.log_likelihood(x, torch.rand(30)), 30)
            if "conjugate" not in name:
                particles = su.twisted_smc(sde, guided, x, times=times, generator=g)
                check(particles.resample(4, g), 4, 2)
                assert particles.log_weights.dtype == torch.float64  # on the CPU
        obs = su.Observation(first, torch.tensor([0.3]), 0.3)
        draws = torch.randn(30, 2)
        particles = su.tempered_smc(sde, denoiser, obs, draws, 15, final=1, generator=g)
        check(particles.resample(4, g), 4, 2)
        step = su.dps_step(su.ancestral, su.Observation(product, 0.2, 0.3), 0.1)
        check(su.sample(sde, denoiser, x, times=times, predictor=step, generator=g), 30, 2)
        check(su.log_likelihood(sde, denoiser, torch.randn(3, 2), steps=3), 3)
        check(su.log_likelihood(sde, denoiser, torch.randn(3, 2), steps=3, probes=2), 3)


def test_networks_training_and_files_without_float64(device, tmp_path):
    data, g = torch.randn(50, 2), torch.Generator(device).manual_seed(0)
    net = network()
    check(su.dsm_loss(net, data, torch.rand(50) + 0.1, g), 50)
    for sampler in (su.log_uniform(0.01, 50.0), su.log_normal(0.0, 1.0, 0.01, 50.0)):
        losses = su.train(
            net, data, sampler, steps=6, batch_size=8, progress=False, generator=g,
            checkpoint=tmp_path / f"{id(sampler)}.pt",
        )  # fmt: skip
        check(losses, 6)
    su.save_denoiser(net, tmp_path / "net.safetensors")
    check(su.load_denoiser(tmp_path / "net.safetensors").to(device)(data, 0.5), 50, 2)
    check(su.load_pretrained("mnist").to(device)(torch.zeros(2, 1, 28, 28), 0.5), 2, 1, 28, 28)


def test_operators_and_figures_without_float64(device):
    x = torch.rand(2, 1, 28, 28)
    for operator in (
        ops.Inpainting(ops.box_mask(28, 28, 8, 8, 20, 20)),
        ops.Downsampling(4),
        ops.Blur(ops.motion_kernel(5, 30.0)),
        ops.Radon(28, [0.0, 45.0]),
        ops.PhaseRetrieval(),
    ):
        y = operator(x)
        assert is_pretended(y)
        if not isinstance(operator, ops.PhaseRetrieval):
            check(ops.adjoint(operator, y, x.shape), 2, 1, 28, 28)
            check(ops.pseudo_inverse(operator, y, x.shape, ridge=0.1, iterations=3), 2, 1, 28, 28)
    figure = draw.posterior_figure(x[:1], None, {"a": x, "b": x}, data=x[:1])
    mix = su.IsotropicMixture(torch.randn(3, 2), 0.1)
    draw.draw_density(figure.axes[0], mix, 0.3, n=20)
    draw.draw_field(figure.axes[0], mix, 0.3)
    draw.draw_points(figure.axes[0], torch.randn(5, 2))
    mass = su.roll_mass(torch.randn(50, 2))
    draw.draw_pieces(figure.axes[0], torch.randn(5, 2), mass, mass, "DPS")
    draw.plt.close(figure)


# ---------------------------------------------------------------- CUDA, pretended by FakeTensorMode
@pytest.fixture
def fake():
    with FakeTensorMode(), answering():
        try:
            torch.zeros(1, device="cuda")[0]
        except RuntimeError:
            pytest.skip("this torch (2.4) asks the driver before it indexes a pretended tensor")
        yield torch.device("cuda")


def on(x, *shape):
    assert x.device.type in ("cuda", "meta")
    assert tuple(x.shape) == shape


def made_on(device):
    with device:  # fake modules cannot be moved
        return su.Denoiser(su.MLP(width=8))


@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_sampling_on_a_pretended_gpu(fake, kind):
    x, means = torch.randn(4, 2, device=fake), torch.randn(3, 2, device=fake)
    denoiser = made_on(fake) if kind == "network" else su.IsotropicMixture(means, 0.1)
    for sde in (su.VESDE(), su.VPSDE(), su.SubVPSDE()):
        for t in (0.5, torch.rand(4, device=fake)):
            for y in (sde.perturb(x, t), sde.score(denoiser, x, t), sde.denoise(denoiser, x, t)):
                on(y, 4, 2)
        on(sde.prior((4, 2), device=fake), 4, 2)
        for name in PREDICTORS:
            step = su.multistep() if name == "multistep" else getattr(su, name)
            options = {"predictor": step, "corrector": su.Langevin(), "times": [1.0, 0.5, 0.1]}
            on(su.sample(sde, denoiser, x, **options), 4, 2)
    if kind == "mixture":
        on(denoiser.sample(5), 5, 2)
        on(denoiser.log_prob(x, torch.rand(4, device=fake)), 4)
        on(su.sliced_wasserstein(x, x))


@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_guidance_and_likelihood_on_meta(kind):
    meta = torch.device("meta")
    x, means = torch.randn(4, 2, device=meta), torch.randn(3, 2, device=meta)
    with answering():
        denoiser = made_on(meta) if kind == "network" else su.IsotropicMixture(means, 0.1)
        obs = su.Observation(product, 0.2, 0.1)
        for sde in (su.VESDE(), su.VPSDE()):
            for guided in (su.DPS(denoiser, obs), su.Annealed(denoiser, obs)):
                on(su.sample(sde, guided, x, times=[1.0, 0.5, 0.1]), 4, 2)
                on(guided.log_likelihood(x, torch.rand(4, device=meta)), 4)
            on(su.log_likelihood(sde, denoiser, x, steps=2, probes=2), 4)
        on(obs.log_likelihood(x), 4)


def test_a_tensor_on_the_wrong_device_would_be_seen(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=fake) + torch.ones(3)


# ---------------------------------------------------------------------------- compiled networks
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_denoisers_work_everywhere():
    """inductor on the CPU: the same numbers as the network itself, through all that calls one."""
    net, g = network(), rng(1)
    compiled = torch.compile(net)
    for sde in (su.VESDE(), su.VPSDE()):
        x, times = sde.prior((20, 2), generator=g), su.karras_times(sde, 6)
        for name in PREDICTORS:
            made = [su.multistep() if name == "multistep" else getattr(su, name) for _ in "ab"]
            both = [
                su.sample(sde, d, x, times=times, predictor=p, generator=rng(2))
                for d, p in zip((net, compiled), made, strict=True)
            ]
            torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)
        plain, fast = (guides(d, torch.tensor([0.3])) for d in (net, compiled))
        z = torch.randn(20, 2, generator=g)
        for name in plain:
            torch.testing.assert_close(
                fast[name](z, 0.7), plain[name](z, 0.7), rtol=1e-4, atol=1e-4
            )
            found, expected = fast[name].look(z, 0.7), plain[name].look(z, 0.7)
            torch.testing.assert_close(found.log_p, expected.log_p, rtol=1e-4, atol=1e-4)
        particles = [
            su.twisted_smc(sde, guided["MMPS"], x, times=times, generator=rng(3))
            for guided in (plain, fast)
        ]
        torch.testing.assert_close(particles[0].x, particles[1].x, rtol=1e-3, atol=1e-3)
        likelihoods = [su.log_likelihood(sde, d, z[:5], steps=5) for d in (net, compiled)]
        torch.testing.assert_close(*likelihoods, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------- the lectures, where there is Metal
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_lectures_code_without_float64(path):
    """All code cells, with counts turned down, on the pretended device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_notebook(turn_down(nbformat.read(path, as_version=4)), path.name)
