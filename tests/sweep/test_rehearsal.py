"""What a method does wrong with its teacher is said before the teacher is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import Toy

from cmbench.errors import PluginError, UserError
from cmbench.plugin.method import Kit, Method, Nets, Phase, SamplingPlan
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep
from cmbench.sweep.training_run import obtain_run
from cmbench_plugins.cm import CD

RECIPES = """
[base]
batch_size = 16
duration_kimg = 0.064
network = { name = "mlp", width = 8, blocks = 1 }

[toys.tiny]
[toys.trigflow]
parameterization = "trigflow"
"""


@pytest.fixture
def recipes(tmp_path: Path) -> str:
    path = tmp_path / "own.toml"
    path.write_text(RECIPES)
    return str(path)


def student(
    context: Context, recipes: str, method_class: type[Method], teacher: str = "edm:{}:tiny"
) -> RunPlan:
    options = (f"teacher={teacher.format(recipes)}",)
    plan = plan_run(context, "cd", "toys", f"{recipes}:tiny", 0, options)
    return replace(plan, method_class=method_class)


class Copying(CD):
    """Copies the teacher's network, which sampling does not have."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        self.teacher = kit.teacher
        return {"model": copy.deepcopy(kit.teacher.network)}  # type: ignore[union-attr, dict-item]


class Shrinking(CD):
    """Builds another network where there is no teacher."""

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        nets = super().build(kit)
        return nets if kit.teacher is not None else {"model": kit.network(width=16)}


class Idle(CD):
    """Has nothing to train."""

    def phases(self, nets: Nets) -> Sequence[Phase]:
        return []


@pytest.mark.parametrize(
    ("method_class", "said"),
    [
        (Copying, "method Copying: its build fails without a teacher, as in sampling: Attribute"),
        (Shrinking, "method Shrinking: its build without a teacher, as in sampling, makes other "),
        (Idle, "method Idle: its phases returned no phase"),
    ],
)
def test_it_is_refused_before_its_teacher_is_trained(
    toys: Context, recipes: str, method_class: type[Method], said: str
) -> None:
    plan = student(toys, recipes, method_class)
    with pytest.raises(PluginError) as raised:
        obtain_run(toys, plan)
    assert str(raised.value).startswith(said)
    if method_class is not Idle:
        assert "kit.student, which is right in sampling too" in str(raised.value)
    assert not any(toys.workspace.root.rglob("run.json"))


def test_a_teacher_of_another_kind_is_refused_before_it_is_trained(
    toys: Context, recipes: str
) -> None:
    """CD has no option for it, so that planning cannot know."""
    plan = student(toys, recipes, CD, "edm:{}:trigflow")
    with pytest.raises(UserError, match="its parameterization is 'trigflow'; allowed: 'edm' for"):
        obtain_run(toys, plan)
    assert not any(toys.workspace.root.rglob("run.json"))


def test_a_rehearsal_changes_nothing(toys: Context, recipes: str, tmp_path: Path) -> None:
    plan = student(toys, recipes, CD)
    state = torch.get_rng_state()
    first = obtain_run(toys, plan).weights().sha256
    elsewhere = replace(toys, workspace=type(toys.workspace)(tmp_path / "elsewhere"))
    torch.manual_seed(1)
    assert obtain_run(elsewhere, plan).weights().sha256 == first
    torch.set_rng_state(state)


class Varied(Toy):
    """Plans a variant that no phase exports."""

    def plan_sampling(self, nfe: int, *_: Any, **__: Any) -> SamplingPlan:
        return SamplingPlan(nfe, "toy", (1.0,), variant="part-9")


@pytest.mark.parametrize(("phases", "allowed"), [(1, "no variant"), (2, "part-0, or no variant")])
def test_an_unknown_variant_is_a_record_before_any_training(
    toys: Context, monkeypatch: pytest.MonkeyPatch, phases: int, allowed: str
) -> None:
    monkeypatch.setattr(Toy, "plan_sampling", Varied.plan_sampling)
    asked = SweepRequest(("toy",), "toys", "demo", (1,), overrides={"phases": phases})
    (record,) = execute(toys, plan_sweep(toys, asked), Local())
    assert record.status == "failed"
    assert record.reason == (
        f"method Toy: its plan_sampling names the variant 'part-9'; allowed: {allowed}; fix the "
        "plugin"
    )
    assert not any(toys.workspace.root.rglob("run.json"))
