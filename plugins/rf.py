"""Rectified flow, reflow and distillation, "k-RF".

Liu et al. 2022, "Flow Straight and Fast", arXiv:2209.03003, and its official code. The clock is the
paper's: time 0 is noise, 1 is data. Algorithm 1, one phase for each of its procedures:

``1-rf``       Z = RectFlow((X0, X1)): Eq. 1 on data X1 and independent noise X0;
``2-rf`` …     Reflow, Z^{k+1} = RectFlow((Z0^k, Z1^k)): Eq. 1 on pairs of noise and what the flow
               before, its average, has made of it by RK45; the weights go on from the last ones;
``distilled``  Distill: the map from Z0^k to Z1^k in ``distil_steps`` steps, by default one.

Every phase exports its generator; ``--sampler 2-rf-euler`` samples that of a phase. With a teacher
there is no phase ``1-rf``: the teacher is that flow, its pairs come from Heun's method on EDM's
grid, and the network goes on from its weights.

``reflow_loss``, ``times`` and ``parameterization = "edm"`` are those of RF++ (Lee et al. 2024,
arXiv:2405.20320), which starts from EDM's network. Its code runs the clock backwards.

A step is one graded call; pairs cost about 110 calls each with RK45, 35 with Heun. A flow is a
diffusion model only before it is rectified: afterwards the images on the way from a noise belong to
that noise, ``x0 + sigma z`` of others is none of them, and there is no consistency function either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cmbench.diffusion.distances import l2_mean, pseudo_huber
from cmbench.diffusion.frames import (
    append_dims,
    flow_interpolate,
    flow_time_to_sigma,
    sigma_to_flow_time,
)
from cmbench.diffusion.grids import RHO, SIGMA_MAX, SIGMA_MIN, choose_uniformly
from cmbench.diffusion.models import DiffusionModel
from cmbench.diffusion.rectified_flow import (
    TIME_SCALE,
    EDMFlowModel,
    FlowModel,
    float64_velocity,
    solve_flow,
    solve_flow_adaptively,
    u_shaped_times,
)
from cmbench.diffusion.runge_kutta import START_EVALUATIONS, STEP_EVALUATIONS
from cmbench.errors import Declined
from cmbench.plugin.config import EMAConfig, NonNegative, Positive
from cmbench.plugin.method import (
    Batch,
    Draws,
    GeneratedData,
    Kit,
    Nets,
    Objective,
    Phase,
    PhaseStart,
    Progress,
    SamplingPlan,
)
from cmbench_plugins._distances import LPIPSConfig, LPIPSMethod
from cmbench_plugins._samplers import staged_solver
from cmbench_plugins._solvers import evaluated_sigmas, solved
from cmbench_plugins.edm import initial_network

__all__ = ["RF", "RFConfig"]

DISTILLED = "distilled"
#: ``c`` of RF++'s pseudo-Huber distance is this times the number of values, not its root.
_HUBER = 0.00054


class RFConfig(LPIPSConfig):
    """Hyper-parameters of rectified flows; ``duration_kimg`` is the first phase's."""

    parameterization: Literal["flow", "edm"] = Field(
        "flow", description="what the network predicts: the velocity, or EDM's F (RF++)"
    )
    time_scale: Positive = Field(
        TIME_SCALE, description="factor of the time that a flow's network receives"
    )
    t_min: float = Field(
        1e-3, gt=0, lt=0.5, description="first time; the last is 1, in training of RF++ 1 - t_min"
    )
    times: Literal["uniform", "u-shaped"] = Field("uniform", description="times of training")
    times_shape: Positive = Field(4.0, description="a of the u-shaped density (RF++)")
    rectifications: int = Field(2, ge=1, le=9, description="k of the last k-RF")
    reflow_loss: Literal["l2", "pseudo-huber", "lpips-huber"] = Field(
        "l2", description="distance in reflow; RF++'s is lpips-huber"
    )
    lpips_over_time: bool = Field(
        True, description="divide LPIPS in reflow by the time that is left (RF++ on CIFAR-10)"
    )
    distil: bool = Field(True, description="distil the last flow in a last phase")
    distil_steps: int = Field(1, ge=1, description="k: steps that the last flow is distilled into")
    distil_loss: Literal["l2", "lpips", "lpips-l2"] = Field(
        "l2", description="distance in distillation; several steps take l2 only"
    )
    reflow_kimg: NonNegative | None = Field(
        None, description="length of every later phase, thousands of images; as the first's if None"
    )
    reflow_ema: tuple[EMAConfig, ...] | None = Field(
        None, description="averages of later phases; those of the first if not given"
    )
    pairs: int = Field(1_000_000, ge=1, description="pairs of noise and image for a later phase")
    pairs_dtype: Literal["float16", "float32"] = Field("float32", description="of stored pairs")
    pairs_tolerance: Positive = Field(
        1e-5, description="relative and absolute tolerance of RK45, for pairs and samples"
    )
    teacher_steps: int = Field(18, ge=2, description="Heun steps of a teacher for its pairs")
    sampler: Literal["euler", "heun", "rk45", "euler-first-noise", "heun-first-noise"] = Field(
        "euler", description="solver of the flow"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.teacher is not None and self.rectifications == 1 and not self.distil:
            raise ValueError(
                "a teacher is the 1-RF: nothing is left to train; set rectifications=2 or distil"
            )
        if self.distil_steps > 1 and self.distil_loss != "l2":
            raise ValueError("distil_loss of several steps is l2 (only one step ends at images)")
        return self


class RF(LPIPSMethod):
    """Rectified flow."""

    Config = RFConfig
    config: RFConfig

    @property
    def stages(self) -> list[str]:
        """The phases in their order."""
        c = self.config
        flows = range(1 if c.teacher is None else 2, c.rectifications + 1)
        return [*(f"{k}-rf" for k in flows), *([DISTILLED] if c.distil else [])]

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        """The flow's network, and the one that makes pairs for the phase after it."""
        nets = {"model": initial_network(kit, self.config.parameterization, self.config)}
        if len(self.stages) > 1:
            nets["generator"] = kit.network()
        return nets

    def flow(self, network: Any) -> FlowModel | EDMFlowModel:
        """Return a network as a flow."""
        if self.config.parameterization == "edm":
            return EDMFlowModel(network, self.sigma_data)
        return FlowModel(network, self.sigma_data, self.config.time_scale)

    def diffusion_model(self, nets: Nets) -> DiffusionModel:
        """The 1-RF as a denoiser; rectified flows are none."""
        if self.stages != ["1-rf"]:
            raise Declined("a rectified flow denoises its own images only: train a 1-RF alone")
        return self.flow(nets["model"])

    # ---- training (Algorithm 1) ----------------------------------------------------------------

    def phases(self, nets: Nets) -> Sequence[Phase]:
        """RectFlow, Reflow and Distill."""
        c = self.config
        if "lpips" in c.distil_loss + c.reflow_loss:
            assert self.lpips is not None  # its weights must be at hand before training starts
        phases = []
        for index, stage in enumerate(self.stages):
            loss = {"1-rf": self.loss, DISTILLED: self.loss_of_steps}.get(stage, self.loss_of_pairs)
            kimg = c.duration_kimg if index == 0 or c.reflow_kimg is None else c.reflow_kimg
            phases.append(
                Phase(
                    stage,
                    round(kimg * 1000),
                    (Objective(loss, ("model",), c.optimizer),),
                    c.ema if index == 0 or c.reflow_ema is None else c.reflow_ema,
                    start=self.promote if index > 0 else None,
                    export=stage,
                    generated=None if stage == "1-rf" else self.pairs(index),
                )
            )
        return phases

    def promote(self, nets: PhaseStart) -> None:
        """The average of the flow before makes the pairs; the network goes on from its own weights.

        The official code, too, loads the weights without their average.
        """
        nets["generator"].load_state_dict(nets.averaged("model"))

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``||(X1 - X0) - v(X_t, t)||^2`` of data and independent noise (Eq. 1), over values."""
        x1 = batch.images
        return self.flow_loss("l2", nets, draws.normal("noise", x1), x1, batch.labels, draws)

    def loss_of_pairs(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """The same of pairs ``(Z0, Z1)``, or RF++'s distance."""
        z0, z1 = batch.pair
        return self.flow_loss(self.config.reflow_loss, nets, z0, z1, batch.labels, draws)

    def flow_loss(
        self, distance: str, nets: Nets, z0: Tensor, z1: Tensor, labels: Tensor | None, draws: Draws
    ) -> Tensor:
        """Return the loss ``[N]`` of a coupling of noise ``z0`` and images ``z1``."""
        t = self.times(draws.uniform("time", z1[:, 0, 0, 0]))
        x_t = flow_interpolate(z1, z0, t)
        v = self.flow(nets["model"]).flow_velocity(x_t, t, labels)
        if distance == "l2":
            return l2_mean(v, z1 - z0)
        values = z1[0].numel()
        huber = pseudo_huber(v, z1 - z0, _HUBER * values) / values
        if distance == "pseudo-huber":
            return huber
        predicted = x_t + append_dims(1 - t, x_t) * v
        learned = self.lpips(predicted, z1)
        return t * huber + (learned / (1 - t) if self.config.lpips_over_time else learned)

    def times(self, uniform: Tensor) -> Tensor:
        """Times of training, in [t_min, 1); u-shaped ones end at 1 - t_min."""
        c = self.config
        if c.times == "u-shaped":
            return c.t_min + (1 - 2 * c.t_min) * u_shaped_times(uniform, c.times_shape)
        return c.t_min + (1 - c.t_min) * uniform

    def loss_of_steps(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        """``d(Z0 + v(Z0, 0), Z1)``, or of k steps the squared error of v at the steps' starts.

        As released the network is asked at ``t_min``, on ``(1 - t_min) Z0 + t_min Z1``.
        """
        z0, z1 = batch.pair
        starts = self.step_times(self.config.distil_steps).to(z1)
        if len(starts) > 1:
            t = starts[choose_uniformly(len(starts), draws.uniform("step", z1[:, 0, 0, 0]))]
        else:
            t = starts.expand(len(z1))
        v = self.flow(nets["model"]).flow_velocity(flow_interpolate(z1, z0, t), t, batch.labels)
        distance = self.config.distil_loss
        error = l2_mean(v, z1 - z0) if "l2" in distance else torch.zeros_like(t)
        return error + self.lpips(z0 + v, z1) if "lpips" in distance else error

    # ---- pairs ---------------------------------------------------------------------------------

    def pairs(self, index: int) -> GeneratedData:
        """The pairs of a phase: from the teacher for the first, from the flow before otherwise."""
        c = self.config
        if index == 0:
            make: Callable[[Nets, Tensor, Tensor | None], Tensor] = self.teacher_images
            solver, nfe, made_by = f"heun {c.teacher_steps} steps", 2 * c.teacher_steps - 1, ()
        else:
            make, nfe, made_by = self.generator_images, None, ("generator",)
            solver = (
                f"rk45 tolerance {c.pairs_tolerance:g} from {c.t_min:g}, {c.parameterization}"
                f" at {c.time_scale:g} t"
            )
        return GeneratedData(c.pairs, make, solver, nfe, made_by, dtype=c.pairs_dtype)

    def teacher_images(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Images of unit noise by Heun's method (Karras et al. 2022, Algorithm 1)."""
        nfe, teacher = 2 * self.config.teacher_steps - 1, self.distilled()
        sigmas = evaluated_sigmas("heun", nfe, SIGMA_MIN, SIGMA_MAX, RHO)
        return solved(teacher, "heun", nfe, noise, sigmas, SIGMA_MIN, labels)

    def generator_images(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Images of unit noise by RK45 along the flow before."""
        return self.by_rk45(nets["generator"], noise, labels)

    def by_rk45(
        self, network: Any, noise: Tensor, labels: Tensor | None, most: int | None = None
    ) -> Tensor:
        """Integrate from ``t_min`` to 1; every image has its own steps, ``most`` calls at most."""
        c = self.config
        start = (1 - float(self.places(torch.tensor(c.t_min)))) * noise.double()
        velocity = float64_velocity(self.flow(network).flow_velocity, noise.dtype)
        return solve_flow_adaptively(
            velocity, start, c.t_min, labels=labels, tolerance=c.pairs_tolerance, most=most
        ).to(noise.dtype)

    # ---- sampling ------------------------------------------------------------------------------

    def step_times(self, steps: int) -> Tensor:
        """Return the times float64 ``[steps]`` at which steps begin, the first one ``t_min``.

        A flow's are ``t_min + (1 - t_min) i / n``, RF++'s ``i / n`` but for the first.
        """
        share, t_min = torch.arange(steps, dtype=torch.float64) / steps, self.config.t_min
        if self.config.parameterization == "flow":
            return t_min + (1 - t_min) * share
        return share.clamp_min(t_min)

    def places(self, times: Tensor) -> Tensor:
        """Return where states are when the network is asked at ``times``: see :func:`solve_flow`.

        The released flow starts from pure noise, RF++ from ``1 - t_min`` times the noise.
        """
        if self.config.parameterization == "flow":
            return (times - self.config.t_min) / (1 - self.config.t_min)
        return times

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        """The distilled flow at its number of steps, the last k-RF otherwise, or a named stage."""
        stage, solver = self.stage_and_solver(nfe, sampler)
        name, least = f"{stage}-{solver}", START_EVALUATIONS + STEP_EVALUATIONS
        own = self.config.distil_steps
        if stage == DISTILLED and ((solver, nfe) != ("euler", own) or sigmas is not None):
            raise Declined(f"the distilled flow takes {own} steps of euler at its own noise levels")
        if solver == "rk45":
            if nfe < least or sigmas is not None:
                raise Declined(f"rk45 chooses its steps; the most that it takes is from {least}")
            return SamplingPlan(nfe, name, (), variant=stage, adaptive=True)
        if solver.startswith("heun") and nfe % 2 == 0:
            raise Declined(f"NFE {nfe} is even: heun takes two per step, one in the last")
        steps = (nfe + 1) // 2 if solver.startswith("heun") else nfe
        levels = flow_time_to_sigma(self.step_times(steps)).tolist()
        if sigmas is not None and (len(sigmas) != steps or sigmas[0] > levels[0]):
            raise Declined(f"{name} at NFE {nfe} takes {steps} noise levels up to {levels[0]:g}")
        return SamplingPlan(nfe, name, tuple(sigmas or levels), variant=stage)

    def stage_and_solver(self, nfe: int, sampler: str | None) -> tuple[str, str]:
        """Read ``[STAGE-]SOLVER``."""
        c, stages = self.config, self.stages
        stage, solver = staged_solver(sampler or c.sampler, stages)
        if stage:
            return stage, solver
        flows = [stage for stage in stages if stage != DISTILLED]
        if c.distil and (not flows or (solver, nfe) == ("euler", c.distil_steps)):
            return DISTILLED, solver
        return flows[-1], solver

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        """Follow the flow from noise to images; the state is float64."""
        if plan.adaptive:
            return self.by_rk45(nets["model"], noise, labels, plan.nfe)
        times = sigma_to_flow_time(torch.tensor(plan.sigmas, dtype=torch.float64))
        places, solver = self.places(times), plan.sampler.removeprefix(f"{plan.variant}-")
        samples = solve_flow(
            float64_velocity(self.flow(nets["model"]).flow_velocity, noise.dtype),
            (1 - places[0]) * noise.double(),
            times,
            places,
            labels=labels,
            heun=solver.startswith("heun"),
            first_noise=solver.endswith("first-noise"),
        )
        return samples.to(noise.dtype)
