"""Score-based diffusion and observation-guided diffusion, each approximation beside its exact counterpart."""

from .data import mnist, swiss_roll, swiss_roll_curve, swiss_roll_parameter, swiss_roll_scaling
from .exact import GaussianMixture, IsotropicMixture, grid_posterior, swiss_roll_density, weighted_posterior
from .guidance import DPS, MMPS, Annealed, Observation, PiGDM
from .metrics import calibration_ranks, central_interval, coverage, frechet_distance, psnr, roll_mass, sliced_wasserstein, total_variation
from .networks import MLP, Denoiser, UNet, load_denoiser, load_pretrained, save_denoiser
from .sampling import (
    Langevin,
    Multistep,
    ancestral,
    euler,
    euler_maruyama,
    heun,
    karras_times,
    log_likelihood,
    sample,
    uniform_times,
)
from .sde import SDE, VESDE, VPSDE, SubVPSDE
from .smc import Particles, twisted_smc
from .training import dsm_loss, log_normal, log_uniform, train

__version__ = "0.1.0"
__all__ = [
    "DPS",
    "MLP",
    "MMPS",
    "SDE",
    "VESDE",
    "VPSDE",
    "Annealed",
    "Denoiser",
    "GaussianMixture",
    "IsotropicMixture",
    "Langevin",
    "Multistep",
    "Observation",
    "Particles",
    "PiGDM",
    "SubVPSDE",
    "UNet",
    "ancestral",
    "calibration_ranks",
    "central_interval",
    "coverage",
    "dsm_loss",
    "euler",
    "euler_maruyama",
    "frechet_distance",
    "grid_posterior",
    "heun",
    "karras_times",
    "load_denoiser",
    "load_pretrained",
    "log_likelihood",
    "log_normal",
    "log_uniform",
    "mnist",
    "psnr",
    "roll_mass",
    "sample",
    "save_denoiser",
    "sliced_wasserstein",
    "swiss_roll",
    "swiss_roll_curve",
    "swiss_roll_density",
    "swiss_roll_parameter",
    "swiss_roll_scaling",
    "total_variation",
    "train",
    "twisted_smc",
    "uniform_times",
    "weighted_posterior",
]
