"""Knowledge distillation: its pairs, its student, and what both cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import build, context, data_of, exact_teacher
from pydantic import ValidationError
from torch import Tensor, nn

from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.models import EDMModel, MixtureModel
from cmbench.errors import UserError
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.manager import load_plugins
from cmbench.plugin.method import Batch, Progress
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.training_run import obtain_run
from cmbench.testing.case import RandomFeed
from cmbench.testing.exact import SD, exact_model, quantile_map
from cmbench.training.loop import Trainer
from cmbench.training.pairs import PairRoot
from cmbench.training.randomness import StepDraws
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState
from cmbench_plugins.knowledge_distillation import PAIR_SOLVERS, KnowledgeDistillation

PROGRESS = Progress(0, 1, 0, 1)
MEAN, STD = 0.3, 0.2


def make(model: Any, **config: Any) -> Any:
    """Return the method on the line, with a teacher."""
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, **config}
    made = KnowledgeDistillation(KnowledgeDistillation.Config(**table), data_of((1, 1, 1), SD))
    made.teacher = None if model is None else exact_teacher(model)
    return made


def gaussian() -> MixtureModel:
    """Return the exact model of one Gaussian on the line."""
    means, stds = torch.tensor([MEAN]).double().reshape(1, 1, 1, 1), torch.tensor([STD]).double()
    return MixtureModel(GaussianMixture(means, stds, torch.ones(1).double()), SD)


def affine(z: Tensor) -> Tensor:
    """Return where the trajectory from ``80 z`` ends: the sheet's map for a Gaussian."""
    return MEAN + (80 * z - MEAN) * STD / (STD**2 + 80**2) ** 0.5


def unit_noise(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((count, 1, 1, 1), generator=generator, dtype=torch.float64)


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "nfe", "order"), [("heun", 255, 2), ("euler", 400, 1)])
def test_pairs_of_a_gaussian_converge_to_an_affine_map(solver: str, nfe: int, order: int) -> None:
    z, errors = unit_noise(200), []
    for evaluations in (nfe, 2 * nfe + 1):
        made = make(gaussian(), solver=solver, solver_nfe=evaluations)
        errors.append(float((made.make({}, z, None) - affine(z)).abs().max()))
    assert errors[0] < (1e-3 if order == 2 else 0.05)
    assert errors[0] / errors[1] > 0.9 * 2**order


def test_pairs_of_a_mixture_are_on_its_flow_map() -> None:
    made, z = make(exact_model(), solver_nfe=255), unit_noise(500)
    exact = quantile_map(80 * z.flatten(), torch.full((500,), 80.0, dtype=torch.float64), 0.0)
    error = (made.make({}, z, None).flatten() - exact).abs()
    assert float(error.mean()) < 2e-3


class Counting(nn.Module):
    """A network of which only the calls matter."""

    def forward(self, x: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        return 0.1 * x


@pytest.mark.parametrize("solver", PAIR_SOLVERS)
def test_every_solver_costs_what_it_declares(solver: str) -> None:
    network = CountedNetwork(Counting())
    made = make(EDMModel(network, SD), solver=solver, solver_nfe=6)
    noise = unit_noise(3).float()
    images = made.make({}, noise, None)
    assert (images.shape, images.dtype) == (noise.shape, torch.float32)
    assert network.evaluations == 3 * made.pairs().nfe
    assert made.pairs().nfe == (6 if solver != "ddim-quadratic" else network.evaluations / 3)


SETTINGS = [
    {"solver": "euler"},
    {"solver_nfe": 17},
    {"sigma_max": 60.0},
    {"sigma_min": 0.01},
    {"rho": 5.0},
    {"solver": "ddim-linear"},
    {"solver": "ddim-linear", "solver_nfe": 50},
]


def test_pairs_of_other_settings_are_others() -> None:
    wanted = [make(None, **settings).pairs() for settings in ({}, *SETTINGS)]
    assert len({(w.solver, w.nfe) for w in wanted}) == len(wanted)
    assert make(None, sigma_max=60.0, solver="ddim-linear").pairs().solver == wanted[-2].solver


def test_images_are_clamped_where_data_are_bounded() -> None:
    case = build("knowledge-distillation", "digits", teacher="edm:smoke")
    free = build("knowledge-distillation", "digits", teacher="edm:smoke", clip_samples=False)
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for whole, cut in ((free, case),):
        large: Any = (whole.method, cut.method)
        for method in large:
            method.distilled = lambda: EDMModel(lambda x, *_: 9 * x, 0.5)
        assert float(large[0].make({}, noise, None).abs().max()) > 1
        assert torch.equal(
            large[1].make({}, noise, None), large[0].make({}, noise, None).clamp(-1, 1)
        )
        assert large[0].pairs().solver + ", clipped" == large[1].pairs().solver


# --- the student ---------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["denoised", "residual"])
def test_student_and_samples_are_one_function(output: str) -> None:
    made = make(None, output=output, sigma_max=40.0)
    seen: list[tuple[float, float]] = []

    def network(x: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        seen.append((float(c_noise[0]), float(x.std())))
        return 0.3 * torch.sin(x)

    z = unit_noise(64)
    images = made.student({"model": network}, z, None)
    level, spread = seen[0]
    assert level == pytest.approx(torch.tensor(40.0).log().item() / 4)
    assert spread == pytest.approx(float(z.std()), rel=1e-3), "inputs of unit variance"
    if output == "residual":
        torch.testing.assert_close(images, z - 0.3 * torch.sin(z))
    else:
        sigma = torch.full((64,), 40.0, dtype=torch.float64)
        torch.testing.assert_close(images, EDMModel(network, SD).denoise(40 * z, sigma))
    plan = made.plan_sampling(1)
    assert (plan.nfe, plan.sigmas) == (1, (40.0,))
    assert torch.equal(made.sample({"model": network}, z, None, plan, StepDraws(0, 0)), images)


def test_the_loss_is_zero_for_the_map_itself() -> None:
    """And the sum over values elsewhere; a learned distance is taken as it is."""
    for metric, expected in (("l1", 6 * 0.5), ("l2", 6 * 0.25), ("pseudo-huber", 0.499)):
        table = {"network": {"name": "formula"}, "duration_kimg": 1.0, "metric": metric}
        config = KnowledgeDistillation.Config(**table, huber_c=1e-3)
        made = KnowledgeDistillation(config, data_of((1, 2, 3)))
        z = torch.randn(5, 1, 2, 3, dtype=torch.float64)
        made.student = lambda nets, noise, labels: noise**2  # type: ignore[method-assign]
        draws: Any = None
        exact = made.loss({}, Batch(z, None, noise=z, target=z**2), draws, PROGRESS)
        assert torch.equal(exact, torch.zeros_like(exact))
        off = made.loss({}, Batch(z, None, noise=z, target=z**2 + 0.5), draws, PROGRESS)
        scale = 6**0.5 if metric == "pseudo-huber" else 1.0
        torch.testing.assert_close(
            off, torch.full_like(off, expected * scale), rtol=3e-3, atol=0, msg=metric
        )


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"solver": "eulre"}, "not one of ddim-quadratic, ddim-linear, heun, euler"),
        ({"solver": "sa-solver"}, "not one of"),
        ({"solver": "dpm-solver-2", "solver_nfe": 5}, "NFE 5 is not a multiple of 2"),
        ({"pairs": 0}, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_pairs_that_no_solver_makes_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make(None, **config)


def test_without_a_teacher() -> None:
    with pytest.raises(UserError, match=r"has no teacher.*METHOD:RECIPE or analytic"):
        make(None).make({}, unit_noise(1), None)


# --- recipes -------------------------------------------------------------------------------------


def test_the_paper_makes_as_many_pairs_as_the_sheet_says() -> None:
    """1,024,000 pairs of 100 steps (six of which do nothing), 25 passes over them."""
    for recipe, nfe in (("paper", 35), ("paper-ddim", 96)):
        plan = plan_run(context(), "knowledge-distillation", "cifar10", recipe, 0, ())
        config: Any = plan.config
        made = KnowledgeDistillation(config, data_of((3, 32, 32)))
        assert (made.pairs().count, made.pairs().nfe) == (1_024_000, nfe)
        assert config.duration_kimg * 1000 == 25 * config.pairs


def test_the_demo_on_digits_costs_what_others_do() -> None:
    """Pairs and training together within the budget of `edm`'s training."""
    plan = plan_run(context(), "knowledge-distillation", "digits", "demo", 0, ())
    baseline = plan_run(context(), "edm", "digits", "demo", 0, ())
    config: Any = plan.config
    cost = config.pairs * config.solver_nfe + 3 * 1000 * config.duration_kimg
    budget = 3 * 1000 * baseline.config.duration_kimg
    assert 0.99 * budget < cost <= budget


# --- training ------------------------------------------------------------------------------------


class Line(nn.Module):
    """A small multilayer perceptron of the sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        out: Tensor = self.body(x.flatten(1)).reshape(x.shape)
        return out


def test_a_student_reaches_the_affine_map_to_one_in_a_thousand(tmp_path: Path) -> None:
    """The fact sheet's quick check, through the harness: pairs made, stored, read, learned."""
    steps, batch = 1500, 256
    made = make(
        gaussian(),
        duration_kimg=steps * batch / 1000,
        batch_size=batch,
        metric="l2",
        pairs=4096,
        solver_nfe=255,
        pair_dtype="float32",
        optimizer={"lr": 3e-3, "decay": "linear"},
        ema=[{"decay": 0.99}],
    )
    state = TrainingState(made, {"model": Line()})
    pairs = PairRoot(tmp_path, {}, lambda: "exact", lambda names: "", (1, 1, 1), None)
    feed = RandomFeed(made.data)
    Trainer(state, feed, Settings(0, batch), Watchers(pairs=pairs)).train()
    average = {k.partition(".")[2]: v for k, v in state.averages[0].state_dict().items()}
    state.modules["model"].load_state_dict(average)
    z = unit_noise(2000).float()
    with torch.no_grad():
        error = (made.student(state.modules, z, None) - affine(z)).abs()
    assert float(error.mean()) < 1e-3
    (cost,) = state.generated.values()
    assert (cost.pairs, cost.network_evaluations) == (4096, 0), "an exact teacher has no network"


def test_a_run_counts_its_pairs(tmp_path: Path) -> None:
    """The teacher's calls, and three forward passes for each image of training."""
    options = ("teacher=edm:smoke", "pairs=64", "solver_nfe=5", "duration_kimg=1.024")
    there = Context(load_plugins(), Workspace(tmp_path), threads=1, device=torch.device("cpu"))
    plan = plan_run(there, "knowledge-distillation", "gmm", "smoke", 0, options)
    export = obtain_run(there, plan).result["exports"]["final"]
    cost = export["generated"]["train"]
    assert (cost["pairs"], cost["network_evaluations"]) == (64, 64 * 5)
    assert export["network_evaluations"] == 64 * 5 + 3 * 1024
    assert cost["bytes"] >= 64 * 2 * 2
