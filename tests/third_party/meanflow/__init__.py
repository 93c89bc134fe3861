"""MeanFlow as the plugin of somebody else; imports no torch."""

from pathlib import Path

from cmbench.plugin import hookimpl
from cmbench.plugin.specs import MethodSpec, TrainingCost


@hookimpl
def cmbench_register_methods() -> list[MethodSpec]:
    return [
        MethodSpec(
            "meanflow",
            "third_party.meanflow.method:MeanFlow",
            "MeanFlow",
            recipes=Path(__file__).with_name("recipes.toml"),
            cost=TrainingCost(tangents=1),
        )
    ]
