"""Charts from plugins: SVG shown as images, in which browsers run no script and load nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Called with the dataset and its rows (see :func:`cmbench.report.payload.public_row`).
Charts = Callable[[str, Sequence[Mapping[str, Any]]], Iterable[Mapping[str, str]]]

MAX_CHARACTERS = 500_000


@dataclass(frozen=True)
class Chart:
    """A plugin's chart: a title and a data URI for ``<img>``, or why there is none."""

    title: str
    uri: str = ""
    problem: str = ""


def chart_images(
    charts: Charts | None, dataset: str, rows: Sequence[Mapping[str, Any]]
) -> list[Chart]:
    """Return the charts of plugins; one that raises becomes a problem on the page."""
    found: list[Chart] = []
    try:
        # One by one: what a generator made stays if it raises.
        found.extend(chart_image(chart) for chart in (charts(dataset, rows) if charts else ()))
    except Exception as error:  # a plugin's fault must not cost the page
        found.append(Chart("plugin", problem=f"{type(error).__name__}: {error}"))
    return found


def chart_image(chart: object) -> Chart:
    """Return the chart's SVG as a data URI, or what is wrong with it."""
    if not isinstance(chart, Mapping):
        return Chart("untitled", problem=f"{type(chart).__name__} is not a mapping")
    title, svg = str(chart.get("title", "untitled"))[:200], chart.get("svg")
    if not isinstance(svg, str) or "<svg" not in svg:
        return Chart(title, problem="it has no svg")
    if len(svg) > MAX_CHARACTERS:
        return Chart(title, problem=f"its svg has more than {MAX_CHARACTERS:,} characters")
    data = base64.b64encode(svg.encode(errors="replace")).decode()
    return Chart(title, f"data:image/svg+xml;base64,{data}")
