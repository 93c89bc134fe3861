"""The distillers' own losses against what the official implementations return, in float64.

tests/golden/distillation: one file per method, made by running the official function (TRACT:
apple/ml-tract @ad25296; MultiStep-CD in EDM's frame: EpiGenomicsCode/edm @129f9ad; PID:
pantheon5100/pid_diffusion @b99605b; knowledge distillation: tcl9876/Denoising_Student @07f4ad7;
Diff-Instruct: pkulwj1994/diff_instruct @0c37389; DMD2: tianweiy/DMD2 @8d8fa55 and NVlabs/FastGen
@34f30e8; SiD: mingyuanzhou/SiD @01fbb13) on fixed inputs and elementwise stand-in networks, with
its casts to float32 switched off. ``multistep-cd`` is the paper's equations: there is no official
code. Everything agrees to 1e-9 relative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import FixedDraws, exact_teacher
from safetensors.torch import load_file
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.grids import ddpm_sigmas
from cmbench.diffusion.models import EDMModel
from cmbench.diffusion.predictions import DataModel
from cmbench.diffusion.score_distillation import (
    DIVERGENCE_WEIGHTS,
    density_ratio,
    discriminator_loss,
    divergence_weights,
    generator_gan_loss,
    matching_direction,
    matching_loss,
)
from cmbench.diffusion.solvers import ddim_step
from cmbench.plugin.method import Batch, DataInfo, Progress
from cmbench_plugins.dmd import DMD2, FDistill
from cmbench_plugins.knowledge_distillation import DDIM_INDICES, KnowledgeDistillation
from cmbench_plugins.mscd import MSCD
from cmbench_plugins.pid import PID
from cmbench_plugins.score_distillation import DiffInstruct, SiD
from cmbench_plugins.tract import TRACT

FOLDER = Path(__file__).parents[1] / "golden" / "distillation"
PROGRESS = Progress(0, 1, 0, 1)


class Formula(nn.Module):
    """A stand-in network; ``push`` is added to its output while gradients are recorded."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.push: Tensor | None = None

    def forward(self, x: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        out = self.formula(x, append_dims(c_noise, x))
        if self.push is None or not torch.is_grad_enabled():
            return out
        return out + self.push


def student() -> Formula:
    return Formula(lambda x, c: 0.3 * torch.sin(1.7 * x + 0.5 * c) + 0.2 * x)


def teacher() -> Formula:
    return Formula(lambda x, c: 0.25 * torch.cos(1.1 * x - 0.4 * c) - 0.1 * x)


def self_teacher() -> Formula:
    return Formula(lambda x, c: 0.28 * torch.sin(1.3 * x - 0.2 * c) + 0.1 * x)


def golden(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def make(method: Any, model: Any, bounded: bool = True, **config: Any) -> Any:
    """Return a method with ``model`` as its teacher."""
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, **config}
    made = method(method.Config(**table), DataInfo("test", (3, 4, 4), 0, 0.5, bounded))
    made.teacher = exact_teacher(model)
    return made


def near(ours: Tensor, theirs: Tensor, atol: float = 1e-13) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=atol)


def with_gradient(network: Formula, like: Tensor, loss: Callable[[], Tensor]) -> tuple[Any, Any]:
    """Return a loss ``[N]`` and the gradient of its mean with respect to the raw output."""
    network.push = torch.zeros_like(like, requires_grad=True)
    value = loss()
    (gradient,) = torch.autograd.grad(value.mean(), network.push)
    return value, gradient


# --- TRACT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(40, 1), (40, 4)])
def test_tract_on_the_karras_grid(steps: tuple[int, int]) -> None:
    g, entry = golden("tract"), f"edm.{steps[0]}-{steps[1]}"
    made = make(TRACT, EDMModel(teacher(), 0.5), steps=steps)
    near(made.levels(40), g[f"{entry}.sigma"])
    network, index = student(), g[f"{entry}.i_from"]
    nets = {"model": network, "self_teacher": self_teacher()}
    draws = FixedDraws({"index": (index - 0.5) / 40, "noise": g["noise"]})
    targets: list[Tensor] = []
    distance = made.distance
    made.distance = lambda d, target, sigma: targets.append(target) or distance(d, target, sigma)

    def loss() -> Tensor:
        batch = Batch(g["x"], None)
        return made.phase_loss(*steps, nets, batch, draws, PROGRESS)  # type: ignore[no-any-return]

    value, gradient = with_gradient(network, g["x"], loss)
    near(targets[0], g[f"{entry}.target"])
    near(value.mean(), g[f"{entry}.loss"])
    near(gradient, g[f"{entry}.grad_F"])


@pytest.mark.parametrize(("phase", "entry"), [(0, "vp.1024-32.phase0"), (1, "vp.32-1.phase1")])
def test_staged_tract(phase: int, entry: str) -> None:
    """Networks that predict x from the variance-preserving image and its logsnr."""
    g, steps = golden("tract"), (1024, 32, 1)
    taught = Formula(lambda z, c: 0.45 * torch.cos(0.7 * z - 0.04 * (-8 * c)) + 0.25 * z)
    followed = Formula(lambda z, c: 0.4 * torch.sin(1.1 * z - 0.03 * (-8 * c)) + 0.2 * z)
    network = Formula(lambda z, c: 0.5 * torch.sin(0.9 * z + 0.05 * (-8 * c)) + 0.3 * z)
    config = {"grid": "cosine", "solver": "ddim", "parameterization": "x", "steps": steps}
    made = make(TRACT, DataModel(taught, 0.5), **config)
    nets = {"model": network, "self_teacher": followed, "teacher": taught}
    fine, coarse = steps[phase], steps[phase + 1]
    u = g[f"{entry}.t_from"] - 0.5 / fine
    draws = FixedDraws({"index": u, "noise": g["noise"]})
    targets: list[Tensor] = []
    distance = made.distance
    made.distance = lambda d, target, sigma: targets.append(target) or distance(d, target, sigma)

    def loss() -> Tensor:
        batch = Batch(g["x"], None)
        return made.phase_loss(  # type: ignore[no-any-return]
            fine, coarse, nets, batch, draws, PROGRESS
        )

    value, gradient = with_gradient(network, g["x"], loss)
    # The released inversion cancels: its target is 3.2e-12 off the same formulas in 50 digits.
    near(targets[0], g[f"{entry}.target"], 1e-11)
    near(value.mean(), g[f"{entry}.loss"])
    near(gradient, g[f"{entry}.grad_net"], 1e-9)


# --- multistep consistency models ----------------------------------------------------------------


@pytest.mark.parametrize("solver", ["addim", "ddim"])
def test_multistep_distillation_on_the_cosine_schedule(solver: str) -> None:
    """The networks know the schedule's time t = 2 / pi arctan(sigma)."""
    g = golden("multistep-cd")

    def time(c: Tensor) -> Tensor:
        return torch.atan(torch.exp(4 * c)) * (2 / torch.pi)

    taught = Formula(lambda z, c: 0.45 * torch.cos(0.7 * z - 0.5 * time(c)) + 0.25 * z)
    network = Formula(lambda z, c: 0.5 * torch.sin(0.9 * z + 0.6 * time(c)) + 0.3 * z)
    made = make(
        MSCD,
        DataModel(taught, 0.5),
        parameterization="x",
        grid="cosine",
        segments=(4,),
        teacher_steps_start=64,
        teacher_steps_end=64,
        solver=solver,
        metric="l2",
    )
    draws = FixedDraws({"index": g["t"] - 0.5 / 64, "noise": g["noise"]})
    sigma, following, end = made.edge(4, 64, draws.values["index"])
    near(torch.atan(sigma) * 2 / torch.pi, g["t"])
    near(torch.atan(following) * 2 / torch.pi, g["s"])
    near(torch.atan(end) * 2 / torch.pi, g["t_step"])

    x = g["x"] + append_dims(sigma, g["x"]) * g["noise"]
    first = made.teacher_step(g["x"], x, sigma, following, None)
    alpha = append_dims(1 / (1 + following**2).sqrt(), x)
    near(alpha * ddim_step(x, first, sigma, following), g[f"z_s.{solver}"])
    if solver == "ddim":
        return
    denoised = made.teacher.model.denoise(x, sigma)
    near(0.75 * (denoised - g["x"]).square().flatten(1).mean(1), g["x_var"])

    targets: list[Tensor] = []
    distance = made.distance
    made.distance = lambda d, target, s: targets.append(target) or distance(d, target, s)

    def loss() -> Tensor:
        batch = Batch(g["x"], None)
        return made.phase_loss(4, {"model": network}, batch, draws, PROGRESS)  # type: ignore[no-any-return]

    value, gradient = with_gradient(network, g["x"], loss)
    near(targets[0], g["target"])
    near(value, g["loss"])
    near(gradient, g["grad_x"])


@pytest.mark.parametrize(("segments", "steps"), [(4, 16), (2, 18)])
@pytest.mark.parametrize("last_target", ["teacher", "data"])
@pytest.mark.parametrize("metric", ["pseudo-huber", "l2"])
def test_multistep_distillation_on_the_karras_grid(
    segments: int, steps: int, last_target: str, metric: str
) -> None:
    g, entry = golden("multistep-cd-edm"), f"S{segments}.T{steps}"
    made = make(
        MSCD,
        EDMModel(teacher(), 0.5),
        segments=(segments,),
        teacher_steps_start=steps,
        teacher_steps_end=steps,
        last_target=last_target,
        metric=metric,
    )
    near(made.levels(segments).flip(0), g[f"{entry}.student_sigmas"])
    near(made.fine_levels(segments, steps).flip(0), g[f"{entry}.teacher_sigmas"])
    probabilities = made.probabilities(segments, steps)
    near(
        probabilities.flip(0), g[f"{entry}.edge_probability"], 1e-9
    )  # it has regularisers of 1e-10

    edges = len(probabilities)
    chosen = edges - 1 - g[f"{entry}.teacher_index"]
    u = (probabilities.cumsum(0) - probabilities / 2)[chosen]
    draws = FixedDraws({"index": u, "noise": g["noise"]})
    sigma, following, end = made.edge(segments, steps, u)
    near(sigma, g[f"{entry}.sigma_t"])
    near(end, g[f"{entry}.sigma_boundary"])
    near(following, torch.maximum(g[f"{entry}.sigma_s"], end))
    snapped = (following == end) & (end > 0)
    assert torch.equal(snapped, g[f"{entry}.is_boundary_snap"].bool())
    assert torch.equal(following == 0, g[f"{entry}.is_terminal"].bool())

    network, targets = student(), []
    distance = made.distance
    made.distance = lambda d, target, s: targets.append(target) or distance(d, target, s)

    def loss() -> Tensor:
        batch = Batch(g["x"], None)
        return made.phase_loss(  # type: ignore[no-any-return]
            segments, {"model": network}, batch, draws, PROGRESS
        )

    value, gradient = with_gradient(network, g["x"], loss)
    results = f"{entry}.{last_target}_end"
    key = f"{results}.{metric.replace('-', '_')}"
    near(targets[0], g[f"{results}.target"])
    near(value, g[f"{key}.loss"])
    near(gradient, g[f"{key}.grad_F"])


# --- PID -----------------------------------------------------------------------------------------


class Recorded(Formula):
    """The student, with another added zero at each of its calls."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(student().formula)
        self.pushes: list[Tensor] = []
        self.like = like

    def forward(self, x: Tensor, c_noise: Tensor, labels: Any = None) -> Tensor:
        self.pushes.append(torch.zeros_like(self.like, requires_grad=True))
        return super().forward(x, c_noise, labels) + self.pushes[-1]


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_physics_informed_distillation(metric: str) -> None:
    g = golden("pid")
    made = make(PID, EDMModel(teacher(), 0.5), metric=metric)
    u = (249 - g["index"] + 0.5).double() / 250
    t, other = made.times(u)
    near(t, g["t"])
    near(other, g["t_next"])
    near(made.trajectory(student())(g["z"], t), g["x_t"])

    network = Recorded(g["z"])
    draws = FixedDraws({"index": u, "noise": g["z"] / 80})
    value = made.loss({"model": network}, Batch(g["z"], None), draws, PROGRESS)
    near(value, g[f"{metric}.loss"])
    first, second = torch.autograd.grad(value.mean(), network.pushes)
    near(first, g[f"{metric}.grad_F_first"])
    near(second, g[f"{metric}.grad_F_second"])

    plan = make(PID, EDMModel(teacher(), 0.5), clip_samples=False).plan_sampling(1)
    free = make(PID, EDMModel(teacher(), 0.5), clip_samples=False)
    near(free.sample({"model": student()}, g["z"] / 80, None, plan, draws), g["sample"])


# --- knowledge distillation ----------------------------------------------------------------------


def noise_formula(z: Tensor, index: Tensor) -> Tensor:
    """The stand-in network, which predicts noise from a state of unit variance and its step."""
    return 0.6 * torch.sin(0.9 * z + 0.002 * index) + 0.25 * z


class NoiseModel:
    """A DDPM around the stand-in, in EDM's frame."""

    def denoise(self, x: Tensor, sigma: Tensor, labels: Any = None) -> Tensor:
        levels = ddpm_sigmas(torch.arange(1000))
        index = (levels[:, None] - sigma).abs().argmin(0)
        assert torch.equal(levels[index], sigma)
        wide = append_dims(sigma, x)
        return x - wide * noise_formula(x / (1 + wide**2).sqrt(), append_dims(index.double(), x))


@pytest.mark.parametrize(("name", "steps"), [("quadratic", 100), ("linear", 50)])
def test_pairs_of_knowledge_distillation(name: str, steps: int) -> None:
    g, entry = golden("knowledge-distillation"), f"{name}{steps}"
    near(ddpm_sigmas(torch.arange(1000)), (1 / g["alpha_bar"] - 1).sqrt())
    table = {"solver": f"ddim-{name}", "solver_nfe": steps}
    made = make(KnowledgeDistillation, NoiseModel(), bounded=False, **table)
    assert DDIM_INDICES[f"ddim-{name}"](steps) == g[f"{entry}.steps"].tolist()
    near(made.make({}, g["z"], None), g[f"{entry}.y"])
    assert made.pairs().nfe == len(g[f"{entry}.steps"].unique())


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_loss_of_knowledge_distillation(metric: str) -> None:
    """The released 8 bits, read as images, are the target; here targets are stored in float16."""
    g, told = golden("knowledge-distillation"), 999
    z = g["stored.z_half_as_double"]
    assert torch.equal(z, g["z"].half().double())
    near(g["stored.y_uint8"].double() / 127.5 - 1, g["target"])
    # The network is told sigma_max, which stands for step 999.
    network = Formula(lambda x, c: noise_formula(x, told * c / (math.log(80) / 4)))
    made = make(KnowledgeDistillation, None, metric=metric, output="residual")
    near(made.student({"model": network}, z, None), g["student_y"])
    batch = Batch(g["target"], None, noise=z, target=g["target"])
    value, gradient = with_gradient(
        network, z, lambda: made.loss({"model": network}, batch, FixedDraws({}), PROGRESS)
    )
    near(value.mean(), g[f"{metric}.loss"])
    near(gradient, g[f"{metric}.grad_eps_output"])


# --- score distillation --------------------------------------------------------------------------


def fake_score() -> Formula:
    return Formula(lambda x, c: 0.35 * torch.sin(0.8 * x + 0.3 * c) - 0.15 * x)


def scored(method: Any, g: Tensor, **config: Any) -> tuple[Any, dict[str, Any], Tensor]:
    """Return a method whose generator gives ``g``, its networks, and ``g`` with a gradient."""
    made = make(method, EDMModel(teacher(), 0.5), **config)
    generated = g.clone().requires_grad_()
    made.generate = lambda nets, z, labels: generated
    return made, {"model": student(), "fake": fake_score()}, generated


def gradient_of(loss: Tensor, generated: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.mean(), generated)
    return found


def test_generator_of_diff_instruct() -> None:
    g = golden("diff-instruct")
    made, nets, generated = scored(DiffInstruct, g["G"])
    draws = FixedDraws({"latent": g["G"], "sigma": g["normal"], "noise": g["noise"]})
    loss = made.generator_loss(nets, Batch(g["G"], None), draws, PROGRESS)
    near(loss, g["generator.loss_elementwise"].flatten(1).sum(1))
    near(gradient_of(loss, generated), g["generator.grad_G"])


def test_fake_score_of_diff_instruct() -> None:
    g = golden("diff-instruct")
    made, nets, _ = scored(DiffInstruct, g["G"])
    names = ("latent-fake", "sigma-fake", "noise-fake")
    draws = FixedDraws(dict(zip(names, (g["G"], g["normal"], g["noise"]), strict=True)))

    def loss() -> Tensor:
        batch = Batch(g["G"], None)
        return made.fake_loss(nets, batch, draws, PROGRESS)  # type: ignore[no-any-return]

    value, gradient = with_gradient(nets["fake"], g["G"], loss)
    near(value, g["score.loss_elementwise"].flatten(1).sum(1))
    near(gradient, g["score.grad_F"])


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_score_identity_distillation(alpha: float) -> None:
    g = golden("sid")
    made, nets, generated = scored(SiD, g["x"], alpha=alpha, loss_scale=1.0)
    draws = FixedDraws({"latent": g["x"], "sigma": g["u"], "noise": g["noise"]})
    near(made.generator_sigmas(draws, g["u"]), g["sigma"])
    loss = made.generator_loss(nets, Batch(g["x"], None), draws, PROGRESS)
    near(loss, g[f"alpha{alpha}.loss_elementwise"].flatten(1).sum(1))
    near(gradient_of(loss, generated), g[f"alpha{alpha}.grad_x"])


def test_generator_of_dmd2() -> None:
    g = golden("dmd2")
    made, nets, generated = scored(DMD2, g["x"])
    near(made.levels(g["x"]), g["sigma_grid"])
    u = (g["timestep"].double() - 20 + 0.5) / 961
    draws = FixedDraws({"latent": g["x"], "sigma": u, "noise": g["noise"]})
    sigma = made.generator_sigmas(draws, u)
    near(sigma, g["sigma_grid"][g["timestep"]])
    y = g["x"] + append_dims(sigma, g["x"]) * g["noise"]
    direction = matching_direction(g["x"], *made.denoised(nets, y, sigma, None), 0.0)
    near(direction, g["generator.direction"])
    loss = made.generator_loss(nets, Batch(g["x"], None), draws, PROGRESS)
    near(loss.mean(), g["generator.loss"])
    near(gradient_of(loss, generated), g["generator.grad_x"])


def test_fake_score_of_dmd2() -> None:
    g = golden("dmd2")
    made, nets, _ = scored(DMD2, g["x"])
    u = (g["timestep"].double() + 0.5) / 1000
    names = ("latent-fake", "sigma-fake", "noise-fake")
    draws = FixedDraws(dict(zip(names, (g["x"], u, g["noise"]), strict=True)))

    def loss() -> Tensor:
        batch = Batch(g["x"], None)
        return made.fake_loss(nets, batch, draws, PROGRESS)  # type: ignore[no-any-return]

    value, gradient = with_gradient(nets["fake"], g["x"], loss)
    near(value.mean(), g["fake.loss"])
    near(gradient, g["fake.grad_F"])


@pytest.mark.parametrize("scaled", [False, True])
def test_f_distill_weights_the_direction(scaled: bool) -> None:
    """FastGen's loss, with a weight per image and without."""
    g = golden("dmd2")
    made, nets, generated = scored(FDistill, g["x"], gan_weight=0.0)
    made.denoised = lambda *_: (g["fastgen.fake_x0"], g["fastgen.teacher_x0"])
    made.logits = lambda network, y, *_: y.flatten(2).mean(2)
    weights = g["fastgen.scale"] if scaled else torch.ones_like(g["fastgen.scale"])
    made.image_weights = lambda logits: weights
    level = torch.ones(8, dtype=torch.float64)
    loss = made.samples_loss(nets | {"discriminator": None}, generated, g["x"], level, None)
    entry = "fastgen.vsd_scaled" if scaled else "fastgen.vsd"
    near(loss.mean(), g[f"{entry}_loss"])
    near(gradient_of(loss, generated), g[f"{entry}_grad_x"])
    # The same by the functions alone.
    direction = matching_direction(
        g["x"], g["fastgen.fake_x0"], g["fastgen.teacher_x0"], made.config.scale_floor
    )
    near(matching_loss(g["x"], append_dims(weights, g["x"]) * direction), loss.detach())


def test_gan_losses() -> None:
    g = golden("dmd2")
    near(generator_gan_loss(g["gan.fake_logits"]).mean(), g["gan.generator"])
    both = discriminator_loss(g["gan.fake_logits"], g["gan.real_logits"])
    near(both.mean(), g["gan.discriminator"])


def test_weights_of_f_divergences() -> None:
    """Divided by the batch's mean; the released name of each."""
    g = golden("dmd2")
    names = {
        "forward-kl": "kl",
        "jensen-shannon": "js",
        "softened-reverse-kl": "sf",
        "neyman": "neyman",
        "hellinger": "sh",
        "jeffreys": "jf",
    }
    assert {*names, "reverse-kl"} == set(DIVERGENCE_WEIGHTS)
    ratio = density_ratio(g["gan.fake_logits"])
    for name, released in names.items():
        near(divergence_weights(name, ratio, 8), g[f"fdistill.h.{released}"])
