"""EDM: the diffusion model that consistency models start from, and the multistep baseline.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364. No teacher. One graded network call per training step (3 forward equivalents).

``parameterization = "trigflow"`` trains the same model in the frame of Lu & Song 2024
(arXiv:2410.11081, Sec. 3), ``||sd F(x_t / sd, t) - v_t||^2`` with ``c_noise = t``: the teacher that
sCM needs. With sigma_data fixed, the two are the same diffusion model in other coordinates.

``logvar_channels`` adds EDM2's uncertainty weighting (Karras et al. 2024, arXiv:2312.02696, Eq. 14
to 16): a head beside the network learns the log-variance ``u(sigma)`` of the error.

Samplers: those of :data:`cmbench_plugins._solvers.SOLVERS`. ``auto`` is ``heun``, the paper's, from
NFE 18 on and ``deis-afs`` below, where Heun's steps are too few: docs/solvers.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims, sigma_to_t
from cmbench.diffusion.grids import lognormal_sigmas
from cmbench.diffusion.models import DiffusionModel, EDMModel, TrigFlowModel
from cmbench.diffusion.predictions import DataAndNoiseModel, DataModel
from cmbench.diffusion.tangent import trigflow_interpolate, trigflow_velocity_target
from cmbench.diffusion.weightings import adaptive_weighted_loss, edm_weight
from cmbench.errors import Declined, UserError
from cmbench.networks.heads import MPLogVariance
from cmbench.plugin.config import MethodConfig, Positive
from cmbench.plugin.method import Batch, Draws, Kit, Method, Nets, Progress, SamplingPlan
from cmbench_plugins._solvers import ALIASES, SOLVERS, automatic_sampler, evaluated_sigmas, solved

__all__ = ["EDM", "MODELS", "EDMConfig", "channel_copies", "initial_network"]

#: How a network's output is read, by the name of its parameterization.
MODELS: dict[str, Callable[[Any, float], DiffusionModel]] = {
    "edm": EDMModel,
    "trigflow": TrigFlowModel,
    "x": DataModel,
    "both": DataAndNoiseModel,
}

#: What may be asked for by name.
SAMPLERS = ("auto", *SOLVERS, *ALIASES)


def channel_copies(parameterization: str) -> int:
    """Return how many times the data's channels the network has: "both" needs twice."""
    return 2 if parameterization == "both" else 1


def initial_network(
    kit: Kit, parameterization: str, config: MethodConfig, **overrides: Any
) -> nn.Module:
    """Build a student: the teacher's averaged weights if there is one with weights, else random.

    ``overrides`` are options of the network, instead of the recipe's.

    Raises:
        UserError: the recipe asks for augmentations, of which only the diffusion model tells its
            network, or the teacher's network does not fit.
    """
    if config.augment > 0:
        raise UserError(
            "recipe",
            f"augment {config.augment:g}",
            allowed="0 for this method",
            remedy="augment the teacher only",
        )
    copies = channel_copies(parameterization)
    return kit.student(parameterization, channel_copies=copies, **overrides)


class EDMConfig(MethodConfig):
    """Hyper-parameters of EDM (Table 1 of the paper)."""

    parameterization: Literal["edm", "trigflow", "x", "both"] = Field(
        "edm",
        description="what the network predicts: EDM's F, TrigFlow's F (v-prediction on data of "
        "unit variance), the data, or data and noise",
    )
    p_mean: float = Field(-1.2, description="mean of ln sigma in training")
    p_std: Positive = Field(1.2, description="standard deviation of ln sigma in training")
    logvar_channels: int = Field(
        0,
        ge=0,
        description="features of the log-variance head that weights the loss (EDM2: 128; 0: none)",
    )
    sampler: str = Field(
        "auto",
        description="solver of the PF-ODE: auto (deis-afs below NFE 18, heun from there), "
        + ", ".join(SOLVERS),
    )
    sigma_min: Positive = Field(0.002, description="last noise level before zero")
    sigma_max: Positive = Field(80.0, description="noise level that sampling starts from")
    rho: Positive = Field(7.0, description="exponent of the sampling grid (Eq. 5)")

    @field_validator("sampler")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SAMPLERS:
            raise ValueError(f"not one of {', '.join(SAMPLERS)}")
        return name


class EDM(Method):
    """Diffusion training, and sampling by solving the PF-ODE."""

    Config = EDMConfig
    config: EDMConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """One network from random weights, and the head of the log-variance where there is one."""
        c = self.config
        if c.augment > 0 and c.parameterization in ("x", "both"):
            raise UserError(
                "recipe",
                f"augment {c.augment:g} with parameterization {c.parameterization!r}",
                allowed="edm, trigflow",
                remedy="set augment=0",
            )
        model = kit.network(channel_copies=channel_copies(c.parameterization))
        if not c.logvar_channels:
            return {"model": model}
        return {"model": model, "logvar": MPLogVariance(c.logvar_channels)}

    def trained_modules(self, nets: Nets) -> tuple[str, ...]:
        """The network and the head of the log-variance learn together."""
        return tuple(nets)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """Weighted denoising error, summed over values (Eq. 8 with the weight of Table 1).

        With a log-variance head: ``sum over values of error / exp(u) + u`` (EDM2, Eq. 15).
        """
        x = batch.images
        eps = draws.normal("noise", x)
        n = draws.normal("sigma", x[:, 0, 0, 0])
        sigma = lognormal_sigmas(n, self.config.p_mean, self.config.p_std)
        extra = {} if batch.augment_labels is None else {"augment_labels": batch.augment_labels}
        if self.config.parameterization == "trigflow":
            error = self._trigflow_error(nets, batch, sigma, eps, extra)
        else:
            x_sigma = x + append_dims(sigma, x) * eps
            denoised = self.diffusion_model(nets).denoise(x_sigma, sigma, batch.labels, **extra)
            error = (denoised - x).square().flatten(1).sum(1)
            error = edm_weight(sigma, self.sigma_data) * error
        if "logvar" not in nets:
            return error
        u, dims = nets["logvar"](sigma.log() / 4), x[0].numel()
        progress.log("logvar", u)
        return dims * adaptive_weighted_loss(error, -u, dims)

    def _trigflow_error(
        self, nets: Nets, batch: Batch, sigma: Tensor, eps: Tensor, extra: dict[str, Tensor]
    ) -> Tensor:
        """``||sd F - v_t||^2 / sd^2``: the same weighting of noise levels as EDM's."""
        t, z = sigma_to_t(sigma, self.sigma_data), self.sigma_data * eps
        x_t = trigflow_interpolate(batch.images, z, t)
        v_t = trigflow_velocity_target(batch.images, z, t)
        model = TrigFlowModel(nets["model"], self.sigma_data)
        velocity = model.velocity(x_t, t, batch.labels, **extra)
        return ((velocity - v_t) / self.sigma_data).square().flatten(1).sum(1)

    def diffusion_model(self, nets: Nets) -> DiffusionModel:
        """Return the denoiser in either frame."""
        return MODELS[self.config.parameterization](nets["model"], self.sigma_data)

    # ---- sampling ------------------------------------------------------------------------------

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """Any solver on its own grid; the automatic one takes any NFE from 1."""
        c, name = self.config, sampler or self.config.sampler
        if name not in SAMPLERS:
            raise Declined(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
        name = automatic_sampler(nfe, sigmas) if name == "auto" else ALIASES.get(name, name)
        steps = SOLVERS[name].steps(nfe)
        if sigmas is None:
            sigmas = evaluated_sigmas(name, nfe, c.sigma_min, c.sigma_max, c.rho)
        if len(sigmas) != steps:
            raise Declined(f"{name} at NFE {nfe} takes {steps} noise levels, got {len(sigmas)}")
        return SamplingPlan(nfe, name, tuple(sigmas))

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Solve the PF-ODE from ``sigma_max`` to zero."""
        return solved(
            self.diffusion_model(nets),
            plan.sampler,
            plan.nfe,
            noise,
            plan.sigmas,
            self.config.sigma_min,
            labels,
            lambda step: draws.normal(f"step-{step}", noise).double(),
        )
