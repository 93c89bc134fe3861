"""What ``cmbench run`` prints: the plan, its cost, the results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click
import torch

from cmbench.cli.common import echo_table
from cmbench.records.record import Record
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import estimate
from cmbench.sweep.kit import TrainingKit
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.sweep import SweepPlan, is_trained

#: Columns of the table that ends ``cmbench run``; the report has them all.
SHOWN_METRICS = 4


def print_table(records: Sequence[Record], protocol: Sequence[str]) -> None:
    """Print the sweep's result: one row per cell, the protocol's first metrics as columns."""
    measured = {name for record in records for name in record.metrics}
    metrics = [name for name in protocol if name in measured][:SHOWN_METRICS]
    rows = []
    for record in records:
        values = [_number(record.metrics[m].value) if m in record.metrics else "-" for m in metrics]
        speed = record.sampling.images_per_s
        rows.append(
            [
                record.method,
                str(record.training.seed),
                str(record.sampling.nfe),
                *values,
                f"{speed:.0f}" if speed else "-",
                record.status,
            ]
        )
    echo_table(["method", "seed", "NFE", *metrics, "images/s", "status"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def print_plan(context: Context, plan: SweepPlan) -> None:
    """Print runs and cells, with parameters, images, and what is already done."""
    rows = [
        [
            run.run_id,
            _parameters(context, run),
            f"{_images(context, run):,}",
            "done" if is_trained(context, run) else _resumable(context, run),
        ]
        for run in plan.runs
    ]
    echo_table(["run", "parameters", "images", "state"], rows, title="runs")
    click.echo()
    print_costs(context, [run for run in plan.runs if not is_trained(context, run)])
    cells = []
    for cell in plan.cells:
        state = "done" if cell.cell in plan.done else "to do"
        if cell.declined or cell.broken:
            state = f"declined: {cell.declined}" if cell.declined else f"broken: {cell.broken}"
        cells.append([cell.cell, str(cell.nfe), str(cell.seed), f"{cell.num_samples:,}", state])
    echo_table(["cell", "NFE", "seed", "images", "state"], cells, title="cells")


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
    if rows:
        header = ["run", "images", "FLOPs per step", "peak memory", "device-hours", "measured by"]
        echo_table(header, reversed(rows), title="cost of each seed (estimates)")
        click.echo()


def _parameters(context: Context, run: RunPlan) -> str:
    with torch.device("meta"):
        network = TrainingKit(context, run, run.data_info(context), None).network()
    return f"{sum(p.numel() for p in network.parameters()):,}"


def _images(context: Context, run: RunPlan) -> int:
    return round(run.config.duration_kimg * 1000)


def _resumable(context: Context, run: RunPlan) -> str:
    folder = context.workspace.run(run.run_id) / "checkpoints"
    seen = [int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()]
    return f"resume at {max(seen):,} images" if seen else "to train"
