"""The small parts of the methods: times, solvers, stages, proposals, starting weights, messages."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_kit import FixedDraws, build, context, plan_or_reason, progress
from pydantic import ValidationError

from cmbench.diffusion.gaussian_mixture import ring_mixture
from cmbench.diffusion.grids import karras_sigmas
from cmbench.diffusion.models import EDMModel, MixtureModel
from cmbench.errors import Declined, UserError
from cmbench.plugin.method import Batch, DataInfo, Progress, SamplingPlan, Teacher
from cmbench.plugin.specs import SamplerSpec
from cmbench.sweep.runs import TrainingKit
from cmbench_plugins._samplers import DIFFUSION
from cmbench_plugins._sigmas import consistency_sigmas
from cmbench_plugins._solvers import SOLVERS
from cmbench_plugins.cct import CCT
from cmbench_plugins.cm import CD, CT
from cmbench_plugins.ect import ECT
from cmbench_plugins.edm import EDM
from cmbench_plugins.ict import ICT
from cmbench_plugins.pd import PD
from cmbench_plugins.scm import SCD, SCT


def make(method: Any, bounded: bool = False, **config: Any) -> Any:
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, **config}
    data = DataInfo("test", (2, 1, 1), 0, 0.5, bounded)
    return method(method.Config(**table), data)


# --- noise levels of the steps -------------------------------------------------------------------


@given(
    nfe=st.integers(1, 20),
    published=st.lists(st.floats(0.01, 70.0), max_size=3, unique=True).map(tuple),
)
def test_steps_descend_from_the_top_and_keep_what_is_published(
    nfe: int, published: tuple[float, ...]
) -> None:
    sigmas = consistency_sigmas(nfe, 80.0, published)
    assert len(sigmas) == nfe
    assert sigmas[0] == 80.0
    assert all(a > b > 0 for a, b in pairwise(sigmas))
    assert set(published[: nfe - 1]) <= set(sigmas)


def test_further_steps_halve_the_widest_gap() -> None:
    assert consistency_sigmas(1, 80.0, (0.821,)) == (80.0,)
    assert consistency_sigmas(2, 80.0, (0.821,)) == (80.0, 0.821)
    third = consistency_sigmas(3, 80.0, (0.821,))
    assert third == pytest.approx((80.0, math.sqrt(80 * 0.821), 0.821))
    assert set(third) < set(consistency_sigmas(4, 80.0, (0.821,)))


@pytest.mark.parametrize("published", [(), (0.821,), (1.1, 0.3), (0.05,), (0.01,)])
def test_more_levels_halve_the_widest_gap_in_ln_sigma(published: tuple[float, ...]) -> None:
    """One level after the other, written out: the widest gap, of equal ones the highest."""
    levels = [80.0, *published]
    for nfe in range(len(levels), 60):
        assert consistency_sigmas(nfe, 80.0, published) == tuple(sorted(levels, reverse=True))
        ordered = sorted({*levels, 0.05}, reverse=True)
        gaps = [math.log(a / b) for a, b in pairwise(ordered)]
        widest = gaps.index(max(gaps))
        levels.append(math.sqrt(ordered[widest] * ordered[widest + 1]))


def test_second_step_of_the_papers() -> None:
    """sCM publishes an angle, 1.1; the others noise levels."""
    assert make(SCT).plan_sampling(2).sigmas == pytest.approx((80.0, 0.5 * math.tan(1.1)))
    assert make(ICT, mid_sigmas=(0.821,)).plan_sampling(2).sigmas == (80.0, 0.821)


# --- solvers of the diffusion model --------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_spends_what_it_declares_and_converges(name: str) -> None:
    """On the ring with its exact denoiser: counted evaluations, and the exact samples."""
    mixture = ring_mixture()
    calls = 0

    def raw(x: torch.Tensor, c_noise: torch.Tensor, labels: Any = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        sigma = torch.exp(4 * c_noise.double())
        velocity = MixtureModel(mixture, 0.5).velocity(
            x.double() * 0.5, torch.atan(sigma / 0.5), labels
        )
        return (-velocity / 0.5).to(x)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((64, 2, 1, 1), generator=generator, dtype=torch.float64)
    renoise = {f"step-{i}": torch.randn((64, 2, 1, 1), generator=generator) for i in range(200)}
    method, errors = make(EDM, sampler=name), []
    exact = mixture.flow_map(noise * 80, torch.full((64,), 80.0, dtype=torch.float64))
    for nfe in (1, 2, 3, 4, 6, 71, 72):
        plan = plan_or_reason(method, nfe)
        if isinstance(plan, str):
            assert f"NFE {nfe}" in plan
            continue
        calls = 0
        ours = method.sample({"model": raw}, noise, None, plan, FixedDraws(renoise))
        assert calls == nfe
        assert bool(torch.isfinite(ours).all())
        errors.append(float((ours - exact).flatten(1).norm(dim=1).median()))
    if name in ("euler-ancestral", "stochastic-heun", "sa-solver"):
        radius = ours.flatten(1).norm(dim=1)  # other samples, of the same distribution
        assert float((radius - mixture.means.flatten(1).norm(dim=1)[0]).abs().median()) < 0.12
    else:
        assert errors[-1] < 0.1
        assert errors[-1] < errors[0] / 5


def test_listed_samplers_are_those_that_can_be_chosen() -> None:
    """By name, with the budgets and the evaluation at NFE 1 that they are listed with."""
    assert [s.name for s in DIFFUSION] == list(SOLVERS)
    for listed in DIFFUSION:
        able = {nfe for nfe in range(1, 13) if not isinstance(listed_plan(listed, nfe), str)}
        expected = {"any": range(1, 13), "odd": range(1, 13, 2)}
        expected |= {f"multiples of {k}": range(k, 13, k) for k in (2, 3)}
        assert able == set(expected[listed.nfe]), listed.name
        plan = listed_plan(listed, 1)
        if isinstance(plan, str):
            assert listed.one_step == "declined"
        else:
            assert len(plan.sigmas) == (2 if listed.one_step.startswith("evaluates") else 1)


def listed_plan(listed: SamplerSpec, nfe: int) -> SamplingPlan | str:
    return plan_or_reason(make(EDM, sampler=listed.name), nfe)


def test_the_table_of_samplers_in_the_documents_is_the_listing() -> None:
    text = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    listed = [(f"`{s.name}`", *s[1:]) for s in DIFFUSION]
    assert [tuple(row) for row in rows[: len(listed)]] == listed


@pytest.mark.parametrize("name", sorted(context().plugins.methods.specs))
def test_samplers_that_plans_name_are_listed(name: str) -> None:
    plans = [plan_or_reason(build(name).method, nfe) for nfe in (1, 2, 3, 4, 8, 35)]
    named = {plan.sampler for plan in plans if not isinstance(plan, str)}
    listed = {sampler.name for sampler in context().plugins.methods.specs[name].samplers}
    assert not listed or named <= listed, (
        "name it in the method's spec, see `cmbench list samplers`"
    )


def test_the_automatic_sampler_depends_on_the_budget() -> None:
    """EDM's from NFE 18 on; below, one whose evaluations are at other levels than sigma_max."""
    names = [make(EDM).plan_sampling(nfe).sampler for nfe in (1, 17, 18, 35)]
    assert names == ["deis-afs", "deis-afs", "heun", "heun"]
    assert make(EDM, sampler="heun").plan_sampling(3).sampler == "heun"
    assert make(EDM, sampler="heun").plan_sampling(3, sampler="auto").sampler == "deis-afs"
    assert make(EDM).plan_sampling(2, sigmas=(80.0, 2.0)).sampler == "deis"
    assert make(EDM).plan_sampling(2, sigmas=(80.0, 2.0, 0.3)).sampler == "deis-afs"
    with pytest.raises(Declined, match="deis-afs at NFE 2 takes 3 noise levels, got 4"):
        make(EDM).plan_sampling(2, sigmas=(80.0, 2.0, 0.3, 0.1))


def test_other_names_and_unknown_solvers() -> None:
    assert make(EDM).plan_sampling(5, sampler="ddim").sampler == "euler"
    with pytest.raises(ValidationError, match="not one of auto, heun"):
        make(EDM, sampler="soduko")
    with pytest.raises(Declined, match="even"):
        make(EDM, sampler="stochastic-heun").plan_sampling(4)
    with pytest.raises(Declined, match="multiple of 3"):
        make(EDM, sampler="dpm-solver-3").plan_sampling(4)


# --- curricula and proposals ---------------------------------------------------------------------


def test_noise_levels_of_ict() -> None:
    grid = karras_sigmas(41)
    lognormal = make(ICT).bin_probabilities(grid)
    uniform = make(ICT, noise_levels="uniform").bin_probabilities(grid)
    for p in (lognormal, uniform):
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        assert p.shape == (40,)
    assert len(set(uniform.tolist())) == 1
    likeliest = grid[int(lognormal.argmax())]
    assert 0.05 < float(likeliest) < 4


def test_stages_of_ect_have_equal_lengths() -> None:
    method = make(ECT, stages=8)
    stages = [method.stage(Progress(nimg, 800, 0, 1)) for nimg in range(0, 801)]
    assert [stages.count(s) for s in range(7)] == [100] * 7
    assert stages[-1] == 7


def test_discrete_times_of_scm_lie_on_the_grid() -> None:
    method = make(SCT, n_points=17)
    u = torch.linspace(0, 0.999, 500)
    t, s = method.times(FixedDraws({"time": u}), u)
    grid = torch.atan(karras_sigmas(17) / 0.5).float()
    index = torch.searchsorted(grid, t)
    torch.testing.assert_close(grid[index], t, rtol=0, atol=0)
    torch.testing.assert_close(grid[index - 1], s, rtol=0, atol=0)


def test_stages_of_pd() -> None:
    method = make(PD, start_steps=16, duration_kimg=10.0, last_stages_factor=2.0)
    phases = method.phases({})
    assert [p.export for p in phases] == ["steps-8", "steps-4", "steps-2", "steps-1"]
    assert [p.images for p in phases] == [10_000, 10_000, 20_000, 20_000]
    assert all(not p.ema for p in phases)
    with pytest.raises(Declined, match="8, 4, 2, 1 steps, none of 3"):
        method.plan_sampling(3)
    with pytest.raises(UserError, match=r"12 steps do not halve to 5"):
        make(PD, start_steps=12, end_steps=5).plan_sampling(1)


@pytest.mark.parametrize("grid", ["karras", "cosine"])
def test_a_grid_of_pd_contains_the_next(grid: str) -> None:
    method = make(PD, grid=grid)
    fine, coarse = method.grid(64), method.grid(32)
    torch.testing.assert_close(fine[::2], coarse, rtol=1e-12, atol=0)
    ends = (0.002, 80.0) if grid == "karras" else (0.0, math.exp(10))
    assert (float(coarse[0]), float(coarse[-1])) == pytest.approx(ends, rel=1e-9)


# --- progressive distillation --------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["karras", "cosine"])
def test_target_of_pd_is_exact_for_point_data(grid: str) -> None:
    """With a teacher that knows the one image, every stage's target is that image: no loss."""
    point = torch.tensor([0.3, -0.7], dtype=torch.float64).reshape(1, 2, 1, 1)

    class Exact:
        sigma_data = 0.5

        def denoise(self, x: torch.Tensor, sigma: torch.Tensor, labels: Any = None) -> Any:
            return point.expand_as(x)

    method = make(PD, grid=grid, start_steps=16)
    method.teacher_model = lambda steps, nets: Exact()
    student = Exact()
    method.model = lambda network: student
    u = torch.linspace(0, 0.999, 32, dtype=torch.float64)
    draws = FixedDraws({"index": u, "noise": torch.randn(32, 2, 1, 1, dtype=torch.float64)})
    batch = Batch(point.expand(32, 2, 1, 1), None)
    for steps in (8, 4, 2, 1):
        loss = method.stage_loss(steps, {"model": None}, batch, draws)
        assert float(loss.abs().max()) < 1e-20


@pytest.mark.parametrize("grid", ["karras", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_one_step_of_the_target_meets_two_of_the_teacher(grid: str, steps: int) -> None:
    """The target by its definition (App. G): one DDIM step with it ends where two steps end."""
    method = make(PD, grid=grid, start_steps=16)
    teacher = MixtureModel(ring_mixture(), 0.5)
    method.teacher_model = lambda steps, nets: teacher
    seen: dict[str, torch.Tensor] = {}

    class Student:
        def denoise(self, x: torch.Tensor, sigma: torch.Tensor, labels: Any = None) -> Any:
            seen.update(x=x, sigma=sigma)
            return torch.zeros_like(x)

    method.model = lambda network: Student()
    method.weight = torch.ones_like
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    x0 = torch.full((steps, 2, 1, 1), 0.4, dtype=torch.float64)
    noise = torch.randn(steps, 2, 1, 1, dtype=torch.float64)
    loss = method.stage_loss(
        steps, {"model": None}, Batch(x0, None), FixedDraws({"index": u, "noise": noise})
    )
    levels = method.grid(2 * steps)
    for i in range(steps):
        sigma, middle, end = levels[2 * i + 2], levels[2 * i + 1], levels[2 * i]
        x = seen["x"][i : i + 1]
        assert float(seen["sigma"][i]) == float(sigma)
        first = teacher.denoise(x, sigma.reshape(1))
        x_middle = middle / sigma * x + (1 - middle / sigma) * first
        second = teacher.denoise(x_middle, middle.reshape(1))
        x_end = end / middle * x_middle + (1 - end / middle) * second
        target = (sigma * x_end - end * x) / (sigma - end)  # whose one DDIM step ends there
        assert float(loss[i]) == pytest.approx(float(target.square().mean()), rel=1e-6)


def test_exact_teacher_teaches_the_first_stage_only() -> None:
    case = build("pd", "gmm", teacher="analytic", start_steps=8)
    method: Any = case.method
    assert isinstance(method.teacher_model(4, case.nets), MixtureModel)
    assert not isinstance(method.teacher_model(2, case.nets), MixtureModel)


# --- starting weights ----------------------------------------------------------------------------


def test_students_start_from_their_teacher() -> None:
    for name in ("cd", "ect", "cct", "sct", "scd", "pd"):
        case = build(name)
        assert case.teacher is not None
        assert case.teacher.network is not None
        fresh = case.method.build(_KitOf(case))["model"].state_dict()
        for key, value in case.teacher.network.state_dict().items():
            assert torch.equal(fresh[key], value)


class _KitOf:
    """A kit around a built case: its teacher and copies of its architecture."""

    def __init__(self, case: Any) -> None:
        self.case, self.teacher = case, case.teacher

    def network(self, *, channel_copies: int = 1, **overrides: Any) -> Any:
        fresh: Any = build(self.case.plan.spec.name).modules["model"]
        return fresh

    def student(self, parameterization: str, *, channel_copies: int = 1, **overrides: Any) -> Any:
        network = self.network()
        network.load_state_dict(self.teacher.network.state_dict())
        return network


@pytest.mark.parametrize(
    ("name", "teacher"),
    [
        ("cd", "edm:trigflow-smoke"),
        ("ect", "edm:trigflow-smoke"),
        ("sct", "edm:smoke"),
        ("pd", "edm:smoke"),
    ],
)
def test_weights_of_another_parameterization_are_refused(name: str, teacher: str) -> None:
    """They fit in shape, and would be misread without a word."""
    with pytest.raises(UserError, match=r"parameterization is '(edm|trigflow)'.*allowed"):
        build(name, teacher=teacher)


def test_augmented_students_are_refused() -> None:
    with pytest.raises(UserError, match=r"augment 0\.12.*augment the teacher only"):
        build("ect", augment=0.12, network={"augment_dim": 9})


class _Flow(EDMModel):
    """A model of somebody else's kind."""

    parameterization = "flow"


class _Silent:
    """A model that does not say how its network is read."""


@pytest.mark.parametrize(("model", "said"), [(_Flow, "flow"), (_Silent, "not stated")])
def test_only_a_student_that_reads_it_alike_gets_the_weights(model: Any, said: str) -> None:
    """The shapes are equal: nothing else tells a flow's weights from a denoiser's."""
    case = build("cd")
    assert case.teacher is not None
    made = model(case.teacher.network, 0.5) if model is _Flow else model()
    other = Teacher("other", made, case.teacher.network)
    kit = TrainingKit(context(), case.plan, case.data, other)
    with pytest.raises(UserError, match=f"teacher other: its parameterization is '{said}'.*'edm'"):
        kit.student("edm")
    if model is _Flow:
        weights = kit.student("flow").state_dict()
        taught = case.teacher.network.state_dict()
        assert all(torch.equal(weights[k], taught[k]) for k in taught)
    kit.teacher = None  # as in sampling
    assert kit.student("edm").state_dict().keys() == case.teacher.network.state_dict().keys()


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "who"),
    [(CD, {}, "method CD"), (SCD, {}, "method SCD"), (CCT, {"form": "distillation"}, "method CCT")],
)
def test_distillation_without_a_teacher(method: Any, options: dict[str, Any], who: str) -> None:
    made = make(method, **options)
    made.teacher = None
    zeros = torch.zeros(2, 2, 1, 1)
    names = {"index": torch.zeros(2), "sigma": torch.zeros(2), "time": torch.zeros(2)}
    with pytest.raises(UserError, match=rf"{who}.*no teacher.*METHOD:RECIPE or analytic"):
        made.loss({}, Batch(zeros, None), FixedDraws({"noise": zeros, **names}), progress())


def test_progressive_distillation_without_a_teacher() -> None:
    made = make(PD)
    made.first_teacher = None
    with pytest.raises(UserError, match="method PD: has no teacher to start from"):
        made.promote({})


def test_unknown_options_and_values_are_refused() -> None:
    for method, options in (
        (CT, {"metric": "soduko"}),
        (ECT, {"metric": "l2"}),
        (CCT, {"metric": "l1"}),
        (CD, {"n_points": 1}),
        (SCT, {"n_points": 1}),
        (ICT, {"s0": 0}),
        (PD, {"grid": "linear"}),
    ):
        with pytest.raises(ValidationError):
            make(method, **options)


def test_samples_are_clamped_where_data_are_bounded_only() -> None:
    """Mixtures reach beyond 1; images do not."""

    def big(x: torch.Tensor, c_noise: torch.Tensor, labels: Any = None) -> torch.Tensor:
        return torch.full_like(x, 9.0)

    noise = torch.zeros(2, 2, 1, 1)
    for method in (CD, PD):
        for bounded in (True, False):
            made = make(method, bounded, **({"grid": "cosine"} if method is PD else {}))
            made.model = lambda network: EDMModel(network, 0.5)
            out = made.sample({"model": big}, noise, None, made.plan_sampling(1), FixedDraws({}))
            assert (float(out.max()) <= 1) is bounded
