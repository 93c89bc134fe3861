"""A study's pictures, drawn with matplotlib (extra ``plots``) as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from cmbench.errors import MissingError
from cmbench.records.studies import ArmResult, StudyResult

_MARKERS = "osD^vP*X"


def require_matplotlib() -> None:
    """Raise ``MissingError`` if pictures cannot be drawn; cheap, for before the work."""
    if find_spec("matplotlib") is None:
        raise MissingError(
            "cmbench study",
            "matplotlib is not installed",
            allowed="with --no-plot, tables only",
            remedy="install it with: pip install 'cmbench[plots]'",
        )


def draw(study: StudyResult, folder: Path) -> list[str]:
    """Draw every plot as ``<study>-<number>.svg`` and ``.png``; return the SVG files' names."""
    require_matplotlib()
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    names = []
    # Text stays text (a third of the size), and equal data give equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cmbench", "font.size": 9}):
        for number, plot in enumerate(study.plots, start=1):
            figure, axes = plt.subplots(figsize=(6.0, 3.6), layout="constrained")
            fill = _draw_metric if plot.kind == "metric" else _draw_curves
            fill(axes, study, plot.quantity)
            if axes.has_data():
                axes.set_yscale(plot.scale)
            axes.grid(True, alpha=0.3)
            axes.set_title(study.title, fontsize=9)
            name = f"{study.name}-{number}"
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=144)
            plt.close(figure)
            names.append(f"{name}.svg")
    return names


def _draw_metric(axes: Any, study: StudyResult, metric: str) -> None:
    """Draw means with every seed's value: against the swept option, or by arm without one."""
    axes.set_ylabel(metric)
    swept = any(result.arm.x is not None for result in study.arms)
    (_draw_sweeps if swept else _draw_arms)(axes, study.arms, metric, study.nfes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _draw_sweeps(axes: Any, results: Sequence[ArmResult], metric: str, nfes: Sequence[int]) -> None:
    """One line per series and NFE; an arm without a swept value is a horizontal line."""
    markers, colors = cycle(_MARKERS), cycle(f"C{i}" for i in range(10))
    options = dict.fromkeys(r.arm.option for r in results if r.arm.x is not None)
    for series in dict.fromkeys(r.arm.series for r in results):
        arms = [r for r in results if r.arm.series == series]
        for nfe in nfes:
            label = series if len(nfes) == 1 else f"{series}, NFE {nfe}"
            found = [(r.arm.x, v) for r in arms if (v := r.values(metric, nfe))]
            swept = sorted((x, v) for x, v in found if x is not None)
            color = next(colors)
            if swept:
                axes.plot(
                    [x for x, _ in swept],
                    [fmean(v) for _, v in swept],
                    color=color,
                    marker=next(markers),
                    label=label,
                )
                for x, values in swept:
                    axes.plot([x] * len(values), values, ".", color=color, alpha=0.5)
            for _, values in (f for f in found if f[0] is None):
                axes.axhline(fmean(values), color=color, linestyle="--", label=label)
                axes.axhspan(min(values), max(values), color=color, alpha=0.1)
    axes.set_xscale("log")
    axes.set_xlabel(", ".join(options))


def _draw_arms(axes: Any, results: Sequence[ArmResult], metric: str, nfes: Sequence[int]) -> None:
    """One position per arm, one colour per NFE."""
    for index, nfe in enumerate(nfes):
        shift = 0.12 * (index - (len(nfes) - 1) / 2)
        label = f"NFE {nfe}"
        for place, result in enumerate(results):
            values = result.values(metric, nfe)
            if not values:
                continue
            color = f"C{index}"
            axes.plot(
                [place + shift],
                [fmean(values)],
                _MARKERS[index % len(_MARKERS)],
                color=color,
                label=label,
            )
            axes.plot([place + shift] * len(values), values, ".", color=color, alpha=0.5)
            label = "_again"
    axes.set_xticks(range(len(results)), [r.arm.name for r in results], fontsize=8)
    axes.set_xlim(-0.6, len(results) - 0.4)


def _draw_curves(axes: Any, study: StudyResult, scalar: str) -> None:
    """One colour per arm, one line per seed."""
    for index, result in enumerate(study.arms):
        label = result.arm.name
        for curve in study.curves(result, scalar):
            axes.plot(
                [x / 1000 for x, _ in curve],
                [y for _, y in curve],
                color=f"C{index}",
                alpha=0.8,
                linewidth=1.2,
                label=label,
            )
            label = "_again"
    axes.set_xlabel("training images, thousands")
    axes.set_ylabel(scalar)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
