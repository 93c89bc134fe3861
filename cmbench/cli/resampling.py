"""Sampling a record's images again, for `cmbench verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cmbench.leaderboard.verify import CannotResampleError, Resampled
from cmbench.records.record import DTYPES, Record
from cmbench.records.workspace import Workspace
from cmbench.sweep.cells import measure_cell
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import CellPlan, RunPlan, SampleSettings
from cmbench.sweep.runs import TrainedRun, read_result


def resampler(context: Context) -> Callable[[Record, int], Resampled]:
    """Return a function that makes the first images of a record again and measures them.

    The run must be in the context's workspace; nothing is written there.
    """

    def resample(record: Record, count: int) -> Resampled:
        if record.kind != "measured":
            raise CannotResampleError(f"{record.kind}: its generator was not trained here")
        trained = find_run(context, record)
        cell = find_cell(context, trained.plan, record, count)
        with TemporaryDirectory(prefix="cmbench-verify-") as name:
            place = Workspace(Path(name))
            cache = context.workspace.cache
            if cache.is_dir():  # the reference need not be computed again
                place.cache.symlink_to(cache.resolve(), target_is_directory=True)
            made = measure_cell(replace(context, workspace=place), trained, cell)
            grid = made.artifacts.get("grid")
            folder = place.records(record.dataset.name)
            picture = (folder / grid.file).read_bytes() if grid is not None else None
        if record.training.snapshots not in ({}, made.training.snapshots):
            raise CannotResampleError("the run's snapshots here are not those of the record")
        if made.dataset != record.dataset:
            raise CannotResampleError("the dataset, reference or extractor here is another one")
        return Resampled(count, made.metrics, picture)

    return resample


def find_run(context: Context, record: Record) -> TrainedRun:
    """Return the finished run of ``record``, if its recipe still resolves to the same one."""
    training = record.training
    plan = plan_run(
        context, record.method, record.dataset.name, training.recipe, training.seed, training.config
    )
    if plan.config_sha256 != training.config_sha256:
        raise CannotResampleError("the recipe resolves differently in this version")
    trained = read_result(plan, context.workspace.run(plan.run_id))
    if trained is None:
        raise CannotResampleError(f"the run {plan.run_id} is not in {context.workspace.root}")
    return trained


def find_cell(context: Context, run: RunPlan, record: Record, count: int) -> CellPlan:
    """Return the cell with the record's sampler, noise levels and seed."""
    sampling = record.sampling
    precision = {dtype: name for name, dtype in DTYPES.items()}.get(sampling.dtype)
    if precision is None:
        raise CannotResampleError(f"this version does not sample in {sampling.dtype}")
    settings = SampleSettings(
        num_samples=count,
        batch_size=sampling.batch_size,
        sampler=sampling.sampler or None,
        ema=record.training.ema,
        tuned=sampling.tuned,
        precision=precision,
    )
    for given in (settings, replace(settings, sigmas=tuple(sampling.times))):
        cell = plan_cells(context, run, [sampling.nfe], sampling.seed, given)[0]
        if cell.sampling is not None and _times(cell.sampling) == sampling.times:
            return cell
    raise CannotResampleError(f"NFE {sampling.nfe} at {sampling.times} is not what is planned here")


def _times(plan: Any) -> list[float]:
    return list(plan.sigmas)
