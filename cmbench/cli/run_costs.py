"""What ``cmbench run --dry-run`` prints of the cost of runs that are to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cmbench.cli.common import echo_table
from cmbench.cli.output import echo
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import Cost, estimate
from cmbench.sweep.plans import RunPlan


def estimate_costs(context: Context, runs: Sequence[RunPlan]) -> dict[str, tuple[RunPlan, Cost]]:
    """Return by recipe hash the first seed's run and its cost in one process."""
    first = {run.config_sha256: run for run in reversed(runs)}
    return {sha256: (run, estimate(context, run)) for sha256, run in reversed(first.items())}


def print_costs(costs: Mapping[str, tuple[RunPlan, Cost]]) -> None:
    """Print the costs of the runs to do; seeds of one recipe once."""
    rows = []
    for run, cost in costs.values():
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
    echo_table(header, rows, title="cost of each seed (estimates)")
    echo()
    print_generated(costs)


def print_generated(costs: Mapping[str, tuple[RunPlan, Cost]]) -> None:
    """Print what the generated data of the runs cost, which the seeds of one teacher share."""
    rows = [
        [
            f"{run.name}, {made.phase}",
            f"{made.pairs:,}",
            "-" if made.evaluations is None else f"{made.evaluations:,}",
            f"{made.bytes / 2**30:.3g} GiB",
            "-" if made.device_hours is None else f"{made.device_hours:.3g} {made.note}".strip(),
        ]
        for run, cost in costs.values()
        for made in cost.generated
    ]
    if rows:
        header = ["run, phase", "pairs", "network evaluations", "disk", "device-hours"]
        echo_table(header, rows, title="generated data, made before the phase (estimates)")
        echo()
