"""``cmbench show``."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from cmbench.cli.options import workspace_option
from cmbench.cli.output import echo, echo_line
from cmbench.cli.record_files import find_record
from cmbench.errors import UserError
from cmbench.leaderboard.details import extrapolation_of, floor_of, interval_of
from cmbench.records.configuration import configured_method
from cmbench.records.folders import reproductions
from cmbench.records.record import MetricRecord, Record, read_record
from cmbench.records.workspace import Workspace


@click.command()
@click.argument("cell")
@click.option("--json", "as_json", is_flag=True, help="Print the whole record.")
@workspace_option
def show(cell: str, as_json: bool, workspace_dir: str | None) -> None:
    """Show the record of CELL: its numbers and everything that decides them.

    Numbers are rounded to six digits; --json has all of them.
    """
    path = find_record(Workspace.existing(workspace_dir), cell, "cmbench show")
    record = read_record(path)
    if as_json:
        echo(record.to_json(), nl=False)
        return
    for line in describe(record):
        echo_line(line)
    echo_line(f"file         {path}")
    for other in reproductions(path):
        echo_line(f"reproduced   {reproduction_line(other)}")


def reproduction_line(path: Path) -> str:
    """Return the rank metric of a record that agrees with the one shown, and its file."""
    try:
        record = read_record(path)
    except UserError as error:
        return str(error)
    found = record.metrics.get(record.rank_metric)
    value = "-" if found is None or found.value is None else f"{found.value:.7g}"
    machine = record.environment.gpu or record.environment.cpu
    return f"{record.rank_metric} {value} on {machine}, {record.created}: {path}"


def describe(record: Record) -> list[str]:
    """Return a record as lines of text."""
    s, t = record.sampling, record.training
    lines = [
        f"cell         {record.cell}",
        f"status       {record.status}" + (f": {record.reason}" if record.reason else ""),
        f"method       {configured_method(record)} ({_plugin(record)})",
        f"dataset      {record.dataset.name} {record.dataset.revision}",
        f"run          {t.run}",
        f"recipe       {t.recipe or '-'}",
        f"training     {_training(record)}",
        f"sampling     {_cost(record)}, {_levels(record)}, {s.num_samples:,} images, seed {s.seed}",
    ]
    lines += cost_lines(record)
    for name, metric in record.metrics.items():
        lines += metric_lines(name, metric)
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


def _training(record: Record) -> str:
    """Return what is known of the training; of samples that were scored that may be nothing."""
    t = record.training
    counts = ((t.images_seen, "images"), (t.parameters, "parameters"))
    known = [f"{number:,} {what}" for number, what in counts if number]
    return ", ".join([*known, *([f"teacher {t.teacher}"] if t.teacher else [])]) or "not stated"


def _plugin(record: Record) -> str:
    known = f"{record.plugin.distribution} {record.plugin.version}"
    return known if record.plugin.version else "scored samples, no plugin"


def _cost(record: Record) -> str:
    s = record.sampling
    counted = "not counted" if s.nfe_measured is None else f"counted {s.nfe_measured}"
    most = "at most " if s.adaptive else ""
    return f"NFE {most}{s.nfe} ({counted})" if s.nfe else f"NFE not stated ({counted})"


def cost_lines(record: Record) -> list[str]:
    """Return what one image costs, and what training used beyond the run's own evaluations."""
    lines, cost, teacher = [], record.cost, record.training.teacher_cost
    if cost is not None:
        low, high = (1000 * seconds for seconds in cost.latency_range_s)
        flops = f", {cost.flops_per_image:.4g} FLOPs" if cost.flops_per_image is not None else ""
        lines.append(
            f"one image    {1000 * cost.latency_s:.4g} ms (from {low:.4g} to {high:.4g} in"
            f" {cost.latency_repetitions}){flops}"
        )
        memory = cost.peak_memory_bytes
        held = f", {memory / 2**20:,.0f} MiB" if memory is not None else ""
        lines.append(
            f"throughput   {cost.throughput_images_per_s:.4g} images/s in batches of"
            f" {cost.throughput_batch_size}{held}"
        )
        if (decoder := cost.decoder) is not None:
            lines.append(
                f"decoder      {1000 * decoder.latency_s:.4g} ms, {decoder.parameters:,} parameters"
            )
        lines.append(f"hardware     {cost.hardware}")
    if teacher is not None:
        lines.append(
            f"teacher      {teacher.network_evaluations:,} network evaluations,"
            f" {teacher.device_hours:.4g} device-hours"
        )
    return lines


def _levels(record: Record) -> str:
    s = record.sampling
    return s.sampler + (f" at {', '.join(f'{x:.4g}' for x in s.sigmas)}" if s.sigmas else "")


def metric_lines(name: str, metric: MetricRecord) -> list[str]:
    """Return a metric's value with its interval, its extrapolation and its floor."""
    lines = [f"  {name:<14} {estimate(metric.value, interval_of(metric))}  {metric.key}"]
    found, floor = extrapolation_of(metric), floor_of(metric)
    if found is not None:
        text = estimate(found.value, (found.low, found.high))
        doubt = "" if found.reliable else " (unreliable: too few samples)"
        lines.append(f"  {'':<14} {text}  extrapolated to infinitely many samples{doubt}")
    if floor is not None:
        lines.append(f"  {'':<14} {floor.number}  {floor.name}: {floor.meaning}")
    return lines


def estimate(value: float | None, interval: tuple[float, float] | None) -> str:
    """Return a value with its 95 % interval, six digits each."""
    scale = max((abs(x) for x in (value, *(interval or ())) if x), default=0.0)
    text = "-" if value is None else rounded(value, scale)
    if interval is None:
        return text
    return f"{text}  95 % [{rounded(interval[0], scale)} {rounded(interval[1], scale)}]"


def rounded(value: float, scale: float) -> str:
    """Return six digits of ``value``; 0 for what is rounding at the size of ``scale``."""
    return "0" if abs(value) <= 1e-12 * scale else f"{value:.6g}"
