"""The chart of quality against each cost, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser_tools import complaints, opened, script
from record_factory import on_disk, record

from cmbench.records.folders import read_records
from cmbench.records.record import SamplingCost
from cmbench.report import render

#: Labels of the marks of the chart, and whether it has a front.
MARKS = (
    "return [...document.querySelectorAll('#chart-cost .point title')].map(t => t.textContent)"
    ".sort()"
)
FRONT = (
    "const d = document.querySelector('#chart-cost path.front')?.getAttribute('d') || '';"
    "return (d.match(/[MV]/g) || []).length"
)


def cost(hardware: str, latency_s: float) -> SamplingCost:
    return SamplingCost(
        hardware=hardware,
        latency_s=latency_s,
        latency_range_s=(latency_s / 2, latency_s * 2),
        latency_repetitions=5,
        throughput_images_per_s=500.0,
        throughput_batch_size=64,
        flops_per_image=None,
        peak_memory_bytes=None,
        decoder=None,
    )


@pytest.fixture(scope="module")
def priced_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods on one machine, of which the third is beaten, and two on another."""
    root = tmp_path_factory.mktemp("costs")
    items = [
        record(name, value=value, seed=seed, cost=cost(hardware, latency_s))
        for name, hardware, latency_s, value in (
            ("alpha", "GPU A", 0.001, 3.0),
            ("beta", "GPU A", 0.002, 2.0),
            ("gamma", "GPU A", 0.004, 2.5),
            ("delta", "GPU B", 0.0001, 1.0),
            ("epsilon", "GPU B", 0.0002, 0.9),
        )
        for seed in range(2)
    ]
    on_disk(root / "r", items)
    render({"digits": read_records(root / "r")}, root)
    return root / "digits.html"


def choose(page: Any, name: str) -> None:
    script(
        page,
        "const s = document.getElementById('cost'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'))",
        name,
    )


def test_a_chart_holds_rows_of_one_hardware_and_their_front(
    browser: Any, priced_page: Path
) -> None:
    page = opened(browser, priced_page)
    names = script(page, "return [...document.getElementById('cost').options].map(o => o.value)")
    # Costs that are equal in all rows (time per image) have no chart.
    assert names == ["Latency [ms] on GPU A", "Latency [ms] on GPU B"]
    found = script(page, MARKS)
    assert [text.split(",")[0] for text in found] == ["alpha", "beta", "gamma"]
    assert all(text.endswith(" on GPU A") for text in found)
    assert script(page, FRONT) == 2
    choose(page, "Latency [ms] on GPU B")
    assert [text.split(",")[0] for text in script(page, MARKS)] == ["delta", "epsilon"]
    title = script(page, "return document.querySelector('#chart-cost figcaption').textContent")
    assert "against cost on GPU B" in title
    assert "cost=Latency" in page.current_url
    assert complaints(page) == []


def test_a_selection_never_promotes_a_row_to_the_front(browser: Any, priced_page: Path) -> None:
    page = opened(browser, priced_page, "#q=gamma")
    assert len(script(page, MARKS)) == 1
    assert script(page, FRONT) == 0
    opened(browser, priced_page, "#q=beta")
    assert script(page, FRONT) == 1


def test_a_link_restores_the_cost(browser: Any, priced_page: Path) -> None:
    page = opened(browser, priced_page, "#cost=Latency+%5Bms%5D+on+GPU+B")
    chosen = script(page, "return document.getElementById('cost').value")
    assert chosen == "Latency [ms] on GPU B"
    opened(browser, priced_page, "#cost=constructor")
    assert script(page, "return document.getElementById('cost').value") == "Latency [ms] on GPU A"
