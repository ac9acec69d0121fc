"""What a user gets wrong is named before any work; what is finite and wrong is warned of.

Each row: a call, the exception, and a pattern that its message must hold: the argument's name, and
what it was or what to write instead. Rows of other kinds of data stand with the room they test.
"""

import math
import re
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import rng
from torch import nn

import sde_utils as su
from sde_utils import operators as ops
from sde_utils import plotting as draw

VE, VP = su.VESDE(), su.VPSDE()
NET, MIX = su.Denoiser(su.MLP()), su.IsotropicMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.1)
ATOMS = su.IsotropicMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.0)
X = VP.prior((16, 2), generator=rng(0))
NOISE = VE.prior((16, 2), generator=rng(0))
DATA = MIX.sample(64, rng(1))
SIGMAS = su.log_uniform(0.01, 50.0)
IMAGES = torch.zeros(2, 1, 8, 8)
NAN = torch.full((4, 2), math.nan)


def first(x):
    return x[:, :1]


def masked_in_place(x):
    x[:, 1:] = 0
    return x


def double_first(x):
    return x[:, :1].double()


OBS = su.Observation(first, torch.tensor([0.5]), 0.1)
EACH = su.Observation(first, torch.zeros(16, 1), 0.1)


def obs(operator, y=None, noise=0.1):
    return su.Observation(operator, torch.zeros(2) if y is None else y, noise)


def train(denoiser=NET, data=DATA, sampler=SIGMAS, **options):
    return su.train(denoiser, data, sampler, **{"steps": 2, "progress": False} | options)


def sample(denoiser=MIX, x=X, sde=VP, **options):
    return su.sample(sde, denoiser, x, **{"steps": 4, "generator": rng(2)} | options)


def smc(guided=None, x=X, sde=VP, **options):
    guided = su.MMPS(MIX, OBS) if guided is None else guided
    return su.twisted_smc(sde, guided, x, **{"steps": 4, "generator": rng(2)} | options)


def gibbs(o=OBS, shape=(2,), chain=lambda z, rho, generator: z):
    return su.SplitGibbs(o, shape, chain)


def tempered(denoiser=MIX, o=OBS, x=None, n=16, **options):
    x = MIX.sample(64, rng(4)) if x is None else x
    return su.tempered_smc(VE, denoiser, o, x, n, **{"generator": rng(2)} | options)


def under_no_grad(z, sigma):
    with torch.no_grad():
        return MIX(z, sigma)


def nan_below_half(z, sigma):
    return MIX(z, sigma) * (math.nan if sigma < 0.5 else 1.0)


def broken(sde, denoiser, x, t, generator=None):
    return x * math.nan


def inference(function):
    def run():
        with torch.inference_mode():
            return function()

    return run


T, V, F = TypeError, ValueError, FloatingPointError
ROWS = {
    # the SDE
    "sigma_min negative": (lambda: su.VESDE(-1.0, 1.0),
        V, r"sigma_min must lie in \(0, inf\), got -1"),
    "sigma_min a string": (lambda: su.VESDE("0.01"), T, "sigma_min must be a number, got str"),
    "sigma_min above": (lambda: su.VESDE(2.0, 1.0), V, "sigma_min must be below sigma_max"),
    "beta_max infinite": (lambda: su.VPSDE(0.1, math.inf), V, "beta_max must lie in"),
    "beta None": (lambda: su.VPSDE(None), T, "beta_min must be a number, got NoneType"),
    "t above 1": (lambda: VE.sigma(1.1), V, r"t must lie in \[0, 1\], got 1.1"),
    "t NaN": (lambda: VP.f(math.nan), V, "t must lie in"),
    "t a tensor above 1": (lambda: VP.g(torch.tensor([0.5, 1.5])), V, "t must lie in"),
    "t integers": (lambda: VP.sigma(torch.tensor(1)), T, "t must be a floating-point tensor"),
    "sigma outside": (lambda: VE.time(1e4), V, r"sigma must lie in \[0.01, 50\]"),
    "x0 NaN": (lambda: VE.perturb(NAN, 0.5), V, "x0 must be finite"),
    "x0 numpy": (lambda: VE.perturb(np.zeros((3, 2)), 0.5), T, "x0 must be a floating.*as_tensor"),
    "x0 integers": (lambda: VE.perturb(torch.ones(3, 2).long(), 0.5), T, "x0 must be a floating"),
    "x0 one sample": (lambda: VE.perturb(torch.ones(3), 0.5),
        V, r"x0 must have shape \(B, \*dims\)"),
    "t of another batch": (lambda: VP.perturb(DATA, torch.rand(3)),
        V, "t must be a scalar or have"),
    "prior of a number": (lambda: VE.prior(1000),
        T, r"shape must be a tuple of ints, as \(1000, 2\)"),
    "prior of floats": (lambda: VE.prior((10.0, 2)), T, "shape must be a tuple of ints"),
    "prior with a seed": (lambda: VE.prior((3, 2), generator=0),
        T, "generator must be a torch.Gen"),
    "score at sigma 0": (lambda: VP.score(MIX, X, 0.0), V, r"t must have σ\(t\) > 0"),
    # networks
    "double data": (lambda: NET(DATA.double(), 1.0), T, "z must have the network's dtype.*float64"),
    "three dimensions": (lambda: NET(torch.zeros(5, 3), 1.0), V, r"x must have shape \(B, 2\)"),
    "images in the MLP": (lambda: NET(IMAGES, 1.0), V, r"x must have shape \(B, 2\), got \(2, 1"),
    "(3, 3, 2) in the MLP": (lambda: NET(torch.zeros(3, 3, 2), 1.0),
        V, r"x must have shape \(B, 2"),
    "sigma negative": (lambda: NET(DATA, -1.0), V, r"sigma must lie in \[0, inf\), got -1"),
    "sigma None": (lambda: NET(DATA, None), T, "sigma must be a number, got NoneType"),
    "sigma infinite": (lambda: NET(DATA, math.inf), V, "sigma must lie in"),
    "sigma of another batch": (lambda: NET(DATA, torch.ones(3)),
        V, "sigma must be a scalar or have"),
    "the network's class": (lambda: su.Denoiser(su.MLP), T, r"network must be.*write MLP\(...\)"),
    "a denoiser in a denoiser": (lambda: su.Denoiser(NET), T, "network must be an F"),
    "sigma_data zero": (lambda: su.Denoiser(su.MLP(), 0.0), V, "sigma_data must lie in"),
    "width zero": (lambda: su.MLP(width=0), V, "width must lie in"),
    "depth a float": (lambda: su.MLP(depth=1.5), T, "depth must be an int, got float 1.5"),
    "F of another shape": (lambda: su.Denoiser(nn.Identity())(DATA, 1.0),
        T, "forward|positional|network"),
    "UNet of odd sides": (lambda: su.UNet()(torch.zeros(2, 1, 27, 28), torch.zeros(2)),
        V, "x must"),
    # training
    "train a bare network": (lambda: train(su.MLP()), T, r"su.Denoiser\(F\)"),
    "train a class": (lambda: train(su.Denoiser), T, "denoiser must be"),
    "train on doubles": (lambda: train(data=DATA.double()), T, r"data must have.*data.float\(\)"),
    "train on integers": (lambda: train(data=torch.ones(9, 2).long()),
        T, "data must be a floating"),
    "train on NaN": (lambda: train(data=NAN), V, "data must be finite"),
    "train on other dimensions": (lambda: train(data=torch.randn(9, 3)), V, r"shape \(B, 2\)"),
    "no steps": (lambda: train(steps=0), V, "steps must lie in"),
    "steps a float": (lambda: train(steps=1.5), T, "steps must be an int"),
    "lr negative": (lambda: train(lr=-1.0), V, "lr must lie in"),
    "ema None": (lambda: train(ema_decay=None), T, "ema_decay must be a number, got NoneType"),
    "ema one": (lambda: train(ema_decay=1.0), V, "ema_decay must lie in"),
    "sampler not called": (lambda: train(sampler=su.log_uniform), T, "sigma_sampler"),
    "sampler infinite": (lambda: train(sampler=lambda n, g=None: torch.full((n,), math.inf)), V,
                         "sigma_sampler"),
    "train with a seed": (lambda: train(generator=0), T, "generator must be a torch.Generator"),
    "levels reversed": (lambda: su.log_uniform(2.0, 1.0), V, "high must lie in"),
    "level zero": (lambda: su.log_uniform(0.0, 1.0), V, "low must lie in"),
    "wide above 1": (lambda: su.log_normal(0.0, 1.0, 0.1, 1.0, wide=1.5), V, "wide must lie in"),
    "loss at sigma 0": (lambda: su.dsm_loss(NET, DATA, 0.0), V, "sigma must be positive"),
    # sampling
    "the SDE's class": (lambda: sample(sde=su.VPSDE), T, r"sde must be.*write VPSDE\(...\)"),
    "predictor by name": (lambda: sample(predictor="heun"), T, "predictor must be.*got str 'heun'"),
    "the corrector's class": (lambda: sample(corrector=su.Langevin), T, r"write Langevin\(...\)"),
    "sample with a seed": (lambda: sample(generator=0), T, "generator must be a torch.Generator"),
    "Heun with a seed": (lambda: sample(predictor=su.heun, generator=0), T, "generator must be"),
    "steps zero": (lambda: sample(steps=0), V, "n must lie in"),
    "steps beyond reason": (lambda: sample(steps=10**8), V, "n must lie in"),
    "times a number": (lambda: sample(times=10), T, "times must be a sequence.*steps="),
    "times equal": (lambda: sample(times=[0.5, 0.5]), V, "times must decrease, but 0.5"),
    "times rising": (lambda: sample(times=[0.2, 0.5]), V, "times must decrease"),
    "times above 1": (lambda: sample(times=[1.2, 0.5]), V, r"times must lie in \[0, 1\], got 1.2"),
    "times NaN": (lambda: sample(times=[1.0, math.nan]), V, "times must lie in"),
    "times down to 0": (lambda: sample(times=[1.0, 0.0]), V, "times must end where σ > 0"),
    "no times": (lambda: sample(times=[]), V, "times must end where σ > 0"),
    "a thousand bad times": (lambda: sample(times=torch.linspace(0, 1, 1001)), V, "^.{,80}$"),
    "last_step negative": (lambda: sample(last_step=-1.0), V, "last_step must lie in"),
    "x NaN": (lambda: sample(x=NAN), V, "x must be finite"),
    "x one sample": (lambda: sample(x=torch.zeros(2)), V, "x must have shape"),
    "the denoiser's class": (lambda: sample(su.Denoiser), T, "denoiser must be a function D"),
    "a bare network": (lambda: sample(su.MLP()), T, r"denoiser must take a scalar sigma"),
    "sigma expected (B,)": (lambda: sample(lambda z, s: z / (1 + s[:, None])), T, r"sigma.expand"),
    "one coordinate back": (lambda: sample(lambda z, s: z[:, :1]),
        T, r"denoiser must return E\[x_0"),
    "one axis more back": (lambda: sample(lambda z, s: z[None]), T, "denoiser must return"),
    "a tuple back": (lambda: sample(lambda z, s: (z, z)), T, "denoiser must return.*got tuple"),
    "numpy back": (lambda: sample(lambda z, s: z.numpy()), T, "denoiser must return.*got ndarray"),
    "doubles back": (lambda: sample(lambda z, s: z.double()), T, "denoiser must return.*float64"),
    "NaN back": (lambda: sample(lambda z, s: z * math.nan), F, "denoiser returned NaN"),
    "NaN later": (lambda: sample(nan_below_half, steps=20),
        F, r"step \d+, t = .*the denoiser is not"),
    "the corrector's NaN": (lambda: sample(corrector=broken), F, "step 1, t = 1.*corrector"),
    "Langevin's moves": (lambda: sample(corrector=su.Langevin(snr=10.0), steps=100), F,
        "corrector's moves are too large"),
    "Langevin's snr": (lambda: su.Langevin(snr=0.0), V, "snr must lie in"),
    "Langevin's steps": (lambda: su.Langevin(steps=0), V, "steps must lie in"),
    "s above t": (lambda: su.ancestral(VP, MIX, X, 0.2, 0.5),
        V, "s must be below t.*t = 0.2, s = 0.5"),
    "s where sigma is 0": (lambda: su.heun(VP, MIX, X, 0.2, 0.0), V, "σ_s > 0.*σ_s = 0"),
    "t from 0": (lambda: su.euler(VP, MIX, X, 0.0, 0.0), V, "s must be below t"),
    "a time each": (lambda: su.ancestral(VP, MIX, X, torch.rand(16), 0.1), T, "t must be a number"),
    "order of multistep": (lambda: su.multistep(5), V, r"order must lie in \[2, 3\], got 5"),
    "karras reversed": (lambda: su.karras_times(VP, 5, low=30.0), V, "low must be below high"),
    "karras above the SDE": (lambda: su.karras_times(su.VESDE(30, 50), 10, 0.1),
        V, "low must be below"),
    "karras rho": (lambda: su.karras_times(VP, 5, rho=0.0), V, "rho must lie in"),
    # likelihood
    "likelihood steps": (lambda: su.log_likelihood(VE, MIX, X, steps=0), V, "steps must lie in"),
    "likelihood probes": (lambda: su.log_likelihood(VE, MIX, X, probes=0), V, "probes must lie in"),
    "likelihood sigma": (lambda: su.log_likelihood(VE, MIX, X, sigma=100.0),
        V, "sigma must lie in"),
    "likelihood of a guided": (lambda: su.log_likelihood(VE, su.DPS(MIX, OBS), X, steps=2), V,
                               "denoiser must have a graph"),
    "likelihood of NaN": (lambda: su.log_likelihood(VE, nan_below_half, X, steps=4),
        (F, V), "denoiser"),
    # observation and guidance
    "operator a string": (lambda: su.Observation("A", 0.0, 0.1), T, "operator must be a function"),
    "y None": (lambda: su.Observation(first, None, 0.1), T, "y must be a number, got NoneType"),
    "y NaN": (lambda: su.Observation(first, math.nan, 0.1), V, "y must"),
    "y infinite": (lambda: obs(first, torch.tensor([math.inf])), V, "y must be finite"),
    "y integers": (lambda: obs(first, torch.tensor([1])), T, "y must be a floating"),
    "noise zero": (lambda: obs(first, noise=0.0), V, "noise_std must lie in"),
    "noise underflowing": (lambda: obs(first, noise=1e-20), V, r"noise_std must lie in \[1e-18"),
    "noise a string": (lambda: obs(first, noise="0.1"), T, "noise_std must be a number"),
    "y of another shape": (lambda: obs(first, torch.zeros(3)).residual(DATA),
        V, r"y must have shape \(1,\)"),
    "operator to a number": (lambda: obs(lambda x: x.sum()).residual(DATA), V, "operator must map"),
    "operator complex": (lambda: obs(torch.fft.fft).residual(DATA), T, "view_as_real"),
    "operator in place": (lambda: obs(masked_in_place).residual(torch.ones(3, 2)),
        V, "in place.*clone"),
    "in place, guided": (lambda: su.DPS(MIX, obs(masked_in_place))(X, 1.0), V, "in place"),
    "operator detached": (lambda: su.MMPS(MIX, obs(lambda x: x.detach()))(X, 1.0),
        V, "differentiable"),
    "guide a class": (lambda: su.DPS(su.Denoiser, OBS), T, "denoiser must be a function"),
    "guide by a number": (lambda: su.DPS(MIX, 0.2), T, "obs must be an Observation, got float"),
    "max_shift zero": (lambda: su.DPS(MIX, OBS, max_shift=0.0), V, "max_shift must lie in"),
    "guided negative sigma": (lambda: su.DPS(MIX, OBS)(X, -1.0), V, "sigma must lie in"),
    "guided without a graph": (lambda: su.MMPS(under_no_grad, OBS)(X, 1.0),
        V, "denoiser must have a graph"),
    "guided twice": (lambda: su.MMPS(su.MMPS(MIX, OBS), OBS)(X, 1.0), V, "go into one Observation"),
    "iterations zero": (lambda: su.MMPS(MIX, OBS, iterations=0), V, "iterations must lie in"),
    "probes negative": (lambda: su.MMPS(MIX, OBS, probes=-1),
        V, r"probes must lie in \[0, .*got -1"),
    "PiGDM of a curve": (lambda: su.PiGDM(MIX, obs(torch.square), (2,)),
        V, "operator must be linear"),
    "PiGDM of an offset": (lambda: su.PiGDM(MIX, obs(lambda x: x + 1e-3), (2,)),
        V, "must be linear"),
    "PiGDM variance": (lambda: su.PiGDM(MIX, OBS, (2,), 0.0), V, "variance must lie in"),
    "PiGDM shape": (lambda: su.PiGDM(MIX, OBS, 2), T, "shape must be a tuple of ints"),
    "zeta zero": (lambda: su.dps_step(su.ancestral, OBS, 0.0), V, "zeta must lie in"),
    "zeta's predictor": (lambda: su.dps_step("ancestral", OBS, 1.0), T, "predictor must be"),
    # particles
    "smc unguided": (lambda: smc(MIX), T, "guided must be a guided denoiser"),
    "smc of a y each": (lambda: smc(su.MMPS(MIX, EACH)), V, "y must be one observation"),
    "smc with a seed": (lambda: smc(generator=0), T, "generator must be"),
    "smc of a class": (lambda: smc(sde=su.VESDE), T, r"write VESDE\(...\)"),
    "smc share": (lambda: smc(resample_below=2.0), V, "resample_below must lie in"),
    "smc of NaN": (lambda: smc(x=NAN), V, "x must be finite"),
    "smc's denoiser NaN": (lambda: smc(su.MMPS(nan_below_half, OBS), steps=20),
        F, "weights are NaN"),
    "y impossible": (lambda: smc(su.DPS(ATOMS, obs(first, torch.tensor([1e15]), 1e-9)), X),
        F, "vanished|NaN"),
    "resample none": (lambda: smc(steps=8).resample(0), V, "n must lie in"),
    # exact
    "variance negative": (lambda: su.IsotropicMixture(DATA, -1.0), V, "variance must lie in"),
    "weights a list": (lambda: su.IsotropicMixture(DATA[:2], 0.1, [0.5, 0.5]),
        T, "weights must be a"),
    "weights negative": (lambda: su.IsotropicMixture(DATA[:2], 0.1, -torch.ones(2)),
        V, "weights must"),
    "weights of another length": (lambda: su.IsotropicMixture(DATA, 0.1, torch.ones(2)),
        V, "weights"),
    "basis crooked": (lambda: su.GaussianMixture(DATA, 1.0, None, torch.ones(2, 1),
        torch.ones(1)), V,
                      "basis must have orthonormal"),
    "basis variance negative": (lambda: su.GaussianMixture(DATA, 1.0, None, torch.eye(2),
        -torch.ones(2)),
                                V, "basis_variance must be non-negative"),
    "mixture elsewhere": (lambda: MIX(torch.zeros(4, 3), 1.0),
        V, r"z must have shape \(B, \*\(2,\)"),
    "atoms at 0": (lambda: ATOMS.log_prob(DATA), V, "atoms"),
    "mixture at sigma NaN": (lambda: MIX(DATA, math.nan), V, "sigma must lie in"),
    "mixture of NaN": (lambda: MIX.log_prob(NAN), V, "z must be finite"),
    "draws with a seed": (lambda: MIX.sample(3, 0), T, "generator must be"),
    "no draws": (lambda: MIX.sample(0), V, "n must lie in"),
    "posterior of a curve": (lambda: MIX.posterior(obs(torch.square)),
        V, "operator must be linear"),
    "posterior of an offset": (lambda: MIX.posterior(obs(lambda x: (x - 0.1307) / 0.3081)),
        V, "linear"),
    "posterior of a y each": (lambda: MIX.posterior(EACH), V, "y must"),
    "posterior far away": (lambda: ATOMS.posterior(obs(double_first, torch.tensor([1e200],
        dtype=torch.float64))), V,
                           "y is impossible"),
    "weighted, a y each": (lambda: su.weighted_posterior(MIX, EACH, 16),
        V, "y must be one observation"),
    "roll of no noise": (lambda: su.swiss_roll_density(0.0), V, "noise must lie in"),
    "roll with a seed": (lambda: su.swiss_roll(100, 0.2, 0), T, "generator must be"),
    "roll of a negative number": (lambda: su.swiss_roll(-1), V, "n must lie in"),
    # digits
    "mnist by position": (lambda: su.mnist("train"), T, "positional"),
    "mnist's split": (lambda: su.mnist(split="half"), V, "split must be one of"),
    "pretrained by another name": (lambda: su.load_pretrained("cifar"), V, "name must be one of"),
    "load nothing": (lambda: su.load_denoiser("nothing"),
        FileNotFoundError, "no denoiser at nothing"),
    "save an own network": (lambda: su.save_denoiser(nn.Linear(2, 2), "x"),
        T, "denoiser must be a Den"),
    "save nowhere": (lambda: su.save_denoiser(NET, "nowhere/x.safetensors"),
        V, "a folder that exists"),
    # measures
    "numpy shares": (lambda: su.total_variation(np.ones(2) / 2, np.ones(2) / 2), T, "p must be a"),
    "counts for shares": (lambda: su.total_variation(torch.ones(2), torch.ones(2)),
        V, "p must sum to 1"),
    "shares as a column": (lambda: su.total_variation(torch.ones(2) / 2, torch.ones(2, 1) / 2),
        V, "q must"),
    "log-weights for weights": (lambda: su.roll_mass(DATA, -torch.ones(64)),
        V, r"log-weights.*exp\(\)"),
    "bins zero": (lambda: su.roll_mass(DATA, bins=0), V, "bins must lie in"),
    "two dtypes": (lambda: su.sliced_wasserstein(DATA, DATA.double()),
        T, "x and y must have one dtype"),
    "two shapes": (lambda: su.sliced_wasserstein(DATA, DATA[:3]),
        V, "x and y must have the same shape"),
    "psnr's peak": (lambda: su.psnr(IMAGES, IMAGES, peak=0.0), V, "peak must lie in"),
    "too few draws": (lambda: su.coverage(torch.zeros(3), torch.randn(3, 5)),
        V, "draws must be at least 19"),
    # operators
    "mask of floats": (lambda: ops.Inpainting(torch.ones(4, 4)), T, "mask must be a bool tensor"),
    "kernel even": (lambda: ops.Blur(torch.ones(2, 3)), V, "odd sides"),
    "factor zero": (lambda: ops.Downsampling(0), V, "factor must lie in"),
    "no angles": (lambda: ops.Radon(8, []), V, "angles must be finite, and at least one"),
    "vectors for images": (lambda: ops.Downsampling(2)(DATA), V, "x must be images"),
    "inverse of a curve": (lambda: ops.pseudo_inverse(torch.square, IMAGES, IMAGES.shape),
        V, "linear"),
    "inverse, iterations": (lambda: ops.pseudo_inverse(ops.Downsampling(2), IMAGES[..., :4, :4],
                                                       IMAGES.shape, iterations=0),
        V, "iterations"),
    # figures
    "draw a list": (lambda: draw.draw_points(plt.gca(), [[0.0]]), T, "x must be a floating"),
    "draw vectors as images": (lambda: draw.draw_images(plt.gca(), DATA, 4), V, "x must be images"),
    # what the review of the 40 findings added
    "a seed that is none": (lambda: su.swiss_roll(9, seed=1.5), T, "seed must be an int"),
    "a maker of predictors": (lambda: sample(predictor=su.multistep), T, "predictor must be"),
    "dps_step not called": (lambda: sample(predictor=su.dps_step), T, "predictor must be"),
    "a step with the SDE's class": (lambda: su.heun(su.VPSDE, MIX, X, 0.5, 0.4), T, "sde must be"),
    "in place, a run": (lambda: sample(su.DPS(MIX, obs(masked_in_place))), V, "in place"),
    "in place, exact": (lambda: MIX.posterior(obs(masked_in_place)), V, "in place"),
    "in place, inverse": (lambda: ops.adjoint(lambda x: x.mul_(2), IMAGES, IMAGES.shape),
        V, "in place"),
    "full a string": (lambda: su.mnist(full="train"), T, "full must be True or False"),
    "a step of one coordinate": (lambda: su.heun(VP, lambda z, s: z[:, :1], X, 0.5, 0.4),
        T, "denoiser must return"),
    "a score of one coordinate": (lambda: VP.score(lambda z, s: z[:, :1], X, 0.5),
        T, "denoiser must return"),
    "sigma expected (B,), guided": (lambda: su.MMPS(lambda z, s: z / s[:, None], OBS)(X, 1.0),
        T, r"sigma.expand"),
    "a bare network's likelihood": (lambda: su.log_likelihood(VE, su.MLP(), X, steps=1),
        T, r"su.Denoiser\(F\)"),
    "a step of numpy": (lambda: su.ancestral(VP, MIX, X.numpy(), 0.5, 0.4), T, "x must be a"),
    "a step of a class": (lambda: su.euler(VP, su.Denoiser, X, 0.5, 0.4), T, "denoiser must be"),
    "score of numpy": (lambda: VP.score(MIX, X.numpy(), 0.5), T, "x must be a floating"),
    "complex, exact": (lambda: MIX.posterior(obs(torch.fft.fft)), T, "view_as_real"),
    "yes or no, exact": (lambda: MIX.posterior(obs(lambda x: x > 0)), T, r"A\(x_0\)"),
    "y of another arrangement": (lambda: su.IsotropicMixture(torch.rand(4, 2, 3), 0.1).posterior(
        obs(lambda x: x, torch.zeros(3, 2))), V, "y must be one observation, of shape"),
    "widths a number": (lambda: su.UNet(widths=32), T, "widths must be"),
    "box of nothing": (lambda: ops.box_mask(None, 8, 0, 0, 1, 1), T, "box_mask.* must be an int"),
    "basis a list": (lambda: su.GaussianMixture(DATA, 1.0, None, [[1.0], [0.0]], torch.ones(1)),
        T, "basis must be a"),
    "basis variance infinite": (lambda: su.GaussianMixture(DATA, 1.0, None, torch.eye(2),
        torch.full((2,), math.inf)), V, "basis_variance must be"),
    "residual of numpy": (lambda: OBS.residual(np.zeros((2, 2))), T, "x0 must be a"),
    "Langevin at 0": (lambda: su.Langevin()(VP, MIX, X, 0.0), V, "t must have"),
    "operator NaN in a run": (lambda: sample(su.DPS(MIX, obs(lambda x: x * math.nan))),
        F, "operator .* returned NaN"),
    "a compiled denoiser in one": (lambda: su.Denoiser(torch.compile(NET)), T, "network must be"),
    # split Gibbs
    "chain of an SDE's class": (lambda: su.reverse_chain(su.VESDE, MIX), T, "sde must be"),
    "chain in one step": (lambda: su.reverse_chain(VE, MIX, 1), V, "steps must lie in"),
    "chain from a string": (lambda: su.reverse_chain(VE, MIX)(X, "1"), T, "rho must be a number"),
    "chain from infinity": (lambda: su.reverse_chain(VE, MIX)(X, math.inf), V, "rho must lie in"),
    "chain from a level each": (lambda: su.reverse_chain(VE, MIX)(X, torch.ones(16)), T, "rho"),
    "kernel of a tensor": (lambda: gibbs(X), T, "obs must be an Observation"),
    "kernel without a shape": (lambda: gibbs(OBS, shape=()), V, "shape must have"),
    "kernel of a denoiser": (lambda: gibbs(chain=MIX), T, "chain must be a function"),
    "kernel in place": (lambda: gibbs(obs(lambda x: x.mul_(2))), V, "in place"),
    "kernel at a negative rho": (lambda: gibbs().couple(X, -1.0), V, "rho must lie in"),
    "kernel at a tensor": (lambda: gibbs().log_likelihood(X, torch.ones(16)), T, "rho must be a"),
    "kernel of NaN": (lambda: gibbs()(NAN), V, "x must be finite"),
    "kernel elsewhere": (lambda: gibbs()(torch.zeros(4, 2, 1)), V, "x must have shape"),
    "kernel's chain, fewer": (lambda: gibbs(chain=lambda z, r, g: z[:2])(X), T, "chain must ret"),
    "kernel's chain, doubles": (lambda: gibbs(chain=lambda z, r, g: z.double())(X), T, "chain mu"),
    "kernel's chain NaN": (lambda: gibbs(chain=lambda z, r, g: z * math.nan)(X), F, "chain ret"),
    "tempered, guided": (lambda: tempered(su.MMPS(MIX, OBS)), T, "denoiser must be the prior's"),
    "tempered, keep 1": (lambda: tempered(keep=1), V, "keep must lie in"),
    "tempered, none": (lambda: tempered(n=0), V, "n must lie in"),
    "tempered, more than there are": (lambda: tempered(n=65), V, r"n must lie in \[1, 64\]"),
    "tempered, no sweep": (lambda: tempered(sweeps=0), V, "sweeps must lie in"),
    "tempered from noise": (lambda: tempered(x=NOISE), V, "x must be draws of the prior"),
    "chain too shallow": (lambda: su.reverse_chain(VE, MIX, depth=1), V, "depth must lie in"),
    "tempered, a y each": (lambda: tempered(o=EACH), V, "y must be one observation"),
    "tempered, no observation": (lambda: tempered(o=X), T, "obs must be an Observation"),
    "tempered, fewer back": (lambda: tempered(chain=lambda z, r, g: z[:2]), T, "chain must return"),
    "tempered, a wide sigma_y": (lambda: tempered(o=obs(first, torch.zeros(1), 100.0)), V, "sde"),
    "tempered, y far away": (lambda: tempered(o=obs(first, torch.tensor([1e4]))),
        V, "y is impossible"),
    "tempered with a seed": (lambda: tempered(generator=0), T, "generator must be"),
    "band of no ranks": (lambda: su.ecdf_band(0, 5), V, "n must lie in"),
    "band in per cent": (lambda: su.ecdf_band(5, 5, 95), V, "level must lie in"),
    "band with a seed": (lambda: su.ecdf_band(5, 5, generator=0), T, "generator must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_wrong_input_is_named(name):
    call, error, words = ROWS[name]
    before = [p.clone() for p in NET.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error) as found:
            call()
    assert re.search(words, str(found.value), re.DOTALL), str(found.value)
    assert all(torch.equal(a, b) for a, b in zip(before, NET.parameters(), strict=True))


def test_there_are_enough_rows():
    assert len(ROWS) >= 120


def half(x):
    return su.Denoiser(su.MLP(width=8), x)


WARNINGS = {
    "data far from sigma_data": (lambda: train(half(1.0), 100 * DATA),
        "root mean square .* sigma_data"),
    "randn for VE": (lambda: sample(sde=VE, x=torch.randn(200, 2, generator=rng(3)), steps=100),
                     "x has the root mean square .* sde.prior"),
    "r forgotten on VP": (lambda: sample(x=152.0 * torch.randn(200, 2, generator=rng(3)),
        steps=100),
                          "x has the root mean square"),
    "an SDE too short": (lambda: sample(half(100.0), sde=VE, x=NOISE), r"below 10 sigma_data"),
    "a score for the denoiser": (lambda: sample(lambda z, s: MIX.score(z, s), steps=50),
        "moves x by .* σ"),
    "noise for the denoiser": (lambda: sample(lambda z, s: (z - MIX(z, s)) / s, steps=50),
        "a noise"),
    "too few steps": (lambda: sample(x=NOISE, sde=VE, steps=5), "too few steps"),
    "an operator without slope": (lambda: sample(su.DPS(MIX, obs(torch.round))),
        "gradient 0 everywhere"),
    "a likelihood's SDE too short": (
        lambda: su.log_likelihood(VE, half(100.0), DATA, steps=2),
        "below 3 sigma_data"),
    "particles collapsed": (lambda: smc(su.DPS(MIX, obs(first, torch.ones(1), 0.01)),
                                        VP.prior((500, 2), generator=rng(4)), steps=60),
        "collapsed"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_finite_and_wrong_is_warned_of(name):
    call, words = WARNINGS[name]
    with pytest.warns(UserWarning, match=words):
        call()


NUMBERS = (
    0.5,
    np.float32(0.5),
    np.float64(0.5),
    torch.tensor(0.5),
    np.array(0.5),
    torch.tensor([1.0])[0] / 2,
)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__}")
def test_numbers_are_numbers_whatever_they_come_in(number):
    assert su.Denoiser(su.MLP(), number).sigma_data == 0.5
    assert su.Observation(first, torch.zeros(1), number).noise_std == 0.5
    assert su.VESDE(number).sigma_min == 0.5
    assert su.PiGDM(MIX, OBS, (2,), number).variance == 0.5
    assert torch.equal(NET(DATA, number), NET(DATA, 0.5))
    assert su.karras_times(VP, 4, number) == su.karras_times(VP, 4, 0.5)
    assert float(VP.sigma(number)) == pytest.approx(float(VP.sigma(0.5)))


@pytest.mark.parametrize("count", [6, np.int64(6), np.int32(6), torch.tensor(6)], ids=str)
def test_counts_are_counts_whatever_they_come_in(count):
    assert len(su.uniform_times(count)) == 6
    assert su.swiss_roll(count, seed=0).shape == (6, 2)
    assert MIX.sample(count, rng(0)).shape == (6, 2)


def test_inference_mode_is_no_mistake():
    with torch.inference_mode():
        x = sample(su.MMPS(MIX, OBS), VP.prior((16, 2), generator=rng(0)), steps=20)
        assert x.isfinite().all()
        assert su.log_likelihood(VP, MIX, DATA[:2].clone(), steps=3).isfinite().all()


def test_sensible_ends_are_allowed():
    assert su.DPS(MIX, OBS, max_shift=math.inf)(X, 1.0).isfinite().all()
    assert smc(resample_below=0).x.shape == (16, 2)
    assert torch.equal(sample(last_step=0), sample(last_step=None) / VP.scale(0.25).float())
    assert su.swiss_roll(5, noise=0.0, seed=0).shape == (5, 2)


RUNS = {
    f"{sde}, {kind}, {step}, {steps}": (sde, kind, step, steps)
    for sde in ("VE", "VP")
    for kind in ("exact", "untrained", "DPS", "MMPS", "annealed", "PiGDM")
    for step, steps in (("euler_maruyama", 20), ("ancestral", 10), ("heun", 5), ("multistep", 100))
}


@pytest.mark.parametrize("run", RUNS)
def test_right_use_warns_of_nothing(run):
    """48 runs: exact, untrained and guided, coarse and fine, with VE and VP."""
    name, kind, step, steps = RUNS[run]
    sde = {"VE": VE, "VP": VP}[name]
    wide = su.Observation(first, torch.tensor([0.5]), 0.3)
    denoiser = {
        "exact": MIX,
        "untrained": NET,
        "DPS": su.DPS(MIX, wide),
        "MMPS": su.MMPS(MIX, wide),
        "annealed": su.Annealed(MIX, wide),
        "PiGDM": su.PiGDM(MIX, wide, (2,)),
    }[kind]
    predictor = su.multistep() if step == "multistep" else getattr(su, step)
    x = sde.prior((200, 2), generator=rng(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times = su.karras_times(sde, steps)
        su.sample(sde, denoiser, x, times=times, predictor=predictor, generator=rng(6))


@pytest.mark.parametrize("sde", [VE, VP])
def test_right_particles_warn_of_nothing(sde):
    x = sde.prior((500, 2), generator=rng(7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for guided in (su.MMPS(MIX, OBS), su.PiGDM(MIX, OBS, (2,), 1.0)):
            su.twisted_smc(sde, guided, x, times=su.karras_times(sde, 60), generator=rng(8))


def test_what_was_changed_afterwards_changes_nothing():
    """A mask after the operator was made."""
    mask = torch.ones(8, 8, dtype=torch.bool)
    operator = ops.Inpainting(mask)
    mask[:4] = False
    assert operator(torch.zeros(1, 1, 8, 8)).shape == (1, 1, 64)


def test_every_random_function_names_a_seed_given_for_its_generator():
    calls = [
        partial(VP.perturb, DATA, 0.5),
        partial(VP.prior, (3, 2)),
        partial(su.dsm_loss, NET, DATA, 1.0),
        partial(su.log_uniform(0.1, 1.0), 5),
        partial(su.log_normal(0.0, 1.0, 0.1, 1.0), 5),
        train,
        sample,
        partial(su.euler_maruyama, VP, MIX, X, 0.5, 0.4),
        partial(su.ancestral, VP, MIX, X, 0.5, 0.4),
        partial(su.Langevin(), VP, MIX, X, 0.5),
        partial(su.log_likelihood, VP, MIX, X, probes=2),
        smc,
        partial(smc(steps=8).resample, 3),
        partial(MIX.sample, 3),
        partial(su.weighted_posterior, MIX, OBS, 5),
        partial(su.swiss_roll, 5),
        partial(su.sliced_wasserstein, DATA, DATA),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"torch\.Generator"):
            call(generator=0)
