"""Text that is not trusted: Markdown, LaTeX, CSV, SVG, JSON in scripts, artifacts."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from record_factory import on_disk, png, record, sweep, with_artifact

from cmbench.leaderboard.boards import load_boards
from cmbench.records.artifacts import ArtifactError, read_artifact
from cmbench.records.record import Artifact
from cmbench.report import render
from cmbench.report.artifacts import curve_points, picture
from cmbench.report.charts import chart_image
from cmbench.report.environment import (
    csv_line,
    escape_markdown,
    escape_tex,
    html_prose,
    markdown_code,
    markdown_prose,
)
from cmbench.report.numbers import format_count, format_mean, format_number
from cmbench.report.payload import script_json

SVG = "http://www.w3.org/2000/svg"
TEXT = st.text(max_size=60)


# ---- Markdown, LaTeX, CSV, JSON -----------------------------------------------------------------


@given(TEXT)
def test_markdown_stays_one_cell_of_plain_text(text: str) -> None:
    found = escape_markdown(text)
    assert "\n" not in found
    assert not re.search(r"(?<!\\)[|*_`<>\[\]$]", found.replace("\\\\", ""))


@given(TEXT)
def test_tex_has_no_live_character(text: str) -> None:
    found = escape_tex(text)
    assert "\n" not in found
    for known in (
        r"\textbackslash{}",
        r"\textasciicircum{}",
        r"\textasciitilde{}",
        r"\textless{}",
        r"\textgreater{}",
        r"\textbar{}",
        r"\ldots{}",
        r"\textdagger{}",
        r"\{",
        r"\}",
        r"\$",
        r"\&",
        r"\#",
        r"\%",
        r"\_",
        r"$\pm$",
        r"$\times$",
        r"$\le$",
        r"$\ge$",
        r"$\downarrow$",
        r"$\uparrow$",
        "$-$",
    ):
        found = found.replace(known, "")
    assert not set(found) & set("\\{}$&#%_^~<>|")
    assert all(ord(c) < 0x180 for c in found)


@given(st.lists(st.one_of(TEXT, st.integers(), st.floats(allow_nan=False), st.none())))
def test_csv_lines_are_one_line_and_never_a_formula(cells: list[object]) -> None:
    line = str(csv_line(cells))
    assert "\n" not in line
    assert "\r" not in line
    if cells and line:
        for cell, original in zip(next(csv.reader(io.StringIO(line))), cells, strict=True):
            if isinstance(original, str):
                assert cell[:1] not in ("=", "+", "-", "@")


@given(TEXT)
def test_json_in_a_script_is_inert_and_comes_back(text: str) -> None:
    found = script_json({"x": text})
    assert not set(found) & set("<>&\u2028\u2029")
    assert json.loads(found) == {"x": text}


def test_code_spans_cannot_be_closed() -> None:
    assert markdown_code("a`b`\nc") == "a'b' c"


def test_prose_marks_up_code_and_nothing_else() -> None:
    text = "a `b<c>` *d* <script> `"
    assert html_prose(text) == "a <code>b&lt;c&gt;</code> *d* &lt;script&gt; `"
    assert markdown_prose(text) == r"a `b<c>` \*d\* &lt;script&gt; \`"


# ---- numbers ------------------------------------------------------------------------------------


def test_numbers_print_what_was_measured() -> None:
    from cmbench.leaderboard.statistics import Interval

    assert format_mean(Interval(2.8512, 2.8, 2.9024, 3)) == "2.851 ± 0.051"
    assert format_mean(Interval(1.0, 1 - 4.2e-6, 1 + 4.2e-6, 3)) == "1.0000000 ± 0.0000042"
    assert format_mean(Interval(2e-5, 2e-5 - 3e-8, 2e-5 + 3e-8, 3)) == "2.000e-05 ± 3.0e-08"
    assert format_mean(Interval(121.5, 100.0, 143.0, 3)) == "122 ± 22"
    assert format_mean(Interval(0.5, None, None, 1)) == "0.5000"
    assert format_mean(Interval(0.5, 0.5, 0.5, 2)) == "0.5000"
    assert [format_number(x) for x in (0.0, 0.01234, 1234.5, 1e9)] == [
        "0",
        "0.0123",
        "1,234",
        "1.00e+09",
    ]
    assert [format_count(x) for x in (898, 55.7e6, 1.5e9)] == ["898", "55.7M", "1.5B"]


# ---- SVG ----------------------------------------------------------------------------------------


def svg(body: str, attributes: str = "") -> str:
    return f'<svg xmlns="{SVG}" {attributes}>{body}</svg>'


def test_a_chart_is_shown_as_an_image_only(tmp_path: Path) -> None:
    drawing = svg("<script>1</script><rect onclick='1'/>")
    render(
        {"digits": on_disk(tmp_path / "r", sweep())},
        tmp_path,
        extra_charts=lambda *_: [{"title": "a < b", "svg": drawing}],
    )
    html = (tmp_path / "digits.html").read_text()
    data = base64.b64encode(drawing.encode()).decode()
    assert f'<img src="data:image/svg+xml;base64,{data}" alt="a &lt; b">' in html
    assert "onclick" not in html


@pytest.mark.parametrize(
    ("chart", "problem"),
    [
        ({"title": "t"}, "it has no svg"),
        ({"title": "t", "svg": 3}, "it has no svg"),
        ({"title": "t", "svg": "<html/>"}, "it has no svg"),
        ({"title": "t", "svg": svg(" " * 600_000)}, "more than 500,000 characters"),
        ("t", "str is not a mapping"),
    ],
)
def test_what_is_not_a_picture_is_a_problem_on_the_page(chart: Any, problem: str) -> None:
    found = chart_image(chart)
    assert found.uri == ""
    assert problem in found.problem


def test_a_chart_hook_that_raises_costs_only_its_charts(tmp_path: Path) -> None:
    def charts(dataset: str, rows: object) -> list[dict[str, str]]:
        raise RuntimeError("no <data>")

    render({"digits": on_disk(tmp_path / "r", sweep())}, tmp_path, extra_charts=charts)
    html = (tmp_path / "digits.html").read_text()
    assert "RuntimeError: no &lt;data&gt;" in html


def test_one_bad_chart_does_not_cost_the_others(tmp_path: Path) -> None:
    good = {"title": "good", "svg": svg("<rect/>")}
    half = {"title": "half", "svg": svg("\ud800")}  # half a surrogate pair has no UTF-8

    def charts(dataset: str, rows: object) -> Iterator[Any]:
        yield from (good, "no chart", half, good)
        raise RuntimeError("no more")

    render({"digits": on_disk(tmp_path / "r", sweep())}, tmp_path, extra_charts=charts)
    html = (tmp_path / "digits.html").read_text()
    assert html.count("data:image/svg+xml;base64,") == 3
    for problem in ("str is not a mapping", "RuntimeError: no more"):
        assert problem in html


def test_chart_hooks_see_plain_rows(tmp_path: Path) -> None:
    seen = []

    def charts(dataset: str, rows: list[dict[str, object]]) -> list[dict[str, str]]:
        seen.extend(rows)
        return [{"title": dataset, "svg": svg("<rect/>")}]

    render({"digits": on_disk(tmp_path / "r", sweep())}, tmp_path, extra_charts=charts)
    assert len(seen) == 9
    assert seen[0]["method"] == "alpha"
    assert seen[0]["metrics"]["fd-digits"]["values"]
    assert "data:image/svg+xml;base64," in (tmp_path / "digits.html").read_text()


# ---- artifacts ----------------------------------------------------------------------------------


def grid(tile: str, size: tuple[int, int] = (32, 24)) -> bytes:
    image = Image.new("L", size)
    for x in range(size[0]):
        for y in range(size[1]):
            image.putpixel((x, y), 10 * (x // 8) + 50 * (y // 8))
    info = PngInfo()
    info.add_text("tile", tile)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def test_a_grid_becomes_a_strip_in_reading_order() -> None:
    data, is_strip = picture(grid("8x8"), "a.png")
    assert is_strip
    strip = Image.open(io.BytesIO(data))
    assert strip.size == (8, 64)
    assert [strip.getpixel((4, 8 * i + 4)) for i in range(8)] == [0, 10, 20, 30, 50, 60, 70, 80]


@pytest.mark.parametrize("tile", ["", "0x8", "7x8", "8", "64x8", "8x-8", "axb"])
def test_a_tile_that_does_not_fit_leaves_the_grid_whole(tile: str) -> None:
    data = grid(tile)
    assert picture(data, "a.png") == (data, False)


def test_pictures_that_are_none_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"a\.png is not a PNG"):
        picture(b"GIF89a", "a.png")
    with pytest.raises(ArtifactError, match=r"a\.png is not a valid PNG"):
        picture(png()[:40], "a.png")
    header = png()[:16] + (60_000).to_bytes(4, "big") * 2
    with pytest.raises(ArtifactError, match=r"not a valid PNG|more than"):
        picture(header + png()[24:], "a.png")


def test_curves_are_read_thinned_and_refused() -> None:
    lines = ["nimg,phase,loss"] + [f"{i},train,{1 / (i + 1)}" for i in range(1000)]
    nimg, scalars = curve_points("\n".join(lines).encode(), "c.csv")
    assert len(nimg) == 200
    assert set(scalars) == {"loss"}
    assert scalars["loss"][1] == pytest.approx(1 / 6, rel=1e-4)
    assert curve_points(b"nimg,loss\n1,nan\n2,0.5\n", "c.csv")[1] == {"loss": [None, 0.5]}
    for bad in (b"loss\n1\n", b"nimg\nx\n", b"nimg,loss\nnan,1\n", b"\xff\xfe", b'nimg,loss\n"1'):
        with pytest.raises(ArtifactError, match=r"c\.csv holds no training curve"):
            curve_points(bad, "c.csv")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_curve_or_an_artifact_error(data: bytes) -> None:
    try:
        nimg, scalars = curve_points(b"nimg,loss\n" + data, "c.csv")
    except ArtifactError:
        return
    assert all(len(values) == len(nimg) for values in scalars.values())


def test_artifacts_outside_missing_or_changed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    (tmp_path / "r/link.png").symlink_to(tmp_path / "b.png")
    good = hashlib.sha256(png()).hexdigest()
    path = tmp_path / "r/x.json"
    assert read_artifact(path, Artifact(file="a.png", sha256=good)) == png()
    for file, sha256, message in (
        ("../b.png", good, "outside the record's folder"),
        ("link.png", good, "outside the record's folder"),
        (str(tmp_path / "b.png"), good, "outside the record's folder"),
        ("none.png", good, "cannot be read"),
        ("a.png", "0" * 64, "its hash differs"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_artifact(path, Artifact(file=file, sha256=sha256))


def test_a_page_keeps_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmbench.report.gallery.LEAST_BYTES", 1500)
    monkeypatch.setattr("cmbench.report.gallery.PAGE_BYTES", 0)
    folder = tmp_path / "r"
    items = [
        with_artifact(folder, item, "grid", f"{i}.png", png((i, 0, 0)))
        for i, item in enumerate(sweep(seeds=1))
    ]
    render({"digits": on_disk(folder, items)}, tmp_path)
    html = (tmp_path / "digits.html").read_text()
    shown = html.count("data:image/png")
    assert 0 < shown < 9
    assert f"{9 - shown} pictures or curves are left out" in html


# ---- LaTeX that compiles ------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_whatever_the_names_are(tmp_path: Path) -> None:
    hostile = r"\input{x} $ & % # _ ^ ~ {} <é Ł 日 𝛼 \\ \end{tabular} | “q”"
    items = [
        record("alpha", seed=s, family=hostile, reference=hostile, title=hostile) for s in range(2)
    ]
    items += [
        item.model_copy(update={"sampling": item.sampling.model_copy(update={"sampler": hostile})})
        for item in sweep(("beta", "gamma"))
    ]
    render({"digits": on_disk(tmp_path / "r", items)}, tmp_path)
    table = (tmp_path / "digits.tex").read_text()
    assert r"\textbf{" in table
    assert "longtable" not in table
    compile_tex(tmp_path, table)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_the_tables_of_all_boards_compile_and_break_over_pages(tmp_path: Path) -> None:
    boards = load_boards(Path(__file__).parents[2] / "leaderboards")
    render({}, tmp_path, published=boards)
    tables = [path.read_text() for path in sorted(tmp_path.glob("*.tex"))]
    assert sum(r"\begin{longtable}" in table for table in tables) >= 2
    compile_tex(tmp_path, "\n\n".join(tables))


def compile_tex(folder: Path, table: str) -> None:
    (folder / "page.tex").write_text(
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs,longtable}\n"
        f"\\begin{{document}}\n{table}\\end{{document}}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
