"""Put the excerpt of the digits leaderboard into README.md, from the committed records.

python docs/update_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from cmbench.leaderboard.details import floor_of
from cmbench.records.folders import read_records
from cmbench.records.record import Record
from cmbench.report.page import build_page
from cmbench.report.pivot import FIRST_NFES, PivotLine, group_text, pivot

ROOT = Path(__file__).resolve().parent.parent
METRIC = "fd-digits"
BEGIN, END = "<!-- excerpt -->", "<!-- end of excerpt -->"


def name(line: PivotLine) -> str:
    """Return the first cell of a line; the usual sampler of few-step methods is left out."""
    return f"`{line.label}` {line.sampler if line.sampler != 'multistep' else ''}".strip()


def excerpt() -> list[str]:
    """Return the lines between the markers: the pivot of the page, and its cards."""
    found = [*read_records(ROOT / "leaderboards" / "digits" / "records")]
    records = [record for _, record in found if isinstance(record, Record)]
    page = build_page("digits", found, None, {}, "")
    shown = pivot(page.sections[0].section.rows, page.groups, METRIC)
    seeds = max(record.training.seed for record in records) + 1
    floor = next((f for r in records if (f := floor_of(r.metrics[METRIC])) is not None), None)
    said = f"; {floor.name} {floor.number}: {floor.meaning}" if floor is not None else ""
    lines = [
        "## Measured on `digits`",
        "",
        f"{METRIC} (lower is better), class-conditional, {seeds} training seed(s) with 95 % "
        f"intervals, from [leaderboards/digits](leaderboards/digits){said}. **Bold**: may be best "
        "(paired t test against the best mean, Holm's correction: [how](docs/leaderboards.md)). "
        "Written by `docs/update_readme.py`; the page is "
        "[reports/digits.html](reports/digits.html).",
        "",
        "| method | " + " | ".join(f"NFE {n}" for n in FIRST_NFES) + " |",
        "|---|" + "---:|" * len(FIRST_NFES),
    ]
    places = [shown.nfes.index(nfe) for nfe in FIRST_NFES]
    for line in shown.lines:
        cells = [line.cells[place] for place in places]
        texts = [f"**{c.text}**" if c.best else c.text or "–" for c in cells]
        lines.append(f"| {name(line)} | " + " | ".join(texts) + " |")
    groups = [group for group in page.groups if group.nfe in FIRST_NFES]
    lines += ["", *(f"- {group_text(group, page.short_labels)}" for group in groups)]
    return [*lines, "", "![The report page](docs/report.png)"]


def main() -> None:
    """Rewrite the lines between the markers."""
    text = "\n".join([BEGIN, *excerpt(), END])
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = re.sub(f"{BEGIN}.*{END}", lambda _: text, old, flags=re.DOTALL)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
