"""Beside a measured row stands the reported one: as printed, with both metric keys."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, on_disk, record

from cmbench.leaderboard.joins import Reported
from cmbench.leaderboard.published_files import load_published
from cmbench.leaderboard.rows import aggregate
from cmbench.records.folders import read_records
from cmbench.report import render
from cmbench.report.cells import TableCell, reported_cell
from cmbench.report.columns import Column
from cmbench.report.csvtable import csv_cells

KEY = "fid:inception@aa:bilinear:round:n-1:float64:ref=bb:n=50000:v1"
BOARD = """
schema_version = 1
dataset = "toys"
title = "Toys"
rank_metric = "fid"
[tables.paper]
title = "The paper's table"
rows = 4
[protocols.stated]
title = "Stated in full"
reason = "every part of the key is in the paper"
key = "{key}"
[protocols.unstated]
title = "Not stated"
reason = "the paper names FID only"
"""
HEAD = (
    "table,block,method,joins,reference,arxiv,year,family,conditioning,nfe,fid,is,precision,recall,"
    "parameters,marks,protocol,source,place,note\n"
)
ROWS = """\
paper,,Alpha,alpha,"A et al., 2024",,2024,diffusion,,1,2.50,9.5,,,,,stated,a paper,Table 1,
paper,,Alpha,alpha,"A et al., 2024",,2024,diffusion,,2,2.10,,,,,,unstated,a paper,Table 1,
paper,,Beta,beta,"B et al., 2024",,2024,diffusion,,1,3.00,,,,,,stated,a paper,Table 1,
paper,,Beta,beta,"B et al., 2024",,2024,diffusion,,1,3.10,,,,,,stated,a paper,Table 2,
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("joins")
    board = root / "leaderboards" / "toys"
    board.mkdir(parents=True)
    (board / "board.toml").write_text(BOARD.format(key=KEY))
    (board / "published.csv").write_text(HEAD + ROWS)
    items = [
        record(
            method,
            dataset="toys",
            nfe=nfe,
            seed=seed,
            rank_metric="fid",
            metrics={
                "fid": metric(value + seed / 10, "fid", key=KEY),
                "is": metric(9.0, "is", higher=True, key="is:x"),
            },
            sampling=sampling,
            recipe=sampling.get("sampler", "demo"),
        )
        for method, nfe, value, sampling in (
            ("alpha", 1, 2.75, {}),
            ("alpha", 2, 2.0, {}),
            ("beta", 1, 3.0, {}),
            ("alpha", 1, 9.0, {"num_samples": 10, "sampler": "short"}),
        )
        for seed in range(2)
    ]
    on_disk(root / "records", items)
    boards = {"toys": load_published(board)}
    render({"toys": read_records(root / "records")}, root, published=boards)
    return root


@pytest.fixture(scope="module")
def lines(made: Path) -> list[dict[str, str]]:
    with (made / "toys.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def one(lines: list[dict[str, str]], method: str, nfe: str, sampler: str) -> dict[str, str]:
    (found,) = [x for x in lines if (x["method"], x["nfe"], x["sampler"]) == (method, nfe, sampler)]
    return found


def test_the_difference_is_measured_minus_reported_under_equal_keys(
    lines: list[dict[str, str]],
) -> None:
    row = one(lines, "alpha", "1", "multistep")
    assert row["reported"] == "2.50"
    assert float(row["difference"]) == pytest.approx(2.80 - 2.50)
    assert row["reported_under"] == f"Stated in full (key {KEY})"


def test_other_keys_disagreeing_sources_and_few_samples_have_no_difference(
    lines: list[dict[str, str]],
) -> None:
    found = {
        name: (row["reported"], row["difference"])
        for name, row in {
            "keys": one(lines, "alpha", "2", "multistep"),
            "sources": one(lines, "beta", "1", "multistep"),
            "short": one(lines, "alpha", "1", "short"),
        }.items()
    }
    assert found == {
        "keys": ("2.10", "keys differ"),
        "sources": ("3.00; 3.10", "sources disagree"),
        "short": ("2.50", "fewer samples"),
    }


def test_equal_keys_share_a_section_and_others_give_the_reason(lines: list[dict[str, str]]) -> None:
    sections: dict[str, set[tuple[str, str]]] = {}
    for line in lines:
        sections.setdefault(line["section"], set()).add((line["method"], line["kind"]))
    assert sections == {
        "Measured and reported, equal metric keys": {
            ("alpha", "measured"),
            ("beta", "measured"),
            ("Alpha", "reported"),
            ("Beta", "reported"),
        },
        "Fewer samples than the protocol": {("alpha", "measured")},
        "Reported by their authors: Not stated": {("Alpha", "reported")},
    }
    # A printed number has no seeds, so it takes no position beside measured ones.
    assert {line["position"] for line in lines if line["kind"] == "reported"} == {""}


def payload(made: Path) -> dict[str, Any]:
    html = (made / "toys.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_drawer_spells_both_keys_out(made: Path) -> None:
    data = payload(made)

    def said(method: str, nfe: int, kind: str = "measured") -> dict[str, Any]:
        wanted = (method, nfe, kind)
        row = next(r for r in data["rows"] if (r["method"], r["nfe"], r["kind"]) == wanted)
        flat = [data["pool"][i] for i in row["reported"]]
        return dict(zip(flat[::2], flat[1::2], strict=True))

    assert said("alpha", 2) == {
        "difference": "keys differ",
        "metric key of fid here": KEY,
        "Alpha, A et al., 2024, a paper, Table 1": "2.10; Not stated (no metric key)",
    }
    assert said("alpha", 1)["difference"] == pytest.approx(0.3)
    assert len(said("beta", 1)) == 4
    assert said("alpha", 1, "reported") == {}


def test_reported_numbers_sort_as_numbers_and_stay_text_in_csv() -> None:
    found = [Reported((), "fd", "", None), None]
    assert [reported_cell(item) for item in found] == [TableCell(), TableCell()]

    class Printed(Reported):
        text = "12.30; 7.80"

    cell = reported_cell(Printed((), "fd", "", None))
    assert (cell.text, cell.sort) == ("12.30; 7.80", 12.3)
    column = Column("reported", "Reported", lambda row: cell, numeric=True)
    row = aggregate([(Path("a.json"), record())])[0]
    assert csv_cells(row, "Measured", [cell], [column])[-1] == "12.30; 7.80"
