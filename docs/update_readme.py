"""Put the excerpt of the digits leaderboard into README.md, from the committed records.

python docs/update_readme.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from cmbench.leaderboard.details import floor_of
from cmbench.records.folders import read_records
from cmbench.records.record import Record

ROOT = Path(__file__).resolve().parent.parent
NFES = (1, 2, 4, 8)
BEGIN, END = "<!-- excerpt -->", "<!-- end of excerpt -->"


def cell(records: list[Record]) -> str:
    """Return the mean over seeds, with the spread where there are several."""
    values = [r.metrics["fd-digits"].value for r in records]
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return f"{mean:.2f}"
    spread = (sum((v - mean) ** 2 for v in known) / (len(known) - 1)) ** 0.5
    return f"{mean:.2f} ± {spread:.2f}"


def main() -> None:
    """Rewrite the lines between the markers."""
    found: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    floor, seeds = None, 0
    for _, record in read_records(ROOT / "leaderboards" / "digits" / "records"):
        if isinstance(record, Record) and record.status == "finished":
            sampler = "" if record.sampling.sampler == "multistep" else record.sampling.sampler
            name = f"`{record.method}` {sampler}".strip()
            found[name][record.sampling.nfe].append(record)
            floor = floor_of(record.metrics["fd-digits"]) or floor
            seeds = max(seeds, record.training.seed + 1)
    rows = sorted(found.items(), key=lambda item: cell(item[1][1]).rjust(12))
    said = f"; {floor.name} {floor.number}: {floor.meaning}" if floor is not None else ""
    lines = [
        BEGIN,
        "## Measured on `digits`",
        "",
        f"fd-digits (lower is better), class-conditional, {seeds} training seed(s) "
        "(± their standard deviation), from "
        f"[leaderboards/digits](leaderboards/digits){said}. Written by "
        "`docs/update_readme.py`; the page is [reports/digits.html](reports/digits.html).",
        "",
        "| method | " + " | ".join(f"NFE {n}" for n in NFES) + " |",
        "|---|" + "---:|" * len(NFES),
    ]
    lines += [
        f"| {name} | " + " | ".join(cell(by[n]) if n in by else "–" for n in NFES) + " |"
        for name, by in rows
    ]
    lines += ["", "![The report page](docs/report.png)", END]
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if END in text:
        text = re.sub(f"{BEGIN}.*{END}", lambda _: "\n".join(lines), text, flags=re.DOTALL)
    else:
        text = text.replace(BEGIN, "\n".join(lines))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
