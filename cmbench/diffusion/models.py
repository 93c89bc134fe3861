"""Denoisers and consistency functions around a raw network, callable in named time frames.

Each class is a frozen pair of a raw network (any callable, see
:data:`cmbench.diffusion.preconditioning.RawNetwork`) and its constants. Images ``[N, C, H, W]``,
``sigma`` and ``t`` ``[N]``, labels int64 ``[N]`` or None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from cmbench.diffusion.frames import (
    append_dims,
    edm_to_trig,
    predictions_to_velocity,
    quarter_log_sigma,
    trig_to_edm,
    velocity_to_denoised,
)
from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.preconditioning import (
    RawNetwork,
    boundary_scalings,
    edm_scalings,
    precondition,
)

#: What a TrigFlow network receives as ``c_noise``: the angle, or EDM's ``ln(sd tan t) / 4``.
NoiseEmbedding = Literal["t", "log-sigma"]


@runtime_checkable
class DiffusionModel(Protocol):
    """A diffusion model that answers in both frames; what teachers and solvers ask for."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data."""
        ...

    @property
    def parameterization(self) -> str:
        """How the raw network's output is read: a student that reads it otherwise is refused."""
        ...

    def denoise(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``D(x_sigma, sigma [N])``, clean images ``[N, C, H, W]`` (EDM frame)."""
        ...

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``dx_t/dt = sd F`` ``[N, C, H, W]`` of the PF-ODE (TrigFlow frame); ``t [N]``."""
        ...


@dataclass(frozen=True)
class EDMModel:
    """A raw network with EDM preconditioning (Karras et al. 2022, Eq. 7)."""

    network: RawNetwork
    sigma_data: float
    parameterization: ClassVar[str] = "edm"

    def denoise(
        self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the denoised images ``[N, C, H, W]`` at noise levels ``sigma [N]`` >= 0."""
        scalings = edm_scalings(sigma, self.sigma_data)
        return precondition(self.network, x_sigma, scalings, labels, **kwargs)

    def velocity(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return ``sd F`` ``[N, C, H, W]`` at angles ``t [N]`` without dividing by ``sin t``.

        EDM's scalings put into ``(cos t x_t - D) / (sd sin t)`` leave the raw network at the same
        input with the opposite sign: ``F_trig(x_t / sd, t) = -F_raw(x_t / sd, ln(sd tan t) / 4)``.
        """
        noise = quarter_log_sigma(t, self.sigma_data)
        return -self.sigma_data * self.network(x_t / self.sigma_data, noise, labels, **kwargs)


@dataclass(frozen=True)
class TrigFlowModel:
    """A raw network read as TrigFlow's ``F`` (Lu & Song 2024, Sec. 3): ``dx_t/dt = sd F``.

    ``noise_embedding`` says what the network receives as time. ``output_sign = -1`` together with
    ``"log-sigma"`` reads a network trained with EDM preconditioning, see :class:`EDMModel`.
    """

    network: RawNetwork
    sigma_data: float
    noise_embedding: NoiseEmbedding = "t"
    output_sign: float = 1.0

    @property
    def parameterization(self) -> str:
        """``trigflow``, or ``edm`` for a network that was trained with EDM preconditioning."""
        return "trigflow" if self.noise_embedding == "t" else "edm"

    def raw(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return ``F(x_t / sd, c_noise(t))`` ``[N, C, H, W]``, of unit variance; ``t [N]``."""
        noise = t if self.noise_embedding == "t" else quarter_log_sigma(t, self.sigma_data)
        raw = self.network(x_t / self.sigma_data, noise, labels, **kwargs)
        return raw if self.output_sign == 1.0 else self.output_sign * raw

    def velocity(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return ``sd F`` ``[N, C, H, W]`` at angles ``t [N]``."""
        return self.sigma_data * self.raw(x_t, t, labels, **kwargs)

    def denoise(
        self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return ``cos(t) x_t - sin(t) sd F`` ``[N, C, H, W]`` at ``t = arctan(sigma / sd)``."""
        x_t, t = edm_to_trig(x_sigma, sigma, self.sigma_data)
        return velocity_to_denoised(x_t, t, self.velocity(x_t, t, labels, **kwargs))


@dataclass(frozen=True)
class MixtureModel:
    """The exact model of a Gaussian mixture: a teacher without error, and without a network."""

    mixture: GaussianMixture
    sigma_data: float
    parameterization: ClassVar[str] = ""

    def denoise(self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``E[x0 | x_sigma]``."""
        return self.mixture.denoised(x_sigma, sigma, labels)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``E[cos(t) z - sin(t) x0 | x_t]``, without dividing by ``sin t``."""
        angle = t.double()  # x_t / cos(t) magnifies float32's rounding of t near pi/2
        x_sigma, sigma = trig_to_edm(x_t.double(), angle, self.sigma_data)
        denoised, epsilon = self.mixture.predictions(x_sigma, sigma, labels)
        return predictions_to_velocity(angle, denoised, epsilon, self.sigma_data).to(x_t.dtype)


@dataclass(frozen=True)
class EDMConsistency:
    """A consistency function in the EDM frame: ``f(x, sigma_min) = x`` bitwise.

    Song et al. 2023 (arXiv:2303.01469), App. C; ``sigma_min = 0`` gives EDM's plain scalings, with
    the boundary at zero noise.
    """

    network: RawNetwork
    sigma_data: float
    sigma_min: float

    def __call__(
        self, x_sigma: Tensor, sigma: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the estimated origin ``[N, C, H, W]`` of the trajectory through ``x_sigma``."""
        scalings = boundary_scalings(sigma, self.sigma_data, self.sigma_min)
        return precondition(self.network, x_sigma, scalings, labels, **kwargs)


@dataclass(frozen=True)
class TrajectoryModel:
    """A raw network that gives every state of a PF-ODE's trajectory from its noise.

    ``x(z, t) = (t/T) z + (1 - t/T) F(z / sqrt(T^2 + sd^2), ln(t) / 4)``, so that ``x(z, T) = z``
    (arXiv:2411.08378, and its code).
    """

    network: RawNetwork
    sigma_data: float
    sigma_max: float

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the states ``[N, C, H, W]`` at levels ``t [N]`` > 0; ``z`` has level ``T``."""
        scale = (self.sigma_max**2 + self.sigma_data**2) ** 0.5
        raw = self.network(z / scale, t.log() / 4, labels, **kwargs)
        share = append_dims(t / self.sigma_max, z)
        return share * z + (1 - share) * raw


@dataclass(frozen=True)
class TrigFlowConsistency:
    """A consistency function in the TrigFlow frame: ``f(x, 0) = x`` (Lu & Song 2024, Sec. 3).

    Fields as in :class:`TrigFlowModel`, whose denoiser at the same ``F`` it is.
    """

    network: RawNetwork
    sigma_data: float
    noise_embedding: NoiseEmbedding = "t"
    output_sign: float = 1.0

    def __call__(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return ``cos(t) x_t - sin(t) sd F(x_t / sd, c_noise(t))`` ``[N, C, H, W]``; ``t [N]``."""
        model = TrigFlowModel(self.network, self.sigma_data, self.noise_embedding, self.output_sign)
        return velocity_to_denoised(x_t, t, model.velocity(x_t, t, labels, **kwargs))
