"""A plugin for the tests: a fast method that can be told to misbehave, and a fast dataset."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.data.locations import DataLocations
from cmbench.data.stored import ArrayDataset
from cmbench.errors import Declined
from cmbench.plugin import hookimpl
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.method import (
    Batch,
    Draws,
    Kit,
    Method,
    Nets,
    Objective,
    Phase,
    Progress,
    SamplingPlan,
)
from cmbench.plugin.specs import DatasetSpec, MethodSpec

Trouble = Literal[
    "",
    "raise",
    "exit",
    "nan-loss",
    "nan-gradient",
    "mean-loss",
    "list-loss",
    "no-gradient",
    "no-model",
    "nan-images",
    "extra-call",
    "around-the-wrapper",
    "wrong-shape",
    "list-images",
    "plan-raises",
    "plan-wrong-nfe",
    "plan-ascending",
    "plan-not-a-plan",
    "sample-raises",
]


class ToyConfig(MethodConfig):
    """What the toy can be told."""

    trouble: Trouble = Field("", description="how to misbehave")
    trouble_nimg: int = Field(0, description="images seen before the trouble starts")
    phases: int = Field(1, ge=1, description="phases of training, each of duration_kimg")
    sigma: float = Field(2.0, gt=0, description="noise level of the one and only step")


class _Nowhere(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


class Toy(Method):
    """Learns ``E[x | x + sigma eps]`` at one noise level; samples by that one call."""

    Config = ToyConfig
    config: ToyConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        self.network = kit.network()
        return {"generator" if self.config.trouble == "no-model" else "model": self.network}

    def phases(self, nets: Nets) -> Sequence[Phase]:
        objective = Objective(self.loss, ("model",), self.config.optimizer)
        images = round(self.config.duration_kimg * 1000)
        last = self.config.phases - 1
        return [
            Phase(
                f"part-{i}",
                images,
                (objective,),
                self.config.ema,
                export=None if i == last else f"part-{i}",
            )
            for i in range(self.config.phases)
        ]

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        noisy = batch.images + self.config.sigma * draws.normal("noise", batch.images)
        denoised = self.denoise(nets["model"], noisy, batch.labels)
        loss = (denoised - batch.images).square().flatten(1).sum(1)
        progress.log("twice_loss", 2 * loss)
        return self.misbehave(loss) if progress.nimg >= self.config.trouble_nimg else loss

    def misbehave(self, loss: Tensor) -> Tensor:
        match self.config.trouble:
            case "raise":
                raise RuntimeError("the toy\nbroke while training")
            case "exit":
                sys.exit("the toy left")
            case "nan-loss":
                return loss * math.nan
            case "nan-gradient":
                return _Nowhere.apply(loss)
            case "mean-loss":
                return loss.mean()
            case "list-loss":
                return loss.tolist()
            case "no-gradient":
                return loss.detach()
        return loss

    def denoise(self, network: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
        scale = 1 / math.sqrt(1 + self.config.sigma**2)
        return network(x * scale, torch.zeros(len(x), device=x.device), labels)

    def plan_sampling(
        self, nfe: int, sigmas: Sequence[float] | None = None, sampler: str | None = None
    ) -> SamplingPlan:
        match self.config.trouble:
            case "plan-raises":
                raise KeyError("planning broke")
            case "plan-wrong-nfe":
                return SamplingPlan(nfe + 1, "toy", (self.config.sigma,))
            case "plan-ascending":
                return SamplingPlan(nfe, "toy", (1.0, 2.0))
            case "plan-not-a-plan":
                return (nfe, "toy")  # type: ignore[return-value]
        if nfe > 2:
            raise Declined("the toy takes one or two steps")
        return SamplingPlan(nfe, sampler or "toy", tuple(sigmas or (self.config.sigma,) * nfe))

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        x = self.denoise(nets["model"], self.config.sigma * noise, labels)
        for step in range(1, plan.nfe):
            renoised = x + self.config.sigma * draws.normal(f"step-{step}", noise)
            x = self.denoise(nets["model"], renoised, labels)
        match self.config.trouble:
            case "sample-raises":
                raise ValueError("sampling broke")
            case "nan-images":
                x[-1] = math.nan
            case "extra-call":
                x = self.denoise(nets["model"], self.config.sigma * noise, labels)
            case "around-the-wrapper":
                x = self.denoise(self.network, self.config.sigma * noise, labels)
            case "wrong-shape":
                x = x[..., :1]
            case "list-images":
                return x.tolist()
        return x


TOYS = DatasetSpec(
    name="toys",
    factory="toy:build_toys",
    title="Ninety-six pictures of four pixels",
    data_shape=(1, 2, 2),
    num_classes=3,
    extractor="pixels",
    metrics=("fd-pixels",),
    nfe=(1, 2),
    num_samples=64,
    embedded=True,
)


def build_toys(spec: DatasetSpec, locations: DataLocations) -> ArrayDataset:
    """Return pictures that are random around a level of their class."""
    random = np.random.default_rng(0)
    labels = np.arange(96) % 3
    levels = 60 + 70 * labels[:, None, None, None]
    pixels = random.normal(levels, 20, (96, 1, 2, 2)).clip(0, 255).astype(np.uint8)
    return ArrayDataset(spec, pixels, labels, sha256="0" * 64, revision="1")


class ToyPlugin:
    """The hooks, as an object."""

    @hookimpl
    def cmbench_register_methods(self) -> list[MethodSpec]:
        return [
            MethodSpec(
                "toy",
                "toy:Toy",
                "A toy",
                recipes=Path(__file__).with_name("toy.toml"),
                needs_teacher=True,  # where its recipe names one
            ),
            MethodSpec(
                "broken-toy",
                "toy:Missing",
                "A toy that cannot be imported",
                recipes=Path(__file__).with_name("toy.toml"),
            ),
        ]

    @hookimpl
    def cmbench_register_datasets(self) -> list[DatasetSpec]:
        return [TOYS]


def add_toys(manager: PluginManager) -> PluginInfo:
    """Register the toys with a manager."""
    return manager.register(ToyPlugin(), PluginInfo("toys", "toy", "toy-distribution", "1.2.3"))


#: What an entry point names.
PLUGIN = ToyPlugin()
