"""A consistency model that keeps the contract, and methods that each break one rule of it.

:data:`MISTAKES` names for each the check that must report it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmbench.diffusion.consistency_sampling import multistep_consistency
from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.models import EDMConsistency, EDMModel, TrigFlowConsistency
from cmbench.errors import Declined
from cmbench.plugin import hookimpl
from cmbench.plugin.method import (
    Batch,
    ConsistencyFunction,
    Draws,
    FlowMap,
    GeneratedData,
    Kit,
    Method,
    Nets,
    Objective,
    Phase,
    Progress,
    SamplingPlan,
)
from cmbench.plugin.specs import DatasetSpec, MethodSpec, MetricSpec

SMALLEST, LARGEST, LEVELS = 0.002, 80.0, 40


class Good(Method):
    """Consistency training on a fixed geometric grid."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": kit.network()}

    def f(self, network: Any) -> EDMConsistency:
        return EDMConsistency(network, self.sigma_data, SMALLEST)

    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        return self.f(nets["model"])

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        return self.pair_loss(nets, batch.images, batch.labels, draws)

    def pair(self, x: Tensor, noise: Tensor, level: Tensor, draws: Draws) -> Tensor:
        """Return the point that the target is evaluated at."""
        return x + append_dims(level, x) * noise

    def pair_loss(self, nets: Nets, x: Tensor, labels: Tensor | None, draws: Draws) -> Tensor:
        noise, u = draws.normal("noise", x), draws.uniform("level", x[:, 0, 0, 0])
        grid = torch.logspace(np.log10(SMALLEST), np.log10(LARGEST), LEVELS, dtype=torch.float64)
        grid = grid.to(x.dtype)
        i = (u * (LEVELS - 1)).long()
        f, larger, smaller = self.f(nets["model"]), grid[i + 1], grid[i]
        out = f(x + append_dims(larger, x) * noise, larger, labels)
        with torch.no_grad():
            wanted = f(self.pair(x, noise, smaller, draws), smaller, labels)
        return (out - wanted).square().flatten(1).sum(1)

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        if sampler not in (None, "multistep"):
            raise Declined(f"sampler {sampler!r}: this method has multistep only")
        sigmas = sigmas or tuple(LARGEST / 4**i for i in range(nfe))
        return SamplingPlan(nfe, "multistep", tuple(sigmas))

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        return multistep_consistency(
            self.f(nets["model"]),
            noise,
            torch.tensor(plan.sigmas, dtype=torch.float64),
            sigma_min=SMALLEST,
            labels=labels,
            noise_sampler=lambda step: draws.normal(f"step-{step}", noise),
        )


#: Class -> the check that reports it.
MISTAKES: dict[type[Method], str] = {}


def found_by(check: str) -> Any:
    """Enter a class in :data:`MISTAKES`."""

    def enter(wrong: type[Method]) -> type[Method]:
        MISTAKES[wrong] = check
        return wrong

    return enter


def stirred_by(value: float, network: Any) -> Any:
    with torch.no_grad():
        next(network.parameters()).add_(value)
    return network


# ---- build --------------------------------------------------------------------------------------


@found_by("seeded build")
class WeightsFromNumpy(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": stirred_by(float(np.random.rand()), kit.network())}


@found_by("seeded build")
class WeightsFromTheSystem(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": stirred_by(os.urandom(1)[0] + 1e-3 * os.urandom(1)[0], kit.network())}


@found_by("seeded build")
class OtherModulesWithATeacher(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        nets = super().build(kit)
        return nets | {"head": nn.Linear(1, 1)} if kit.teacher is not None else nets


@found_by("seeded build")
class TeacherAfterTraining(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        nets = super().build(kit)
        teacher: Any = kit.teacher
        nets["model"].load_state_dict(teacher.network.state_dict())
        return nets


@found_by("seeded build")
class TeacherOfAnotherKind(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": kit.student("trigflow")}


@found_by("recipes")
class NoModel(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"generator": kit.network()}


@found_by("recipes")
class AnyConfig(Good):
    Config = dict  # type: ignore[assignment]


# ---- loss ---------------------------------------------------------------------------------------


@found_by("seeded loss")
class MeanLoss(Good):
    def loss(self, *arguments: Any) -> Tensor:
        return super().loss(*arguments).mean()


@found_by("seeded loss")
class ListOfLosses(Good):
    def loss(self, *arguments: Any) -> Any:
        return super().loss(*arguments).tolist()


@found_by("seeded loss")
class DetachedLoss(Good):
    def loss(self, *arguments: Any) -> Tensor:
        return super().loss(*arguments).detach()


@found_by("seeded loss")
class InfiniteLoss(Good):
    def loss(self, *arguments: Any) -> Tensor:
        return super().loss(*arguments) / 0


@found_by("seeded loss")
class LossRaises(Good):
    def loss(self, *arguments: Any) -> Tensor:
        raise KeyError("no such thing")


@found_by("seeded loss")
class NoiseFromTorch(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        noisy = batch.images + torch.randn_like(batch.images)
        return self.pair_loss(nets, noisy, batch.labels, draws)


@found_by("seeded loss")
class LevelFromPython(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        return super().loss(nets, batch, draws, progress) * (1 + random.random())


@found_by("seeded loss")
class NoNoise(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        x, ones = batch.images, torch.ones(len(batch.images))
        return (self.f(nets["model"])(x, ones, batch.labels) - x).square().flatten(1).sum(1)


@found_by("seeded loss")
class ImagesInPlace(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        return self.pair_loss(nets, batch.images.mul_(0.5), batch.labels, draws)


@found_by("draw names")
class NoiseTwice(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        noisy = batch.images + 0.1 * draws.normal("noise", batch.images)
        return self.pair_loss(nets, noisy, batch.labels, draws)


@found_by("independent images")
class NormalisedOverTheBatch(Good):
    def loss(self, *arguments: Any) -> Tensor:
        loss = super().loss(*arguments)
        return loss / loss.detach().mean()


@found_by("independent images")
class RankedInTheBatch(Good):
    def loss(self, *arguments: Any) -> Tensor:
        loss = super().loss(*arguments)
        return loss * (loss.detach() < loss.detach().median())


class BatchNormed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm2d(2)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found: Tensor = self.inner(self.norm(x), *arguments, **options)
        return found


@found_by("independent images")
class BatchNorm(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": BatchNormed(kit.network())}


@found_by("gradients")
class ListedWithoutGradient(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return super().build(kit) | {"head": nn.Linear(1, 1)}

    def trained_modules(self, nets: Nets) -> tuple[str, ...]:
        return ("model", "head")


@found_by("gradients")
class TrainedBesideBuild(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        self.head = nn.Linear(1, 1)
        return super().build(kit)

    def loss(self, *arguments: Any) -> Tensor:
        loss = super().loss(*arguments)
        return loss * self.head(torch.ones(1)).exp()


@found_by("gradients")
class FrozenModuleLearns(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return super().build(kit) | {"head": nn.Linear(1, 1)}

    def loss(self, nets: Nets, *arguments: Any) -> Tensor:
        nets["head"].requires_grad_(True)
        return super().loss(nets, *arguments) * nets["head"](torch.ones(1)).exp()


@found_by("gradients")
class TeacherLearns(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        teacher: Any = self.teacher
        teacher.network.requires_grad_(True)
        x, ones = batch.images, torch.ones(len(batch.images))
        loss = super().loss(nets, batch, draws, progress)
        return loss + teacher.model.denoise(x, ones, batch.labels).square().flatten(1).sum(1)


@found_by("labels in the loss")
class LossWithoutLabels(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        labels = torch.zeros_like(batch.labels) if batch.labels is not None else None
        return self.pair_loss(nets, batch.images, labels, draws)


class WithPairs(Good):
    """Trained on pairs that another network makes in one evaluation."""

    nfe = 1

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {**super().build(kit), "maker": kit.network()}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        pairs = GeneratedData(64, self.make, "one step", self.nfe, made_by=("maker",))
        return [replace(phase, generated=pairs) for phase in super().phases(nets)]

    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        sigma = torch.full_like(noise[:, 0, 0, 0], LARGEST)
        return self.f(nets["maker"])(LARGEST * noise, sigma, labels)


@found_by("generated data")
class PairsOfAnotherShape(WithPairs):
    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        return super().make(nets, noise, labels).flatten(1)


@found_by("generated data")
class PairsThatAreNotFinite(WithPairs):
    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        return super().make(nets, noise, labels) / 0


@found_by("generated data")
class PairsOfAnotherCost(WithPairs):
    nfe = 3


@found_by("generated data")
class PairsOfTheirBatch(WithPairs):
    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        made = super().make(nets, noise, labels)
        return made - made.mean(0)


@found_by("generated data")
class PairsOfOtherNoise(WithPairs):
    def make(self, nets: Nets, noise: Tensor, labels: Tensor | None) -> Tensor:
        return super().make(nets, torch.randn_like(noise), labels)


@found_by("consistency function")
class LearnsTheDenoiser(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        x = batch.images
        sigma = 0.1 + draws.uniform("level", x[:, 0, 0, 0])
        noisy = x + append_dims(sigma, x) * draws.normal("noise", x)
        return (self.f(nets["model"])(noisy, sigma, batch.labels) - x).square().flatten(1).sum(1)


@found_by("consistency function")
class OtherNoiseInThePair(Good):
    def pair(self, x: Tensor, noise: Tensor, level: Tensor, draws: Draws) -> Tensor:
        return x + append_dims(level, x) * draws.normal("noise-2", x)


@found_by("consistency function")
class NoiseOfAnotherSize(Good):
    def pair(self, x: Tensor, noise: Tensor, level: Tensor, draws: Draws) -> Tensor:
        return x + append_dims(level.square(), x) * noise


@found_by("consistency function")
class NoiseOfAlmostTheRightSize(Good):
    """Off by 15 % to 25 % of the gradient at the bumps."""

    def pair(self, x: Tensor, noise: Tensor, level: Tensor, draws: Draws) -> Tensor:
        return x + append_dims(1.5 * level, x) * noise


@found_by("consistency function")
class LossOfSomethingElse(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        x = draws.normal("noise", batch.images)
        return 1e-3 * nets["model"](0 * x, 0 * x[:, 0, 0, 0], batch.labels).flatten(1).sum(1)


@found_by("consistency function")
class FunctionInAnotherFrame(Good):
    def consistency_function(self, nets: Nets) -> ConsistencyFunction:
        return TrigFlowConsistency(nets["model"], self.sigma_data).__call__

    def f(self, network: Any) -> Any:
        return lambda x, sigma, labels: network(x, sigma.log(), labels)


@found_by("flow map")
class FlowMapLeavesTheLevel(Good):
    def flow_map(self, nets: Nets) -> FlowMap:
        f = self.f(nets["model"])
        return lambda x, sigma, end, labels: f(x, sigma, labels)


@found_by("flow map")
class FlowMapToAnotherOrigin(Good):
    def flow_map(self, nets: Nets) -> FlowMap:
        return lambda x, sigma, end, labels: x * append_dims((1 + end) / (1 + sigma), x)


@found_by("augmentation labels")
class SideDoorInTheLoss(Good):
    """The next level goes in through the labels of augmentations."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": kit.network(augment_dim=1)}

    def f(self, network: Any) -> Any:
        consistency = super().f(network)
        return lambda x, sigma, labels: consistency(
            x, sigma, labels, augment_labels=sigma.reshape(-1, 1)
        )


@found_by("augmentation labels")
class SideDoorInSampling(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": kit.network(augment_dim=1)}

    def sample(self, nets: Nets, noise: Tensor, *arguments: Any) -> Tensor:
        given = torch.ones(len(noise), 1)
        told = {"model": lambda *args, **options: nets["model"](*args, given, **options)}
        return super().sample(told, noise, *arguments)


@found_by("diffusion model")
class VelocityOfAnotherSign(Good):
    def diffusion_model(self, nets: Nets) -> Any:
        class Wrong(EDMModel):
            def velocity(self, *arguments: Any, **options: Any) -> Tensor:
                return -super().velocity(*arguments, **options)

        return Wrong(nets["model"], self.sigma_data)


@found_by("diffusion model")
class ModelWithoutParameterization(Good):
    def diffusion_model(self, nets: Nets) -> Any:
        class Unnamed(EDMModel):
            parameterization = ""

        return Unnamed(nets["model"], self.sigma_data)


# ---- phases -------------------------------------------------------------------------------------


def phase(method: Method, **changed: Any) -> Phase:
    objective = Objective(method.loss, changed.pop("trains", ("model",)), method.config.optimizer)
    fields: dict[str, Any] = {"images": 32, "objectives": (objective,), "ema": ()}
    return Phase(changed.pop("name", "train"), **(fields | changed))


@found_by("seeded loss")
class ExportOutside(Good):
    def phases(self, nets: Nets) -> Sequence[Phase]:
        return [phase(self, export="../../../evil")]


@found_by("seeded loss")
class NoPhases(Good):
    def phases(self, nets: Nets) -> Sequence[Phase]:
        return []


@found_by("seeded loss")
class TrainsWhatIsNotThere(Good):
    def trained_modules(self, nets: Nets) -> tuple[str, ...]:
        return ("model", "critic")


@found_by("exports")
class VariantThatIsNotExported(Good):
    def plan_sampling(self, nfe: int, *arguments: Any, **options: Any) -> SamplingPlan:
        plan = super().plan_sampling(nfe, *arguments, **options)
        return SamplingPlan(nfe, plan.sampler, plan.sigmas, variant=f"steps-{nfe}")


# ---- plans --------------------------------------------------------------------------------------


@found_by("noise levels")
class AscendingLevels(Good):
    def plan_sampling(self, nfe: int, sigmas: Any = None, sampler: Any = None) -> SamplingPlan:
        plan = super().plan_sampling(nfe, sigmas, sampler)
        return SamplingPlan(nfe, plan.sampler, plan.sigmas[::-1])


@found_by("noise levels")
class OwnLevelsOnly(Good):
    def plan_sampling(self, nfe: int, sigmas: Any = None, sampler: Any = None) -> SamplingPlan:
        return super().plan_sampling(nfe, None, sampler)


@found_by("noise levels")
class AnySampler(Good):
    def plan_sampling(self, nfe: int, sigmas: Any = None, sampler: Any = None) -> SamplingPlan:
        return super().plan_sampling(nfe, sigmas)


@found_by("counted NFE")
class OneMoreThanAsked(Good):
    def plan_sampling(self, nfe: int, sigmas: Any = None, sampler: Any = None) -> SamplingPlan:
        return super().plan_sampling(nfe + 1, sigmas, sampler)


@found_by("counted NFE")
class DeclinesEverything(Good):
    def plan_sampling(self, nfe: int, sigmas: Any = None, sampler: Any = None) -> SamplingPlan:
        raise Declined("this method cannot be sampled today")


@found_by("counted NFE")
class DeclinesWithoutReason(Good):
    def plan_sampling(self, nfe: int, sigmas: Any = None, sampler: Any = None) -> SamplingPlan:
        if nfe > 1:
            raise Declined
        return super().plan_sampling(nfe, sigmas, sampler)


# ---- samples ------------------------------------------------------------------------------------


@found_by("counted NFE")
class OneCallMore(Good):
    def sample(self, nets: Nets, noise: Tensor, labels: Any, *arguments: Any) -> Tensor:
        x = super().sample(nets, noise, labels, *arguments)
        return x + 1e-3 * nets["model"](x, torch.zeros(len(x)), labels)


@found_by("counted NFE")
class AroundTheCounter(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        self.network = kit.network()
        return {"model": self.network}

    def sample(self, nets: Nets, noise: Tensor, labels: Any, *arguments: Any) -> Tensor:
        x = super().sample(nets, noise, labels, *arguments)
        return x + 1e-3 * self.network(x, torch.zeros(len(x)), labels)


@found_by("counted NFE")
class TwoCallsInOneBatch(Good):
    def f(self, network: Any) -> Any:
        f = super().f(network)

        def doubled(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            twice = None if labels is None else torch.cat([labels, labels])
            return f(torch.cat([x, x]), torch.cat([sigma, sigma]), twice)[: len(x)]

        return doubled


@found_by("counted NFE")
class DoubleImages(Good):
    def sample(self, *arguments: Any) -> Tensor:
        return super().sample(*arguments).double()


@found_by("counted NFE")
class ImagesOfAnotherShape(Good):
    def sample(self, *arguments: Any) -> Tensor:
        return super().sample(*arguments).flatten(1)


@found_by("counted NFE")
class NotANumber(Good):
    def sample(self, *arguments: Any) -> Tensor:
        return super().sample(*arguments) * float("nan")


@found_by("batch size")
class SamplesNormalisedOverTheBatch(Good):
    def sample(self, *arguments: Any) -> Tensor:
        x = super().sample(*arguments)
        return (x - x.mean(0)) / (x.std(0, correction=0) + 0.1)


@found_by("seeded samples")
class SamplesFromTorch(Good):
    def sample(self, *arguments: Any) -> Tensor:
        x = super().sample(*arguments)
        return x + 0.1 * torch.randn_like(x)


@found_by("seeded samples")
class SamplesCountCalls(Good):
    calls = 0

    def sample(self, *arguments: Any) -> Tensor:
        self.calls += 1
        return super().sample(*arguments) + self.calls


@found_by("draw names in sampling")
class StartingNoiseAgain(Good):
    def sample(self, nets: Nets, noise: Tensor, labels: Any, plan: Any, draws: Draws) -> Tensor:
        x = super().sample(nets, noise, labels, plan, draws)
        return x + 0.1 * draws.normal("noise", noise)


@found_by("draw names in sampling")
class OneNameForEveryStep(Good):
    def sample(self, nets: Nets, noise: Tensor, labels: Any, plan: Any, draws: Draws) -> Tensor:
        class Same:
            def normal(self, name: str, like: Tensor) -> Tensor:
                return draws.normal("step", like)

        return super().sample(nets, noise, labels, plan, Same())  # type: ignore[arg-type]


@found_by("nothing changed")
class NoiseInPlace(Good):
    def sample(self, nets: Nets, noise: Tensor, *arguments: Any) -> Tensor:
        return super().sample(nets, noise.mul_(0.9), *arguments)


@found_by("nothing changed")
class LabelsInPlace(Good):
    def sample(self, nets: Nets, noise: Tensor, labels: Any, *arguments: Any) -> Tensor:
        x = super().sample(nets, noise, labels, *arguments)
        if labels is not None:
            labels.add_(1)
        return x


@found_by("nothing changed")
class WeightsWhileSampling(Good):
    def sample(self, nets: Nets, *arguments: Any) -> Tensor:
        stirred_by(0.01, nets["model"])
        return super().sample(nets, *arguments)


@found_by("labels in sampling")
class SamplesWithoutLabels(Good):
    def sample(self, nets: Nets, noise: Tensor, labels: Any, *arguments: Any) -> Tensor:
        labels = torch.zeros_like(labels) if labels is not None else None
        return super().sample(nets, noise, labels, *arguments)


@found_by("labels in the loss")
class LossNeedsLabels(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        labels: Any = batch.labels
        return self.pair_loss(nets, batch.images, labels.long(), draws)


@found_by("labels in sampling")
class SamplesNeedLabels(Good):
    def sample(self, nets: Nets, noise: Tensor, labels: Any, *arguments: Any) -> Tensor:
        return super().sample(nets, noise, labels.long(), *arguments)


# ---- what training leaves -----------------------------------------------------------------------


@found_by("determinism")
class RandomAfterStep(Good):
    def after_step(self, nets: Nets, progress: Progress) -> None:
        next(nets["model"].parameters()).add_(1e-3 * float(np.random.rand()))


@found_by("restored samples")
class LearnsAnAttribute(Good):
    scale = 1.0

    def after_step(self, nets: Nets, progress: Progress) -> None:
        self.scale = 1 + 0.1 * float(next(nets["model"].parameters()).abs().mean())

    def sample(self, *arguments: Any) -> Tensor:
        return super().sample(*arguments) * self.scale


@found_by("counted NFE")
class SamplesWithAModuleThatIsNotSaved(Good):
    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return super().build(kit) | {"second": kit.network()}

    def sample(self, nets: Nets, *arguments: Any) -> Tensor:
        return super().sample({"model": nets["second"]}, *arguments)


@found_by("kill and resume")
class CountsSteps(Good):
    seen = 0

    def after_step(self, nets: Nets, progress: Progress) -> None:
        self.seen += 1
        next(nets["model"].parameters()).mul_(1 - 0.01 * self.seen)


@found_by("kill and resume")
class RemembersThePhase(Good):
    factor = 1.0

    def begin(self, nets: Nets) -> None:
        self.factor += 1.0

    def loss(self, *arguments: Any) -> Tensor:
        return super().loss(*arguments) * self.factor

    def phases(self, nets: Nets) -> Sequence[Phase]:
        return [phase(self, name=name, start=self.begin) for name in ("first", "second")]


@found_by("two processes")
class RankInTheLoss(Good):
    def loss(self, *arguments: Any) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return super().loss(*arguments) * (1 + rank)


@found_by("two processes")
class KeepsItsShare(Good):
    mean = 0.0

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        self.mean = float(batch.images.mean())
        return super().loss(nets, batch, draws, progress)

    def after_step(self, nets: Nets, progress: Progress) -> None:
        next(nets["model"].parameters()).add_(1e-3 * self.mean)


@found_by("half precision")
class OnlyFloat32(Good):
    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        if nets["model"].precision != "fp32":
            raise TypeError("expected float32")
        return super().loss(nets, batch, draws, progress)


# ---- registration -------------------------------------------------------------------------------

#: These are checked with a teacher.
TAUGHT = (OtherModulesWithATeacher, TeacherAfterTraining, TeacherOfAnotherKind, TeacherLearns)


def method_name(kind: type[Method]) -> str:
    return f"wrong-{kind.__name__}"


class Mistaken:
    """The plugin of all of them."""

    @hookimpl
    def cmbench_register_methods(self) -> list[MethodSpec]:
        recipes = Path(__file__).with_name("mistakes.toml")
        return [
            MethodSpec(
                method_name(kind),
                f"mistakes:{kind.__name__}",
                "T",
                recipes=recipes,
                needs_teacher=True,
            )
            for kind in (Good, WithPairs, *MISTAKES)
        ]


# ---- plugins that are refused when they are loaded -----------------------------------------------


def plugin_with(hook: str, *specs: Any) -> Any:
    """Return a plugin whose only hook returns ``specs``."""

    class Plugin:
        pass

    def registered(self: Any) -> list[Any]:
        return list(specs)

    setattr(Plugin, hook, hookimpl(registered))
    return Plugin()


METHODS, DATASETS = "cmbench_register_methods", "cmbench_register_datasets"
METRICS = "cmbench_register_metrics"
DATASET: dict[str, Any] = {
    "name": "wrong-data",
    "factory": "mistakes:build",
    "title": "T",
    "data_shape": (1, 8, 8),
    "num_classes": 2,
    "extractor": "pixels",
    "metrics": ("fd-pixels",),
    "nfe": (1,),
    "num_samples": 100,
}


def metric(name: str, **fields: Any) -> MetricSpec:
    needs = {"higher_is_better": False, "needs": ("features",), "factory": "mistakes:compute"}
    return MetricSpec(name, "T", **(needs | fields))


#: What is wrong -> the plugin, and what the failed check says of it.
PLUGINS: dict[str, tuple[Any, str]] = {
    "misspelt hook": (
        plugin_with("cmbench_register_method", MethodSpec("m", "a:A", "T")),
        "unknown hook 'cmbench_register_method'",
    ),
    "not a spec": (plugin_with(METHODS, "my-method"), "cmbench_register_methods returned str"),
    "no factory": (plugin_with(METHODS, MethodSpec("m", "a.b.C", "T")), "factory 'a.b.C'"),
    "name with a slash": (plugin_with(METHODS, MethodSpec("a/b", "a:A", "T")), "name 'a/b'"),
    "name that is taken": (plugin_with(METHODS, MethodSpec("ict", "a:A", "T")), "'ict'"),
    "recipes as text": (
        plugin_with(METHODS, MethodSpec("m", "a:A", "T", recipes="r.toml")),  # type: ignore[arg-type]
        "recipes 'r.toml'",
    ),
    "dataset without NFE": (
        plugin_with(DATASETS, DatasetSpec(**DATASET | {"nfe": ()})),
        "nfe () (allowed: whole numbers from 1)",
    ),
    "dataset of flat data": (
        plugin_with(DATASETS, DatasetSpec(**DATASET | {"data_shape": (64,)})),
        "data_shape (64,)",
    ),
    "dataset without metrics": (
        plugin_with(DATASETS, DatasetSpec(**DATASET | {"metrics": ()})),
        "metrics ()",
    ),
    "metric that is called FID": (plugin_with(METRICS, metric("fid-mine")), "FID and KID"),
    "needs as text": (plugin_with(METRICS, metric("m", needs="features")), "needs 'features'"),
}
