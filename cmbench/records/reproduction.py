"""What `cmbench verify` compares: samples of a record made again. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cmbench.records.record import FirstSamples, MetricRecord, Record


@dataclass(frozen=True)
class Reproduction:
    """Images of a record made again.

    Args:
        first_samples: their checksums.
        grid_png: the sample grid.
        metrics: by name; empty unless all images were made.
    """

    first_samples: FirstSamples
    grid_png: bytes | None = None
    metrics: Mapping[str, MetricRecord] = field(default_factory=dict)


class CannotReproduceError(Exception):
    """Why a record cannot be sampled again here."""


#: Called with a record and whether to make all images and measure them, or the first ones only.
Reproduce = Callable[[Record, bool], Reproduction]
