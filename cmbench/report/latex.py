"""The tables of several datasets as one LaTeX text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cmbench.errors import UserError
from cmbench.records.folders import read_records
from cmbench.report.environment import Templates
from cmbench.report.page import build_page


def latex_tables(folders: Mapping[str, Path]) -> tuple[str, list[UserError]]:
    """Return the LaTeX table of every folder of records, and the records that cannot be read."""
    engine = Templates()
    texts, errors = [], []
    for dataset, folder in folders.items():
        found = list(read_records(folder, dataset))
        errors += [item for _, item in found if isinstance(item, UserError)]
        page = build_page(dataset, found, None, {}, "cmbench export latex")
        texts.append(engine.render("table.tex.j2", {"page": page}))
    return "\n".join(texts), errors
