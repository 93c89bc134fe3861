"""``cmbench compare``."""

from __future__ import annotations

from pathlib import Path

import click

from cmbench.cli.export import record_folders
from cmbench.cli.main import workspace_option
from cmbench.cli.results import echo_table
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_MISSING, EXIT_OK, UserError
from cmbench.leaderboard.compare import Comparison, compare, select
from cmbench.leaderboard.rows import Row, aggregate
from cmbench.records.record import Record, read_records
from cmbench.records.workspace import Workspace


def workspace_rows(place: Workspace, dataset: str | None) -> tuple[list[Row], list[UserError]]:
    """Return the measured rows of a workspace, or of one of its datasets, and unreadable records.

    Raises:
        UserError: a dataset without records; lists those with some.
    """
    cells: list[tuple[Path, Record]] = []
    errors: list[UserError] = []
    for folder in record_folders(place, (dataset,) if dataset else ()).values():
        for path, found in read_records(folder):
            if isinstance(found, Record):
                cells.append((path, found))
            else:
                errors.append(found)
    return aggregate(cells), errors


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--dataset", "-d", metavar="D", default=None, help="Only this dataset.")
@workspace_option
def compare_(a: str, b: str, dataset: str | None, workspace: str | None) -> int:
    """Compare A with B: paired difference over seeds with shared noise, interval, verdict.

    A and B are METHOD, METHOD:RECIPE, METHOD:RECIPE:SAMPLER or the id of a row. Differences are
    A minus B with 95 % intervals; p-values carry Holm's correction over the settings compared.

    \b
    Exit codes: 0 A is nowhere worse; 1 B is better somewhere or a record could not be read;
    4 nothing could be compared.
    """
    rows, errors = workspace_rows(Workspace.existing(workspace), dataset)
    for error in errors:
        click.echo(f"unreadable: {error}", err=True)
    found = compare(select(rows, a), select(rows, b))
    echo_table(
        ["dataset", "NFE", "metric", "A", "B", "A - B", "95 % interval", "p", "pairs", "verdict"],
        [table_row(item) for item in found],
    )
    for item in found:
        if item.reason:
            click.echo(f"{item.a.dataset} NFE {item.a.nfe_text}: {item.reason}", err=True)
    verdicts = {item.verdict for item in found}
    if verdicts == {"not comparable"}:
        return EXIT_MISSING
    return EXIT_CELLS_FAILED if "B is better" in verdicts or errors else EXIT_OK


def table_row(item: Comparison) -> list[str]:
    """Return a comparison as the cells of its line."""
    x, y = item.a.rank_measurement, item.b.rank_measurement
    numbers = [f"{m.mean:.5g}" if m else "-" for m in (x, y)]
    difference = item.difference
    if difference is None or item.p_adjusted is None:
        tail = ["-", "-", "-", "-", item.verdict]
    else:
        pairs = str(difference.pairs) if difference.pairs else "unpaired"
        tail = [
            f"{difference.mean:+.4g}",
            f"[{difference.low:.4g}, {difference.high:.4g}]",
            f"{item.p_adjusted:.3g}",
            pairs,
            item.verdict,
        ]
    return [item.a.dataset, item.a.nfe_text, item.metric, *numbers, *tail]
