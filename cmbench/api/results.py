"""Records as objects of a notebook: a tidy table, and how it is displayed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmbench.errors import MissingError, UserError
from cmbench.leaderboard.costs import COSTS
from cmbench.leaderboard.details import floor_of, interval_of
from cmbench.records.configuration import configured_method, overrides_text
from cmbench.records.folders import read_records
from cmbench.records.record import Record
from cmbench.records.workspace import Workspace

if TYPE_CHECKING:
    import pandas

#: What decides a value, in the order of the table's columns.
_DECIDING = (
    "dataset",
    "kind",
    "method",
    "recipe",
    "overrides",
    "seed",
    "nfe",
    "sampler",
    "sigmas",
    "ema",
    "samples",
    "conditional",
)


class Results(Sequence[Record]):
    """Records in order.

    Args:
        records: of cells that are finished, declined or failed.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = tuple(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        found = self.records[index]
        return Results(found) if isinstance(index, slice) else found

    @property
    def failed(self) -> Results:
        """The records of cells that failed; ``reason`` says why."""
        return Results([r for r in self.records if r.status == "failed"])

    def dataframe(self) -> pandas.DataFrame:
        """Return one row per cell and metric, with what decides the value.

        Columns: ``dataset``, ``kind``, ``method``, ``recipe``, ``overrides`` (what differs
        from the recipe: ``optimizer.lr=0.01``), ``seed`` (of training), ``nfe``
        (missing where it is not stated), ``sampler``, ``sigmas``, ``ema``, ``samples``,
        ``conditional``, then ``metric``, ``value``, ``standard_error``, ``low`` and ``high`` (the
        95 % interval), ``floor`` (what a perfect generator has at this number of samples), ``key``
        (equal keys are comparable), what the cell cost (``flops`` per image, ``latency_ms``,
        ``ms_per_image``, ``memory_mib``, ``decoder_ms``, ``training_h``, ``training_evaluations``;
        times and memory belong to ``hardware``), ``cell``, ``run``, ``status`` and ``reason``. A
        cell without values has one row with an empty metric.
        """
        import pandas  # takes half a second

        columns = [*_DECIDING, "metric", "value", "standard_error", "low", "high", "floor", "key"]
        columns += [*(kind.key for kind in COSTS), "hardware", "cell", "run", "status", "reason"]
        return pandas.DataFrame(list(self._lines()), columns=columns)

    def _lines(self) -> Iterator[dict[str, Any]]:
        for record in self.records:
            shared = {
                **dict(zip(_DECIDING, _deciding(record), strict=True)),
                **{kind.key: kind.of(record) for kind in COSTS},
                "hardware": record.environment.hardware,
                "cell": record.cell,
                "run": record.training.run,
                "status": record.status,
                "reason": record.reason,
            }
            if not record.metrics:
                yield shared
            for name, metric in record.metrics.items():
                low, high = interval_of(metric) or (None, None)
                floor = floor_of(metric)
                yield shared | {
                    "metric": name,
                    "value": metric.value,
                    "standard_error": metric.standard_error,
                    "low": low,
                    "high": high,
                    "floor": floor.value if floor else None,
                    "key": metric.key,
                }

    def __repr__(self) -> str:
        return f"Results of {len(self)} cells\n{self._wide().to_string(index=False)}"

    def _repr_html_(self) -> str:
        warned = sorted({w for r in self.records for w in r.warnings})
        notes = "".join(f"<li>{escape(text)}</li>" for text in warned)
        table = self._wide().to_html(index=False, border=0, na_rep="-")
        return table + (f"<ul>{notes}</ul>" if notes else "")

    def _wide(self) -> pandas.DataFrame:
        """Return one row per cell with a column per metric, for people to read."""
        import pandas

        names = list(dict.fromkeys(n for r in self.records for n in r.metrics))
        rows = [
            {
                "dataset": r.dataset.name,
                "method": configured_method(r),
                "recipe": r.training.recipe,
                "seed": r.training.seed,
                "NFE": r.sampling.nfe or "not stated",
                **{n: _rounded(r.metrics[n].value) if n in r.metrics else "-" for n in names},
                "status": r.status,
            }
            for r in self.records
        ]
        return pandas.DataFrame(rows)


def _deciding(record: Record) -> tuple[Any, ...]:
    s, t = record.sampling, record.training
    sigmas = ", ".join(f"{sigma:g}" for sigma in s.sigmas)
    return (
        record.dataset.name,
        record.kind,
        record.label or record.method,
        t.recipe,
        ", ".join(overrides_text(record)),
        t.seed,
        s.nfe or None,
        s.sampler,
        sigmas,
        t.ema,
        s.num_samples,
        record.conditional,
    )


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def load(workspace: str | Path | None = None, dataset: str | None = None) -> Results:
    """Return all records of a workspace, or those of one dataset.

    Args:
        workspace: the folder; by default ``$CMBENCH_WORKSPACE``, or ``cmbench-out`` here.
        dataset: its name.

    A record that cannot be read is left out with a warning that names the file.

    Raises:
        MissingError: the workspace does not exist, or has no records of the dataset.
    """
    chosen = Workspace.existing(str(workspace) if workspace is not None else None)
    folders = sorted(p for p in chosen.records("x").parent.glob("*") if p.is_dir())
    if dataset is not None:
        held = [folder.name for folder in folders]
        folders = [folder for folder in folders if folder.name == dataset]
        if not folders:
            raise MissingError(
                "cmbench.load",
                f"{chosen.root} has no records of {dataset!r}",
                allowed=", ".join(held) or "none yet",
                remedy="measure some with cmbench.run",
            )
    found: list[Record] = []
    for folder in folders:
        for path, record in read_records(folder, folder.name):
            if isinstance(record, UserError):
                warnings.warn(f"{path} is left out: {record}", stacklevel=2)
            else:
                found.append(record)
    return Results(found)
