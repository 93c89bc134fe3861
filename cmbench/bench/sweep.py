"""A sweep: every method x seed x NFE asked for, each cell ending as a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cmbench.bench.cells import failed_record, measure_cell, skipped_record
from cmbench.bench.context import Context
from cmbench.bench.executors import Executor, Job
from cmbench.bench.planning import CellPlan, RunPlan, SampleSettings, plan_cells, plan_run
from cmbench.bench.record import Record, read_record, write_record
from cmbench.bench.runs import TrainedRun, obtain_run, read_result
from cmbench.errors import BusyError, InterruptedRunError, UserError


@dataclass(frozen=True)
class SweepRequest:
    """What the user asked for."""

    methods: Sequence[str]
    dataset: str
    recipe: str | None = None
    nfes: Sequence[int] | None = None
    seeds: Sequence[int] = (0,)
    overrides: Sequence[str] = ()
    sampling: SampleSettings = field(default_factory=SampleSettings)
    save_samples: bool = False


@dataclass(frozen=True)
class SweepPlan:
    """The jobs, and the records that are already there."""

    jobs: tuple[Job, ...]
    done: Mapping[str, Path]

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
                run = run.teacher
            for run in reversed(chain):
                ordered.setdefault(run.run_id, run)
        return list(ordered.values())


def plan_sweep(context: Context, request: SweepRequest) -> SweepPlan:
    """Resolve everything before any work starts, so that bad input costs nothing."""
    spec = context.plugins.datasets.get(request.dataset, "cmbench run")
    jobs: list[Job] = []
    done: dict[str, Path] = {}
    for name in request.methods:
        for seed in request.seeds:
            run = plan_run(
                context, name, request.dataset, request.recipe, seed, request.overrides
            )
            cells = plan_cells(context, run, request.nfes or spec.nfe, seed, request.sampling)
            jobs.append(tuple(cells))
            for cell in cells:
                path = context.workspace.records(request.dataset) / f"{cell.cell}.json"
                if path.exists() and read_record(path).status == "finished":
                    done[cell.cell] = path
    return SweepPlan(tuple(jobs), done)


def execute(
    context: Context, request: SweepRequest, plan: SweepPlan, executor: Executor
) -> list[Record]:
    """Carry out what is not done; return the record of every cell, in the plan's order."""
    context.workspace.require_writable()
    records: dict[str, Record] = {name: read_record(path) for name, path in plan.done.items()}

    def work(job: Job) -> None:
        open_cells = [cell for cell in job if cell.cell not in plan.done]
        if open_cells:
            for record in work_on_job(context, request, open_cells):
                records[record.cell] = record

    executor.run(plan.jobs, work)
    return [records[cell.cell] for cell in plan.cells]


def work_on_job(context: Context, request: SweepRequest, cells: Job) -> list[Record]:
    """Train or find the run, measure its cells; a failure is a record, not the end of the sweep."""
    wanted = [cell for cell in cells if cell.sampling is not None]
    records = [skipped_record(context, cell) for cell in cells if cell.sampling is None]
    if wanted:
        try:
            trained = obtain_run(context, wanted[0].run)
        except (BusyError, InterruptedRunError):
            raise  # nothing is wrong with the cells: they are for later
        except UserError as error:
            context.reporter.warn(str(error))
            records += [failed_record(context, cell, str(error)) for cell in wanted]
        except Exception as error:
            reason = plugin_failure(wanted[0].run, "training", error)
            context.reporter.warn(reason)
            records += [failed_record(context, cell, reason) for cell in wanted]
        else:
            records += [attempt(context, request, trained, cell) for cell in wanted]
    folder = context.workspace.records(request.dataset)
    for record in records:
        write_record(record, folder)
        context.notify("cmbench_cell_finished", record=record)
    return records


def attempt(
    context: Context, request: SweepRequest, trained: TrainedRun, cell: CellPlan
) -> Record:
    """Measure one cell; what goes wrong becomes the record's reason."""
    try:
        return measure_cell(context, trained, cell, save_samples=request.save_samples)
    except UserError as error:
        reason = str(error)
    except Exception as error:
        reason = plugin_failure(cell.run, "sampling", error)
    context.reporter.warn(f"{cell.cell}: {reason}")
    return failed_record(context, cell, reason, trained)


def plugin_failure(run: RunPlan, stage: str, error: Exception) -> str:
    """Return one line for an exception that escaped from a method."""
    text = " ".join(str(error).split())[:500]
    return f"method {run.spec.name!r} failed while {stage}: {type(error).__name__}: {text}"


def is_trained(context: Context, run: RunPlan) -> bool:
    """Say whether a run is complete."""
    return read_result(run, context.workspace.run(run.run_id)) is not None
