"""A cmbench plugin: what it registers. Imports no torch, so that listings stay fast."""

from pathlib import Path

from cmbench.plugin import hookimpl
from cmbench.plugin.specs import MethodSpec, StudySpec, TrainingCost


@hookimpl
def cmbench_register_methods() -> list[MethodSpec]:
    """Return the methods: with one loss, with a phase on generated pairs, with two networks."""
    return [
        MethodSpec(
            "example-flow",
            "cmbench_example.flow:Flow",
            "Rectified flow",
            reference="Liu et al. 2022, arXiv:2209.03003",
            family="diffusion",
            recipes=Path(__file__).with_name("flow.toml"),
        ),
        MethodSpec(
            "example-reflow",
            "cmbench_example.reflow:Reflow",
            "Reflow",
            reference="Liu et al. 2022, arXiv:2209.03003",
            family="distillation",
            recipes=Path(__file__).with_name("reflow.toml"),
            cost=TrainingCost(generated="50,000 pairs x 32 NFE"),
        ),
        MethodSpec(
            "example-diff-instruct",
            "cmbench_example.diff_instruct:DiffInstruct",
            "Diff-Instruct",
            reference="Luo et al. 2023, arXiv:2305.18455",
            family="distillation",
            recipes=Path(__file__).with_name("diff_instruct.toml"),
            needs_teacher=True,
            cost=TrainingCost(calls=3, graded=2, teacher="yes", data="labels", nfe="1"),
        ),
    ]


@hookimpl
def cmbench_register_studies() -> list[StudySpec]:
    """Return the one study of this plugin (optional)."""
    file = Path(__file__).with_name("steps.toml")
    return [StudySpec("example-steps", "Euler steps of a rectified flow", file)]
