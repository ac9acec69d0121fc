"""Score-based diffusion and observation-guided diffusion, each approximation beside the exact."""

from .chain import moment_matched, reverse_chain
from .digits import load_denoiser, load_pretrained, mnist, save_denoiser
from .exact import GaussianMixture, IsotropicMixture, weighted_posterior
from .gibbs import SplitGibbs, tempered_smc
from .guidance import DPS, MMPS, Annealed, PiGDM, dps_step
from .guided import Guidance, Guided, Isotropic, Spectral
from .likelihood import log_likelihood
from .metrics import calibration_ranks, central_interval, coverage, ecdf_band
from .metrics import frechet_distance, psnr, sliced_wasserstein, total_variation
from .networks import MLP, Denoiser, UNet
from .observation import Observation
from .predictors import Langevin, ancestral, euler, euler_maruyama, heun, multistep
from .roll import roll_mass, roll_pieces, swiss_roll, swiss_roll_curve, swiss_roll_density
from .roll import swiss_roll_parameter, swiss_roll_scaling
from .sampling import karras_times, sample, uniform_times
from .schedules import VESDE, VPSDE, SubVPSDE
from .sde import SDE
from .smc import Particles, twisted_smc
from .training import dsm_loss, log_normal, log_uniform, train

__version__ = "0.2.0"
