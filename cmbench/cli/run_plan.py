"""What ``cmbench run --dry-run`` prints of a sweep that was planned."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cmbench.cli.run_tables import cell_row, finished_row, print_cells, print_runs
from cmbench.sweep.context import Context
from cmbench.sweep.plans import CellPlan, RunPlan
from cmbench.sweep.run_files import read_result_file
from cmbench.sweep.runs import TrainingKit
from cmbench.sweep.sweep import SweepPlan, is_trained


def print_plan(context: Context, plan: SweepPlan) -> None:
    """Print runs and cells, with parameters, images, and what is already done."""
    to_train = [run for run in plan.runs if not is_trained(context, run)]
    images: dict[str, int] = {}
    if to_train:
        # Fake tensors take a second to import.
        from cmbench.cli.run_costs import estimate_costs, print_costs

        costs = estimate_costs(context, to_train)
        images = {sha256: cost.images for sha256, (_, cost) in costs.items()}
    print_runs(_run_row(context, run, images) for run in plan.runs)
    if to_train:
        print_costs(costs)
    print_cells(cell_row(cell, _state(cell, plan)) for cell in plan.cells)


def _run_row(context: Context, run: RunPlan, to_train: Mapping[str, int]) -> list[str]:
    """Return a run's row; ``to_train`` are the images of all phases, by recipe hash."""
    folder = context.workspace.run(run.run_id)
    result = read_result_file(folder, run.run_id) if run.imported is None else None
    if result is not None:
        return finished_row(run.run_id, result)
    with torch.device("meta"):
        network = TrainingKit(context, run, run.data_info(context), None).network()
    parameters = sum(p.numel() for p in network.parameters())
    seen = [int(p.stem) for p in (folder / "checkpoints").glob("*.json") if p.stem.isdecimal()]
    state = f"resume at {max(seen):,} images" if seen else "to train"
    if run.imported is not None:
        state = "done"
    images = to_train.get(run.config_sha256, 0)
    return [run.run_id, f"{parameters:,}", f"{images:,}", state]


def _state(cell: CellPlan, plan: SweepPlan) -> str:
    if cell.broken:
        return f"broken: {cell.broken}"
    return "done" if cell.cell in plan.done else "to do"
