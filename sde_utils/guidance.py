r"""Guidance turns a denoiser into a denoiser, and a method is a covariance.

All methods here say that y is Gaussian given z, around A(x̂), x̂ = D(z, σ). They differ in nothing
but its covariance S, and D_y follows by Tweedie's formula:

    log p(y | z) = log N(y; A(x̂), S),
    D_y = x̂ + σ² ∇_z log p(y | z) = x̂ + σ² Jᵀ Hᵀ S⁻¹ (y - A(x̂)),   J = ∂x̂/∂z,  H = ∂A/∂x̂.

Stiffness. σ² J is the covariance of x_0 given z. With S = σ_y² I the correction has the slope
|H|² (σ² J)² / (σ² σ_y²) in z: it falls like v² / (σ² σ_y²) at large σ, where σ² J is the data's
variance v, and is σ² / σ_y² at small σ along the data. In between, and wherever a learned J is too
large, no explicit step follows it if σ_y is small. The exact correction is the shift of a mean, by
a few σ at most in each of m directions. So each sample's is held to

    |σ² ∇_z log p(y | z)| <= max_shift σ sqrt(min(m, d)),   m numbers observed, d dimensions.

Below σ_y, where the width of the result is decided, that changes nothing.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import _check as check
from ._numerics import Denoise, Predictor, Random, conjugate_gradient, differentiable, product
from .guided import Guided, Isotropic, Spectral, Tangent
from .observation import Observation
from .sde import SDE


@dataclass(frozen=True, eq=False)
class DPS(Guided):
    r"""All of p(x_0 | z) put at its mean.

        S = σ_y² I.

    One vector-Jacobian product. Source: Chung et al. 2023 (arXiv 2209.14687), eq. 11 to 16.
    """

    def covariance(self, at: Tangent) -> Isotropic:
        return Isotropic(torch.full_like(at.levels, at.noise))


@dataclass(frozen=True, eq=False)
class Annealed(Guided):
    r"""The likelihood widened by the noise that is still in z.

        S = (σ_y² + σ²) I.

    One vector-Jacobian product. Source: Jalal et al. 2021 (arXiv 2108.01368), there at z, not x̂.
    """

    def covariance(self, at: Tangent) -> Isotropic:
        return Isotropic(at.noise + at.levels**2)


@dataclass(frozen=True, eq=False)
class PiGDM(Guided):
    r"""Every direction of the data as wide as any other; exact for data N(μ, v I).

        S = σ_y² I + ρ² A Aᵀ,   ρ² = σ² v / (σ² + v).

    One vector-Jacobian product; A becomes a matrix once, here (`ValueError` if it is not linear).
    Args:
        shape: of one x_0, dims.
        variance: v, that of the data; `denoiser.sigma_data`² if None, 1 where there is no such.
    Source: Song, J., et al. 2023, Pseudoinverse-guided diffusion models (ICLR).
    """

    shape: tuple[int, ...]
    variance: float = None  # type: ignore[assignment]
    max_shift: float = field(default=10.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        own = getattr(self.denoiser, "sigma_data", 1.0) ** 2
        variance = own if self.variance is None else self.variance
        vars(self).update(variance=check.number("variance", variance))
        assert self.gram  # refuses a crooked A before any work

    @cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """A Aᵀ = U diag(values) Uᵀ."""
        matrix = self.obs.matrix(self.shape)
        values, basis = torch.linalg.eigh(matrix @ matrix.T)
        return values.clamp(min=0), basis

    def covariance(self, at: Tangent) -> Spectral:
        wide = torch.promote_types(at.r.dtype, torch.float32)
        values, basis = (a.to(at.r.device, wide) for a in self.gram)
        square = at.levels[:, None].to(wide) ** 2
        rho2 = square * self.variance / (square + self.variance)
        return Spectral(at.noise + rho2 * values, basis)


@dataclass(frozen=True, eq=False)
class MMPS(Guided):
    r"""The covariance of x_0 given z by Tweedie's formula, σ² J; exact for Gaussian data, linear A.

        S = σ_y² I + σ² H J Hᵀ + C,   C = mean of q qᵀ,   q = (A(x̂ + δ) + A(x̂ - δ))/2 - A(x̂).

    C is what the linearisation of a curved A leaves out (ours), over `probes` fixed δ ~ N(0, ρ² I),
    ρ² = σ² s² / (σ² + s²), s = `denoiser.sigma_data` or 1; calls of A only. Up to `dense` observed
    numbers S is built, by one vector-Jacobian product each; where a learned J is not positive, the
    direction has no say. Above, S⁻¹ r takes `iterations` of conjugate gradients with the diagonal
    of C, one product each, and one more at the end; log p(y | z) builds S in any case.
    Source: Rozet et al. 2024 (arXiv 2405.13712), section 4.2, for linear A and so without C.
    """

    dense: int = field(default=8, kw_only=True)
    iterations: int = field(default=5, kw_only=True)
    probes: int = field(default=0, kw_only=True)
    max_shift: float = field(default=10.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.count("dense", self.dense)
        check.count("iterations", self.iterations)
        check.count("probes", self.probes, least=0)

    def covariance(self, at: Tangent) -> Spectral:
        h, g = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in at.rows)
        spread = at.levels[:, None, None].to(g) ** 2 * g @ h.mT
        if self.probes:
            q = self.bend(at).to(g)
            spread = spread + q.mT @ q / self.probes
        values, basis = torch.linalg.eigh((spread + spread.mT) / 2)
        return Spectral(at.noise + values.clamp(min=0), basis, live=values > 0)

    def weights(self, at: Tangent) -> Tensor:
        if at.r.shape[1] <= self.dense:
            return super().weights(at)
        square = at.levels[:, None] ** 2
        noise = at.noise + (self.bend(at) ** 2).mean(1) if self.probes else at.noise
        return conjugate_gradient(
            lambda u: noise * u + square * at.H(at.JHt(u)), at.r, self.iterations
        )

    def bend(self, at: Tangent) -> Tensor:
        """q for each probe, (B, probes, m)."""
        operator, x, size = self.obs.operator, at.x0_hat, getattr(self.denoiser, "sigma_data", 1.0)
        rho = at.sigma * size / (at.sigma**2 + size**2).sqrt()
        shape, random = (self.probes, *x.shape[1:]), torch.Generator().manual_seed(0)
        normal = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            centre = operator(x)
            q = [(operator(x + rho * d) + operator(x - rho * d)) / 2 - centre for d in normal.to(x)]
        return torch.stack(q, dim=1).reshape(len(x), self.probes, -1)


def dps_step(predictor: Predictor, obs: Observation, zeta: float) -> Predictor:
    r"""Algorithm 1 of the DPS paper. It forgets σ_y, and so is a step, no denoiser.

        x_s = predictor(x_t) - ζ ∇_{x_t} |r|² / |r|,   r = y - A(D(z_t, σ_t)), norms per sample.

    Published with `ancestral`. The last step, to x_0, is `sample`'s. No bound; ζ is tuned.
    Args: predictor: as `sample` takes it. zeta: ζ > 0.   Returns: a predictor.
    Source: Chung et al. 2023 (arXiv 2209.14687), algorithm 1.
    """
    check.function("predictor", predictor, "a function of one step, as su.ancestral", 6)
    zeta = check.number("zeta", zeta)
    check.kind(isinstance(obs, Observation), "obs must be an Observation", obs)

    def step(
        sde: SDE, denoiser: Denoise, x: Tensor, t: float, s: float, generator: Random = None
    ) -> Tensor:
        r, sigma = float(sde.scale(t)), x.new_full((), float(sde.sigma(t)))
        z, x0_hat = differentiable(denoiser, x / r, sigma)
        point = x0_hat.detach().requires_grad_()
        with torch.enable_grad():
            norm = obs.residual(point.clone()).norm(dim=1).sum()
        gradient = product(x0_hat, z, torch.autograd.grad(norm, point)[0], last=True)
        known = [x0_hat.detach()]

        def told(z: Tensor, sigma: Tensor) -> Tensor:
            return known.pop() if known else denoiser(z, sigma)  # the first call has been made

        x_s = predictor(sde, told, x, t, s, generator)
        return x_s - 2 * zeta / r * gradient  # ∇|r|² / |r| = 2 ∇|r|, and ∇_x = ∇_z / r

    return step
