"""A sweep: every method x option value x seed x sampler x NFE asked for, each a record."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cmbench.errors import (
    BusyError,
    InterruptedRunError,
    NonFiniteError,
    PluginError,
    UserError,
    described,
    one_line,
)
from cmbench.records.record import Record, read_record, write_record
from cmbench.sweep.cell_record import base_record
from cmbench.sweep.cells import measure_cell
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Executor, Job
from cmbench.sweep.failures import compiler_failure, method_failure
from cmbench.sweep.missing_gpu import missing_gpu
from cmbench.sweep.planned_runs import plan_runs
from cmbench.sweep.planning import plan_cells
from cmbench.sweep.plans import CellPlan, RunPlan, SampleSettings
from cmbench.sweep.protocol import require_metrics
from cmbench.sweep.run_files import read_result_file
from cmbench.sweep.runs import TrainedRun
from cmbench.sweep.training_run import obtain_run
from cmbench.sweep.tuned_sigmas import with_tuned_sigmas
from cmbench.training.distributed import SharedFailureError
from cmbench.training.memory import sampling_memory_explained


@dataclass(frozen=True)
class SweepRequest:
    """What the user asked for.

    An option of ``overrides`` with several values makes runs of each, see
    :mod:`cmbench.sweep.combinations`.
    """

    methods: Sequence[str]
    dataset: str
    recipe: str | None = None
    nfes: Sequence[int] | None = None
    seeds: Sequence[int] = (0,)
    overrides: Sequence[str] | Mapping[str, Any] = ()
    sampling: SampleSettings = field(default_factory=SampleSettings)
    save_samples: bool = False
    #: Name or path of an imported checkpoint to sample; ``methods`` may be empty then.
    checkpoint: str | None = None
    #: at the noise levels that `cmbench tune-times` found
    tuned: bool = False
    #: each samples every run; none is the sampler of ``sampling``
    samplers: Sequence[str] = ()

    @property
    def settings(self) -> list[SampleSettings]:
        """How every run is sampled: once per sampler."""
        each = [replace(self.sampling, sampler=name) for name in self.samplers]
        return each or [self.sampling]


@dataclass(frozen=True)
class SweepPlan:
    """The jobs, the records that are already there, and why some methods cannot be planned."""

    request: SweepRequest
    jobs: tuple[Job, ...]
    done: Mapping[str, Path]
    refused: tuple[str, ...] = ()

    @property
    def cells(self) -> list[CellPlan]:
        """All cells."""
        return [cell for job in self.jobs for cell in job]

    @property
    def runs(self) -> list[RunPlan]:
        """All runs, teachers first, each once."""
        ordered: dict[str, RunPlan] = {}
        for job in self.jobs:
            chain = []
            run: RunPlan | None = job[0].run
            while run is not None:
                chain.append(run)
                run = run.teacher.run if run.teacher is not None else None
            for run in reversed(chain):
                ordered.setdefault(run.run_id, run)
        return list(ordered.values())


def plan_sweep(context: Context, request: SweepRequest) -> SweepPlan:
    """Resolve everything before any work starts, so that bad input costs nothing.

    A method whose plugin is broken does not stop the others.

    Raises:
        UserError: the input is bad, or no method of the sweep can be planned.
    """
    spec = context.dataset_spec(request.dataset, context.verb)
    jobs: list[Job] = []
    refused: list[PluginError] = []
    methods: Sequence[str | None] = request.methods
    nfes = request.nfes or spec.nfe
    if request.checkpoint is not None and not methods:
        methods = [None]
    for name in methods:
        try:
            runs = plan_runs(
                context,
                name,
                request.dataset,
                request.recipe,
                request.seeds,
                request.overrides,
                request.checkpoint,
            )
        except PluginError as error:
            refused.append(error)
            continue
        jobs += [_cells_of(context, request, run, nfes) for run in runs]
    if not jobs and refused:
        raise refused[0]
    for settings in request.settings:
        _require_some(settings, jobs, nfes)
    done = {}
    for cell in (cell for job in jobs for cell in job):
        path = context.workspace.records(spec.name) / f"{cell.cell}.json"
        if path.exists() and read_record(path).status == "finished":
            done[cell.cell] = path
    return SweepPlan(request, tuple(jobs), done, tuple(map(str, refused)))


def _require_some(settings: SampleSettings, jobs: Sequence[Job], nfes: Sequence[int]) -> None:
    """Raise ``UserError`` if a sampler or noise levels were asked for that no method can use."""
    asked = {
        "--sampler": settings.sampler,
        "--sigmas": ",".join(f"{s:g}" for s in settings.sigmas or ()),
    }
    given = [f"{option} {value}" for option, value in asked.items() if value]
    cells = [cell for job in jobs for cell in job]
    declined = [c for c in cells if c.declined and c.asked[0] == settings.sampler]
    if not given or len(declined) < len(jobs) * len(nfes):
        return
    reasons = {f"{c.run.spec.name} at NFE {c.nfe}: {c.declined}": None for c in declined}
    raise UserError(
        " ".join(given),
        f"no cell supports these settings: {'; '.join(reasons)}",
        remedy="choose another sampler, noise levels, --nfe or method",
    )


def _cells_of(context: Context, request: SweepRequest, run: RunPlan, nfes: Sequence[int]) -> Job:
    """Return a run's cells, each once; a record's sampling seed is its training seed."""
    cells: list[CellPlan] = []
    for settings in request.settings:
        if not request.tuned:
            cells += plan_cells(context, run, nfes, run.seed, settings)
            continue
        for nfe in nfes:
            tuned = with_tuned_sigmas(context, run, nfe, settings)
            cells += plan_cells(context, run, [nfe], run.seed, tuned)
    return tuple({cell.cell: cell for cell in cells}.values())


def execute(context: Context, plan: SweepPlan, executor: Executor) -> list[Record]:
    """Carry out what is not done; return the record of every cell, in the plan's order.

    Of several processes the leader writes and returns the records, the others return none.

    Raises:
        BusyError: another process holds one of the runs; all other cells are done.
        InterruptedRunError: a stop was asked for; cells that were finished have their records.
    """
    context.world.lead(context.workspace.require_writable)
    # What is done is for the leader to say: another process may have looked a moment later.
    done = set(context.world.lead(lambda: sorted(plan.done)))
    leads = context.world.leads
    if leads and (line := missing_gpu(context, plan.runs, plan.cells, done)):
        context.reporter.warn(line)
    if any(cell.sampling is not None and cell.cell not in done for cell in plan.cells):
        further = plan.request.sampling.metrics
        context.world.lead(lambda: require_metrics(context, plan.request.dataset, further))
    records: dict[str, Record] = {n: read_record(plan.done[n]) for n in done if leads}
    busy: list[BusyError] = []
    carried_out: set[str] = set()

    def work(job: Job) -> None:
        carried_out.update(cell.cell for cell in job)
        open_cells = [cell for cell in job if cell.cell not in done]
        try:
            for record in outcomes(context, plan.request, open_cells):
                if leads:
                    records[record.cell] = keep(context, record)
        except BusyError as error:
            busy.append(error)

    executor.run(plan.jobs, work)
    _require_carried_out(plan, carried_out, executor)
    for error in busy[1:]:
        context.reporter.warn(str(error))
    if busy:
        raise busy[0]
    if not leads:
        return []
    return [records[cell.cell] for cell in plan.cells]


def _require_carried_out(plan: SweepPlan, carried_out: set[str], executor: Executor) -> None:
    """Raise ``PluginError`` if an executor has left out jobs or worked on others."""
    cells = {cell.cell for cell in plan.cells}
    if cells != carried_out:
        raise PluginError(
            f"executor {type(executor).__name__}",
            f"{len(cells - carried_out)} of {len(cells)} cells were not worked on, "
            f"{len(carried_out - cells)} others were",
            allowed="one call of work for every job, with the job itself",
            remedy="fix the plugin and start again: the other cells have their records",
        )


def outcomes(context: Context, request: SweepRequest, cells: Job) -> Iterator[Record]:
    """Yield the record of each cell as it is done; a failure is a record, not the sweep's end."""
    wanted = [cell for cell in cells if cell.sampling is not None]
    for cell in cells:
        if cell.broken:
            yield base_record(context, cell, "failed", reason=cell.broken)
        elif cell.sampling is None:
            yield base_record(context, cell, "skipped", reason=cell.declined)
    if not wanted:
        return
    try:
        variants = {cell.sampling.variant for cell in wanted if cell.sampling is not None}
        trained = obtain_run(context, wanted[0].run, variants)
    except (BusyError, InterruptedRunError):
        raise  # nothing is wrong with the cells: they are for later
    except (Exception, SystemExit) as error:
        if context.world.size > 1 and not isinstance(error, NonFiniteError | SharedFailureError):
            raise  # perhaps in this process only: the launcher ends the others
        reason = reason_of(context, wanted[0].run, "training", error)
        context.reporter.warn(
            f"run {wanted[0].run.run_id} failed; the reason is printed at the end"
        )
        yield from (base_record(context, cell, "failed", reason=reason) for cell in wanted)
    else:
        for cell in wanted:
            yield from measured(context, request, trained, cell)


def measured(
    context: Context, request: SweepRequest, trained: TrainedRun, cell: CellPlan
) -> Iterator[Record]:
    """Yield the cell's record in the leading process; the others wait for it, and yield none."""
    made: list[Record] = []
    context.world.lead(lambda: made.append(attempt(context, request, trained, cell)))
    yield from made


def attempt(context: Context, request: SweepRequest, trained: TrainedRun, cell: CellPlan) -> Record:
    """Measure one cell; what goes wrong becomes the record's reason."""
    try:
        with sampling_memory_explained(context.device, cell.batch_size):
            return measure_cell(context, trained, cell, save_samples=request.save_samples)
    except InterruptedRunError:
        raise
    except (Exception, SystemExit) as error:
        reason = reason_of(context, cell.run, "sampling", error)
    context.reporter.warn(f"cell {cell.cell} failed; the reason is printed at the end")
    return base_record(context, cell, "failed", trained, reason)


def reason_of(context: Context, run: RunPlan, stage: str, error: Exception | SystemExit) -> str:
    """Return why a cell failed, in one line; the traceback goes to the reporter under --debug."""
    if context.debug:
        context.reporter.note("".join(traceback.format_exception(error)))
    shared = error if isinstance(error, SharedFailureError) else None
    what = shared.what if shared else described(error, 2000)
    if line := compiler_failure(run.spec.name, stage, what):
        return line
    if shared and not shared.foreseen:
        return one_line(
            f"method {run.spec.name!r} failed while {stage} in {shared.where}: {shared.what}"
        )
    if isinstance(error, UserError):
        return str(error)
    return method_failure(run.spec.name, stage, error)


def keep(context: Context, record: Record) -> Record:
    """Write a record as soon as it is there, so that a later kill loses nothing."""
    folder = context.workspace.records(record.dataset.name)
    path = folder / f"{record.cell}.json"
    if path.exists():
        there = read_record(path)
        if there.status == "finished":  # records are immutable: the first one stays
            context.reporter.note(f"{record.cell}: another process finished it meanwhile")
            return there
    write_record(record, folder)
    context.notify("cmbench_cell_finished", record=record)
    return record


def is_trained(context: Context, run: RunPlan) -> bool:
    """Say whether a run is complete."""
    if run.imported is not None:
        return True
    return read_result_file(context.workspace.run(run.run_id), run.run_id) is not None
