"""No absolute path of anybody's machine stands on a page."""

from __future__ import annotations

from pathlib import Path

import pytest
from record_factory import on_disk, record, with_artifact

from cmbench.records.folders import read_records
from cmbench.report import render
from cmbench.report.paths import clean, without_paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "FileNotFoundError: '/home/me/data set/x.npz' is missing",
            "FileNotFoundError: '…/x.npz' is missing",
        ),
        ("cannot read /scratch/a b/c.json", "cannot read …/a b/c.json"),
        ("folder /home/me/runs/: no space", "folder …/: no space"),
        ("cmbench run -w /home/me/out -o data=/mnt/x/y", "cmbench run -w …/out -o data=…/y"),
        ("see file:///home/me/x.html", "see …/x.html"),
        ("~/runs/a and ~other/runs/b", "…/a and …/b"),
        (r"C:\Users\me\x.pt (in 'D:\my files\y.pt')", "…/x.pt (in '…/y.pt')"),
        (r"\\server\share\x.pt", "…/x.pt"),
        ('at "/x/y.py", line 3', 'at "…/y.py", line 3'),
        ("(/x/y.py)[/a/b]", "(…/y.py)[…/b]"),
        # These are no absolute paths.
        ("https://arxiv.org/abs/2303.01469 and/or n/a", None),
        ("runs/digits/a.json 3/4 images/s a/b/c ../x/y ./x/y", None),
        ("1e-3 / 2e-3 at 5:/6", None),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text: str, shown: str | None) -> None:
    assert without_paths(text) == (text if shown is None else shown)


def test_every_string_of_a_value_is_cleaned() -> None:
    value = {"a": ["/x/y/z", 1, None], "/k/e/y": {"b": "'/q/r'"}}
    assert clean(value) == {"a": ["…/z", 1, None], "…/y": {"b": "'…/r'"}}


def test_pages_hold_no_path_of_the_records_or_the_renderer(tmp_path: Path) -> None:
    secret = "/home/somebody/secret-project/file.npz"
    folder = tmp_path / "records"
    failed = record("beta", status="failed", metrics={}, reason=f"OSError: {secret} is not there")
    done = record(
        "alpha",
        command=f"cmbench run -w {secret}",
        warnings=[f"read '{secret}'"],
        training={"config": {"data": secret}, "teacher": secret},
    )
    done = with_artifact(folder, done, "curve", "c.csv", b"no curve")
    on_disk(folder, [failed, done])
    (folder / "torn.json").write_text('{"cell": "torn"')

    def charts(dataset: str, rows: object) -> list[dict[str, str]]:
        raise OSError(2, "not there", secret)

    out = tmp_path / "out"
    render(
        {"digits": read_records(folder)},
        out,
        extra_charts=charts,
        extra_columns={"Command": "command"},
        command=f"cmbench report --out {secret}",
    )
    for path in out.iterdir():
        text = path.read_text()
        assert "secret-project" not in text, path.name
        assert str(tmp_path) not in text, path.name
    html = (out / "digits.html").read_text()
    assert "OSError: …/file.npz is not there" in html
    assert "torn.json" in html
