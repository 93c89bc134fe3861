"""sCD under classifier-free guidance: the teacher's velocity, and what the student receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_kit import FixedDraws, build, progress
from torch import Tensor

from cmbench.errors import UserError
from cmbench.plugin.method import Batch
from cmbench_plugins._guidance import GUIDANCE, guided_velocity

RANGE = {"low": 1.0, "high": 2.0, "sampled": 1.5}


def guided(sampled: float = 1.5, **options: Any) -> Any:
    guidance = {**RANGE, "sampled": sampled}
    network = {"conditions": (GUIDANCE,)}
    return build("scd", conditional=True, network=network, guidance=guidance, **options)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_guided_velocity_is_extrapolated_from_the_one_without_a_class() -> None:
    case = guided()
    model = case.method.teacher.model
    x, t, labels = numbers(4, 1, 8, 8), torch.full((4,), 0.7), torch.arange(4)
    told = {GUIDANCE: torch.tensor([0.0, 1.0, 2.0, 0.5])}
    free, known = model.velocity(x, t, None), model.velocity(x, t, labels)
    expected = torch.stack([free[0], known[1], 2 * known[2] - free[2], (free[3] + known[3]) / 2])
    torch.testing.assert_close(guided_velocity(model, x, t, labels, told), expected)
    assert not torch.allclose(free, known), "the classes matter"
    assert torch.equal(guided_velocity(model, x, t, labels, {}), known)


def test_the_strength_is_drawn_between_the_bounds_and_reaches_teacher_and_student() -> None:
    case = guided(warmup_steps=0)
    x0, u = numbers(3, 1, 8, 8), torch.tensor([0.0, 0.5, 0.25])
    draws = FixedDraws(
        {"noise": numbers(3, 1, 8, 8, seed=1), "time": numbers(3, seed=2), GUIDANCE: u}
    )
    seen: list[dict[str, Any]] = []
    tangent, slope = case.method.tangent, case.method.slope
    case.method.tangent = lambda *a: (seen.append({"student": a[-1]}), tangent(*a))[1]
    case.method.slope = lambda *a: (seen.append({"teacher": a[-1]}), slope(*a))[1]
    loss = case.method.loss(case.nets, Batch(x0, torch.arange(3), None), draws, progress())
    loss.sum().backward()
    strengths = torch.tensor([1.0, 1.5, 1.25])
    for found in seen:
        (told,) = found.values()
        torch.testing.assert_close(told[GUIDANCE], strengths)
    assert {key for found in seen for key in found} == {"student", "teacher"}


def test_the_condition_learns() -> None:
    case = guided(warmup_steps=0)
    x0 = numbers(3, 1, 8, 8)
    values = {"noise": numbers(3, 1, 8, 8, seed=1), "time": numbers(3, seed=2)}
    draws = FixedDraws({**values, GUIDANCE: torch.rand(3)})
    case.method.loss(
        case.nets, Batch(x0, torch.arange(3), None), draws, progress()
    ).sum().backward()
    learned = [p for name, p in case.modules["model"].named_parameters() if "conditions." in name]
    assert learned
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)


def test_images_are_sampled_at_the_recipes_strength() -> None:
    case = guided()
    x = numbers(2, 1, 8, 8)
    assert case.method.told_in_sampling(x)[GUIDANCE].tolist() == [1.5, 1.5]
    f = case.method.consistency_function(case.nets)
    sigma, labels = torch.full((2,), 3.0), torch.arange(2)
    other = guided(sampled=1.0).method.consistency_function(case.nets)
    assert not torch.equal(f(x, sigma, labels), other(x, sigma, labels))


@pytest.mark.parametrize(
    ("conditional", "conditions"), [(False, (GUIDANCE,)), (True, ()), (True, ("time_end",))]
)
def test_guidance_needs_classes_and_its_condition(
    conditional: bool, conditions: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"guidance with conditional = .*the condition 'guidance'"):
        build("scd", conditional=conditional, network={"conditions": conditions}, guidance=RANGE)


def test_recipes_without_guidance_keep_their_hash() -> None:
    assert "guidance" not in build("scd").plan.table
