"""What `cmbench verify` compares: samples of a record made again. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cmbench.records.record import FirstSamples, MetricRecord, Record

#: By precision of the sampling network: the largest difference of a pixel in levels of 255, and of
#: the mean feature relative to its norm, that other hardware or another torch may cause: about four
#: times what compiling changes, see docs/records.md. A record
#: states them, and no record may allow more.
TOLERANCES = {"fp32": (2.0, 2e-4), "bf16": (16.0, 4e-3), "fp16": (4.0, 1e-3)}


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
