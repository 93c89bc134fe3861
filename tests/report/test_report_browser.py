"""Pages in a real browser: untrusted text stays text, nothing leaves the page, everything works."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from browser_tools import complaints, eventually, opened, requests, script
from record_factory import metric, on_disk, png, record, sweep, with_artifact

from cmbench.leaderboard.published import (
    Board,
    Published,
    PublishedRow,
    ReportedProtocol,
    SourceTable,
)
from cmbench.leaderboard.published_files import load_published
from cmbench.records.folders import read_records
from cmbench.report import render

BOARDS = Path(__file__).parents[2] / "leaderboards"

#: Every way a string has been turned into a script; HIT is a server that must stay untouched.
HOSTILE = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=1>',
    "'><svg onload=window.pwned=1>",
    "<img src='HIT/img'><link rel=stylesheet href='HIT/css'>",
    "</title></style></noscript><iframe src='HIT/frame'></iframe>",
    "javascript:window.pwned=1",
    "{{ 7*7 }}{% for x in y %}${7*7}`${window.pwned=1}`",
    "<!--<script>",
    "\u2028window.pwned=1//\u2029",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
    "=HYPERLINK('HIT/csv')",
    "\x00\x07\u202e",
]
SVG_START = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="parent.pwned=1">'
HOSTILE_SVG = [
    "<script>parent.pwned=1</script>",
    "<a href='javascript:1'><text>x</text></a>",
    "<image href='HIT/svg'/><use href='HIT/use#a'/>",
    "<foreignObject><body xmlns='http://www.w3.org/1999/xhtml' onload='1'/></foreignObject>",
    "<style>@import url(HIT/import); rect { fill: url(HIT/fill) }</style>",
    "<animate attributeName='href' to='javascript:1'/><rect onclick='1' width='9'/>",
]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    hits: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}", hits
    made.shutdown()


# ---- hostile values -----------------------------------------------------------------------------


def hostile_records(text: str, seed: int) -> Any:
    """A record with ``text`` wherever a string may stand."""
    base = record("alpha", seed=seed)
    values = {
        text: metric(1.0 + seed, text, unit=text, detail={text: [text], "floor": 0.5}),
        "precision": metric(0.5, "precision", higher=True),
    }
    update = {
        "title": text,
        "family": text,
        "reference": text,
        "command": text,
        "reason": text,
        "warnings": [text],
        "rank_metric": text,
        "metrics": values,
        "plugin": base.plugin.model_copy(update={"name": text, "distribution": text}),
        "training": base.training.model_copy(
            update={"config": {text: text}, "run": text}
            | dict.fromkeys(("recipe", "teacher", "ema"), text)
        ),
        "sampling": base.sampling.model_copy(
            update={"sampler": text, "labels": text, "tuned": {text: text}}
        ),
        "environment": base.environment.model_copy(
            update={"packages": {text: text}, "cpu": text, "gpu": text, "platform": text}
        ),
        "cell": f"cell-{seed}-{abs(hash(text)) % 10**6}",
    }
    return base.model_copy(update=update)


@pytest.fixture(scope="module")
def hostile_page(server: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    folder = root / "records"
    texts = [text.replace("HIT", server[0]) for text in HOSTILE]
    items = []
    for i, text in enumerate(texts):
        items += [hostile_records(text, 2 * i), hostile_records(text, 2 * i + 1)]
        failed = record(f"m{i}", status="failed", reason=text, metrics={})
        items.append(failed)
    curve = f'nimg,"{texts[0]}",loss\n0,1.0,2.0\n'.encode()
    items[0] = with_artifact(folder, items[0], "curve", "c.csv", curve)
    items[1] = with_artifact(folder, items[1], texts[2], "a.png", png())
    found = [(folder / f"{item.cell}.json", item) for item in items]

    def charts(dataset: str, rows: object) -> list[dict[str, str]]:
        bodies = [body.replace("HIT", server[0]) for body in HOSTILE_SVG]
        return [{"title": t, "svg": SVG_START + body + "</svg>"} for t, body in zip(texts, bodies)]

    columns = dict.fromkeys(texts, "training.recipe")
    boards = {"hostile": hostile_board(texts)}
    render(
        {"hostile": found},
        root,
        extra_columns=columns,
        extra_charts=charts,
        command=texts[1],
        published=boards,
    )
    return root / "hostile.html"


def hostile_board(texts: list[str]) -> Published:
    """A board with the texts wherever a board takes any; a row of it stands beside a record."""
    table = SourceTable(title=texts[0], rows=len(texts))
    protocol = ReportedProtocol(title=texts[1], reason=texts[2], key=texts[3])
    board = Board(
        schema_version=1,
        dataset="hostile",
        title=texts[0],
        rank_metric="fid",
        description="\n\n".join(texts),
        notes=tuple(texts),
        tables={"t": table},
        protocols={"p": protocol},
    )
    names = [field.alias or name for name, field in PublishedRow.model_fields.items()]
    base = dict.fromkeys(names, "") | {
        "table": "t",
        "protocol": "p",
        "year": "2024",
        "family": "GAN",
        "nfe": "1",
        "fid": "1.0",
    }
    texts_of = ("block", "method", "source", "place", "note")
    rows = [
        PublishedRow.model_validate(
            base
            | dict.fromkeys(texts_of, text)
            | {"joins": "alpha", "reference": f"{' '.join(text.split())}, 2024"}
        )
        for text in texts
    ]
    return Published(board, tuple(enumerate(rows, 2)))


def test_hostile_values_stay_text_and_no_request_leaves_the_page(
    browser: Any, hostile_page: Path, server: tuple[str, list[str]]
) -> None:
    page = opened(browser, hostile_page)
    count = script(page, "return document.querySelectorAll('tr[data-row]').length")
    assert count >= len(HOSTILE)
    script(
        page,
        """
        for (const button of document.querySelectorAll('.details')) {
          button.click();
          document.getElementById('drawer-close').click();
        }
        for (const name of ['metric', 'scalar']) {
          const select = document.getElementById(name);
          for (const option of select.options) {
            select.value = option.value;
            select.dispatchEvent(new Event('change'));
          }
        }
        for (const b of document.querySelectorAll('thead button, .controls input')) b.click();
        """,
    )
    assert script(page, "return window.pwned") is None
    assert requests(page) == []
    assert server[1] == []
    assert complaints(page) == []
    foreign = "return document.querySelectorAll('iframe,object,embed,link,base').length"
    assert script(page, foreign) == 0
    sources = script(page, "return [...document.images].map(i => i.src.slice(0, 11))")
    assert set(sources) == {"data:image/"}
    assert hostile_page.read_text().count("data:image/svg+xml;base64,") == len(HOSTILE_SVG)


def test_hostile_hashes_change_nothing(browser: Any, hostile_page: Path) -> None:
    for fragment in (
        "#q=<img src=x onerror=window.pwned=1>",
        "#sort=__proto__&row=constructor",
        "#columns=[%22__proto__%22]&metric=toString&theme=x",
        "#columns=%7B%7D",
        "#columns=nojson",
        "#-family=x&-__proto__=y",
    ):
        page = opened(browser, hostile_page, fragment)
        assert script(page, "return window.pwned") is None
        assert complaints(page) == []
        assert script(page, "return document.documentElement.className") == "live"


# ---- the page at work ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    folder = root / "records" / "cifar10"
    items = sweep(("alpha", "beta"), (1, 2), 3, dataset="cifar10", rank_metric="fid")
    items = [
        item.model_copy(update={"metrics": {"fid": item.metrics["fd-digits"]}}) for item in items
    ]
    curve = b"nimg,loss,norm_small_t,norm_middle_t,norm_large_t\n0,1,1,2,3\n9,.5,1,2,3\n"
    items[0] = with_artifact(folder, items[0], "grid", "a.png", png())
    items[0] = with_artifact(folder, items[0], "curve", "curves/a.csv", curve)
    on_disk(folder, items)
    boards = {"cifar10": load_published(BOARDS / "cifar10")}
    render({"cifar10": read_records(folder)}, root, published=boards)
    return root / "cifar10.html"


def shown(page: Any) -> list[str]:
    return script(
        page,
        "return [...document.querySelectorAll('tr[data-row]')].filter(r => !r.hidden)"
        ".map(r => r.cells[0].textContent.trim())",
    )


def test_the_selection_drives_the_charts_and_stands_in_the_hash(
    browser: Any, page_path: Path
) -> None:
    page = opened(browser, page_path)
    everything = len(shown(page))
    marks = "return document.querySelectorAll('#chart-nfe .point').length"
    before = script(page, marks)
    page.find_element("id", "search").send_keys("beta")
    assert set(shown(page)) == {"beta"}
    assert 0 < script(page, marks) < before
    assert page.current_url.endswith("#q=beta")
    assert page.find_element("id", "count").text == f"2 of {everything} rows"
    page.find_element("id", "reset").click()
    assert len(shown(page)) == everything
    assert "#" not in page.current_url.removesuffix("#")


def test_a_metric_may_have_the_name_of_what_objects_inherit(browser: Any, tmp_path: Path) -> None:
    items = sweep(("alpha", "beta"), (1, 2), 2)
    for index, item in enumerate(items):
        if item.method == "alpha":
            odd = {"constructor": metric(1.0, "constructor"), "toString": metric(2.0, "toString")}
            items[index] = item.model_copy(update={"metrics": {**item.metrics, **odd}})
    on_disk(tmp_path / "r", items)
    render({"digits": read_records(tmp_path / "r")}, tmp_path)
    page = opened(browser, tmp_path / "digits.html", "#metric=constructor")
    assert complaints(page) == []
    assert script(page, "return document.querySelectorAll('#chart-nfe .point').length") == 2
    assert script(page, "return document.querySelectorAll('#chart-steps .point').length") == 1


@pytest.mark.parametrize(("full", "label"), [(True, "Pareto front, measured"), (False, "")])
def test_only_a_ranked_section_has_a_front(
    browser: Any, tmp_path: Path, full: bool, label: str
) -> None:
    items = sweep(("alpha", "beta"), (1, 2), 2)
    if not full:
        few = {"num_samples": 10}
        items = [
            i.model_copy(update={"sampling": i.sampling.model_copy(update=few)}) for i in items
        ]
    on_disk(tmp_path / "r", items)
    render({"digits": read_records(tmp_path / "r")}, tmp_path)
    page = opened(browser, tmp_path / "digits.html")
    assert complaints(page) == []
    assert script(page, "return document.querySelectorAll('#chart-nfe .point').length") == 4
    text = script(page, "return document.querySelector('#chart-nfe').textContent")
    assert ("Pareto front" in text) == bool(label)
    assert label in text
    faint = script(page, "return document.querySelectorAll('#chart-nfe .faint').length")
    assert (faint > 0) != full


def test_a_link_restores_the_selection(browser: Any, page_path: Path) -> None:
    page = opened(
        browser,
        page_path,
        "#-kind=reported&sort=-metric%3Afid&columns=%5B%22method%22%2C%22metric%3Afid%22%5D&theme=dark",
    )
    assert shown(page) == ["beta", "alpha", "beta", "alpha"]
    heads = script(
        page,
        "return [...document.querySelectorAll('thead th[data-c]')].filter(h => !h.hidden)"
        ".map(h => [h.textContent, h.getAttribute('aria-sort')])",
    )
    assert heads == [["Method", None], ["FID ↓", "descending"]]
    assert script(page, "return document.documentElement.dataset.theme") == "dark"
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    assert script(page, background) == "rgb(18, 21, 26)"


def test_sorting_keeps_sections_apart_and_missing_values_last(
    browser: Any, page_path: Path
) -> None:
    page = opened(browser, page_path, "#sort=metric%3Ais")
    values = script(
        page,
        "const body = document.querySelector('tbody[data-section^=reported]');"
        "const at = [...document.querySelectorAll('thead th[data-c]')]"
        ".findIndex(h => h.textContent.startsWith('IS'));"
        "return [...body.querySelectorAll('tr[data-row]')].map(r => r.cells[at].textContent)",
    )
    numbers = [float(v) for v in values if v]
    assert numbers == sorted(numbers)
    assert values[len(numbers) :] == [""] * (len(values) - len(numbers))


def test_the_keyboard_sorts_filters_and_opens_the_provenance(browser: Any, page_path: Path) -> None:
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = opened(browser, page_path, "#-kind=reported")
    header = page.find_element("xpath", "//thead//button[starts-with(., 'FID')]")
    header.send_keys(keys.ENTER)
    assert header.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    menu = page.find_element("css selector", ".menu summary")
    menu.send_keys(keys.ENTER)
    assert menu.find_element("xpath", "..").get_attribute("open") is not None
    menu.send_keys(keys.ESCAPE)
    assert eventually(lambda: menu.find_element("xpath", "..").get_attribute("open") is None)
    page.find_element("css selector", ".details").send_keys(keys.ENTER)
    drawer = page.find_element("id", "drawer")
    assert "cmbench run --method alpha" in drawer.text
    assert "training.config" in drawer.text
    assert eventually(lambda: "&row=" in page.current_url)
    drawer.send_keys(keys.ESCAPE)
    assert eventually(lambda: not drawer.is_displayed())
    # The drawer's close event, which writes the address, comes after the key.
    assert eventually(lambda: "row=" not in page.current_url)


def test_every_chart_has_a_name_and_its_marks(browser: Any, page_path: Path) -> None:
    page = opened(browser, page_path)
    figures = script(
        page,
        "return [...document.querySelectorAll('.charts figure')].filter(f => !f.hidden)"
        ".map(f => [f.id, f.querySelector('svg').getAttribute('aria-label').length,"
        " f.querySelectorAll('.mark.hollow').length, f.querySelectorAll('.whisker').length])",
    )
    by_id = {name: rest for name, *rest in figures}
    assert set(by_id) == {
        "chart-nfe",
        "chart-one",
        "chart-year",
        "chart-steps",
        "chart-compute",
        "chart-curves",
    } - ({"chart-compute"} if "chart-compute" not in by_id else set())
    assert all(length > 20 for length, *_ in by_id.values())
    assert by_id["chart-nfe"][1] > 50
    assert by_id["chart-nfe"][2] == 4
    names = script(page, "return [...document.getElementById('scalar').options].map(o => o.value)")
    assert names == ["norm by time", "loss", "norm_small_t", "norm_middle_t", "norm_large_t"]
    assert complaints(page) == []


def test_downloads_hold_the_selected_rows(browser: Any, page_path: Path) -> None:
    page = opened(browser, page_path, "#q=beta")
    found = script(
        page,
        """
        const made = {};
        const make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { made.last = blob; return make.call(URL, blob); };
        const click = HTMLAnchorElement.prototype.click;
        HTMLAnchorElement.prototype.click = function () { made[this.download] = made.last; };
        for (const b of document.querySelectorAll('[data-save]')) b.click();
        document.querySelector('#chart-nfe .save').click();
        HTMLAnchorElement.prototype.click = click;
        window.made = made;
        return Object.keys(made);
        """,
    )
    assert set(found) == {"last", "cifar10.csv", "cifar10.json", "cifar10.tex", "cifar10-nfe.svg"}

    def text(name: str) -> str:
        return page.execute_async_script("made[arguments[0]].text().then(arguments[1])", name)

    lines = text("cifar10.csv").splitlines()
    assert len(lines) == 3
    assert "beta" in lines[1]
    rows = json.loads(text("cifar10.json"))["rows"]
    assert [row["label"] for row in rows] == ["beta", "beta"]
    assert rows[0]["provenance"]["method"] == "beta"
    assert text("cifar10.tex").count("beta") == 2
    assert r"\bottomrule" in text("cifar10.tex")
    drawing = ElementTree.fromstring(text("cifar10-nfe.svg"))
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert "currentColor" in text("cifar10-nfe.svg")


@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_nothing_overflows_sideways(browser: Any, page_path: Path, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = opened(browser, page_path)
        assert script(page, "return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("name", ["cifar10.html", "index.html"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, page_path: Path, name: str, theme: str) -> None:
    axe = pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text()
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page = opened(browser, page_path.with_name(name))
        script(page, source)
        found = page.execute_async_script(
            "const [theme, done] = arguments;"
            # Only colours differ in the dark.
            "axe.run(document, theme === 'dark' ? {runOnly: ['color-contrast']} : {})"
            ".then(r => done(r.violations.map("
            "v => `${v.impact} ${v.id}: ${v.nodes.map(n => n.html).slice(0, 3)}`)))",
            theme,
        )
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert found == []
