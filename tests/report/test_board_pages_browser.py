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


#: Name and value of the best row of each card, and what of cards and pivot is in the viewport.
FIRST_SCREEN = """
const inside = (e) => { const b = e.getBoundingClientRect();
  return b.width > 0 && b.top >= 0 && b.left >= 0
    && b.bottom <= innerHeight && b.right <= innerWidth; };
const winners = [...document.querySelectorAll('.card .winner')];
return {
  answers: winners.map(w => w.querySelector('.details').textContent + ' '
    + w.querySelector('b').textContent),
  hidden: winners.flatMap(w => [w.querySelector('.details'), w.querySelector('b')])
    .filter(e => !inside(e)).length,
  cards: [...document.querySelectorAll('.card')].map(inside),
  pivot: document.querySelector('.pivot tbody tr').getBoundingClientRect().top < innerHeight,
};
"""


@pytest.mark.parametrize("size", [(1280, 800), (768, 1024), (360, 640)])
def test_the_answer_is_on_the_first_screen_of_every_page(
    browser: Any, board_pages: Path, size: tuple[int, int]
) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    answers = {}
    try:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for path in sorted(board_pages.glob("*.html")):
            if path.stem == "index":
                continue
            page = opened(browser, path)
            found = script(page, FIRST_SCREEN)
            assert found["cards"] == [True] * 3, path.name
            assert found["hidden"] == 0, path.name
            assert found["pivot"], path.name
            answers[path.stem] = found["answers"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert answers["digits"][1].startswith("ect 1.27 ± ")
    assert answers["imagenet64"][0] == "Uni-Instruct 1.02"
    assert all(answers.values())


def test_cards_and_pivot_show_the_same_rows_as_best(browser: Any, board_pages: Path) -> None:
    page = opened(browser, board_pages / "digits.html")
    bold = script(
        page,
        "return [...document.querySelectorAll('.pivot tbody tr')].filter(r => "
        "r.querySelectorAll('td')[1].querySelector('b')).map(r => r.cells[0].title)",
    )
    card = script(page, "return document.querySelectorAll('.card')[1].textContent")
    assert {"ect", "sct", "ict-deep"} == set(bold)
    assert all(name in card for name in bold)
    page.find_element("css selector", ".pivot td button").click()
    assert "NFE 1" in page.find_element("id", "drawer-title").text


def test_filters_have_only_this_all_and_none(browser: Any, board_pages: Path) -> None:
    page = opened(browser, board_pages / "cifar10.html")
    visible = "return [...document.querySelectorAll('tr[data-row]')].filter(r => !r.hidden).length"
    whole = script(page, visible)
    script(page, "document.querySelector('[data-none=family]').click()")
    assert script(page, visible) == 0
    script(page, "document.querySelector('[data-only=family]').click()")
    one = script(page, visible)
    assert 0 < one < whole
    assert (
        script(page, "return document.querySelectorAll('[data-filter=family]:checked').length") == 1
    )
    script(page, "document.querySelector('[data-every=family]').click()")
    assert script(page, visible) == whole


def test_the_search_ignores_what_no_reader_sees(browser: Any, board_pages: Path) -> None:
    page = opened(browser, board_pages / "cifar10.html")
    visible = "return [...document.querySelectorAll('tr[data-row]')].filter(r => !r.hidden).length"
    found = {}
    for text in ("few-step generation with", "distillation", "ict-deep"):
        opened(browser, board_pages / "cifar10.html", f"#q={text}")
        found[text] = script(page, visible)
    assert found["few-step generation with"] == 0  # titles of tables
    assert found["distillation"] > 5  # a family
    assert found["ict-deep"] > 0


def test_legends_switch_groups_off_and_on(browser: Any, board_pages: Path) -> None:
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = opened(browser, board_pages / "digits.html")
    marks = "return document.querySelectorAll('#chart-nfe .point').length"
    before = script(page, marks)
    entry = page.find_element("css selector", "#chart-nfe .switch")
    assert entry.get_attribute("aria-pressed") == "true"
    entry.send_keys(keys.ENTER)
    assert script(page, marks) < before
    again = page.switch_to.active_element
    assert again.get_attribute("aria-pressed") == "false"
    again.send_keys(keys.ENTER)
    assert script(page, marks) == before


def test_an_outlier_is_clipped_with_a_mark(browser: Any, tmp_path: Path) -> None:
    items = [
        record(f"m{i}", nfe=1 + i % 2, seed=seed, metrics={"fd-digits": metric(value)})
        for i, value in enumerate([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 900.0])
        for seed in range(2)
    ]
    on_disk(tmp_path / "r", items)
    render({"digits": read_records(tmp_path / "r")}, tmp_path)
    page = opened(browser, tmp_path / "digits.html")
    text = script(page, "return document.querySelector('#chart-nfe').textContent")
    assert "1 beyond the axis, clipped" in text
    ticks = script(
        page,
        "return [...document.querySelectorAll('#chart-nfe .axes text')].map(t => t.textContent)",
    )
    assert not [tick for tick in ticks if tick.isdigit() and int(tick) > 100]
    inside = script(
        page,
        "const box = document.querySelector('#chart-nfe svg').getBoundingClientRect();"
        "return [...document.querySelectorAll('#chart-nfe .mark')].every(m => "
        "m.getBoundingClientRect().top >= box.top)",
    )
    assert inside


def test_references_lead_to_the_paper(browser: Any, board_pages: Path) -> None:
    page = opened(browser, board_pages / "cifar10.html")
    links = script(page, "return [...document.querySelectorAll('#table td a')].map(a => a.href)")
    assert len(links) > 50
    assert all(link.startswith("https://arxiv.org/abs/") for link in links)


def test_the_index_shows_what_is_best(browser: Any, board_pages: Path) -> None:
    text = opened(browser, board_pages / "index.html").find_element("tag name", "main").text
    assert "ect 1.27 ± " in text
    assert "Uni-Instruct" in text
