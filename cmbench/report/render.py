"""Render leaderboard pages: HTML, Markdown, CSV and LaTeX from the same rows."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmbench.errors import UserError
from cmbench.files import write_atomically
from cmbench.leaderboard.published import Published
from cmbench.records.folders import ReadRecord
from cmbench.report.cards import CARD_NFES
from cmbench.report.charts import Charts, chart_images
from cmbench.report.environment import Templates
from cmbench.report.page import Page, build_page
from cmbench.report.paths import clean, without_paths
from cmbench.report.payload import page_payload, public_row, script_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_TABLES = (("md", "table.md.j2"), ("csv", "table.csv.j2"), ("tex", "table.tex.j2"))
_STYLES = ("report.css", "chart.css")
_SCRIPTS = ("chart.js", "views.js", "table.js", "download.js", "page.js")


def render(
    records_by_dataset: Mapping[str, Iterable[ReadRecord]],
    out_dir: Path,
    *,
    templates: Path | None = None,
    extra_columns: Mapping[str, str] | None = None,
    extra_charts: Charts | None = None,
    published: Mapping[str, Published] | None = None,
    references: Mapping[str, Iterable[ReadRecord]] | None = None,
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
        published: boards by dataset: title, notes and reported rows.
        references: reference records by dataset, in the form of ``records_by_dataset``: shown
            beside its records as rows of kind ``reference``.
        command: the command that makes the pages again, shown on them.

    Returns:
        The paths written, the HTML page of each dataset first.

    Raises:
        UserError: if a template fails (names template and line) or a file cannot be written.
    """
    engine = Templates(templates)
    published, references = published or {}, references or {}
    written: list[Path] = []
    summaries = []
    for dataset in sorted({*records_by_dataset, *published}):
        if problem := name_problem(dataset):
            raise problem
        page = build_page(
            dataset,
            records_by_dataset.get(dataset, ()),
            published.get(dataset),
            extra_columns or {},
            command,
            references.get(dataset, ()),
        )
        written += _write_page(page, engine, out_dir, extra_charts)
        summaries.append(page.summary())
    written.append(_write_index(summaries, engine, out_dir, command))
    return written


def name_problem(dataset: str) -> UserError | None:
    """Return the error for a dataset whose name cannot be that of a page."""
    if _NAME.fullmatch(dataset):
        return None
    return UserError(
        f"dataset {dataset!r}",
        "is not a valid name",
        allowed="letters, digits and . _ + -",
        remedy="rename the records' folder",
    )


def _write_index(
    summaries: Sequence[Mapping[str, Any]], engine: Templates, out_dir: Path, command: str
) -> Path:
    """Write the index; earlier pages in the folder are listed too."""
    names = {summary["dataset"] for summary in summaries}
    others = sorted(p.stem for p in out_dir.glob("*.html") if p.stem not in {*names, "index"})
    shown = {"pages": summaries, "others": others, "nfes": CARD_NFES}
    context = {**shown, "command": without_paths(command)}
    html = _with_csp(engine, "index.html.j2", context, scripts=())
    return _write(out_dir / "index.html", html)


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text.encode())
    return path


def _write_page(page: Page, engine: Templates, out_dir: Path, charts: Charts | None) -> list[Path]:
    written = []
    tables = {}
    for suffix, template in _TABLES:
        tables[suffix] = engine.render(template, {"page": page})
        written.append(_write(out_dir / f"{page.dataset}.{suffix}", tables[suffix]))
    rows = [public_row(line.row, page.labels[line.row.id]) for line in page.lines]
    hooks = chart_images(charts, page.dataset, rows)
    context = {
        "page": page,
        "data": script_json(page_payload(page, tables)),
        "hook_charts": [chart for chart in hooks if chart.uri],
        "problems": clean(
            [*page.gallery.problems]
            + [f"chart {chart.title!r}: {chart.problem}" for chart in hooks if chart.problem]
        ),
    }
    html = _with_csp(engine, "page.html.j2", context, scripts=_SCRIPTS)
    return [_write(out_dir / f"{page.dataset}.html", html), *written]


def _with_csp(
    engine: Templates, template: str, context: Mapping[str, Any], *, scripts: Sequence[str]
) -> str:
    """Render a page whose policy allows exactly its own style sheet and script, by hash."""
    styles = [engine.asset(name) for name in _STYLES]
    script = "\n".join(engine.asset(name) for name in scripts)
    script = f'"use strict";\n(() => {{\n{script}\n}})();' if script else ""
    policy = "; ".join(
        [
            "default-src 'none'",
            "style-src " + " ".join(f"'{_csp_hash(text)}'" for text in styles),
            f"script-src '{_csp_hash(script)}'" if script else "script-src 'none'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return engine.render(template, {**context, "csp": policy, "styles": styles, "script": script})


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
