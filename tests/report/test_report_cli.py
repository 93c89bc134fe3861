"""`cmbench report`, in process."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from record_factory import on_disk, sweep

from cmbench.cli.leaderboard import leaderboard
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


def test_an_oddly_named_folder_costs_one_line(tmp_path: Path) -> None:
    on_disk(tmp_path / "records" / "digits", sweep(("alpha",), (1,), 2))
    (tmp_path / "records" / "bad name").mkdir()
    result = run("--workspace", str(tmp_path))
    assert result.return_value == 1
    assert result.stderr == (
        "unreadable: dataset 'bad name': is not a valid name; allowed: letters, digits and"
        " . _ + -; rename the records' folder\n"
    )
    assert (tmp_path / "reports" / "digits.html").is_file()


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


def test_a_page_of_own_records_has_no_description_of_the_boards(tmp_path: Path) -> None:
    board = tmp_path / "boards" / "digits"
    on_disk(board / "records", sweep(("alpha",), (1,), 2))
    on_disk(tmp_path / "own" / "records" / "digits", sweep(("alpha",), (1,), 2))
    source = Path(__file__).parents[2] / "leaderboards" / "cifar10"
    for name in ("board.toml", "published.csv"):
        shutil.copy(source / name, board / name)
    text = (board / "board.toml").read_text().replace('dataset = "cifar10"', 'dataset = "digits"')
    (board / "board.toml").write_text(
        re.sub(
            r'^description = (""".*?"""|"[^"]*")',
            'description = "Three seeds each."',
            text,
            flags=re.DOTALL | re.MULTILINE,
        )
    )
    result = run("-w", str(tmp_path / "own"), "--leaderboards", str(tmp_path / "boards"))
    assert result.return_value == 0
    out = str(tmp_path / "reference")
    rendered = CliRunner().invoke(
        leaderboard, ["render", str(tmp_path / "boards"), "--out", out], standalone_mode=False
    )
    assert rendered.return_value == 0
    for suffix in ("html", "md"):
        own = (tmp_path / "own" / "reports" / f"digits.{suffix}").read_text()
        assert "Three seeds each." not in own
        assert "Reported by their authors" in own
        assert "Three seeds each." in (tmp_path / "reference" / f"digits.{suffix}").read_text()


@pytest.mark.parametrize("option", ["--template", "--leaderboards"])
@pytest.mark.parametrize("records", [True, False])
def test_folders_that_are_not_there_are_refused(tmp_path: Path, option: str, records: bool) -> None:
    (tmp_path / "own").mkdir()
    if records:
        on_disk(tmp_path / "own" / "records" / "digits", sweep(("alpha",), (1,), 2))
    result = run("-w", str(tmp_path / "own"), option, str(tmp_path / "nope"))
    assert "is not a folder" in str(result.exception)
    assert not (tmp_path / "own" / "reports").exists()
