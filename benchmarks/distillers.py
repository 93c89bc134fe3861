"""Distillers trained from the exact teacher of a mixture on the line, and how far they come.

    python benchmarks/distillers.py tract pid

The setting of the fact sheet's references: 0.3 N(-0.66, 0.16^2) + 0.7 N(0.4, 0.1^2), an MLP of 3
layers of 128, batches of 512, Adam at 1e-3 falling linearly (to zero here, to a tenth there),
averages at decay 0.999, a student that starts from a network trained with EDM's loss. W1 is
between samples and the exact quantiles.
"""

from __future__ import annotations

import argparse
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.models import MixtureModel
from cmbench.networks.counted import CountedNetwork
from cmbench.networks.temporal import TemporalMixing
from cmbench.plugin.method import Batch, DataInfo, Teacher
from cmbench.sweep.runs import seeded
from cmbench.training.loop import Trainer
from cmbench.training.pairs import PairRoot
from cmbench.training.randomness import StepDraws
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState
from cmbench_plugins.dfno import DFNO
from cmbench_plugins.dmd import DMD2, FDistill
from cmbench_plugins.edm import EDM
from cmbench_plugins.knowledge_distillation import KnowledgeDistillation
from cmbench_plugins.mscd import MSCD
from cmbench_plugins.pid import PID
from cmbench_plugins.rf import RF
from cmbench_plugins.score_distillation import DiffInstruct, SiD
from cmbench_plugins.tract import TRACT

BATCH, SHAPE = 512, (1, 1, 1)
ADAM = {"lr": 1e-3, "decay": "linear"}
WITHOUT_MOMENTUM = {**ADAM, "betas": [0.0, 0.999]}
TURNS: dict[str, Any] = {
    "generator_every": 2,
    "sigma_init": 1.0,
    "scale_floor": 0.05,
    "fake_optimizer": ADAM,
}
FLOW: dict[str, Any] = {"time_scale": 1.0, "pairs": 50_000, "pairs_tolerance": 1e-4}
#: Name -> method, training steps, options. Squared distances: a norm's regression is a median.
RUNS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "tract": (TRACT, 9000, {}),
    "tract-3000": (TRACT, 3000, {}),
    "mscd": (
        MSCD,
        9000,
        {
            "grid": "cosine",
            "solver": "ddim",
            "teacher_steps_start": 40,
            "teacher_steps_end": 40,
            "metric": "l2",
        },
    ),
    "mscd-karras": (
        MSCD,
        9000,
        {"teacher_steps_start": 16, "teacher_steps_end": 64, "metric": "l2"},
    ),
    "pid": (PID, 6000, {"metric": "l2"}),
    "knowledge-distillation": (
        KnowledgeDistillation,
        3000,
        {"pairs": 50_000, "solver_nfe": 35, "optimizer": {**ADAM, "lr": 2e-3}},
    ),
    "dfno": (
        DFNO,
        3000,
        {
            "trajectories": 50_000,
            "solver": "heun",
            "solver_steps": 64,
            "optimizer": {**ADAM, "lr": 2e-3},
        },
    ),
    "1-rf": (RF, 3000, {**FLOW, "rectifications": 1, "distil": False}),
    "2-rf-3000": (RF, 3000, {**FLOW, "teacher": "analytic", "distil": False}),
    "2-rf": (
        RF,
        9000,
        {**FLOW, "teacher": "analytic", "distil": False, "optimizer": {**ADAM, "lr": 2e-3}},
    ),
    "1-rf-distilled": (
        RF,
        3000,
        {**FLOW, "teacher": "analytic", "rectifications": 1, "optimizer": {**ADAM, "lr": 2e-3}},
    ),
    "2-rf-distilled": (RF, 3000, {**FLOW, "teacher": "analytic"}),
    "diff-instruct": (
        DiffInstruct,
        6000,
        {
            "generator_every": 2,
            "optimizer": {**WITHOUT_MOMENTUM, "lr": 5e-4},
            "fake_optimizer": WITHOUT_MOMENTUM,
        },
    ),
    "sid": (
        SiD,
        3000,
        {
            "loss_scale": 1.0,
            "scale_floor": 0.05,
            "optimizer": WITHOUT_MOMENTUM,
            "fake_optimizer": WITHOUT_MOMENTUM,
        },
    ),
    "dmd2": (DMD2, 3000, TURNS),
    "f-distill": (FDistill, 3000, {**TURNS, "weight_group": 64}),
}
MEANS, STDS, WEIGHTS = (-0.66, 0.4), (0.16, 0.1), (0.3, 0.7)


def mixture() -> GaussianMixture:
    """Return two modes; the standard deviation is 0.5."""
    means, stds, weights = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS, WEIGHTS))
    return GaussianMixture(means.reshape(2, 1, 1, 1), stds, weights)


class Feed:
    """Fresh samples of the mixture by their position."""

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return the samples; their seed is their position."""
        generator = torch.Generator().manual_seed(start + 1_000_003 * seed)
        return Batch(mixture().sample(count, generator)[0], None)


class Line(nn.Module):
    """A plain multilayer perceptron of the sample and its noise label."""

    def __init__(self, states: int = 1, temporal_modes: int = 2) -> None:
        super().__init__()
        widths, self.states = (2, 128, 128, 128), states
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU())))
        self.out = nn.Linear(128, 1)
        if states > 1:  # after every layer
            for index in range(1, 2 * len(layers), 2):
                mixing = TemporalMixing(128, states, temporal_modes)
                self.body[index] = nn.Sequential(nn.SiLU(), mixing)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the raw output ``[N, 1, 1, 1]``, or ``[N, S, 1, 1, 1]`` of S states."""
        x = x if self.states == 1 else x[:, None].expand(-1, self.states, -1, -1, -1)
        inputs = torch.stack([x.flatten(), c_noise.expand(x.shape[: c_noise.ndim]).flatten()], 1)
        out: Tensor = self.out(self.body(inputs)).reshape(x.shape)
        return out


class Kit:
    """Builds networks; a student starts from the given weights."""

    def __init__(self, teacher: Any, weights: dict[str, Tensor] | None) -> None:
        self.teacher, self.weights = teacher, weights

    def network(self, *, channel_copies: int = 1, **overrides: Any) -> nn.Module:
        """Return a network with initial weights."""
        return Line(**overrides)

    def student(
        self, parameterization: str, *, channel_copies: int = 1, **overrides: Any
    ) -> nn.Module:
        """Return a network with the pretrained weights; the mixing of states is its own."""
        made = self.network(**overrides)
        if self.weights is not None:
            made.load_state_dict(self.weights, strict=not overrides)
        return made


def trained(
    method: Any, iterations: int, seed: int = 0, *, pretrained: bool = True, **config: Any
) -> tuple[Any, dict[str, CountedNetwork]]:
    """Train a method; return it with the averaged networks."""
    table = {
        "network": {"name": "mlp"},
        "duration_kimg": iterations * BATCH / 1000,
        "batch_size": BATCH,
        "optimizer": {"lr": 1e-3, "decay": "linear"},
        "ema": [{"decay": 0.999}],
        **config,
    }
    made = method(method.Config(**table), DataInfo("line", SHAPE, 0, 0.5, bounded=False))
    weights = diffusion_weights(seed) if pretrained else None
    with seeded(seed, "modules"):
        modules = made.modules(Kit(Teacher("exact", MixtureModel(mixture(), 0.5), None), weights))
    state = TrainingState(made, modules)
    with TemporaryDirectory() as folder:
        pairs = PairRoot(Path(folder), {}, lambda: "exact", lambda names: "", SHAPE, None)
        Trainer(state, Feed(), Settings(seed, BATCH), Watchers(pairs=pairs)).train()
    averaged = state.averages[0].state_dict()
    nets = {}
    for name, module in state.sampled.items():
        own = {k.partition(".")[2]: v for k, v in averaged.items() if k.startswith(f"{name}.")}
        module.load_state_dict(own)
        nets[name] = CountedNetwork(module.eval().requires_grad_(False))
    return made, nets


@cache
def diffusion_weights(seed: int = 0) -> dict[str, Tensor]:
    """Return the weights of a denoiser, 3000 steps of EDM's loss."""
    _, nets = trained(EDM, 3000, seed, pretrained=False)
    return {k: v.clone() for k, v in nets["model"].module.state_dict().items()}


def wasserstein(made: Any, nets: Any, nfe: int = 1, count: int = 50_000) -> float:
    """Return W1 between samples and the mixture's quantiles."""
    generator = torch.Generator().manual_seed(123)
    noise = torch.randn((count, *SHAPE), generator=generator)
    with torch.no_grad():
        samples = made.sample(nets, noise, None, made.plan_sampling(nfe), StepDraws(5, 0))
    exact = quantiles((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return float((samples.double().flatten().sort().values - exact).abs().mean())


def quantiles(u: Tensor) -> Tensor:
    """Return the mixture's quantiles of ``u`` in (0, 1), by bisection."""
    means, stds, weights = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, STDS, WEIGHTS))
    low, high = torch.full_like(u, -3.0), torch.full_like(u, 3.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = (weights * torch.special.ndtr((middle[:, None] - means) / stds)).sum(1)
        low, high = torch.where(below < u, middle, low), torch.where(below < u, high, middle)
    return (low + high) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        method, iterations, options = RUNS[name]
        found = wasserstein(*trained(method, iterations, arguments.seed, **options))
        print(f"{name}: W1 {found:.4f} after {iterations} steps", flush=True)


if __name__ == "__main__":
    main()
