"""``cmbench run`` of a sweep that is finished: its records need no tensor. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from cmbench.cli.best import print_best
from cmbench.cli.common import reporter_for
from cmbench.cli.output import echo
from cmbench.cli.report import render_workspace
from cmbench.cli.run import RunOptions
from cmbench.cli.run_tables import (
    cell_row,
    finished_row,
    print_cells,
    print_runs,
    print_skipped,
    print_table,
    print_warnings,
    warn_of_few,
)
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.record import Record
from cmbench.records.workspace import Workspace
from cmbench.sweep.kept_plans import find_plan, plan_key
from cmbench.sweep.run_files import read_result_file

#: The options that do not decide the plan; a new option decides it unless it is added here.
_DECIDES_NOTHING = frozenset(
    {
        *("workspace_dir", "device", "threads", "quiet", "time_limit_s", "batch_size"),
        *("save_samples", "compiled", "split", "executor", "dry_run", "no_report"),
    }
)


def key_of(options: RunOptions, plugins: PluginManager) -> str | None:
    """Return the key of the options' plan; None for sweeps whose plans are not kept."""
    registered = options.dataset in plugins.datasets.specs
    if options.checkpoint is not None or options.tuned or not registered:
        return None
    request = {k: v for k, v in asdict(options).items() if k not in _DECIDES_NOTHING}
    return plan_key(request, plugins)


def print_finished(options: RunOptions, plugins: PluginManager) -> bool:
    """Print a finished sweep, or its plan; return whether it is known to be finished."""
    key, workspace = key_of(options, plugins), Workspace.choose(options.workspace_dir)
    kept = find_plan(workspace, key) if key is not None else None
    records = kept.records(workspace) if kept is not None else None
    # What the machine lacks, or what is still to be written, is for those who carry out.
    plain = options.device in ("auto", "cpu") and not (options.split or options.save_samples)
    if kept is None or records is None or not plain:
        return False
    results = {run: read_result_file(workspace.run(run), run) for run in kept.runs}
    if options.dry_run and None in results.values():
        return False
    spec = plugins.datasets.specs[kept.dataset]
    reporter = reporter_for(options.quiet, plugins)
    if options.dry_run:
        warn_of_few(reporter, options.samples, spec.num_samples)
        print_runs(finished_row(run, result) for run, result in results.items() if result)
        print_cells(cell_row(cell, "done") for cell in kept.cells)
        return True
    pages = () if options.no_report else [kept.dataset]
    print_results(records, workspace, spec, plugins, pages)
    print_warnings(records)
    print_skipped(records)
    return True


def print_results(
    records: Sequence[Record],
    workspace: Workspace,
    spec: DatasetSpec,
    plugins: PluginManager,
    pages: Sequence[str],
) -> None:
    """Render the ``pages`` of datasets, then print the cells of a sweep and what is best.

    In this order: whoever reads may stop reading.
    """
    written = render_workspace(workspace, pages, plugins)[0] if pages else []
    print_table(records, spec.metrics)
    print_best(records)
    if written:
        echo(f"report: {written[0]}")
