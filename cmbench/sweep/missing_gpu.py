"""A warning before long work starts on the CPU because no GPU was found."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch

from cmbench.sweep.context import Context
from cmbench.sweep.plans import CellPlan, RunPlan

#: Numbers (pixels x channels) that go into a network in one run or cell. The recipes of the
#: embedded datasets stay five times below; recipes for GPUs start at twice as many.
LONG = 1e8


def missing_gpu(
    context: Context, runs: Iterable[RunPlan], cells: Iterable[CellPlan], done: Collection[str]
) -> str:
    """Return the warning, or "" if the device was named, is a GPU, or the work is short.

    Args:
        context: the device and how it was chosen.
        runs: trainings of the sweep, teachers included; finished ones do not count.
        cells: evaluations of the sweep.
        done: names of cells that have their records.
    """
    if context.device.type != "cpu" or not context.device_found:
        return ""
    work = [(_training(context, run), f"training {run.run_id}") for run in runs]
    work += [
        (cell.nfe * cell.num_samples * _numbers(context, cell.run), f"sampling {cell.cell}")
        for cell in cells
        if cell.sampling is not None and cell.cell not in done
    ]
    most, what = max(work, default=(0.0, ""))
    if most < LONG:
        return ""
    lacks = (
        f"torch {torch.__version__} is built without CUDA"
        if torch.version.cuda is None
        else f"torch {torch.__version__} finds no NVIDIA GPU and driver"
    )
    return (
        f"no GPU: {lacks}, so {what} ({most:.1g} pixel values through a network) runs on the "
        "CPU; install a CUDA build of torch on a machine with an NVIDIA GPU, or give --device cpu "
        "to run on the CPU without this warning"
    )


def _numbers(context: Context, run: RunPlan) -> int:
    return math.prod(context.dataset_spec(run.dataset).data_shape)


def _training(context: Context, run: RunPlan) -> float:
    trained = (
        run.imported is not None or (context.workspace.run(run.run_id) / "result.json").exists()
    )
    return 0.0 if trained else run.config.duration_kimg * 1000 * _numbers(context, run)
