"""A student with further conditions starts from a teacher without, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_kit import build, context

from cmbench.errors import UserError
from cmbench.networks.base import is_addition
from cmbench.plugin.method import Teacher
from cmbench.sweep.runs import TrainingKit, build_modules


def kit_of(method: str, **network: Any) -> tuple[TrainingKit, Teacher]:
    case = build(method, network=network)
    assert case.teacher is not None
    return TrainingKit(context(), case.plan, case.method.data, case.teacher), case.teacher


def test_a_recipe_turns_conditions_on_and_its_teacher_has_none() -> None:
    plain: Any = build("cd").plan
    kit, teacher = kit_of("cd", conditions=("time_end",))
    conditioned: Any = kit.plan
    assert conditioned.config.network["conditions"] == ["time_end"]
    assert conditioned.teacher.run.run_id == plain.teacher.run.run_id, "they share one teacher"
    assert "conditions" not in plain.table["network"]
    student, taught = kit.student("edm"), teacher.network
    assert taught is not None
    x, c = torch.randn(3, 1, 8, 8), torch.rand(3)
    assert torch.equal(student(x, c, conditions={"time_end": c}), taught(x, c))
    keys = {key for key in student.state_dict() if is_addition(key)}
    assert keys
    assert student.state_dict().keys() - keys == taught.state_dict().keys()


def test_a_method_turns_conditions_on_for_one_of_its_networks() -> None:
    kit, teacher = kit_of("cd")
    student = kit.student("edm", conditions=("guidance",))
    assert any(is_addition(key) for key in student.state_dict())
    assert not any(is_addition(key) for key in kit.network().state_dict())
    other = Teacher("conditioned", teacher.model, student)
    kit.teacher = other
    with pytest.raises(UserError, match="teacher conditioned's in 1 tensors"):
        kit.student("edm")


def test_what_is_built_for_sampling_has_the_same_weights_by_name() -> None:
    case = build("sct", network={"conditions": ("time_end",)})
    _, sampled = build_modules(context(), case.plan, None)
    assert case.modules["model"].state_dict().keys() == sampled["model"].state_dict().keys()
