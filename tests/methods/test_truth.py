"""Every method at the exact solution of an analytic mixture: nothing to learn there, all around it.

The student is the exact consistency function plus ``delta`` times a smooth bump. Float64, the exact
teacher, and the plugins' own losses. Pair losses hold the target at the exact function: with it a
stop-gradient loss is a function of the student alone, of which the exact one is the minimum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exact_maps import ExactConsistency
from method_kit import FixedDraws, exact_teacher
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import karras_sigmas
from cmbench.diffusion.preconditioning import edm_scalings
from cmbench.plugin.method import Batch, DataInfo, Progress
from cmbench.testing.exact import SD, exact_model, line_mixture, quantile_map
from cmbench_plugins.cct import CCT
from cmbench_plugins.cm import CD, CT
from cmbench_plugins.ect import ECT
from cmbench_plugins.edm import EDM
from cmbench_plugins.ict import ICT
from cmbench_plugins.pd import PD
from cmbench_plugins.scm import SCD, SCT

COUNT = 12_000
LATE = Progress(99, 100, 99, 100)


def make(method: Any, **config: Any) -> Any:
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, **config}
    made = method(method.Config(**table), DataInfo("line", (1, 1, 1), 0, SD, bounded=False))
    made.teacher = made.first_teacher = exact_teacher(exact_model())
    return made


def draws(count: int = COUNT, seed: int = 0) -> tuple[Batch, FixedDraws]:
    """Return data and every draw that a loss may ask for."""
    generator = torch.Generator().manual_seed(seed)
    x0, _ = line_mixture().sample(count, generator, dtype=torch.float64)
    normal = torch.randn((3, count), generator=generator, dtype=torch.float64)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    noise = normal[0].reshape(count, 1, 1, 1)
    return Batch(x0, None), FixedDraws({"noise": noise, "index": uniform})


def loss_at(method: Any, network: nn.Module, batch: Batch, drawn: FixedDraws) -> Tensor:
    return method.loss({"model": network}, batch, drawn, LATE)  # type: ignore[no-any-return]


def gradient_at(
    method: Any, network: ExactConsistency, delta: float, batch: Batch, drawn: FixedDraws
) -> Tensor:
    """Return each image's derivative of the loss with respect to delta, ``[N]``."""
    x = batch.images
    network.delta = nn.Parameter(torch.full((len(x), 1, 1, 1), delta, dtype=torch.float64))
    loss = loss_at(method, network, batch, drawn)
    (found,) = torch.autograd.grad(loss.sum(), network.delta)
    return found.flatten()


# --- pairs of noise levels -----------------------------------------------------------------------

PAIRS = [
    pytest.param(CD, {"n_points": 65, "solver": "heun"}, 0.002, id="cd-heun"),
    pytest.param(CD, {"n_points": 257, "solver": "euler"}, 0.002, id="cd-euler"),
    pytest.param(CT, {"s1": 600}, 0.002, id="ct"),
    pytest.param(CT, {"s1": 600, "metric": "pseudo-huber", "huber_c": 0.1}, 0.002, id="ct-huber"),
    pytest.param(ICT, {"s1": 640}, 0.002, id="ict"),
    pytest.param(ICT, {"s1": 640, "metric": "l2"}, 0.002, id="ict-l2"),
    pytest.param(ECT, {"q": 2.0, "stages": 8, "huber_c": 0.1}, 0.0, id="ect"),
]


@pytest.mark.parametrize(("method", "config", "sigma_min"), PAIRS)
def test_pair_losses_are_least_at_the_exact_function(
    method: Any, config: dict[str, Any], sigma_min: float
) -> None:
    batch, drawn = draws()
    values = dict(drawn.values)
    values["sigma"] = torch.randn(
        COUNT, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).clamp(-2.5, 2.5)
    made, drawn = make(method, **config), FixedDraws(values)
    network = ExactConsistency("edm", sigma_min, exact_target=True)

    def mean_loss(delta: float) -> float:
        with torch.no_grad():
            network.delta = nn.Parameter(torch.tensor(delta, dtype=torch.float64))
        return float(loss_at(made, network, batch, drawn).detach().mean())

    least = mean_loss(0.0)
    for delta in (0.1, 0.3):
        assert mean_loss(delta) > least
        assert mean_loss(-delta) > least
    assert mean_loss(0.3) > mean_loss(0.1)
    slopes = [gradient_at(made, network, d, batch, drawn).mean() for d in (-0.1, 0.0, 0.1)]
    # The parabola's bottom is at zero up to the discretisation: an eighth of the smaller step.
    assert slopes[0] < 0 < slopes[2]
    assert abs(float(slopes[1])) < (float(slopes[2]) - float(slopes[0])) / 16


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_residual_of_distillation_has_the_order_of_one_step(solver: str, order: int) -> None:
    """At the exact function the outputs differ by one step's error, O(h^(p+1))."""
    residuals, intervals = [], (32, 64, 128, 256)
    for count in intervals:
        made = make(CD, n_points=count + 1, solver=solver)
        batch, drawn = draws(4000)
        # The same noise levels on every grid: those of the coarsest.
        index = torch.arange(4000) % 20 + 6
        u = ((index * (count // 32)).double() + count // 32 - 0.5) / count
        values = {**drawn.values, "index": u}
        loss = loss_at(made, ExactConsistency(), batch, FixedDraws(values)).detach()
        residuals.append(float(loss.sqrt().median()))
    fit = np.polyfit(np.log(intervals), np.log(residuals), 1)[0]
    assert fit == pytest.approx(-order, abs=0.25)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_bias_of_distillation_falls_with_the_order_of_its_solver(solver: str, order: int) -> None:
    """The function that CD with N levels is satisfied with is N - 1 steps of its solver.

    Its loss is zero at every pair of levels, and its distance from the exact function falls as the
    solver's global order says.
    """
    biases, intervals = [], (64, 128, 256, 512)
    noise = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64).reshape(-1, 1, 1, 1)
    top = torch.full((101,), 80.0, dtype=torch.float64)
    exact = quantile_map((noise * 80).flatten(), top, 0.002)
    for count in intervals:
        made, grid = make(CD, n_points=count + 1, solver=solver), karras_sigmas(count + 1)
        x = noise * 80
        for n in range(count, 0, -1):
            sigma, following = grid[n].expand(101), grid[n - 1].expand(101)
            x = made.step(x, x, x, sigma, following, None)
        biases.append(float((x.flatten() - exact).abs().median()))
    fit = np.polyfit(np.log(intervals), np.log(biases), 1)[0]
    assert fit == pytest.approx(-order, abs=0.2)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_distillation_is_satisfied_with_its_own_solver(solver: str) -> None:
    count = 12
    made, grid = make(CD, n_points=count + 1, solver=solver), karras_sigmas(count + 1)

    class Solved(nn.Module):
        """F of the function that solves down the grid."""

        def forward(self, x_in: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
            sigma = torch.exp(4 * c_noise)
            f = made.consistency(lambda *_: torch.zeros_like(x_in))  # c_skip x alone
            x = x_in / append_dims(edm_scalings(sigma, SD).c_in, x_in)
            skip, solved = f(x, sigma), x.clone()
            start = torch.searchsorted(grid, sigma * (1 - 1e-9))
            for n in range(count, 0, -1):
                rows = start >= n
                if bool(rows.any()):
                    levels = (grid[m].expand(int(rows.sum())) for m in (n, n - 1))
                    solved[rows] = made.step(None, None, solved[rows], *levels, None)
            # Read c_out off the method's own scalings: f of the constant network 1.
            c_out = made.consistency(lambda *_: torch.ones_like(x_in))(x, sigma) - skip
            inside = c_out.abs() > 1e-9
            return torch.where(inside, (solved - skip) / torch.where(inside, c_out, 1.0), 0.0)

    batch, drawn = draws(500)
    assert float(loss_at(made, Solved(), batch, drawn).max()) < 1e-20


# --- continuous time -----------------------------------------------------------------------------

FLAT = {"adaptive_weighting": False, "warmup_steps": 0}
DISTILLED = [
    pytest.param(SCD, {**FLAT, "tangent": "raw"}, "trigflow", id="scd-raw"),
    pytest.param(SCD, FLAT, "trigflow", id="scd-normalized"),
    pytest.param(SCD, {**FLAT, "tangent": "clip"}, "trigflow", id="scd-clipped"),
    pytest.param(CCT, {"form": "distillation"}, "edm", id="cct"),
]
TRAINED = [
    pytest.param(SCT, {**FLAT, "tangent": "raw"}, "trigflow", id="sct"),
    pytest.param(CCT, {"form": "training"}, "edm", id="cct"),
]


def continuous_draws(count: int) -> tuple[Batch, FixedDraws]:
    batch, drawn = draws(count)
    generator = torch.Generator().manual_seed(2)
    time = torch.randn(count, generator=generator, dtype=torch.float64).clamp(-3, 3)
    level = 0.05 + 0.9 * torch.rand(count, generator=generator, dtype=torch.float64)
    return batch, FixedDraws({**drawn.values, "time": time, "sigma": level})


@pytest.mark.parametrize(("method", "config", "frame"), DISTILLED)
def test_exact_function_has_no_tangent(method: Any, config: dict[str, Any], frame: str) -> None:
    """Distillation: no gradient at any single image, and for sCD no loss; with a bump there is."""
    batch, drawn = continuous_draws(500)
    made, network = make(method, **config), ExactConsistency(frame)
    gradients = [
        gradient_at(made, network, delta, batch, drawn).abs() for delta in (0.0, 0.05, 0.2)
    ]
    assert float(gradients[0].max()) < 1e-9
    assert float(gradients[2].median()) > float(gradients[1].median()) > 1e-4
    if method is SCD:
        losses = []
        for delta in (0.0, 0.05, 0.2):
            network.delta = nn.Parameter(torch.tensor(delta, dtype=torch.float64))
            losses.append(float(loss_at(made, network, batch, drawn).detach().mean()))
        assert losses[0] < 1e-16
        assert losses[2] > losses[1] > 1e-5


@pytest.mark.parametrize(("method", "config", "frame"), TRAINED)
def test_exact_function_has_no_tangent_on_average(
    method: Any, config: dict[str, Any], frame: str
) -> None:
    """Training sees one clean image at a time: zero within the standard error, 10 of it off."""
    batch, drawn = continuous_draws(COUNT)
    made, network = make(method, **config), ExactConsistency(frame)

    def deviation(delta: float) -> float:
        found = gradient_at(made, network, delta, batch, drawn)
        return abs(float(found.mean() / (found.std() / len(found) ** 0.5)))

    assert deviation(0.0) < 4
    assert deviation(0.5) > 10
    assert deviation(-0.5) > 10


def test_discrete_tangent_converges_to_the_continuous_one() -> None:
    """Sec. 5.3: its error at the exact function is of first order in the step."""
    sizes, points = [], (65, 129, 257, 513)
    for n_points in points:
        made = make(SCD, n_points=n_points, **{**FLAT, "tangent": "raw"})
        batch, drawn = continuous_draws(2000)
        u = torch.rand(2000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        drawn = FixedDraws({**drawn.values, "time": u})
        network = ExactConsistency("trigflow")
        sizes.append(float(loss_at(made, network, batch, drawn).detach().sqrt().median()))
    fit = np.polyfit(np.log(points), np.log(sizes), 1)[0]
    assert fit == pytest.approx(-1, abs=0.15)


def test_warm_up_mixes_in_the_denoiser() -> None:
    """At r = 0 sCM is diffusion training: the exact consistency function is not its solution."""
    batch, drawn = continuous_draws(500)
    made = make(SCD, **{**FLAT, "warmup_steps": 200, "tangent": "raw"})
    network = ExactConsistency("trigflow")
    values = [
        float(
            made.loss({"model": network}, batch, drawn, Progress(0, 1, step, 200)).detach().mean()
        )
        for step in (0, 100, 199, 200)
    ]
    assert values[0] > values[1] > values[2] > values[3]
    assert values[3] < 1e-16


# --- diffusion -----------------------------------------------------------------------------------


class ExactDenoiser(nn.Module):
    """The raw network of the exact denoiser plus a bump, read as EDM's or TrigFlow's F."""

    def __init__(self, parameterization: str) -> None:
        super().__init__()
        self.parameterization = parameterization
        self.delta = 0.0

    def forward(self, x_in: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        trig = self.parameterization == "trigflow"
        t = c_noise if trig else torch.atan(torch.exp(4 * c_noise) / SD)
        raw = exact_model().velocity(x_in * SD, t) / SD
        return (raw if trig else -raw) + self.delta * torch.sin(1.3 * x_in + 0.4)


@pytest.mark.parametrize("parameterization", ["edm", "trigflow"])
def test_diffusion_loss_is_least_at_the_exact_denoiser(parameterization: str) -> None:
    batch, drawn = continuous_draws(COUNT)
    drawn = FixedDraws({**drawn.values, "sigma": drawn.values["time"]})
    made, network = make(EDM, parameterization=parameterization), ExactDenoiser(parameterization)
    losses = []
    for delta in (-0.3, -0.1, 0.0, 0.1, 0.3):
        network.delta = delta
        losses.append(float(loss_at(made, network, batch, drawn).mean()))
    assert losses[0] > losses[1] > losses[2] < losses[3] < losses[4]
    # A parabola in delta: its bottom is at zero within the sampling error.
    bottom = np.polyfit((-0.3, -0.1, 0.0, 0.1, 0.3), losses, 2)
    assert abs(-bottom[1] / (2 * bottom[0])) < 0.02


@pytest.mark.parametrize("grid", ["karras", "cosine"])
def test_stage_of_progressive_distillation_is_least_at_two_teacher_steps(grid: str) -> None:
    """Zero where one student step is two teacher steps; the teacher itself is left behind by less
    and less as the steps become finer.
    """
    left = []
    for steps in (16, 32, 64):
        made = make(PD, grid=grid, start_steps=2 * steps, parameterization="trigflow")
        batch, drawn = draws(2000)
        nets = {"model": ExactDenoiser("trigflow"), "teacher": ExactDenoiser("trigflow")}
        made.weight = torch.ones_like
        loss = made.stage_loss(steps, nets, batch, drawn)
        left.append(float(loss.mean()))
        nets["model"].delta = 0.3  # type: ignore[assignment]
        assert float(made.stage_loss(steps, nets, batch, drawn).mean()) > 2 * left[-1]
    assert left[0] > 2 * left[1] > 4 * left[2]
