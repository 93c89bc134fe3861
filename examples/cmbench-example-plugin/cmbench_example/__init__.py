"""A cmbench plugin: what it registers. Imports no torch, so that listings stay fast."""

from __future__ import annotations

from pathlib import Path

from cmbench.plugin import hookimpl
from cmbench.plugin.specs import MethodSpec, StudySpec


@hookimpl
def cmbench_register_methods() -> list[MethodSpec]:
    """Return the one method of this plugin."""
    return [
        MethodSpec(
            "example-flow",
            "cmbench_example.flow:Flow",
            "Rectified flow",
            reference="Liu et al. 2022, arXiv:2209.03003",
            year=2022,
            family="diffusion",
            recipes=Path(__file__).with_name("flow.toml"),
        )
    ]


@hookimpl
def cmbench_register_studies() -> list[StudySpec]:
    """Return the one study of this plugin (optional)."""
    file = Path(__file__).with_name("steps.toml")
    return [StudySpec("example-steps", "Euler steps of a rectified flow", file)]
