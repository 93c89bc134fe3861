"""The contract of a method: how a generator is trained and sampled.

A method owns neither the training loop nor the data, the metrics or the seeds. It builds modules
from a network (and a teacher), has a loss that receives its randomness and returns one value per
image, and maps noise to images with a stated number of network evaluations.

Shapes: images ``[N, C, H, W]`` float32 in [-1, 1]; labels int64 ``[N]`` or None; unit noise as
images; noise levels as EDM's sigma (a method that works in TrigFlow time converts by name).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cmbench.diffusion.consistency_sampling import multistep_consistency, sample_flow_map
from cmbench.errors import Declined, UserError
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.phases import (
    Batch,
    Draws,
    GeneratedData,
    LossFunction,
    Nets,
    Objective,
    Phase,
    PhaseStart,
    Progress,
)

if TYPE_CHECKING:
    from cmbench.diffusion.models import DiffusionModel


@dataclass(frozen=True)
class DataInfo:
    """The properties of the data that a method models."""

    dataset: str
    data_shape: tuple[int, int, int]
    num_classes: int  #: 0 when unconditional
    sigma_data: float
    bounded: bool = True  #: whether values are in [-1, 1], as for images (not for mixtures)


#: ``f(x, sigma, labels) -> images``, see :meth:`Method.consistency_function`.
ConsistencyFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: ``f(x, sigma, sigma_end, labels) -> images``, see :meth:`Method.flow_map`.
FlowMap = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Teacher:
    """A trained diffusion model: its denoiser, and the network to start a student from."""

    name: str
    model: DiffusionModel
    network: nn.Module | None

    @property
    def parameterization(self) -> str:
        """How the network's output is read, as :attr:`model` says; empty if it does not say."""
        return str(getattr(self.model, "parameterization", ""))


class Kit(Protocol):
    """What :meth:`Method.build` receives.

    ``teacher`` is the frozen teacher of a training. It is None without one, and whenever modules
    are built for sampling: their weights are loaded afterwards, and the teacher may be far away.
    """

    teacher: Teacher | None

    def network(self, *, channel_copies: int = 1, **overrides: Any) -> nn.Module:
        """Build a network as in the recipe, with initial weights from a named seed.

        ``channel_copies`` multiplies its input and output channels.
        """

    def student(
        self, parameterization: str, *, channel_copies: int = 1, **overrides: Any
    ) -> nn.Module:
        """Build a network as in the recipe that starts from the teacher's network, if there is one.

        The same call is right in sampling and for a teacher without a network: then it is
        :meth:`network`.

        Args:
            parameterization: how this method reads the network's output; the name that the
                teacher's diffusion model gives its own (``"edm"``, ``"trigflow"``, ``"x"``,
                ``"both"``, or one of yours).
            channel_copies: as for :meth:`network`.
            overrides: options of the network, instead of the recipe's.

        Raises:
            UserError: the teacher's network is read in another way, or has another architecture.
        """


@dataclass(frozen=True)
class SamplingPlan:
    """How a method uses its network evaluations.

    ``sigmas`` are the noise levels at which the network is evaluated, descending: none for a method
    without noise levels, infinity for pure noise. ``variant`` is the phase's ``export`` to load for
    a staged method, or empty. An ``adaptive`` sampler chooses the steps of each image by itself:
    ``nfe`` is then the most that an image may cost, and the record has the mean that was counted.
    """

    nfe: int
    sampler: str
    sigmas: tuple[float, ...]
    variant: str = ""
    adaptive: bool = False


class Method:
    """Base class of all methods. Subclasses are in plugins, one file per paper."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    #: Whether samples are compared with the probability flow's images of their noise, on datasets
    #: that know it. False for methods whose map from noise to images is another (a GAN's).
    follows_probability_flow: ClassVar[bool] = True
    #: The name of its sampler, where :meth:`plan_sampling` is the default one.
    sampler: ClassVar[str] = "multistep"
    #: The frozen teacher of a training, as ``kit.teacher``; set before :meth:`build` is called.
    teacher: Teacher | None = None

    def __init__(self, config: MethodConfig, data: DataInfo) -> None:
        self.config, self.data = config, data
        self.sigma_data = config.sigma_data or data.sigma_data

    def modules(self, kit: Kit) -> dict[str, nn.Module]:
        """Keep the kit's teacher and return the modules that :meth:`build` makes (final)."""
        self.teacher = kit.teacher
        return self.build(kit)

    def distilled(self) -> DiffusionModel:
        """Return the teacher's diffusion model.

        Raises:
            UserError: there is no teacher.
        """
        if self.teacher is None:
            raise UserError(
                f"method {type(self).__name__}",
                "has no teacher",
                allowed="METHOD:RECIPE or analytic",
                remedy="set teacher in the recipe",
            )
        return self.teacher.model

    # ---- train hooks ---------------------------------------------------------------------------

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """Return the modules by name, among them ``"model"``: by default the recipe's network.

        It is called for training and again for sampling. Random numbers of torch come from the
        run's seed during the whole call, so modules that are made without the kit are seeded too.
        """
        return {"model": kit.network()}

    def sampled_modules(self, nets: Nets) -> tuple[str, ...]:
        """Return the names of the modules that :meth:`sample` and :meth:`diffusion_model` use.

        They are averaged, stored in the results and restored for sampling. Every other module is
        for training only: using it in sampling is an error. ``"model"`` is always one of them.
        """
        return ("model",)

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """Return the loss per image ``[N]``; all randomness comes from ``draws``."""
        raise NotImplementedError(
            f"{type(self).__name__} defines none of loss, objectives and phases"
        )

    def objectives(self, nets: Nets) -> tuple[Objective, ...]:
        """Return what the default phase optimizes, in this order: ``"model"`` by :meth:`loss`."""
        return (Objective(self.loss, self.trained_modules(nets), self.config.optimizer),)

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """Return the phases of training: by default one with all :meth:`objectives`."""
        c = self.config
        images, objectives = round(c.duration_kimg * 1000), self.objectives(nets)
        return [Phase("train", images, objectives, c.ema, after_step=self.after_step)]

    def trained_modules(self, nets: Nets) -> tuple[str, ...]:
        """Return the names of the modules that the default objective's optimizer moves."""
        return ("model",)

    def after_step(self, nets: Nets, progress: Progress) -> None:
        """Update what is not learned by gradients; the default does nothing."""

    # ---- sample hooks --------------------------------------------------------------------------

    def sampling_levels(self, nfe: int) -> Sequence[float]:
        """Return the noise levels of ``nfe`` evaluations, descending, for the default plan.

        A method with fewer or more levels than ``nfe`` (a one-step generator has one) declines that
        NFE by returning them.
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines neither sampling_levels nor plan_sampling"
        )

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """Return how ``nfe`` evaluations are used, or raise :class:`Declined` with a reason.

        ``sigmas`` and ``sampler`` override the method's own choice. The default: one evaluation at
        each of :meth:`sampling_levels`, by the sampler :attr:`sampler`.
        """
        who = type(self).__name__
        if sampler not in (None, self.sampler):
            raise Declined(f"sampler {sampler!r}: {who} has {self.sampler} only")
        levels = tuple(self.sampling_levels(nfe) if sigmas is None else sigmas)
        if len(levels) != nfe:
            raise Declined(f"NFE {nfe} of {who} takes {nfe} noise levels, got {len(levels)}")
        return SamplingPlan(nfe, self.sampler, levels)

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Map unit ``noise`` to images in [-1, 1] with exactly ``plan.nfe`` evaluations per image.

        With ``plan.adaptive``, with at most as many: an image costs what it costs alone.

        Noise for later steps comes from ``draws.normal("step-1", noise)`` and so on: per-image
        seeds, so that a sample does not depend on the batch it is made in. The default jumps along
        :meth:`flow_map` if there is one; otherwise it denoises by :meth:`consistency_function` and
        adds the noise of the next level.
        """
        if self._has_flow_map:
            return sample_flow_map(self.flow_map(nets), noise, plan.sigmas, labels)
        if type(self).consistency_function is Method.consistency_function:
            who = type(self).__name__
            raise NotImplementedError(
                f"{who} defines none of sample, flow_map and consistency_function"
            )
        return multistep_consistency(
            self.consistency_function(nets),
            noise,
            torch.tensor(plan.sigmas, dtype=torch.float64),
            sigma_min=0.0,
            labels=labels,
            noise_sampler=lambda step: draws.normal(f"step-{step}", noise),
        )

    # ---- optional ------------------------------------------------------------------------------

    def diffusion_model(self, nets: Nets) -> DiffusionModel:
        """Return the trained model as a diffusion model, for methods that can be teachers."""
        raise Declined(f"{type(self).__name__} does not train a diffusion model")

    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        """Return ``f(x, sigma, labels)``, the origin of the trajectory through noisy images.

        In EDM's frame, ``x = x0 + sigma z``, whatever frame the method works in: ``x``
        ``[N, C, H, W]``, ``sigma`` ``[N]``, labels int64 ``[N]`` or None. One network evaluation.
        For tasks, tests and users; by default :meth:`flow_map` to zero. Raises :class:`Declined`
        for methods without one.
        """
        if not self._has_flow_map:
            raise Declined(f"{type(self).__name__} has no consistency function")
        flow_map = self.flow_map(nets)
        return lambda x, sigma, labels: flow_map(x, sigma, sigma.new_zeros(len(sigma)), labels)

    @property
    def _has_flow_map(self) -> bool:
        return type(self).flow_map is not Method.flow_map

    def flow_map(self, nets: Nets) -> FlowMap:
        """Return ``f(x, sigma, sigma_end, labels)``: images moved along their trajectories.

        As :meth:`consistency_function`, to the noise level ``sigma_end`` ``[N]`` instead of zero.
        """
        raise Declined(f"{type(self).__name__} has no flow map")


__all__ = [
    "Batch",
    "ConsistencyFunction",
    "DataInfo",
    "Declined",
    "Draws",
    "FlowMap",
    "GeneratedData",
    "Kit",
    "LossFunction",
    "Method",
    "Nets",
    "Objective",
    "Phase",
    "PhaseStart",
    "Progress",
    "SamplingPlan",
    "Teacher",
]
