"""Distillers: quick checks on exact models, calls per training step, and their parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exact_maps import ExactConsistency
from method_kit import FixedDraws, build, exact_teacher
from pydantic import ValidationError
from torch import Tensor, nn

from cmbench.diffusion.grids import karras_sigmas
from cmbench.diffusion.score_distillation import (
    diff_instruct_loss,
    divergence_weights,
    identity_loss,
    matching_direction,
)
from cmbench.diffusion.segments import addim_denoised, heun_denoised
from cmbench.diffusion.solvers import ddim_step, heun_step, two_step_target
from cmbench.errors import Declined, UserError
from cmbench.plugin.method import Batch, DataInfo, PhaseStart, Progress
from cmbench.testing.exact import SD, exact_model, line_mixture, quantile_map
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings
from cmbench_plugins import METHODS
from cmbench_plugins.dmd import DMD2, FDistill
from cmbench_plugins.mscd import MSCD
from cmbench_plugins.pid import PID
from cmbench_plugins.score_distillation import DiffInstruct, SiD
from cmbench_plugins.tract import TRACT

PROGRESS = Progress(0, 1, 0, 1)


def make(method: Any, **config: Any) -> Any:
    """Return a method for the mixture on the line, with its exact teacher."""
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, **config}
    made = method(method.Config(**table), DataInfo("line", (1, 1, 1), 0, SD, bounded=False))
    made.teacher = exact_teacher(exact_model())
    return made


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, unit noise and uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    x0, _ = line_mixture().sample(count, generator, dtype=torch.float64)
    noise = torch.randn((count, 1, 1, 1), generator=generator, dtype=torch.float64)
    return x0, noise, torch.rand(count, generator=generator, dtype=torch.float64)


# --- calls per training step ---------------------------------------------------------------------

#: Options that change the count -> forward equivalents per image of a step: 1 for a call, 3 for one
#: that is differentiated. The fact sheet's table of calls, "a + b graded" being a + 3 b.
CALLS = [
    pytest.param("tract", {"solver": "ddim"}, 2 + 3 * 1, id="tract-ddim"),
    pytest.param("mscd", {"grid": "cosine", "solver": "addim"}, 2 + 3 * 1, id="mscd-addim"),
    pytest.param("mscd", {"form": "training"}, 1 + 3 * 1, id="mscd-training"),
    # Also a discriminator of samples and images, and its gradient for the generator.
    pytest.param("dmd2", {"gan_weight": 1.0}, 1 + 3 + (1 + 6) + (2 + 3 + 2) / 5, id="dmd2-gan"),
]
#: The fact sheet's table at the default options, beside what the methods declare.
SHEET = {
    "knowledge-distillation": 3,
    "tract": 6,
    "pid": 7,
    "dfno": 3,
    "diff-instruct": 9,
    "sid": 11,
    "dmd2": 5,
}
#: Where the recipe `smoke` has an exact teacher, without a network that could be counted.
NETWORK: dict[str, dict[str, Any]] = {
    **{key: {"teacher": "edm:smoke"} for key in ("cd", "tract", "mscd", "pid")},
    "scd": {"teacher": "edm:smoke", "parameterization": "edm"},
}
BUILT_IN = {spec.name: spec.cost for spec in METHODS}


def counted_forwards(name: str, options: dict[str, Any]) -> float:
    """Return forward passes per image, counted by the engine over ten steps with the teacher's."""
    case = build(name, "gmm", **options)
    state, batch_size, steps = case.state(), 8, 10
    network = getattr(case.teacher.model, "network", None) if case.teacher is not None else None
    state.observed = [] if network is None else [network]
    trainer = Trainer(state, case.feed, Settings(0, batch_size))
    state.enter(0)
    for _ in range(steps):
        trainer.train_step()
    return float(state.network_evaluations / batch_size / steps)


def test_every_built_in_method_declares_its_cost() -> None:
    assert [name for name, cost in BUILT_IN.items() if cost is None] == []
    for name, forwards in SHEET.items():
        cost = BUILT_IN[name]
        assert cost is not None
        assert cost.forward_equivalents == pytest.approx(forwards)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_declared_calls_are_counted(name: str) -> None:
    cost = BUILT_IN[name]
    assert cost is not None
    assert counted_forwards(name, NETWORK.get(name, {})) == pytest.approx(cost.forward_equivalents)


@pytest.mark.parametrize(("name", "options", "expected"), CALLS)
def test_calls_per_training_step(name: str, options: dict[str, Any], expected: float) -> None:
    assert counted_forwards(name, {"teacher": "edm:smoke", **options}) == expected


# --- steps of a teacher --------------------------------------------------------------------------


def test_a_heun_step_as_the_denoised_images_of_one_ddim_step() -> None:
    x0, noise, _ = data(64)
    grid, model = karras_sigmas(8), exact_model()
    sigma, following = grid[torch.arange(64) % 7 + 1], grid[torch.arange(64) % 7]
    x = x0 + sigma.reshape(-1, 1, 1, 1) * noise
    denoised = heun_denoised(model.denoise, x, sigma, following)
    expected = heun_step(model.denoise, x, sigma, following)
    torch.testing.assert_close(
        ddim_step(x, denoised, sigma, following), expected, rtol=1e-10, atol=1e-10
    )
    zero = torch.zeros_like(sigma)
    assert torch.equal(heun_denoised(model.denoise, x, sigma, zero), model.denoise(x, sigma))


def test_the_target_of_a_jump_is_its_inverse() -> None:
    """Two DDIM steps end where one with their target does; also where the first ends it all."""
    x0, noise, _ = data(40)
    levels = torch.tensor([80.0, 3.0, 0.4, 0.0], dtype=torch.float64)
    for sigma, middle, end in ((0, 1, 2), (0, 1, 3), (1, 2, 2), (0, 3, 3)):
        s, m, e = (levels[i].expand(40) for i in (sigma, middle, end))
        x = x0 + s.reshape(-1, 1, 1, 1) * noise
        first, second = torch.sin(x), torch.cos(x0)
        arrived = ddim_step(x, first, s, m)
        if middle != end:
            arrived = ddim_step(arrived, second, m, e)
        target = two_step_target(first, second, s, m, e)
        torch.testing.assert_close(ddim_step(x, target, s, e), arrived, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("end", [0.0, 0.3])
def test_addim_adds_the_variance_that_the_mean_lacks(end: float) -> None:
    """Written out; without variance it is DDIM."""
    x0, noise, _ = data(4 * 3 * 5 * 5)
    x0, noise = x0.reshape(4, 3, 5, 5), noise.reshape(4, 3, 5, 5)
    sigma = torch.tensor([0.5, 2.0, 9.0, 80.0], dtype=torch.float64)
    following, variance = torch.full_like(sigma, end), 0.1 / (2 + sigma**-2)
    x = x0 + sigma.reshape(-1, 1, 1, 1) * noise
    denoised = torch.sin(x0)
    e = (x - denoised) / sigma.reshape(-1, 1, 1, 1)
    size = e.square().flatten(1).sum(1)
    q = 75 / size * (1 - end / sigma) ** 2 * variance
    expected = denoised + (end**2 + q).sqrt().reshape(-1, 1, 1, 1) * e
    found = addim_denoised(x, denoised, sigma, following, variance)
    torch.testing.assert_close(
        ddim_step(x, found, sigma, following), expected, rtol=1e-12, atol=1e-12
    )
    none = torch.zeros_like(sigma)
    assert torch.equal(addim_denoised(x, denoised, sigma, following, none), denoised)


# --- TRACT ---------------------------------------------------------------------------------------


def tract_residual(points: int, share: float) -> float:
    """Return the largest distance of TRACT's target from the exact function at a level's index."""
    made = make(TRACT, steps=(points, 1))
    levels = made.levels(points)
    index = round(share * points)
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
    x0 = torch.full_like(noise, 0.1)
    sigma = levels[index].expand(41)
    exact = quantile_map((x0 + sigma.reshape(-1, 1, 1, 1) * noise).flatten(), sigma, 0.0)
    targets: list[Tensor] = []
    made.distance = lambda d, target, s: targets.append(target) or d
    nets = {n: ExactConsistency(sigma_min=0.0) for n in ("model", "self_teacher")}
    draws = FixedDraws(
        {"index": torch.full((41,), (index - 0.5) / points, dtype=torch.float64), "noise": noise}
    )
    made.phase_loss(points, 1, nets, Batch(x0, None), draws, PROGRESS)
    return float((targets[0].flatten() - exact).abs().median())


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_target_of_tract_is_a_step_of_third_order_off_the_exact_function(share: float) -> None:
    """With the exact teacher and the exact function as the self-teacher, Heun's error is left."""
    counts = (40, 80, 160, 320)
    found = [tract_residual(count, share) for count in counts]
    slope = np.polyfit(np.log(counts), np.log(found), 1)[0]
    assert slope == pytest.approx(-3, abs=0.4)
    assert found[0] < (1e-5 if share == 1.0 else 2e-2)


def test_self_teacher_of_tract_copies_the_student_first() -> None:
    """Its shares of the student are 1, 1 / (1 + beta), … with beta = 0.5."""
    made = make(TRACT, steps=(8, 2, 1))
    nets: Any = {n: nn.Linear(1, 1, bias=False) for n in ("model", "self_teacher")}
    values = [1.0, 3.0, -2.0, 5.0]
    with torch.no_grad():
        for n, value in enumerate(values, 1):
            nets["model"].weight.fill_(value)
            made.after_step(nets, Progress(n - 1, 4, n - 1, 4))
            weights = [0.5 ** (n - k) for k in range(1, n + 1)]
            expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
            assert float(nets["self_teacher"].weight) == pytest.approx(expected, rel=1e-6)


def test_the_average_of_a_phase_teaches_the_next() -> None:
    case = build("tract", "gmm", steps=[8, 2, 1], solver="ddim", grid="cosine")
    state: Any = case.state()
    assert [p.export for p in state.phases] == ["steps-2", "steps-1"]
    assert [p.start is not None for p in state.phases] == [False, True]
    average = {k: torch.full_like(v, 0.25) for k, v in case.modules["model"].state_dict().items()}
    state.phases[1].start(PhaseStart(case.modules, averaged=lambda name: average))
    for name, parameter in case.modules["teacher"].named_parameters():
        assert torch.equal(parameter, average[name])
    assert set(build("tract", "gmm", steps=[8, 1]).modules) == {"model", "self_teacher"}


def test_levels_of_tract() -> None:
    """Forty Karras levels and zero; the cosine grid's ends are logsnr 20 and -20."""
    karras, cosine = make(TRACT), make(TRACT, grid="cosine", steps=(1024, 32, 1))
    assert karras.levels(40).tolist() == [0.0, *karras_sigmas(40).tolist()]
    assert karras.plan_sampling(1).sigmas == (80.0,)
    ends = cosine.levels(1)
    torch.testing.assert_close(-2 * ends.log(), torch.tensor([20.0, -20.0], dtype=torch.float64))
    torch.testing.assert_close(cosine.levels(1024)[::32], cosine.levels(32))
    assert len(cosine.plan_sampling(32).sigmas) == 32


@pytest.mark.parametrize("steps", [(40,), (40, 3), (40, 40), (8, 2, 0), (8, 2, 4)])
def test_schedules_that_do_not_divide_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match=r"allowed: each a divisor|at least 2 items"):
        make(TRACT, steps=steps)


def test_students_of_other_step_counts_are_declined() -> None:
    with pytest.raises(Declined, match="TRACT from 40 steps has students of 2, 1 steps, none of 3"):
        make(TRACT, steps=(40, 2, 1)).plan_sampling(3)


# --- multistep consistency models ----------------------------------------------------------------


class Point:
    """The exact model of one image."""

    sigma_data, parameterization = SD, ""

    def denoise(self, x: Tensor, sigma: Tensor, labels: Any = None) -> Tensor:
        return torch.full_like(x, 0.3)


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("form", ["distillation", "training"])
@pytest.mark.parametrize(("grid", "solver"), [("karras", "heun"), ("cosine", "addim")])
def test_every_target_is_the_image_if_there_is_only_one(
    segments: int, form: str, grid: str, solver: str
) -> None:
    """A student that knows it has no loss, at any edge of any number of segments."""
    config = {"segments": (segments,), "form": form, "grid": grid, "solver": solver}
    made = make(MSCD, metric="l2", **config)
    made.teacher = exact_teacher(Point())
    made.model = lambda network: Point()
    _, noise, u = data(200)
    batch, draws = (
        Batch(torch.full_like(noise, 0.3), None),
        FixedDraws({"index": u, "noise": noise}),
    )
    loss = made.phase_loss(segments, {"model": None}, batch, draws, PROGRESS)
    assert float(loss.max()) < 1e-24


@pytest.mark.parametrize("grid", ["karras", "cosine"])
@pytest.mark.parametrize("segments", [1, 2, 3, 8])
def test_edges_lie_in_their_segments(grid: str, segments: int) -> None:
    made = make(MSCD, grid=grid, segments=(segments,), student_sigma_min=0.4)
    u = torch.linspace(0, 0.9999, 2000, dtype=torch.float64)
    for steps in (16, 17, 64):
        if grid == "karras":  # the highest edges are too rare to be met by chance
            chances = made.probabilities(segments, steps)
            u = chances.cumsum(0) - chances / 2
        sigma, following, end = made.edge(segments, steps, u)
        own = made.levels(segments)
        upper = own[torch.searchsorted(own, end * (1 + 1e-9) + 1e-12)]
        assert bool(((end <= following) & (following < sigma)).all())
        assert bool((sigma <= upper * (1 + 1e-9)).all())
        assert len(set(end.tolist())) == segments


def test_teachers_steps_grow_in_proportion() -> None:
    made = make(MSCD, annealing_share=0.5)
    found = [made.teacher_steps(Progress(n, 100, n, 100)) for n in (0, 25, 50, 100)]
    assert found == [64, round((64 * 1280) ** 0.5), 1280, 1280]


def test_students_of_all_segments_start_alike() -> None:
    case = build("mscd", "gmm", segments=[4, 2, 1])
    state: Any = case.state()
    assert [p.export for p in state.phases] == ["steps-4", "steps-2", "steps-1"]
    state.enter(1)
    for a, b in zip(
        case.modules["model"].parameters(), case.modules["initial"].parameters(), strict=True
    ):
        assert torch.equal(a, b)
    assert set(build("mscd", "gmm", segments=[4]).modules) == {"model"}


def test_first_level_of_the_cosine_schedule_is_finite() -> None:
    """tan(pi / 2) is -2e7 in float32; alpha = cos and sigma = sin everywhere else."""
    levels = make(MSCD, grid="cosine").levels(64)
    u = torch.arange(64, dtype=torch.float64) / 64 * torch.pi / 2
    torch.testing.assert_close(levels[:-1], u.sin() / u.cos())
    assert float(levels[-1].log()) == pytest.approx(10)
    assert float(levels[0]) == 0


def test_last_step_of_multistep_models() -> None:
    """As released the last jump leaves 0.002; with one segment there is only 80 -> 0."""
    assert make(MSCD).plan_sampling(1).sigmas == (80.0,)
    plan = make(MSCD, segments=(3,)).plan_sampling(3)
    assert plan.sigmas == pytest.approx((80.0, float(karras_sigmas(3)[1]), 0.002))
    assert plan.variant == "steps-3"
    with pytest.raises(Declined, match="students of 3 steps, none of 1"):
        make(MSCD, segments=(3,)).plan_sampling(1)


# --- PID -----------------------------------------------------------------------------------------


class GaussianTrajectory(nn.Module):
    """PID's raw network whose trajectory is exact for N(0.1, 0.4^2), and that Gaussian's model."""

    sigma_data, parameterization, mean, std = SD, "", 0.1, 0.4

    def denoise(self, x: Tensor, sigma: Tensor, labels: Any = None) -> Tensor:
        share = (self.std**2 / (self.std**2 + sigma**2)).reshape(-1, 1, 1, 1)
        return self.mean + share * (x - self.mean)

    def state(self, z: Tensor, t: Tensor) -> Tensor:
        spread = torch.sqrt((self.std**2 + t**2) / (self.std**2 + 80.0**2)).reshape(-1, 1, 1, 1)
        return self.mean + spread * (z - self.mean)

    def forward(self, x_in: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        t, z = torch.exp(4 * c_noise), x_in * (80.0**2 + SD**2) ** 0.5
        share = (t / 80.0).reshape(-1, 1, 1, 1)
        raw = (self.state(z, t) - share * z) / (1 - share)
        return torch.where(share < 1 - 1e-9, raw, torch.zeros_like(raw))


def test_residual_of_the_exact_trajectory_falls_with_the_step() -> None:
    """First order in the difference of levels."""
    exact, sizes, counts = GaussianTrajectory(), [], (250, 500, 1000, 2000)
    _, noise, _ = data(400)
    for count in counts:
        made = make(PID, n_points=count, metric="l1")
        made.teacher = exact_teacher(exact)
        u = torch.linspace(0.02, 0.98, 400, dtype=torch.float64)
        draws = FixedDraws({"index": u, "noise": noise})
        loss = made.loss({"model": exact}, Batch(noise, None), draws, PROGRESS)
        sizes.append(float(loss.mean()))
    slope = np.polyfit(np.log(counts), np.log(sizes), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)
    assert 5e-4 < sizes[0] < 8e-3


def test_a_trajectory_begins_with_its_noise_and_only_its_shape_is_of_data() -> None:
    made = make(PID, metric="l2")
    _, noise, u = data(16)
    network = ExactConsistency()
    top = torch.full((16,), 80.0, dtype=torch.float64)
    assert torch.equal(made.trajectory(network)(80 * noise, top), 80 * noise)
    draws = FixedDraws({"index": u, "noise": noise})
    first, second = (
        made.loss({"model": network}, Batch(images, None), draws, PROGRESS)
        for images in (torch.zeros_like(noise), torch.ones_like(noise))
    )
    assert torch.equal(first, second)


def test_generators_of_one_step_decline_more() -> None:
    with pytest.raises(Declined, match="one evaluation, not in 2"):
        make(PID).plan_sampling(2)
    with pytest.raises(Declined, match="sampler 'heun'"):
        make(PID).plan_sampling(1, sampler="heun")
    with pytest.raises(Declined, match="knows one of the noise levels only: 80"):
        make(PID).plan_sampling(1, sigmas=(1.0,))
    assert make(PID).plan_sampling(1).sigmas == (80.0,)


# --- score distillation --------------------------------------------------------------------------

MEAN, GENERATED_MEAN, STD = 0.3, 0.5, 0.4


def denoised_gaussian(y: Tensor, mean: float, sigma: float, std: float = STD) -> Tensor:
    return mean + std**2 / (std**2 + sigma**2) * (y - mean)


def gaussian_samples(sigma: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the generator's shift (a parameter), its samples, and noisy copies."""
    _, z, _ = data(count)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=z.dtype)
    shift = torch.tensor(GENERATED_MEAN, dtype=torch.float64, requires_grad=True)
    g = shift + STD * z
    return shift, g, g + sigma * noise


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_diff_instruct_pulls_a_gaussian_to_the_right_mean(sigma: float) -> None:
    """``D_fake - D_real = (m_g - m) sigma^2 / (s^2 + sigma^2)`` at every sample."""
    shift, g, y = gaussian_samples(sigma, 100)
    fake = denoised_gaussian(y, GENERATED_MEAN, sigma)
    real = denoised_gaussian(y, MEAN, sigma)
    (gradient,) = torch.autograd.grad(diff_instruct_loss(g, fake, real).mean(), shift)
    share = sigma**2 / (STD**2 + sigma**2)
    assert float(gradient) == pytest.approx((GENERATED_MEAN - MEAN) * share, rel=1e-9)


@pytest.mark.parametrize(("sigma", "expected"), [(0.3, 0.0259), (1.0, 0.1486), (5.0, 0.1975)])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_pulls_a_gaussian_to_the_right_mean(
    sigma: float, expected: float, alpha: float
) -> None:
    """Before the division by w: the loss is ``(1 - alpha) d^2`` in expectation, of either sign."""
    shift, g, y = gaussian_samples(sigma, 400_000)
    fake = denoised_gaussian(y, GENERATED_MEAN, sigma)
    real = denoised_gaussian(y, MEAN, sigma)
    scale = (g - real).detach().abs().flatten(1).mean(1).clamp_min(1e-5)
    loss = (identity_loss(g, fake, real, alpha) * scale).mean()
    gap = (MEAN - GENERATED_MEAN) * sigma**2 / (STD**2 + sigma**2)
    assert float(loss.detach()) == pytest.approx((1 - alpha) * gap**2, abs=1e-3)
    (gradient,) = torch.autograd.grad(loss, shift)
    assert float(gradient) == pytest.approx(expected, abs=2e-3)


def test_dmd2_pulls_a_shifted_mixture_back() -> None:
    """``E[D_fake - D_real]`` is positive for a shift of 0.2, and that itself at large sigma."""
    x, noise, _ = data(20_000)
    found = []
    for level in (0.1, 0.5, 2.0, 10.0):
        sigma = torch.full((len(x),), level, dtype=torch.float64)
        y = x + 0.2 + level * noise
        fake = exact_model().denoise(y - 0.2, sigma) + 0.2
        real = exact_model().denoise(y, sigma)
        found.append(float((fake - real).mean()))
        same = exact_model().denoise(x + level * noise, sigma)
        direction = matching_direction(x, same, same, 0.0)
        assert float(direction.abs().max()) == 0
    assert 0 < found[0] < found[1] < found[2] < found[3]
    assert found[3] == pytest.approx(0.2, abs=2e-3)


def test_a_direction_that_is_not_finite_is_zero() -> None:
    same = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    assert float(matching_direction(same, same, same, 0.0).abs().max()) == 0
    assert float(matching_direction(same, same + 1, same, 0.0).abs().max()) == 0
    assert torch.equal(matching_direction(same, same + 1, same, 0.5), 2 * same)


def test_floors_add_to_the_scale() -> None:
    real, fake, g = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (0.4, 0.1, 0.2))
    product = (0.4 - 0.1) * ((0.4 - 0.2) - 1.2 * (0.4 - 0.1))
    for floor in (0.0, 0.05):
        assert float(identity_loss(g, fake, real, 1.2, floor)) == pytest.approx(
            product / (0.2 + floor)
        )
    assert float(identity_loss(real, fake, real, 1.2)) == pytest.approx(-1.2 * 0.09 / 1e-5)


def test_divergences_agree_where_only_the_mean_is_wrong() -> None:
    """Forward and reverse KL have one mean gradient, ``(m_g - m) / (s^2 + sigma^2)``."""
    sigma = 1.0
    _, _, y = gaussian_samples(sigma, 400_000)
    y = y.detach()
    variance = STD**2 + sigma**2
    ratio = torch.exp(((y - GENERATED_MEAN) ** 2 - (y - MEAN) ** 2) / (2 * variance)).flatten()
    assert float(ratio.mean()) == pytest.approx(1, abs=2e-3)
    gradient = (y - MEAN).flatten() / variance - (y - GENERATED_MEAN).flatten() / variance
    expected = (GENERATED_MEAN - MEAN) / variance
    assert float((ratio * gradient).mean()) == pytest.approx(expected, rel=1e-2)
    assert float(gradient.mean()) == pytest.approx(expected, rel=1e-9)
    weights = divergence_weights("forward-kl", ratio, 8)
    torch.testing.assert_close(
        weights.reshape(-1, 8).mean(1), torch.ones(50_000, dtype=torch.float64), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", ["diff-instruct", "sid", "dmd2", "f-distill"])
def test_networks_of_score_distillation_take_turns(name: str) -> None:
    """Which modules there are, what each objective moves and how often."""
    case = build(name, "gmm")
    (phase,) = case.method.phases(case.nets)
    judged = name == "f-distill"
    expected = ["fake", *["discriminator"] * judged, "model"]
    assert [o.trains for o in phase.objectives] == [(n,) for n in expected]
    assert set(case.modules) == set(expected)
    every = [o.every for o in phase.objectives]
    assert every == [1] * (len(expected) - 1) + [5 if name in ("dmd2", "f-distill") else 1]
    assert phase.objectives[-1].group == (4 if judged else 1)


def test_levels_of_dmd2() -> None:
    """20 to 980 of 1000 for the generator, all for the fake score."""
    made = make(DMD2)
    u = torch.linspace(0, 1 - 1e-9, 20_000, dtype=torch.float64)
    draws = FixedDraws({"sigma": u, "sigma-fake": u})
    grid = karras_sigmas(1000)
    inner = made.generator_sigmas(draws, u)
    assert float(inner[0]) == float(grid[20])
    assert float(inner[-1]) == float(grid[980])
    assert len(set(inner.tolist())) == 961
    assert len(set(made.fake_sigmas("sigma-fake", draws, u).tolist())) == 1000


# --- without a teacher ---------------------------------------------------------------------------


def test_distillers_without_a_teacher() -> None:
    tract, mscd, pid = make(TRACT), make(MSCD), make(PID)
    tract.teacher = mscd.teacher = pid.teacher = None
    message = r"method {}.*no teacher.*METHOD:RECIPE or analytic"
    with pytest.raises(UserError, match=message.format("TRACT")):
        tract.distilled()
    with pytest.raises(UserError, match=message.format("MSCD")):
        mscd.distilled()
    with pytest.raises(UserError, match=message.format("PID")):
        pid.distilled()
    for method in (DiffInstruct, SiD, DMD2, FDistill):
        made = make(method)
        made.teacher = None
        with pytest.raises(UserError, match=message.format(method.__name__)):
            made.distilled()
