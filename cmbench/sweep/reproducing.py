"""Making a record's images again, for `cmbench verify`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cmbench.metrics.catalog import all_metrics
from cmbench.records.record import DTYPES, LABELS, Record
from cmbench.records.reproduction import CannotReproduceError, Reproduce, Reproduction
from cmbench.records.workspace import Workspace
from cmbench.sweep.cells import measure_cell, reproduce_first
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells
from cmbench.sweep.plans import CellPlan, RunPlan, SampleSettings
from cmbench.sweep.protocol import open_protocol
from cmbench.sweep.runs import TrainedRun, read_result
from cmbench.sweep.teachers import saved_plan


def reproducer(context: Context) -> Reproduce:
    """Return a function that makes the images of a record again.

    The run must be in the context's workspace; nothing is written there.
    """

    def reproduce(record: Record, full: bool) -> Reproduction:
        if record.kind != "measured":
            raise CannotReproduceError(f"{record.kind}: its generator was not trained here")
        trained = find_run(context, record)
        cell = find_cell(context, trained.plan, record)
        here = open_protocol(context, record.dataset.name).record
        # Not the reference's moments, whose last bits depend on the machine: keys name the rest.
        for part in ("name", "revision", "sha256", "extractor", "extractor_sha256"):
            if getattr(here, part) != getattr(record.dataset, part):
                raise CannotReproduceError(f"the dataset or extractor here has another {part}")
        if not full:
            return reproduce_first(context, trained, cell)
        return _measure_again(context, trained, cell, record)

    return reproduce


def _measure_again(
    context: Context, trained: TrainedRun, cell: CellPlan, record: Record
) -> Reproduction:
    """Measure a cell again in a workspace of its own."""
    with TemporaryDirectory(prefix="cmbench-verify-") as name:
        place = Workspace(Path(name))
        made = measure_cell(replace(context, workspace=place), trained, cell)
        grid = place.records(record.dataset.name) / made.artifacts["grid"].file
        picture = grid.read_bytes()
    if record.training.snapshots not in ({}, made.training.snapshots):
        raise CannotReproduceError("the run's snapshots here are not those of the record")
    assert made.first_samples is not None
    return Reproduction(made.first_samples, picture, made.metrics)


def find_run(context: Context, record: Record) -> TrainedRun:
    """Return the finished run of ``record``, if its configuration still means the same."""
    saved = {"method": record.method, "dataset": record.dataset.name}
    plan = saved_plan(context, {**record.training.model_dump(), **saved})
    if plan.config_sha256 != record.training.config_sha256:
        raise CannotReproduceError("this version reads the record's configuration differently")
    trained = read_result(plan, context.workspace.run(plan.run_id))
    if trained is None:
        raise CannotReproduceError(f"the run {plan.run_id} is not in {context.workspace.root}")
    return trained


def find_cell(context: Context, run: RunPlan, record: Record) -> CellPlan:
    """Return the cell with the record's sampler, noise levels and seed."""
    sampling = record.sampling
    precision = {dtype: name for name, dtype in DTYPES.items()}.get(sampling.dtype)
    if precision is None:
        raise CannotReproduceError(f"this version does not sample in {sampling.dtype}")
    labels = {text: name for name, text in LABELS.items()}.get(sampling.labels or LABELS["drawn"])
    if labels is None:
        raise CannotReproduceError(f"this version does not choose labels by {sampling.labels}")
    settings = SampleSettings(
        num_samples=sampling.num_samples,
        batch_size=sampling.batch_size,
        sampler=sampling.sampler or None,
        ema=record.training.ema,
        tuned=sampling.tuned,
        precision=precision,
        labels=labels,
        metrics=tuple(n for n in record.metrics if n in all_metrics(context.plugins)),
    )
    for given in (settings, replace(settings, sigmas=tuple(sampling.sigmas))):
        cell = plan_cells(context, run, [sampling.nfe], sampling.seed, given)[0]
        if cell.sampling is not None and list(cell.sampling.sigmas) == sampling.sigmas:
            return cell
    raise CannotReproduceError(
        f"NFE {sampling.nfe} at {sampling.sigmas} is not what is planned here"
    )
