"""``cmbench compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from cmbench.cli.common import echo_table
from cmbench.cli.options import workspace_option
from cmbench.cli.output import echo_line
from cmbench.cli.record_files import Readings, echo_unreadable, record_folders
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_MISSING, EXIT_OK
from cmbench.leaderboard.compare import RowComparison, compare
from cmbench.leaderboard.labels import row_labels
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.leaderboard.selection import select
from cmbench.records.record import Record
from cmbench.records.workspace import Workspace
from cmbench.report.numbers import format_difference


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--dataset", "-d", metavar="D", help="Only this dataset.")
@workspace_option
def compare_(a: str, b: str, dataset: str | None, workspace_dir: str | None) -> int:
    """Compare A with B: paired difference over seeds with shared noise, interval, verdict.

    A and B are METHOD, METHOD:RECIPE, METHOD:RECIPE:SAMPLER or the id of a row. Options in brackets
    select among rows of one recipe; without them, the row that differs from its recipe in nothing
    comes first, and METHOD:RECIPE[] selects it alone. Differences are A minus B, in percent of B
    for Fréchet distances (from means of logarithms). Interval and p-value agree: both are those of
    Holm's procedure at 5 % over the settings compared.

    \b
    cmbench compare M:demo N:demo
    cmbench compare 'M:demo[optimizer.lr=1e-2]' 'M:demo[optimizer.lr=1e-3,sigmas=80,0.8]'

    \b
    Exit codes: 0 A is nowhere worse; 1 B is better somewhere or a record could not be read;
    4 nothing could be compared.
    """
    folders = record_folders(Workspace.existing(workspace_dir), (dataset,) if dataset else ())
    readings = Readings()
    found = [item for name, folder in folders.items() for item in readings.read(folder, name)]
    rows = aggregate([(path, record) for path, record in found if isinstance(record, Record)])
    echo_unreadable(readings.errors)
    compared = compare(select(rows, a), select(rows, b), rows)
    labels = row_labels(rows)
    echo_side("A", [item.a for item in compared], labels)
    echo_side("B", [item.b for item in compared], labels)
    parts: dict[tuple[str, str], list[RowComparison]] = {}
    for item in compared:
        parts.setdefault((item.a.dataset, item.metric), []).append(item)
    for title, items in parts.items():
        header = ["NFE", "A", "B", "A - B", "p", "pairs", "verdict"]
        echo_table(header, map(table_row, items), title=", ".join(title))
    for item in compared:
        if item.reason:
            echo_line(f"{item.a.dataset} NFE {item.a.nfe_text}: {item.reason}", err=True)
    verdicts = {item.verdict for item in compared}
    if verdicts == {"not comparable"}:
        return EXIT_MISSING
    return EXIT_CELLS_FAILED if "B is better" in verdicts or readings.errors else EXIT_OK


def echo_side(side: str, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    """Print the names of the rows that one side of a comparison means."""
    names = dict.fromkeys(labels[row.id] for row in rows)
    echo_line(f"{side}: {'; '.join(names)}")


def table_row(item: RowComparison) -> list[str]:
    """Return a comparison as one line of the table."""
    x, y = item.a.rank_measurement, item.b.rank_measurement
    numbers = [f"{m.mean:.5g}" if m else "-" for m in (x, y)]
    difference = item.difference
    if difference is None:
        tail = ["-", "-", "-", item.verdict]
    else:
        tail = [
            format_difference(difference, interval=True),
            f"{difference.p:.3g}",
            "unpaired" if difference.unpaired else str(difference.pairs),
            item.verdict,
        ]
    return [item.a.nfe_text, *numbers, *tail]
