"""Render leaderboard pages: HTML, Markdown, CSV and LaTeX from the same rows."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmbench import __version__
from cmbench.bench.record import Record
from cmbench.errors import UserError
from cmbench.files import write_atomically
from cmbench.leaderboard.best import best_values
from cmbench.leaderboard.joins import join_reported
from cmbench.leaderboard.ranking import rank_all
from cmbench.leaderboard.rows import Row, aggregate, unfinished
from cmbench.leaderboard.sections import Section, sections
from cmbench.report.columns import (
    Cell,
    Column,
    Findings,
    conditioning,
    metric_title,
    table_columns,
)
from cmbench.report.csvtable import csv_cells, csv_header
from cmbench.report.environment import Templates
from cmbench.report.gallery import Gallery, build_gallery
from cmbench.report.payload import Interner, row_payload, script_json

#: What :func:`cmbench.bench.record.read_records` yields.
Found = tuple[Path, Record | UserError]
Charts = Callable[[str, Sequence[Mapping[str, Any]]], Iterable[Mapping[str, str]]]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_TABLES = (("md", "table.md.j2"), ("csv", "table.csv.j2"), ("tex", "table.tex.j2"))
_SCRIPTS = ("chart.js", "views.js", "table.js", "page.js")


@dataclass(frozen=True)
class Line:
    """One row with its printed cells, in column order."""

    row: Row
    index: int
    section: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class TableSection:
    """A section with its printed lines."""

    section: Section
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Filter:
    """One menu of check boxes."""

    key: str
    title: str
    values: Sequence[str]


@dataclass(frozen=True)
class Page:
    """Everything that the templates of one dataset see."""

    dataset: str
    columns: Sequence[Column]
    sections: Sequence[TableSection]
    unfinished: Sequence[tuple[Path, Record]]
    unreadable: Sequence[tuple[Path, str]]
    gallery: Gallery
    floors: Sequence[float]
    rank_metric: str
    command: str
    version: str = __version__

    @property
    def csv_header(self) -> list[str]:
        """Column names of the CSV: plain numbers, so metrics have mean, low, high, n and values."""
        return csv_header(self.columns)

    def csv_cells(self, line: Line) -> list[object]:
        """The CSV's cells of one line."""
        return csv_cells(line.row, line.section, line.cells, self.columns)

    @property
    def lines(self) -> list[Line]:
        """All lines in the order of the page."""
        return [line for section in self.sections for line in section.lines]

    @property
    def filters(self) -> list[Filter]:
        """What the reader can filter by: everything with at least two values."""
        rows = [line.row for line in self.lines]
        found = [
            Filter("family", "Family", sorted({row.family or "other" for row in rows})),
            Filter("kind", "Kind", sorted({row.kind for row in rows})),
            Filter("conditional", "Labels", sorted({conditioning_filter(row) for row in rows})),
            Filter("nfe", "NFE", [t for _, t in sorted({_nfe_filter(row) for row in rows})]),
        ]
        return [item for item in found if len(item.values) > 1]

    @property
    def shown(self) -> list[tuple[int, Column]]:
        """Index and column of those visible from the start."""
        return [(i, c) for i, c in enumerate(self.columns) if c.shown]


def render(
    records_by_dataset: Mapping[str, Iterable[Found]],
    out_dir: Path,
    *,
    templates: Path | None = None,
    extra_columns: Mapping[str, str] | None = None,
    extra_charts: Charts | None = None,
    published: Mapping[str, Sequence[Row]] | None = None,
    command: str = "cmbench report",
) -> list[Path]:
    """Write ``<dataset>.html``, ``.md``, ``.csv`` and ``.tex`` for every dataset, and an index.

    Args:
        records_by_dataset: dataset name to the pairs that ``read_records`` yields; an error in
            place of a record is listed on the page with its reason.
        out_dir: folder to write to; files are replaced atomically.
        templates: folder whose files replace built-in templates of the same name.
        extra_columns: title to dotted record path (hook ``cmbench_report_columns``).
        extra_charts: called with the dataset and its rows; returns mappings with ``title`` and
            ``svg`` (hook ``cmbench_report_charts``).
        published: reported rows by dataset.
        command: the command that makes the pages again, shown on them.

    Returns:
        The paths written, the HTML page of each dataset first.

    Raises:
        UserError: if a template fails (names template and line) or a file cannot be written.
    """
    engine = Templates(templates)
    published = published or {}
    written: list[Path] = []
    pages = []
    for dataset in sorted({*records_by_dataset, *published}):
        if not _NAME.fullmatch(dataset):
            raise UserError(
                f"dataset {dataset!r}", "is no valid name",
                allowed="letters, digits and . _ + -", remedy="rename the records' folder",
            )
        page = build_page(
            dataset, records_by_dataset.get(dataset, ()), published.get(dataset, ()),
            extra_columns or {}, command,
        )
        pages.append(page)
        written += _write_page(page, engine, out_dir, extra_charts)
    names = {page.dataset for page in pages}
    others = sorted(p.stem for p in out_dir.glob("*.html") if p.stem not in {*names, "index"})
    context = {"pages": pages, "others": others, "command": command}
    index = _with_csp(engine, "index.html.j2", context, scripts=())
    written.append(_write(out_dir / "index.html", index))
    return written


def build_page(
    dataset: str, found: Iterable[Found], published: Sequence[Row],
    extra_columns: Mapping[str, str], command: str,
) -> Page:  # fmt: skip
    """Aggregate, sort into sections and format the rows of one dataset."""
    records: list[tuple[Path, Record]] = []
    unreadable: list[tuple[Path, str]] = []
    for path, item in found:
        if isinstance(item, UserError):
            # Pages are published: no absolute paths of the machine that made them.
            unreadable.append((path, str(item).replace(str(path), path.name)))
        else:
            records.append((path, item))
    rows = [*aggregate(records), *published]
    parts = sections(rows)
    columns = table_columns(rows, extra_columns, Findings(rank_all(parts), join_reported(rows)))
    ranked = [row.rank_metric for row in rows if row.rank_metric]
    return Page(
        dataset=dataset,
        columns=columns,
        sections=_lines(parts, columns),
        unfinished=unfinished(records),
        unreadable=unreadable,
        gallery=build_gallery(rows),
        floors=_floors(rows),
        rank_metric=max(set(ranked), key=ranked.count) if ranked else "",
        command=command,
    )


def _lines(found: Sequence[Section], columns: Sequence[Column]) -> list[TableSection]:
    result, index = [], 0
    for section in found:
        best = best_values(section.rows)
        lines = []
        for row in section.rows:
            cells = tuple(_cell(row, column, best) for column in columns)
            lines.append(Line(row, index, section.title, cells))
            index += 1
        result.append(TableSection(section, tuple(lines)))
    return result


def _cell(row: Row, column: Column, best: set[tuple[str, str]]) -> Cell:
    cell = column.cell(row)
    if column.metric and (row.id, column.metric) in best:
        return Cell(cell.text, cell.sort, best=True)
    return cell


def _floors(rows: Iterable[Row]) -> list[float]:
    """Return the distances between two real halves that the records know, ascending."""
    found = set()
    for row in rows:
        for _, record in row.cells:
            metric = record.metrics.get(record.rank_metric)
            floor = metric.detail.get("floor") if metric is not None else None
            if isinstance(floor, (int, float)) and floor > 0:
                found.add(float(f"{floor:.6g}"))
    return sorted(found)


def conditioning_filter(row: Row) -> str:
    """Return the filter's word for a row's conditioning."""
    return conditioning(row) or "not stated"


def _nfe_filter(row: Row) -> tuple[float, str]:
    return (float(row.nfe) if row.nfe is not None else float("inf"), row.nfe_text or "not stated")


# ---- writing ------------------------------------------------------------------------------------


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text.encode())
    return path


def _write_page(page: Page, engine: Templates, out_dir: Path, charts: Charts | None) -> list[Path]:
    written = []
    tables = {}
    for suffix, template in _TABLES:
        tables[suffix] = engine.render(template, {"page": page})
        written.append(_write(out_dir / f"{page.dataset}.{suffix}", tables[suffix]))
    payload = page_payload(page)
    hooks = list(charts(page.dataset, payload["rows"])) if charts is not None else []
    context = {"page": page, "data": script_json(payload), "hook_charts": hooks}
    html = _with_csp(engine, "page.html.j2", context, scripts=_SCRIPTS)
    return [_write(out_dir / f"{page.dataset}.html", html), *written]


def page_payload(page: Page) -> dict[str, Any]:
    """Return the JSON inside the page."""
    pool = Interner()
    rows = [
        row_payload(line.row, page.columns, position, pool)
        for position, section in enumerate(page.sections)
        for line in section.lines
    ]
    metrics = {c.metric: c.higher_is_better for c in page.columns if c.metric}
    return {
        "dataset": page.dataset,
        "rank_metric": page.rank_metric,
        "metrics": [
            {"name": name, "title": metric_title(name), "higher": higher}
            for name, higher in metrics.items()
        ],
        "floors": page.floors,
        "columns": [{"key": c.key, "numeric": c.numeric, "shown": c.shown} for c in page.columns],
        "sections": [s.section.title for s in page.sections],
        "rows": rows,
        "pool": pool.values,
        "curves": [
            {"row": c.row, "title": c.title, "run": c.run, "nimg": c.nimg, "scalars": c.scalars}
            for c in page.gallery.curves
        ],
    }


def _with_csp(
    engine: Templates, template: str, context: Mapping[str, Any], *, scripts: Sequence[str]
) -> str:
    """Render a page whose policy allows exactly its own style sheet and script, by hash."""
    style = engine.asset("report.css")
    script = "\n".join(engine.asset(name) for name in scripts)
    script = f'"use strict";\n(() => {{\n{script}\n}})();' if script else ""
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src '{_csp_hash(style)}'",
            f"script-src '{_csp_hash(script)}'" if script else "script-src 'none'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return engine.render(template, {**context, "csp": policy, "style": style, "script": script})


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
