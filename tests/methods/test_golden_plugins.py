"""The plugins' own losses and sampler against what the official implementations return.

tests/golden/losses.safetensors (its tables are described in tests/diffusion/test_golden_losses.py)
through the interface that training uses: ``Method.loss`` with injected draws and ``Method.sample``.
CD's and CT's official noise levels are float32: 5e-5 relative; everything else 1e-9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import FixedDraws, data_of, exact_teacher
from safetensors.torch import load_file
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.models import EDMModel
from cmbench.plugin.method import Batch, Progress
from cmbench_plugins.cm import CD, CT
from cmbench_plugins.ect import ECT
from cmbench_plugins.edm import EDM

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.safetensors"


class Student(nn.Module):
    """The student of the golden file, a formula."""

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return 0.3 * torch.sin(1.7 * x + 0.5 * append_dims(c_noise, x)) + 0.2 * x


class Teacher(nn.Module):
    """The teacher of the golden file, a formula."""

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return 0.25 * torch.cos(1.1 * x - 0.4 * append_dims(c_noise, x)) - 0.1 * x


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def make(method: Any, **config: Any) -> Any:
    table = {"network": {"name": "formula"}, "duration_kimg": 1.0, **config}
    return method(method.Config(**table), data_of((3, 4, 4)))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.dtype == theirs.dtype == torch.float64
    return float(((ours - theirs).abs() / theirs.abs()).max())


def index_draw(golden: dict[str, Tensor], entry: str, n_points: int) -> Tensor:
    """Return the uniform number that chooses the interval of a descending index."""
    interval = n_points - 2 - golden[f"{entry}.index_descending"]
    return (interval.double() + 0.5) / (n_points - 1)


def test_diffusion_loss(golden: dict[str, Tensor]) -> None:
    method = make(EDM)
    draws = FixedDraws({"sigma": golden["edm.normal_for_sigma"], "noise": golden["edm.noise"]})
    nets = {"model": Student()}
    ours = method.loss(nets, Batch(golden["x"], None), draws, Progress(0, 1, 0, 1))
    assert relative_error(ours, golden["edm.loss_per_element"].flatten(1).sum(1)) < 1e-9


def test_distillation_loss(golden: dict[str, Tensor]) -> None:
    method, entry = make(CD, n_points=18), "cd.l2.N18"
    method.teacher = exact_teacher(EDMModel(Teacher(), 0.5))
    draws = FixedDraws({"index": index_draw(golden, entry, 18), "noise": golden[f"{entry}.noise"]})
    nets = {"model": Student()}
    ours = method.loss(nets, Batch(golden["x"], None), draws, Progress(0, 1, 0, 1))
    assert relative_error(ours, golden[f"{entry}.loss_mean_over_pixels"]) < 5e-5


@pytest.mark.parametrize("n_points", [2, 18, 151])
@pytest.mark.parametrize("target", ["own", "student"])
def test_training_loss(golden: dict[str, Tensor], n_points: int, target: str) -> None:
    """At the three stages of N(k); student and target have the same weights in the golden file."""
    method, entry = make(CT, s0=2, s1=150), f"ct.l2.N{n_points}"
    step = {2: 0, 18: 11_144, 151: 800_000}[n_points]
    place = Progress(0, 1, step, 800_000)
    assert method.n_points(place) == n_points
    draws = FixedDraws(
        {"index": index_draw(golden, entry, n_points), "noise": golden[f"{entry}.noise"]}
    )
    nets = {"model": Student()} | ({"target": Student()} if target == "own" else {})
    ours = method.loss(nets, Batch(golden["x"], None), draws, place)
    assert relative_error(ours, golden[f"{entry}.loss_mean_over_pixels"]) < 5e-5


@pytest.mark.parametrize("stage", [0, 3, 7])
@pytest.mark.parametrize("c", [0, 0.06])
def test_shrinking_gap_loss(golden: dict[str, Tensor], stage: int, c: float) -> None:
    method, entry = make(ECT, huber_c=c), f"ect.q2.stage{stage}.c{c}"
    draws = FixedDraws(
        {"sigma": golden[f"{entry}.normal_for_t"], "noise": golden[f"{entry}.noise"]}
    )
    place = Progress(stage * 100 + 99, 800, 0, 1)  # the last images of the stage
    assert method.stage(place) == stage
    ours = method.loss({"model": Student()}, Batch(golden["x"], None), draws, place)
    assert relative_error(ours, golden[f"{entry}.loss"]) < 1e-9


@pytest.mark.parametrize("steps", [2, 3, 5, 18])
def test_heun_sampler(golden: dict[str, Tensor], steps: int) -> None:
    method = make(EDM, sampler="heun")
    plan = method.plan_sampling(2 * steps - 1)
    noise = golden["edm_heun.unit_noise"]
    ours = method.sample({"model": Teacher()}, noise, None, plan, FixedDraws({}))
    theirs = golden[f"edm_heun.steps{steps}.sample"]
    assert ours.dtype == torch.float64
    assert float(((ours - theirs).abs() / theirs.abs().clamp_min(1e-3)).max()) < 1e-9


def test_released_decay_of_the_target(golden: dict[str, Tensor]) -> None:
    """mu as the code has it, by option; the paper's exponent is the default and another number."""
    released, paper = make(CT, mu_exponent="released-code"), make(CT)
    for k, decay in zip(
        golden["ct_schedule.k"].tolist(), golden["ct_schedule.ema_as_in_code"].tolist(), strict=True
    ):
        place = Progress(0, 1, k, 800_000)
        assert released.target_decay(place) == pytest.approx(decay, rel=1e-12)
        assert paper.target_decay(place) > decay
    assert paper.target_decay(Progress(0, 1, 0, 800_000)) == pytest.approx(0.9)
