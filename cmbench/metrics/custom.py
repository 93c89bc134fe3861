"""A plugin's own metric: a function of the features of samples and of real images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cmbench.errors import PluginError, UserError
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.reference import Reference
from cmbench.metrics.samples import Samples
from cmbench.metrics.values import MetricValue
from cmbench.plugin.specs import MetricSpec

#: What a plugin's metric may need of the extractor.
NEEDS = ("features", "logits", "spatial")

Compute = Callable[[Samples, Reference | None, Extractor], float | MetricValue]


@dataclass(frozen=True)
class CustomMetric:
    """A metric that a plugin brings.

    Args:
        spec: its name, direction and what it needs ("features", "logits" or "spatial").
        compute: ``compute(samples, reference, extractor)``; returns a number, or a ``MetricValue``
            for one with a standard error, an interval or details (its name, direction and key are
            set here).
        version: distribution and version it came from; part of the metric's key.
    """

    spec: MetricSpec
    compute: Compute
    version: str

    def __post_init__(self) -> None:
        if self.spec.needs not in NEEDS:
            raise PluginError(
                f"metric {self.spec.name!r}",
                f"needs {self.spec.needs!r}",
                allowed=", ".join(NEEDS),
                remedy="fix the plugin",
            )

    def evaluate(
        self, samples: Samples, reference: Reference | None, extractor: Extractor, key: str
    ) -> MetricValue:
        """Return the metric's value under ``key``.

        Raises:
            PluginError: it raised, or returned something else than a number.
        """
        name = self.spec.name
        try:
            found: Any = self.compute(samples, reference, extractor)
        except UserError:
            raise
        except Exception as error:  # somebody else's program
            reason = " ".join(str(error).split())
            raise PluginError(
                f"metric {name!r}",
                f"raised {type(error).__name__}: {reason}",
                remedy="fix the plugin, or leave the metric out",
            ) from error
        if not isinstance(found, MetricValue):
            try:
                found = MetricValue(name, float(found), self.spec.higher_is_better, key)
            except (TypeError, ValueError) as error:
                raise PluginError(
                    f"metric {name!r}",
                    f"returned {type(found).__name__}",
                    allowed="a number, or a MetricValue",
                    remedy="fix the plugin",
                ) from error
        if math.isnan(found.value):
            raise PluginError(
                f"metric {name!r}", "returned NaN", allowed="a number", remedy="fix the plugin"
            )
        return MetricValue(
            name,
            found.value,
            self.spec.higher_is_better,
            key,
            found.standard_error,
            found.interval,
            found.detail,
        )
