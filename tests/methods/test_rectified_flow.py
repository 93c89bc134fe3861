"""Rectified flow: quick checks on exact flows, its stages, plans, and what RK45 may cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_kit import FixedDraws, build, data_of, exact_teacher, plan_or_reason
from pydantic import ValidationError
from torch import Tensor, nn

from cmbench.diffusion.frames import (
    append_dims,
    flow_interpolate,
    flow_time_to_sigma,
    sigma_to_flow_time,
)
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.rectified_flow import EDMFlowModel, FlowModel
from cmbench.errors import Declined, PluginError
from cmbench.plugin.method import Batch, PhaseStart, Progress, SamplingPlan
from cmbench.sampling.stream import Sampler
from cmbench.testing.exact import SD, exact_model, line_mixture, quantile_map
from cmbench_plugins.rf import RF

PROGRESS = Progress(0, 1, 0, 1)


class ExactFlow(nn.Module):
    """The velocity of the 1-RF of the mixture on the line; the time is as it is."""

    def forward(self, x: Tensor, t: Tensor, labels: Any = None) -> Tensor:
        t = t.clamp(1e-6, 1 - 1e-6)
        denoised = exact_model().denoise(x / append_dims(t, x), flow_time_to_sigma(t))
        return (denoised - x) / append_dims(1 - t, x)


def make(**config: Any) -> Any:
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, "time_scale": 1.0, **config}
    made = RF(RF.Config(**table), data_of((1, 1, 1), SD))
    made.teacher = exact_teacher(exact_model())
    return made


def grid_of_noise(count: int = 81) -> Tensor:
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(u).reshape(-1, 1, 1, 1)


# --- what the literature proves ------------------------------------------------------------------


def test_the_optimum_of_a_1_rf_is_the_velocity_of_the_denoiser() -> None:
    """Its error is orthogonal to every function of (x_t, t): the conditional mean."""
    generator = torch.Generator().manual_seed(1)
    count = 400_000
    x1, _ = line_mixture().sample(count, generator, dtype=torch.float64)
    z = torch.randn(x1.shape, generator=generator, dtype=torch.float64)
    t = make().times(torch.rand(count, generator=generator, dtype=torch.float64)).clamp_max(0.98)
    x_t = flow_interpolate(x1, z, t)
    error = (x1 - z - FlowModel(ExactFlow(), SD, 1.0).flow_velocity(x_t, t)).flatten()
    for probe in (torch.ones_like(error), x_t.flatten(), t, torch.sin(3 * x_t.flatten() + 2 * t)):
        product = error * probe
        assert abs(float(product.mean())) < 4 * float(product.std()) / count**0.5


def test_the_coupling_of_a_1_rf_is_monotone_and_that_of_quantiles() -> None:
    """So the lines from noise to image never cross, and a 2-RF takes one step."""
    z = grid_of_noise()
    made = make(pairs_tolerance=1e-9, t_min=1e-5)
    images = made.generator_images({"generator": ExactFlow()}, z, None)
    sigma = torch.full((len(z),), 1e5, dtype=torch.float64)
    exact = quantile_map((1e5 * z).flatten(), sigma, 0.0)
    torch.testing.assert_close(images.flatten(), exact, rtol=0, atol=2e-4)
    for time in torch.linspace(0, 1, 11, dtype=torch.float64):
        between = flow_interpolate(images, z, time.expand(len(z)))
        assert (between.flatten().diff() > 0).all(), "two lines cross"


def test_a_2_rf_of_the_exact_coupling_takes_one_step() -> None:
    """Velocities that are constant along lines have no loss, and one step of Euler is exact."""
    z = grid_of_noise()
    made = make(rectifications=2, distil=False)
    images = made.generator_images({"generator": ExactFlow()}, z, None)

    class Straight(nn.Module):
        """Interpolates between the lines at a time."""

        def forward(self, x: Tensor, t: Tensor, labels: Any = None) -> Tensor:
            nodes = flow_interpolate(images, z, t[:1].expand(len(z))).flatten()
            above = torch.searchsorted(nodes, x.flatten()).clamp(1, len(z) - 1)
            share = (x.flatten() - nodes[above - 1]) / (nodes[above] - nodes[above - 1])
            slopes = (images - z).flatten()
            return torch.lerp(slopes[above - 1], slopes[above], share).reshape(x.shape)

    nets = {"model": Straight()}
    for time in (0.0, 0.5, 0.9):
        draws = FixedDraws({"time": torch.full((len(z),), time, dtype=torch.float64)})
        loss = made.loss_of_pairs(
            nets, Batch(images, None, noise=z, target=images), draws, PROGRESS
        )
        assert float(loss.max()) < 1e-20
    one = made.sample(nets, z, None, made.plan_sampling(1), FixedDraws({}))
    torch.testing.assert_close(one, images, rtol=0, atol=2e-3)  # asked at 0.001, not at 0


def test_frames() -> None:
    """One model in three frames: the flow's, EDM's and TrigFlow's."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((30, 1, 1, 1), generator=generator, dtype=torch.float64)
    sigma = torch.logspace(-2, 3, 30, dtype=torch.float64)
    torch.testing.assert_close(flow_time_to_sigma(sigma_to_flow_time(sigma)), sigma)
    flow, exact = FlowModel(ExactFlow(), SD, 1.0), exact_model()
    torch.testing.assert_close(
        flow.denoise(x * sigma.reshape(x.shape), sigma),
        exact.denoise(x * sigma.reshape(x.shape), sigma),
    )
    angle = torch.linspace(0.05, 1.5, 30, dtype=torch.float64)
    torch.testing.assert_close(flow.velocity(x, angle), exact.velocity(x, angle))

    def network(x: Tensor, c: Tensor, labels: Any = None) -> Tensor:
        return torch.sin(1.7 * x + append_dims(c, x))

    t = torch.linspace(1e-5, 0.999, 30, dtype=torch.float64)
    denoised = EDMModel(network, SD).denoise(x / append_dims(t, x), flow_time_to_sigma(t))
    expected = (denoised - x) / append_dims(1 - t, x)
    edm = EDMFlowModel(network, SD)
    torch.testing.assert_close(edm.flow_velocity(x, t), expected, rtol=1e-9, atol=1e-9)
    assert torch.isfinite(edm.flow_velocity(x, torch.ones_like(t))).all()


# --- stages --------------------------------------------------------------------------------------

STAGES = [
    ({}, ["1-rf", "2-rf", "distilled"]),
    ({"rectifications": 3}, ["1-rf", "2-rf", "3-rf", "distilled"]),
    ({"rectifications": 1, "distil": False}, ["1-rf"]),
    ({"rectifications": 1}, ["1-rf", "distilled"]),
    ({"teacher": "analytic"}, ["2-rf", "distilled"]),
    ({"teacher": "analytic", "rectifications": 1}, ["distilled"]),
]


@pytest.mark.parametrize(("options", "stages"), STAGES)
def test_stages(options: dict[str, Any], stages: list[str]) -> None:
    case = build("rf", "gmm", reflow_ema=[{"decay": 0.5}], **options)
    phases = case.state().phases
    assert [p.name for p in phases] == [p.export for p in phases] == stages
    assert [p.start is not None for p in phases] == [False] + [True] * (len(stages) - 1)
    assert [p.ema[0].decay for p in phases] == [None] + [0.5] * (len(stages) - 1)
    assert ("generator" in case.modules) == (len(stages) > 1)
    made_by = [None if p.generated is None else p.generated.made_by for p in phases]
    first: Any = () if "teacher" in options else None
    assert made_by == [first] + [("generator",)] * (len(stages) - 1)
    costs = [p.generated.nfe for p in phases if p.generated is not None]
    assert costs == ([35] if first == () else []) + [None] * (len(stages) - 1)


def test_the_average_makes_the_pairs_and_the_weights_go_on() -> None:
    case = build("rf", "gmm")
    own = {k: v.clone() for k, v in case.modules["model"].state_dict().items()}
    average = {k: torch.full_like(v, 0.25) for k, v in own.items()}
    state: Any = case.state()
    state.phases[1].start(PhaseStart(case.modules, averaged=lambda name: average))
    for name, value in case.modules["model"].state_dict().items():
        assert torch.equal(value, own[name])
        assert torch.equal(case.modules["generator"].state_dict()[name], average[name])


def test_a_teacher_makes_the_first_pairs() -> None:
    z = grid_of_noise()
    made = make(teacher="analytic", teacher_steps=100)
    exact = quantile_map((80 * z).flatten(), torch.full((len(z),), 80.0).double(), 0.0)
    torch.testing.assert_close(made.teacher_images({}, z, None).flatten(), exact, rtol=0, atol=0.02)


def test_only_a_1_rf_alone_is_a_diffusion_model() -> None:
    model = make(rectifications=1, distil=False).diffusion_model({"model": ExactFlow()})
    assert model.parameterization == "flow"
    with pytest.raises(Declined, match="train a 1-RF alone"):
        make().diffusion_model({"model": ExactFlow()})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"teacher": "analytic", "rectifications": 1, "distil": False}, "nothing is left to train"),
        ({"distil_steps": 2, "distil_loss": "lpips"}, "several steps is l2"),
    ],
)
def test_what_cannot_be_trained(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        make(**options)


# --- sampling ------------------------------------------------------------------------------------

PLANS = [
    (1, None, "distilled-euler", "distilled"),
    (2, None, "2-rf-euler", "2-rf"),
    (1, "2-rf-euler", "2-rf-euler", "2-rf"),
    (4, "1-rf-euler", "1-rf-euler", "1-rf"),
    (3, "heun", "2-rf-heun", "2-rf"),
    (60, "1-rf-rk45", "1-rf-rk45", "1-rf"),
    (5, "1-rf-euler-first-noise", "1-rf-euler-first-noise", "1-rf"),
]


@pytest.mark.parametrize(("nfe", "sampler", "name", "variant"), PLANS)
def test_plans(nfe: int, sampler: str | None, name: str, variant: str) -> None:
    plan = make().plan_sampling(nfe, sampler=sampler)
    assert (plan.nfe, plan.sampler, plan.variant) == (nfe, name, variant)
    assert plan.adaptive == name.endswith("rk45")
    assert make().plan_sampling(nfe, sampler=name) == plan, "a record's sampler is this one again"


@pytest.mark.parametrize(
    ("nfe", "sampler", "sigmas", "told"),
    [
        (4, "heun", None, "NFE 4 is even"),
        (7, "rk45", None, "from 8"),
        (9, "rk45", (1.0,), "from 8"),
        (2, "distilled-euler", None, "1 steps of euler"),
        (2, "3-rf-euler", None, "not one of euler, heun"),
        (2, "2-rf-euler", (999.0,), "takes 2 noise levels up to 999"),
        (1, "2-rf-euler", (1000.0,), "takes 1 noise levels up to 999"),
        (1, None, (999.0,), "its own noise levels"),
    ],
)
def test_declined(nfe: int, sampler: str | None, sigmas: Any, told: str) -> None:
    with pytest.raises(Declined, match=told):
        make().plan_sampling(nfe, sigmas, sampler)


def test_noise_levels_of_the_user() -> None:
    plan = make().plan_sampling(2, (99.0, 1.0), "2-rf-euler")
    assert plan.sigmas == (99.0, 1.0)
    asked: list[Tensor] = []

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Any = None) -> Tensor:
            asked.append(t)
            return torch.ones_like(x)

    z = grid_of_noise(3)
    images = make().sample({"model": Network()}, z, None, plan, FixedDraws({}))
    torch.testing.assert_close(torch.stack(asked)[:, 0], torch.tensor([0.01, 0.5]).double())
    place = (0.01 - 1e-3) / (1 - 1e-3)  # of the first step; the slope is one everywhere
    torch.testing.assert_close(images, (1 - place) * (z + 1))


def sampler_of(nfe: int, **options: Any) -> Sampler:
    case = build("rf", "gmm", sampler="rk45", pairs_tolerance=1e-3, **options)
    plan = plan_or_reason(case.method, nfe)
    assert isinstance(plan, SamplingPlan)
    return Sampler(case.method, case.modules, plan, seed=3, labels=lambda start, count: None)


def test_rk45_costs_what_each_image_needs() -> None:
    together = sampler_of(500)
    images = together.make(0, 12).images
    together.check_nfe()
    assert 8 <= together.nfe_measured < 500
    costs = []
    for index in range(12):
        alone = sampler_of(500)
        torch.testing.assert_close(alone.make(index, 1).images[0], images[index])
        costs.append(alone.nfe_measured)
    assert together.nfe_measured == pytest.approx(sum(costs) / 12)


def test_rk45_keeps_to_its_limit() -> None:
    limited = sampler_of(14)
    limited.make(0, 12)
    limited.check_nfe()
    assert limited.nfe_measured <= 14
    limited.plan = SamplingPlan(10, "rk45", (), adaptive=True)
    limited.nets["model"].evaluations += 12 * 20
    with pytest.raises(PluginError, match="declares at most NFE 10 but"):
        limited.check_nfe()
