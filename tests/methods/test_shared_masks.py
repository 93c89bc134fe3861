"""Student and target see the same dropout masks, on the device in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_kit import Case, build, exact_teacher, progress

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.gaussian_mixture import GaussianMixture
from cmbench.diffusion.models import MixtureModel
from cmbench.plugin.method import Batch
from cmbench.training.randomness import StepDraws
from cmbench_plugins.scm import Ends

PAIRED = ("cd", "ct", "ect", "ict", "ict-deep")

DROPOUT = {"network": {"dropout": 0.5}}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pair(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return student and target at the same input, and the student without dropout."""
    method: Any = case.method
    for module in case.modules.values():
        module.to(device).train()
    if "target" in case.modules:
        case.modules["target"].load_state_dict(case.modules["model"].state_dict())
    x = case.batch().images.to(device)
    sigma = torch.linspace(0.1, 5.0, len(x), device=device)
    torch.manual_seed(5)
    student, target = method.pair_outputs(case.nets, x, sigma, x, sigma, None)
    case.modules["model"].eval()
    return student, target, method.trained_consistency(case.nets["model"])(x, sigma)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dataset", ["digits", "gmm"])
@pytest.mark.parametrize("name", PAIRED)
def test_equal_inputs_have_equal_outputs(name: str, dataset: str, device: str) -> None:
    student, target, without = pair(build(name, dataset, **DROPOUT), device)
    assert torch.equal(student, target)
    assert not torch.equal(student, without), "dropout is off: the test shows nothing"
    assert student.requires_grad
    assert not target.requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_generator_goes_on_where_the_student_left_it(device: str) -> None:
    """The target's replay leaves no trace: the next draw is the one after the student's."""
    after = []
    for with_target in (True, False):
        case = build("ict", **DROPOUT)
        case.modules["model"].to(device).train()
        method: Any = case.method
        x, sigma = case.batch().images.to(device), torch.ones(8, device=device)
        torch.manual_seed(5)
        if with_target:
            method.pair_outputs(case.nets, x, sigma, x, sigma, None)
        else:
            method.consistency(case.nets["model"])(x, sigma)
        after.append(torch.rand(3, device=device))
    assert torch.equal(*after)


@pytest.mark.parametrize("name", PAIRED)
def test_loss_without_a_gap_is_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loss itself: with the smaller level moved to the larger, nothing is left."""
    options: dict[str, Any] = {"weighting": "edm"} if name == "ect" else {}
    case = build(name, **DROPOUT, **options)
    for module in case.modules.values():
        module.train()
    if "target" in case.modules:
        case.modules["target"].load_state_dict(case.modules["model"].state_dict())
    original = case.method.pair_outputs  # type: ignore[attr-defined]

    def no_gap(nets: Any, x: Any, sigma: Any, x_next: Any, next_: Any, labels: Any) -> Any:
        return original(nets, x, sigma, x, sigma, labels)

    def loss() -> torch.Tensor:
        return case.method.loss(case.nets, case.batch(), StepDraws(0, 0), progress(step=9))

    assert bool((loss() > 0).all())
    monkeypatch.setattr(case.method, "pair_outputs", no_gap)
    monkeypatch.setattr("cmbench_plugins.ict.inverse_gap_weight", lambda a, b: torch.ones_like(a))
    assert bool((loss() == 0).all())


@pytest.mark.parametrize("name", ["sct", "scd"])
def test_discrete_tangent_shares_masks(name: str) -> None:
    """With masks of its own the difference would be divided by a step of 1/2000 and explode."""
    mixture = GaussianMixture(torch.zeros(1, 2, 1, 1), torch.ones(1), torch.ones(1))
    found = []
    for n_points in (None, 2000):
        case = build(name, "gmm", n_points=n_points, tangent="raw", **DROPOUT)
        method: Any = case.method
        method.teacher = exact_teacher(MixtureModel(mixture, method.sigma_data))
        network = case.modules["model"].double().train()
        t = torch.tensor([0.2, 0.5, 1.0, 1.4], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        x0, z = torch.randn(2, 4, 2, 1, 1, generator=generator, dtype=torch.float64) / 2
        x_t = append_dims(torch.cos(t), x0) * x0 + append_dims(torch.sin(t), x0) * z
        slope = method.slope(x_t, t, Ends(x0, z, None), {})
        torch.manual_seed(3)
        nets = {"model": case.nets["model"]}
        if n_points is None:
            found.append(method.tangent(nets["model"], x_t, t, slope, 1.0, None, {})[1])
        else:
            s = t - 1 / n_points
            found.append(method.discrete(nets["model"], x_t, t, s, slope, 1.0, None, {})[1])
        assert network.training
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 5e-3


@pytest.mark.parametrize("name", ["mscd", "pid"])
def test_outputs_at_neighbouring_levels_share_masks(name: str) -> None:
    """The student's own target, and the difference along its trajectory, vanish with the step."""
    sizes = []
    for step in (1e-2, 1e-4):
        case = build(name, "gmm", **DROPOUT)
        method: Any = case.method
        network, x = case.modules["model"].double().train(), case.batch().images.double()
        sigma = torch.linspace(0.5, 5.0, len(x), dtype=torch.float64)
        levels = sigma, sigma * (1 - step), torch.zeros_like(sigma)
        torch.manual_seed(3)
        draws = StepDraws(0, 0)
        if name == "mscd":
            method.edge = lambda *_, levels=levels: levels
            loss = method.phase_loss(1, case.nets, Batch(x, None), draws, progress())
            sizes.append(float(loss.max()))
        else:
            seen: list[torch.Tensor] = []
            method.distance = lambda a, b, seen=seen: seen.append(a) or (a - b).flatten(1).sum(1)
            method.times = lambda _, levels=levels: levels[:2]
            method.loss(case.nets, Batch(x, None), draws, progress())
            sizes.append(float(seen[0].abs().max()))
        assert network.training
    if name == "mscd":
        assert sizes[1] < sizes[0] / 50
    else:  # t dx/dt: a quotient of differences stays what it is, instead of growing a hundredfold
        assert sizes[1] < 2 * sizes[0]
