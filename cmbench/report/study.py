"""A study's result as Markdown: what was compared, every number, what training logged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from cmbench.report.numbers import format_count, format_number
from cmbench.sweep.studies import ArmResult, PlotTable, Study, curves_of, values_of


def summary(
    study: Study,
    results: Sequence[ArmResult],
    folder: Path,
    pictures: Sequence[str],
    rank_metric: str,
) -> str:
    """Return the page: the claim, the pictures, and a table for each of them.

    Args:
        study: what was asked.
        results: its arms with their records.
        folder: where the records lie, with their training curves.
        pictures: file names of the plots, in the order of the study's ``plots``.
        rank_metric: the metric of plots that name none.
    """
    table = study.table
    lines = [f"# {escape(table.title)}", "", escape(table.claim), ""]
    if table.source:
        lines += [f"Source of the claim: {escape(table.source)}.", ""]
    lines += [
        f"Dataset `{table.dataset}`, {table.seeds} training seed(s). Again: "
        f"`cmbench study {study.argument}`.",
        "",
    ]
    shown = list(pictures) + [""] * (len(table.plots) - len(pictures))
    for plot, picture in zip(table.plots, shown, strict=True):
        what = (plot.metric or rank_metric) if plot.kind == "metric" else plot.scalar
        lines += [f"## {escape(what)}", ""]
        if picture:
            lines += [f"![{escape(what)}]({picture})", ""]
        if plot.kind == "metric":
            lines += metric_table(results, plot.metric or rank_metric)
        else:
            lines += curve_table(results, folder, plot)
        lines.append("")
    return "\n".join([*lines, *failures(results)]).rstrip() + "\n"


def metric_table(results: Sequence[ArmResult], metric: str) -> list[str]:
    """Return one line an arm and NFE: mean, every seed's value, and what training cost."""
    lines = [
        f"| arm | method | NFE | {metric} | seeds | training images | evaluations |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for result in results:
        for nfe in nfes_of([result]):
            values = values_of(result, metric, nfe)
            training = result.records[0].training
            lines.append(
                f"| {escape(result.arm.name)} | `{result.arm.method}` | {nfe} | "
                f"{mean_text(values)} | {', '.join(format_number(v) for v in values) or '–'} | "
                f"{format_count(training.images_seen)} | "
                f"{format_count(training.network_evaluations)} |"
            )
    return lines


def curve_table(results: Sequence[ArmResult], folder: Path, plot: PlotTable) -> list[str]:
    """Return one line an arm: what the logged quantity did over training, all seeds together."""
    lines = ["| arm | runs | median | last tenth, mean | largest |", "|---|---:|---:|---:|---:|"]
    for result in results:
        curves = curves_of(folder, result, plot.scalar)
        values = [y for curve in curves for _, y in curve]
        if not values:
            lines.append(f"| {escape(result.arm.name)} | 0 | – | – | – |")
            continue
        ends = [y for curve in curves for x, y in curve if x >= 0.9 * curve[-1][0]]
        lines.append(
            f"| {escape(result.arm.name)} | {len(curves)} | {format_number(median(values))} | "
            f"{format_number(fmean(ends))} | {format_number(max(values))} |"
        )
    return lines


def mean_text(values: Sequence[float]) -> str:
    """Return ``mean ± standard deviation over seeds``; never the smallest of several."""
    if not values:
        return "–"
    spread = f" ± {format_number(stdev(values), 2)}" if len(values) > 1 else ""
    return f"{format_number(fmean(values))}{spread}"


def failures(results: Sequence[ArmResult]) -> list[str]:
    """Return a section on the cells that have no numbers, or nothing."""
    lines = [
        f"- {escape(result.arm.name)}, seed {r.training.seed}, NFE {r.sampling.nfe}: {r.status}: "
        f"{escape(r.reason)}"
        for result in results
        for r in result.records
        if r.status != "finished"
    ]
    return ["## Not measured", "", *lines] if lines else []


def nfes_of(results: Iterable[ArmResult]) -> list[int]:
    """Return the NFE of the results' records, ascending, each once."""
    return sorted({record.sampling.nfe for result in results for record in result.records})


def escape(text: str) -> str:
    """Return text that stays text in Markdown tables."""
    plain = " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("|", "\\|")
