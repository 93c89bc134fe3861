"""Truncated consistency models as the plugin of somebody else; imports no torch."""

from pathlib import Path

from cmbench.plugin import hookimpl
from cmbench.plugin.specs import MethodSpec, TrainingCost


@hookimpl
def cmbench_register_methods() -> list[MethodSpec]:
    return [
        MethodSpec(
            "tcm",
            "third_party.tcm.method:TCM",
            "Truncated consistency models",
            recipes=Path(__file__).with_name("recipes.toml"),
            needs_teacher=True,
            cost=TrainingCost(calls=1, teacher="weights"),
        )
    ]
