"""What ``cmbench run`` prints: plans, results, what was skipped or failed. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmbench.cli.common import TABLE_WIDTH, debugging, echo_table, table_width
from cmbench.cli.output import echo
from cmbench.records.configuration import configured_method
from cmbench.records.record import Record
from cmbench.reporter import Reporter

if TYPE_CHECKING:
    from cmbench.sweep.kept_plans import KeptCell
    from cmbench.sweep.plans import CellPlan

#: Metrics of the protocol at the end of ``cmbench run``; the report has them all.
SHOWN_METRICS = 4


def print_table(records: Sequence[Record], protocol: Sequence[str]) -> None:
    """Print the sweep's cells: one row each, with metrics of the protocol that fit, and others."""
    measured = dict.fromkeys(name for record in records for name in record.metrics)
    known = [name for name in protocol if name in measured]
    added = [name for name in measured if name not in protocol]
    for count in range(min(len(known), SHOWN_METRICS), -1, -1):
        metrics = known[:count] + added
        header = ["method", "seed", "NFE", *metrics, "images/s", "status"]
        rows = [_result_row(record, metrics) for record in records]
        if count < 2 or table_width(header, rows) <= TABLE_WIDTH:
            break
    echo_table(header, rows)


def _result_row(record: Record, metrics: Sequence[str]) -> list[str]:
    found, speed = record.metrics, record.sampling.images_per_s
    return [
        configured_method(record),
        str(record.training.seed),
        str(record.sampling.nfe),
        *(_number(found[name].value) if name in found else "-" for name in metrics),
        f"{speed:.0f}" if speed else "-",
        record.status,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def print_runs(rows: Iterable[Sequence[str]]) -> None:
    """Print the runs of a plan."""
    echo_table(["run", "parameters", "images", "state"], rows, title="runs")
    echo()


def finished_row(run_id: str, result: Mapping[str, Any]) -> list[str]:
    """Return the row of a run that is finished."""
    return [run_id, f"{result['parameters']:,}", f"{result['images_seen']:,}", "done"]


def print_cells(rows: Iterable[Sequence[str]]) -> None:
    """Print the cells of a plan."""
    echo_table(["cell", "NFE", "seed", "images", "state"], rows, title="cells")


def cell_row(cell: CellPlan | KeptCell, state: str) -> list[str]:
    """Return the row of a cell, which is in ``state`` unless its method declines it."""
    state = f"declined: {cell.declined}" if cell.declined else state
    return [cell.cell, str(cell.nfe), str(cell.seed), f"{cell.num_samples:,}", state]


def warn_of_few(reporter: Reporter, asked: int | None, protocol: int) -> None:
    """Warn that the planned cells have fewer samples than the protocol and are never ranked."""
    if asked is not None and asked < protocol:
        reporter.warn(
            f"{asked:,} samples instead of the protocol's {protocol:,}: never ranked with full ones"
        )


def print_warnings(records: Sequence[Record]) -> None:
    """Print the warnings of records, even when quiet: they decide what a number is worth."""
    warned = Counter((r.method, warning) for r in records for warning in r.warnings)
    for (method, warning), count in warned.items():
        echo(f"warning: {count} cell(s) of {method}: {warning}", err=True)


def print_skipped(records: Sequence[Record]) -> None:
    """Print how many cells each method declined, for each of its reasons."""
    skipped = Counter((r.method, r.reason) for r in records if r.status == "skipped")
    for (method, reason), count in skipped.items():
        echo(f"skipped: {count} cell(s) of {method}: {reason}", err=True)


def print_failed(records: Sequence[Record]) -> bool:
    """Print how many cells failed, for each reason; return whether any did."""
    reasons = Counter(r.reason for r in records if r.status == "failed")
    if any(" failed while " in reason for reason in reasons) and not debugging():
        echo("run again with --debug for the tracebacks", err=True)
    for reason, count in reasons.items():
        echo(f"error: {count} cell(s) failed: {reason}", err=True)
    return bool(reasons)
