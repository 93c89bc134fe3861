"""The pages of the boards that are checked in, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from browser_tools import complaints, opened, requests, script
from record_factory import metric, on_disk, record, with_artifact

from cmbench.leaderboard.boards import load_boards, record_folders
from cmbench.measure.gallery import grid_png
from cmbench.records.folders import read_records
from cmbench.report import render

BOARDS = Path(__file__).parents[2] / "leaderboards"


def test_strips_of_several_methods_show_one_seed_in_one_row(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    grid = grid_png(torch.zeros(16, 1, 8, 8))
    items = [
        with_artifact(folder, record(method), "grid", f"{method}.png", grid)
        for method in ("alpha", "a-method-with-a-long-name", "beta")
    ]
    on_disk(folder, items)
    render({"digits": read_records(folder)}, tmp_path)
    page = opened(browser, tmp_path / "digits.html")
    boxes = script(
        page,
        "return [...document.querySelectorAll('.strips img')].map(i => i.getBoundingClientRect())"
        ".map(b => [b.top, b.height, b.width])",
    )
    assert len(boxes) == 3
    assert len({tuple(box) for box in boxes}) == 1
    assert boxes[0][1:] == [512, 64]


@pytest.fixture(scope="module")
def board_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("boards")
    boards = load_boards(BOARDS)
    folders = record_folders(BOARDS)
    render(
        {name: read_records(folder) for name, folder in folders.items()},
        root,
        published={p.board.dataset: p for p in boards.values()},
    )
    return root


def test_no_page_of_the_boards_overflows_or_complains(browser: Any, board_pages: Path) -> None:
    empty = (
        "return [...document.querySelectorAll('.charts figure')]"
        ".filter(f => !f.hidden && !f.querySelector('.mark, .line')).map(f => f.id)"
    )
    # Colour, shape and filling of every legend entry, by chart.
    legends = (
        "return [...document.querySelectorAll('.legend')].map(l => [...l.querySelectorAll('.mark')]"
        ".map(m => [m.parentNode.getAttribute('class'), m.getAttribute('class'),"
        " (m.getAttribute('d') || 'circle').replace(/[-0-9.,]/g, '')].join(' ')))"
    )
    try:
        for path in sorted(board_pages.glob("*.html")):
            page = opened(browser, path)
            for width in (360, 1280, 1920):
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                wide = script(page, "return document.documentElement.scrollWidth")
                assert wide <= width, path.name
                assert script(page, empty) == [], path.name
            for entries in script(page, legends):
                assert len(set(entries)) == len(entries), path.name
            assert complaints(page) == [], path.name
            assert requests(page) == [], path.name
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


AXE_SERIOUS = """
const done = arguments[0];
// Contrast takes nine tenths of the time; another test looks at it on one page of each kind.
axe.run(document, {rules: {'color-contrast': {enabled: false}}}).then(r => done(
  r.violations.map(v => `${v.impact} ${v.id}: ${v.nodes.map(n => n.html).slice(0, 3)}`)));
"""


def test_axe_finds_nothing_on_pages_of_each_kind(browser: Any, board_pages: Path) -> None:
    axe = pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text()
    # Measured rows with pictures and curves, reported rows, and the index.
    for name in ("digits", "lsun-cat256", "index"):
        path = board_pages / f"{name}.html"
        page = opened(browser, path)
        script(page, source)
        assert page.execute_async_script(AXE_SERIOUS) == [], path.name
        if path.stem == "lsun-cat256":  # the drawer and an open menu, once
            script(page, "document.querySelector('.menu').open = true")
            script(page, "document.querySelector('.details').click()")
            assert page.execute_async_script(AXE_SERIOUS) == []


def test_the_drawer_shows_what_others_reported_and_why_there_is_no_difference(
    browser: Any, tmp_path: Path
) -> None:
    key = "fid:inception@aa:bilinear:round:n-1:float64:ref=bb:n=50000:v1"
    items = [
        record(
            "edm",
            dataset="cifar10",
            nfe=35,
            seed=seed,
            rank_metric="fid",
            metrics={"fid": metric(2.0 + seed / 100, "fid", key=key)},
        )
        for seed in range(2)
    ]
    found = [(Path(f"{item.cell}.json"), item) for item in items]
    render({"cifar10": found}, tmp_path, published=load_boards(BOARDS))
    page = opened(browser, tmp_path / "cifar10.html", "#-kind=reported")
    page.find_element("css selector", "tr[data-row]:not([hidden]) .details").click()
    text = page.find_element("id", "drawer").text
    assert "Reported by others" in text
    assert "keys differ" in text
    assert key in text
    assert "2.04; Not stated precisely (no metric key)" in text
    assert 'EDM, Karras et al., 2022, talk "Consistency Models", ' in text
