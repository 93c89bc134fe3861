"""``cmbench show``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from cmbench.cli.main import workspace_option
from cmbench.errors import MissingError, UserError, first_names
from cmbench.records.record import Record, read_record
from cmbench.records.workspace import Workspace


def find_record(workspace: Workspace, name: str, who: str = "cmbench show") -> Path:
    """Return the record file that ``name`` means: a path, a cell, or the start of one cell."""
    if name.endswith(".json") and Path(name).is_file():
        return Path(name)
    if name.endswith((".json", ".zip")):  # no cell's name ends so
        raise MissingError(who, f"there is no file {name}", remedy="check the path")
    files = sorted(workspace.all_records.glob("*/*.json"))
    matches = [f for f in files if f.stem == name] or [f for f in files if f.stem.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    some = first_names([f.stem for f in matches or files], 5) or "no records yet"
    problem = f"{name!r} fits {len(matches)} records" if matches else f"no record {name!r}"
    raise UserError(
        who,
        problem,
        allowed=some,
        remedy="give a cell's full name: a file's in the folder records, without .json",
    )


@click.command()
@click.argument("cell")
@click.option("--json", "as_json", is_flag=True, help="Print the whole record.")
@workspace_option
def show(cell: str, as_json: bool, workspace: str | None) -> None:
    """Show the record of CELL: its numbers and everything that decides them.

    Numbers are rounded to six digits; --json has all of them.
    """
    path = find_record(Workspace.existing(workspace), cell)
    record = read_record(path)
    if as_json:
        click.echo(record.to_json(), nl=False)
        return
    for line in describe(record):
        # A record is untrusted: nothing in it may move the terminal's cursor or colours.
        click.echo("".join(c if c.isprintable() else "?" for c in line))
    click.echo(f"file         {path}")


def describe(record: Record) -> list[str]:
    """Return a record as lines for a person."""
    s, t = record.sampling, record.training
    lines = [
        f"cell         {record.cell}",
        f"status       {record.status}" + (f": {record.reason}" if record.reason else ""),
        f"method       {record.method} ({record.plugin.distribution} {record.plugin.version})",
        f"dataset      {record.dataset.name} {record.dataset.revision}",
        f"run          {t.run}",
        f"training     {t.images_seen:,} images, {t.parameters:,} parameters, teacher {t.teacher}",
        f"sampling     NFE {s.nfe} (counted {s.nfe_measured}), {s.sampler} at "
        f"{', '.join(f'{x:.4g}' for x in s.times)}, {s.num_samples:,} images, seed {s.seed}",
    ]
    for name, metric in record.metrics.items():
        scale = max((abs(x) for x in (metric.value, *(metric.interval or ())) if x), default=0.0)
        low_high = " ".join(rounded(x, scale) for x in metric.interval or ())
        interval = f"  95 % [{low_high}]" if low_high else ""
        value = "-" if metric.value is None else rounded(metric.value, scale)
        lines.append(f"  {name:<14} {value}{interval}  {metric.key}")
    lines += [f"warning      {w}" for w in record.warnings]
    packages = ", ".join(f"{n} {v}" for n, v in sorted(record.environment.packages.items()))
    lines.append(
        f"environment  python {record.environment.python}, {record.environment.cpu}, "
        f"{record.environment.threads} threads"
    )
    lines += textwrap.wrap(
        packages,
        96,
        initial_indent="packages     ",
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines.append(f"command      {record.command}")
    return lines


def rounded(value: float, scale: float) -> str:
    """Return six digits of ``value``; 0 for what is float64's rounding beside ``scale``."""
    return "0" if abs(value) <= 1e-12 * scale else f"{value:.6g}"
