"""`cmbench report`, in process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from record_factory import on_disk, sweep

from cmbench.cli.report import report


def run(*arguments: str):
    return CliRunner().invoke(report, arguments, standalone_mode=False)


def test_report_prints_what_it_wrote(tmp_path: Path) -> None:
    on_disk(tmp_path / "records" / "digits", sweep(("alpha",), (1,), 2))
    result = run("--workspace", str(tmp_path))
    assert result.return_value == 0
    assert result.stdout.splitlines()[0] == str(tmp_path / "reports" / "digits.html")
    assert all(Path(line).is_file() for line in result.stdout.splitlines())


def test_an_unreadable_record_is_listed_and_the_exit_code_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "records" / "digits"
    on_disk(folder, sweep(("alpha",), (1,), 2))
    (folder / "future.json").write_text('{"schema_version": 99}')
    (folder / "torn.json").write_text('{"schema_version": 1,')
    result = run("--workspace", str(tmp_path))
    assert result.return_value == 1
    assert "has schema version 99" in result.stderr
    html = (tmp_path / "reports" / "digits.html").read_text()
    assert "has schema version 99" in html
    assert "torn.json" in html
    assert str(tmp_path) not in html


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"cell": NaN}'])
def test_whatever_lies_there_the_page_is_made_and_names_it(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "records" / "digits"
    on_disk(folder, sweep(("alpha",), (1,), 2))
    (folder / "broken.json").write_bytes(data)
    result = run("--workspace", str(tmp_path))
    assert result.return_value == 1
    assert result.stderr.startswith("unreadable: ")
    html = (tmp_path / "reports" / "digits.html").read_text()
    assert "<b>broken.json</b>: " in html
    assert "broken.json" in (tmp_path / "reports" / "digits.md").read_text()
    assert 'data-row="0"' in html


def test_an_unknown_dataset_is_one_clear_line(tmp_path: Path) -> None:
    on_disk(tmp_path / "records" / "digits", sweep(("alpha",), (1,), 2))
    result = run("--workspace", str(tmp_path), "--dataset", "nope")
    assert "no records of 'nope'" in str(result.exception)
    assert "allowed: digits" in str(result.exception)


def test_pages_of_other_datasets_stay_in_the_index(tmp_path: Path) -> None:
    for name in ("digits", "gmm"):
        on_disk(tmp_path / "records" / name, sweep(("alpha",), (1,), 2, dataset=name))
    run("--workspace", str(tmp_path))
    run("--workspace", str(tmp_path), "--dataset", "gmm")
    index = (tmp_path / "reports" / "index.html").read_text()
    assert 'href="digits.html"' in index
    assert 'href="gmm.html"' in index


def test_reports_need_no_torch() -> None:
    code = "import sys, cmbench.cli.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
