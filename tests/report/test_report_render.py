"""The pages and tables that `render` writes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from record_factory import metric, on_disk, png, record, sweep, with_artifact

from cmbench.errors import UserError
from cmbench.leaderboard.statistics import Unit, interval_over_seeds
from cmbench.records.folders import read_records
from cmbench.report import render
from cmbench.report.numbers import format_mean


def page_data(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    folder = tmp_path / "records" / "digits"
    items = sweep()
    items[0] = with_artifact(folder, items[0], "grid", "grids/a.png", png())
    curve = b"nimg,phase,loss,grad_norm\n0,train,1.0,2.0\n1000,train,nan,1.0\n"
    items[0] = with_artifact(folder, items[0], "curve", "curves/a.csv", curve)
    on_disk(folder, items)
    on_disk(folder, [record("broken", status="failed", reason="loss <nan>", metrics={})])
    (folder / "torn.json").write_text('{"schema_version": 1, "ce')
    return folder


def test_render_writes_page_tables_and_index(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = render({"digits": read_records(digits)}, out, command="cmbench report")
    assert [p.name for p in paths] == [
        "digits.html",
        "digits.md",
        "digits.csv",
        "digits.tex",
        "index.html",
    ]
    html = (out / "digits.html").read_text()
    data = page_data(html)
    assert len(data["rows"]) == 9
    label = "floor: two halves of the real images"
    assert data["floors"] == [{"value": 0.8, "label": label}]
    assert html.count("data:image/png;base64,") == 1
    assert data["curves"][0]["scalars"] == {"loss": [1.0, None], "grad_norm": [2.0, 1.0]}
    assert "loss &lt;nan&gt;" in html
    assert "torn.json" in html
    assert "digits.html" in (out / "index.html").read_text()


def test_rows_hold_mean_interval_and_raw_values(tmp_path: Path) -> None:
    values = [1.0, 2.0, 4.0]
    found = on_disk(tmp_path / "r", [record(seed=s, value=v) for s, v in enumerate(values)])
    render({"digits": found}, tmp_path)
    line = next(csv.DictReader((tmp_path / "digits.csv").open()))
    assert float(line["fd-digits_mean"]) == pytest.approx(7 / 3)
    # t_{2, 0.975} = 4.302653, s = 1.527525, n = 3
    assert float(line["fd-digits_high"]) == pytest.approx(7 / 3 + 4.302653 * 1.527525 / 3**0.5)
    assert line["fd-digits_values"] == "1.0 2.0 4.0"
    assert line["fd-digits_seeds"] == "3"


def test_the_minimum_is_never_what_is_shown(tmp_path: Path) -> None:
    found = on_disk(tmp_path / "r", [record(seed=s, value=v) for s, v in enumerate([1.0, 9.0])])
    render({"digits": found}, tmp_path)
    assert "| **5 ± 51** |" in (tmp_path / "digits.md").read_text()


def test_equal_means_are_both_bold(tmp_path: Path) -> None:
    items = [record(m, seed=s, value=2.0) for m in ("alpha", "beta") for s in range(6)]
    items += [record("gamma", seed=s, value=3.0) for s in range(6)]
    render({"digits": on_disk(tmp_path / "r", items)}, tmp_path)
    assert (tmp_path / "digits.md").read_text().count("**2.000**") == 2
    assert (tmp_path / "digits.tex").read_text().count(r"\textbf{2.000}") == 2


def test_rows_that_are_never_ranked_are_not_bold(tmp_path: Path) -> None:
    few = {"num_samples": 200}
    on_disk(tmp_path / "digits", sweep(("alpha", "omega"), (1,), 3))
    assert "**" in page_of(tmp_path)
    on_disk(tmp_path / "few", sweep(("alpha", "omega"), (1,), 3, dataset="few", sampling=few))
    assert "**" not in page_of(tmp_path, "few")


def page_of(folder: Path, dataset: str = "digits") -> str:
    render({dataset: read_records(folder / dataset)}, folder / "out")
    return (folder / "out" / f"{dataset}.md").read_text()


def test_a_spread_of_rounding_is_no_spread() -> None:
    def shown(*values: float) -> str:
        return format_mean(interval_over_seeds([Unit(s, s, v) for s, v in enumerate(values)]))

    assert shown(1.0, 1.0 + 2e-16, 1.0) == "1.000"
    assert shown(1.0, 1.5, 2.0) == "1.5 ± 1.2"


def test_fewer_samples_than_the_protocol_stand_apart(tmp_path: Path) -> None:
    items = [record(), record("beta", sampling={"num_samples": 100})]
    render({"digits": on_disk(tmp_path / "r", items)}, tmp_path)
    text = (tmp_path / "digits.md").read_text()
    assert "## Fewer samples than the protocol" in text
    assert "**" not in text


def test_other_metric_keys_stand_apart_with_the_reason(tmp_path: Path) -> None:
    other = {"fd-digits": metric(0.1, key="fd-digits|another reference")}
    items = [record(), record("beta"), record("gamma", metrics=other)]
    render({"digits": on_disk(tmp_path / "r", items)}, tmp_path)
    assert "Another metric key" in (tmp_path / "digits.md").read_text()


def test_an_empty_dataset_has_a_page(tmp_path: Path) -> None:
    render({"digits": []}, tmp_path)
    assert "0 rows" in (tmp_path / "digits.html").read_text()


def test_a_dataset_name_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset .\.\./x.: is not a valid name"):
        render({"../x": []}, tmp_path)


def test_changed_or_foreign_artifacts_are_named_and_not_shown(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    changed = with_artifact(folder, record("alpha"), "grid", "a.png", png())
    (folder / "a.png").write_bytes(png((0, 0, 0)))
    not_png = with_artifact(folder, record("beta"), "grid", "b.png", b"<svg onload=x>")
    outside = with_artifact(folder, record("gamma"), "grid", "../c.png", png())
    render({"digits": on_disk(folder, [changed, not_png, outside])}, tmp_path)
    html = (tmp_path / "digits.html").read_text()
    assert "data:image" not in html
    for message in ("its hash differs", "is not a PNG", "outside the record&#39;s folder"):
        assert message in html


def test_a_user_template_replaces_ours_and_its_errors_name_the_line(tmp_path: Path) -> None:
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "table.md.j2").write_text("mine: {{ page.dataset }}\n")
    render({"digits": []}, tmp_path, templates=folder)
    assert (tmp_path / "digits.md").read_text() == "mine: digits\n"
    (folder / "table.md.j2").write_text("one\ntwo {{ page.dataset.nothing }}\n")
    with pytest.raises(UserError, match=r"template table.md.j2 line 2 .*nothing"):
        render({"digits": []}, tmp_path, templates=folder)
    (folder / "table.md.j2").write_text("one\n\n{% if %}\n")
    with pytest.raises(UserError, match=r"template table.md.j2 line 3 .*Syntax"):
        render({"digits": []}, tmp_path, templates=folder)
    (folder / "table.md.j2").write_text("{{ 1 / 0 }}")
    with pytest.raises(UserError, match=r"template table.md.j2 line 1 .*ZeroDivision"):
        render({"digits": []}, tmp_path, templates=folder)


def test_a_template_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        render({"digits": []}, tmp_path, templates=tmp_path / "none")


def test_extra_columns_come_from_the_record(tmp_path: Path) -> None:
    columns = {"Git": "environment.git_commit", "LR": "training.config.lr", "No": "training.x.y"}
    found = on_disk(tmp_path / "r", [record(seed=s) for s in range(2)])
    render({"digits": found}, tmp_path, extra_columns=columns)
    line = next(csv.DictReader((tmp_path / "digits.csv").open()))
    assert line["LR"] == "0.00100"
    assert len(line["Git"]) == 40
    assert line["No"] == ""
