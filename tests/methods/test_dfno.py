"""DSNO: golden values, trajectories of the exact teacher, and what its block alone can reach."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import build, exact_teacher
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.models import MixtureModel
from cmbench.errors import Declined
from cmbench.networks.layers import PositionalEmbedding
from cmbench.networks.temporal import TemporalMixing
from cmbench.plugin.method import Batch, DataInfo, Progress
from cmbench.testing.exact import SD, exact_model, quantile_map
from cmbench_plugins.dfno import DFNO, levels_at, state_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "distillation" / "dsno.safetensors"
PROGRESS = Progress(0, 1, 0, 1)
#: The release's first level has logsnr -20.
SIGMA_MAX = math.exp(10)
RELEASED: dict[str, dict[str, Any]] = {
    "cifar10": {"sigma_max": SIGMA_MAX},
    "imagenet64": {"sigma_max": SIGMA_MAX, "times": (0.75, 0.5, 0.25, 0.0), "solver_steps": 16},
}
released = pytest.mark.parametrize("name", RELEASED)


def make(model: Any = None, **config: Any) -> DFNO:
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, **config}
    made = DFNO(DFNO.Config(**table), DataInfo("line", (1, 1, 1), 0, SD, bounded=False))
    made.teacher = exact_teacher(model or exact_model())
    return made


def near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)


@released
def test_times_levels_and_weights_are_the_official_ones(name: str) -> None:
    g, made = load_file(GOLDEN), make(**RELEASED[name])
    assert made.fine_index() == g[f"{name}.fine_index"].tolist()
    near(torch.tensor(made.config.times, dtype=torch.float64), g[f"{name}.times"])
    sigmas = levels_at(made.config.times, SIGMA_MAX)
    near(-2 * sigmas.log(), g[f"{name}.logsnr"])
    near(state_weights(made.config.times, SIGMA_MAX, 1e4), g[f"{name}.weights"])
    fine = made.fine_sigmas()
    assert fine[-1] == 0
    near(fine[made.fine_index()][1:-1], sigmas[:-1])


def test_the_official_time_of_a_state_and_its_embedding() -> None:
    """The harness's networks receive ln(sigma) / 4 instead; the embedding is the same class."""
    g = load_file(GOLDEN)
    time = torch.atan(levels_at(make().config.times, SIGMA_MAX)) / (math.pi / 2)
    near(time, g["cifar10.network_time"])
    embedding = PositionalEmbedding(8)
    # Its frequencies are float32 there too, from an exponential: up to rounding those of ours.
    theirs = torch.exp(torch.arange(4, dtype=torch.float32) * -(math.log(10000) / 3))
    torch.testing.assert_close(embedding.freqs, theirs, rtol=1e-6, atol=0)
    embedding.freqs = theirs.double()
    near(embedding(1000 * time), g["cifar10.embedding8"])


@released
@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_losses_are_the_official_ones(name: str, metric: str) -> None:
    g, made = load_file(GOLDEN), make(metric=metric, **RELEASED[name])
    prediction, target = g["pred"].clone().requires_grad_(), g["target"]
    made.states = lambda nets, noise, labels: prediction  # type: ignore[method-assign]
    batch = Batch(target[:, -1], None, noise=target[:, 0], target=target)
    loss = made.loss({}, batch, None, PROGRESS).mean()  # type: ignore[arg-type]
    near(loss, g[f"{name}.{metric}"])
    distances = made.distance(prediction.flatten(0, 1), target.flatten(0, 1)).reshape(4, 4)
    near(distances.mean(0), g[f"{name}.{metric}_per_time"])
    if metric == "l1":
        (gradient,) = torch.autograd.grad(loss, prediction)
        near(gradient, g[f"{name}.l1_grad"])


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
def test_trajectories_of_the_exact_teacher_converge_to_the_exact_flow(
    solver: str, order: int
) -> None:
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
    errors = []
    for steps in (128, 256):
        made = make(solver=solver, solver_steps=steps)
        wanted = made.trajectories()
        states = wanted.make({}, noise, None)
        assert states.shape == (41, wanted.states, 1, 1, 1)
        assert wanted.nfe == (steps if solver == "ddim" else 2 * steps - 1)
        ends = [*levels_at(made.config.times[:-1], 80.0).tolist(), 0.0]
        start = torch.full((41,), 80.0, dtype=torch.float64)
        for state, sigma in zip(states.unbind(1), ends, strict=True):
            exact = quantile_map(80 * noise.flatten(), start, sigma) / (1 + sigma**2) ** 0.5
            errors.append(float((state.flatten() - exact).abs().mean()))
    for coarse, fine in zip(errors[:4], errors[4:], strict=True):
        assert fine < 0.01
        assert coarse / fine > 0.75 * 2**order


def test_the_network_is_the_teachers_with_mixing_of_states() -> None:
    case = build("dfno", "gmm", teacher="edm:smoke")
    assert case.teacher is not None
    assert case.teacher.network is not None
    keys = {*case.modules["model"].state_dict()} - {*case.teacher.network.state_dict()}
    assert keys
    assert all("temporal." in key for key in keys)
    noise = torch.randn(3, *case.data.data_shape)
    plan = case.method.plan_sampling(1)
    nets = dict(case.nets)
    sample = case.method.sample(nets, noise, None, plan, None)  # type: ignore[arg-type]
    assert sample.shape == noise.shape
    assert nets["model"].evaluations == 3, "one evaluation for all states"


def test_states_of_a_gaussian_are_within_reach_of_the_block_alone() -> None:
    """They are a linear map of the noise: one channel, as many modes as the states have, l2."""
    mean, std = 0.0, 0.4
    mixture = GaussianMixture(
        torch.full((1, 1, 1, 1), mean, dtype=torch.float64),
        torch.tensor([std], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
    )
    made = make(MixtureModel(mixture, std), solver="heun", solver_steps=128, weight_max=1.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)
    target = made.make({}, noise, None)
    scale = [math.sqrt((std**2 + s**2) / (1 + s**2)) for s in levels_at((0.5625, 0.25), 80.0)]
    for state, expected in zip(target.unbind(1), scale, strict=False):
        torch.testing.assert_close(state, expected * noise, rtol=1e-3, atol=1e-3)
    # A pulse at the first state has every mode: its convolution can be any linear map.
    pulse = torch.cat([noise[:, None], torch.zeros(64, 3, 1, 1, 1, dtype=torch.float64)], 1)
    block = TemporalMixing(1, 4, 3).double()
    with torch.no_grad():
        block.weight.zero_()
    columns = []
    for index in range(len(block.weight)):
        unit = torch.zeros_like(block.weight)
        unit[index] = 1.0
        columns.append(block.convolve(pulse.flatten(0, 1), unit).detach().flatten())
    solution = torch.linalg.lstsq(torch.stack(columns, 1), target.flatten()[:, None]).solution
    found = torch.stack(columns, 1) @ solution
    assert float((found[:, 0] - target.flatten()).abs().max()) < 2e-3


def test_choices_that_do_not_fit_are_refused() -> None:
    for times in ((0.5, 0.25), (1.0, 0.0), (0.25, 0.5, 0.0)):
        with pytest.raises(ValidationError, match="descend from below 1 to 0"):
            make(times=times)
    with pytest.raises(ValidationError, match=r"times \[0.3\] are no multiples of 1 / solver"):
        make(times=(0.3, 0.0))
    with pytest.raises(ValidationError, match="temporal_modes: allowed up to 3"):
        make(temporal_modes=4)
    with pytest.raises(Declined, match="parallel decoding samples in one evaluation, not in 2"):
        make().plan_sampling(2)


def test_levels_descend_from_the_teachers_to_the_release_s_last() -> None:
    levels = levels_at((1.0, 0.5625, 0.25, 0.0625, 0.0), 80.0).tolist()
    assert levels[0] == pytest.approx(80.0)
    assert levels[-1] == pytest.approx(math.exp(-10))
    assert all(a > b for a, b in pairwise(levels))
