"""A study's result as Markdown: what was compared, every number, what training logged."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median, stdev

from cmbench.records.studies import StudyResult
from cmbench.report.numbers import format_count, format_number


def summary(study: StudyResult, pictures: Sequence[str]) -> str:
    """Return the page: the claim, the pictures, and a table for each of them.

    Args:
        study: what was asked, and its arms with their records.
        pictures: file names of the plots, in the order of the study's ``plots``; may be empty.
    """
    lines = [f"# {escape(study.title)}", "", escape(study.claim), ""]
    if study.source:
        lines += [f"Source of the claim: {escape(study.source)}.", ""]
    lines += [
        f"Dataset `{study.dataset}`, {study.seeds} training seed(s). To repeat: "
        f"`cmbench study {study.argument}`.",
        "",
    ]
    shown = list(pictures) + [""] * (len(study.plots) - len(pictures))
    for plot, picture in zip(study.plots, shown, strict=True):
        lines += [f"## {escape(plot.quantity)}", ""]
        if picture:
            lines += [f"![{escape(plot.quantity)}]({picture})", ""]
        table = metric_table if plot.kind == "metric" else curve_table
        lines += [*table(study, plot.quantity), ""]
    return "\n".join([*lines, *failures(study)]).rstrip() + "\n"


def metric_table(study: StudyResult, metric: str) -> list[str]:
    """Return one line per arm and NFE: mean, every seed's value, and what training cost."""
    lines = [
        f"| arm | method | NFE | {metric} | seeds | training images | evaluations |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for result in study.arms:
        training = result.records[0].training
        for nfe in result.nfes:
            values = result.values(metric, nfe)
            lines.append(
                f"| {escape(result.arm.name)} | `{result.arm.method}` | {nfe} | "
                f"{mean_text(values)} | {', '.join(format_number(v) for v in values) or '–'} | "
                f"{format_count(training.images_seen)} | "
                f"{format_count(training.network_evaluations)} |"
            )
    return lines


def curve_table(study: StudyResult, scalar: str) -> list[str]:
    """Return one line per arm: what the logged scalar did over training, all seeds together."""
    lines = ["| arm | runs | median | last tenth, mean | largest |", "|---|---:|---:|---:|---:|"]
    for result in study.arms:
        curves = study.curves(result, scalar)
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


def failures(study: StudyResult) -> list[str]:
    """Return a section on the cells that have no numbers, or nothing."""
    lines = [
        f"- {escape(result.arm.name)}, seed {r.training.seed}, NFE {r.sampling.nfe}: {r.status}: "
        f"{escape(r.reason)}"
        for result in study.arms
        for r in result.records
        if r.status != "finished"
    ]
    return ["## Not measured", "", *lines] if lines else []


def escape(text: str) -> str:
    """Return text that stays text in Markdown tables."""
    plain = " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("|", "\\|")
