"""What ``cmbench run --dry-run`` prints of the cost of runs that are to be trained."""

from __future__ import annotations

from collections.abc import Sequence

import click

from cmbench.cli.common import echo_table
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import estimate
from cmbench.sweep.plans import RunPlan


def print_costs(context: Context, runs: Sequence[RunPlan]) -> None:
    """Print the cost of the runs to do, in one process; seeds of one recipe once."""
    rows = []
    for run in {run.config_sha256: run for run in reversed(runs)}.values():
        cost = estimate(context, run)
        step = cost.flops_per_image
        rows.append(
            [
                run.name,
                f"{cost.images:,}",
                "-" if step is None else f"{step * run.config.batch_size:.3g}",
                "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**30:.2f} GiB",
                "-" if cost.device_hours is None else f"{cost.device_hours:.3g}",
                cost.note,
            ]
        )
    header = ["run", "images", "FLOPs per step", "peak memory", "device-hours", "measured by"]
    echo_table(header, reversed(rows), title="cost of each seed (estimates)")
    click.echo()
