"""What a study leaves: its arms with their records, and the plots that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cmbench.files import regular
from cmbench.records.artifacts import parse_curve
from cmbench.records.record import Record


@dataclass(frozen=True)
class Arm:
    """One line of a comparison; ``x`` is the value of the swept ``option`` if it is a number."""

    name: str
    series: str
    method: str
    recipe: str | None
    options: Mapping[str, Any]
    option: str = ""
    x: float | None = None


@dataclass(frozen=True)
class ArmResult:
    """An arm with the records of its cells, in the order of seeds and NFE."""

    arm: Arm
    records: tuple[Record, ...]

    @property
    def nfes(self) -> list[int]:
        """The NFE of the records, ascending, each once."""
        return sorted({record.sampling.nfe for record in self.records})

    def values(self, metric: str, nfe: int) -> list[float]:
        """Return the metric's value of every seed that has one."""
        found = [
            r.metrics[metric].value
            for r in self.records
            if r.status == "finished" and r.sampling.nfe == nfe and metric in r.metrics
        ]
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Plot:
    """One picture: a metric against the swept option or by arm, or a logged scalar (``curve``)."""

    kind: Literal["metric", "curve"]
    #: name of the metric, or column of the training log
    quantity: str
    scale: Literal["linear", "log"] = "log"


@dataclass(frozen=True)
class StudyResult:
    """A study with everything that its page shows."""

    name: str
    title: str
    claim: str
    source: str
    dataset: str
    seeds: int
    #: what `cmbench study` takes to repeat it: its name, or the file
    argument: str
    #: the metric that the dataset's leaderboards rank by
    rank_metric: str
    plots: tuple[Plot, ...]
    arms: Sequence[ArmResult]
    #: where the records lie, with their training curves
    folder: Path

    @property
    def nfes(self) -> list[int]:
        """The NFE of all records, ascending, each once."""
        return sorted({nfe for result in self.arms for nfe in result.nfes})

    @property
    def metrics(self) -> list[str]:
        """The metrics that are plotted, or the one that leaderboards rank by."""
        plotted = [plot.quantity for plot in self.plots if plot.kind == "metric"]
        return list(dict.fromkeys(plotted)) or [self.rank_metric]

    def curves(self, result: ArmResult, scalar: str) -> list[list[tuple[float, float]]]:
        """Return ``(images seen, scalar)`` of every run of an arm whose curve can be read."""
        files = {r.artifacts["curve"].file: None for r in result.records if "curve" in r.artifacts}
        return [curve for file in files if (curve := _curve(self.folder / file, scalar))]


def _curve(path: Path, scalar: str) -> list[tuple[float, float]]:
    try:
        nimg, scalars = parse_curve(regular(path).read_bytes())
    except (OSError, ValueError):
        return []
    return [(x, y) for x, y in zip(nimg, scalars.get(scalar, ()), strict=False) if y is not None]
