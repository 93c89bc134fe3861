"""A metric: what it is called, what it is computed from, and the function that computes it.

    def mean_gap(data: MetricData) -> float:
        return float((data.features.double().mean(0) - data.real_moments.mean).norm())

is a metric with ``needs=("features", "real moments")``. Built-in metrics and those of plugins are
registered by one hook and computed by one class, :class:`cmbench.metrics.suite.MetricSuite`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmbench.errors import PluginError, blaming
from cmbench.metrics.catalog import all_metrics
from cmbench.metrics.floor import Floors
from cmbench.metrics.statistics import Moments
from cmbench.metrics.values import Estimate, holds
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import MetricSpec, load_object

#: Needs that the extractor serves from the samples, by attribute of ``Samples``.
OF_SAMPLES = {"features": "pool", "logits": "logits", "spatial features": "spatial"}
#: Needs that the reference serves, by attribute of ``Reference``.
OF_REFERENCE = {
    "real features": "features",
    "real moments": "moments",
    "real spatial moments": "spatial",
}
#: Everything that an evaluation provides today.
NEEDS = (*OF_SAMPLES, *OF_REFERENCE, "labels", "flow map")

T = TypeVar("T")


class MetricData:
    """What one metric is computed from: exactly the needs that its spec declares.

    ``data["real moments"]`` and ``data.real_moments`` are one thing. Reading what the spec does not
    declare is a :class:`PluginError` that names the metric and the need.

    ========================= ==================================================================
    need                      value
    ========================= ==================================================================
    ``features``              pooled features of the samples, ``[N, D]``, by sample number
    ``logits``                logits of the extractor's classifier, ``[N, K]``
    ``spatial features``      spatial features of the samples, ``[N, S]``
    ``labels``                class labels of the samples, int64 ``[N]``
    ``real features``         pooled features of the real images, ``[M, D]``
    ``real moments``          :class:`Moments` of the real images' pooled features, float64
    ``real spatial moments``  :class:`Moments` of their spatial features, float64
    ``flow map``              errors of the samples against the dataset's exact flow map
    ========================= ==================================================================

    Rows are in the order of sample numbers. ``floors`` says what a perfect generator scores and
    ``real_score`` the inception score of the real images; both are None where not known.
    """

    features: Tensor
    logits: Tensor
    spatial_features: Tensor
    labels: Tensor
    real_features: Tensor
    real_moments: Moments
    real_spatial_moments: Moments

    def __init__(self, spec: MetricSpec, parts: Mapping[str, Any], results: dict[Any, Any]) -> None:
        self._spec, self._parts, self._results = spec, parts, results
        self.floors: Floors | None = parts.get("floors")
        self.real_score: float | None = parts.get("real score")

    def __getitem__(self, need: str) -> Any:
        if need not in self._spec.needs:
            raise PluginError(
                f"metric {self._spec.name!r}",
                f"reads {need!r} without declaring it",
                allowed=", ".join(self._spec.needs),
                remedy=f"add {need!r} to the needs of its MetricSpec",
            )
        return self._parts[need]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as of a copy that is being made
            raise AttributeError(name)
        return self[name.replace("_", " ")]

    def prepared(self, name: str) -> Any:
        """Return what is cached of the real features (``"radii"``, ``"kernel"``), or None."""
        self["real features"]
        return self._parts.get(name)

    def shared(self, compute: Callable[[MetricData], T]) -> T:
        """Return ``compute(self)``, computed once for all metrics of equal needs."""
        key = compute, self._spec.needs
        if key not in self._results:
            self._results[key] = compute(self)
        found: T = self._results[key]
        return found


@dataclass(frozen=True)
class Metric:
    """A spec with the function that computes it, ready to use.

    Args:
        spec: name, needs, direction and what else is known without computing anything.
        compute: takes one :class:`MetricData`; returns a number or an :class:`Estimate`.
        version: of the formula; the last part of the metric key.
        family: metrics computed by the same function, with the extractors that each belongs to.
    """

    spec: MetricSpec
    compute: Callable[[MetricData], float | Estimate]
    version: str
    family: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """Name as in ``cmbench list metrics``."""
        return self.spec.name

    @property
    def needs(self) -> tuple[str, ...]:
        """What it is computed from."""
        return self.spec.needs

    @property
    def higher_is_better(self) -> bool:
        """Direction."""
        return self.spec.higher_is_better

    def names_for(self, extractor: str) -> list[str]:
        """Return the names in its family for an extractor's short name: its own, or any's."""
        own = [name for name, owners in self.family.items() if extractor in owners]
        return own or [name for name, owners in self.family.items() if not owners]

    def evaluate(self, data: MetricData) -> Estimate:
        """Return the value.

        Raises:
            PluginError: the function raised, or returned something else than a number.
        """
        who, remedy = f"metric {self.name!r}", "fix the plugin, or leave the metric out"
        with blaming(who, "raised", remedy=remedy, passing=torch.OutOfMemoryError):
            found: Any = self.compute(data)
        if not isinstance(found, Estimate):
            try:
                found = Estimate(float(found))
            except (TypeError, ValueError) as error:
                raise PluginError(
                    who,
                    f"returned {type(found).__name__}",
                    allowed="a number or an Estimate",
                    remedy="fix the plugin",
                ) from error
        if math.isnan(found.value):
            raise PluginError(who, "returned NaN", allowed="a number", remedy="fix the plugin")
        if found.interval and math.isfinite(found.value) and not holds(found.interval, found.value):
            raise PluginError(
                who,
                f"returned {found.value:.6g} with the 95 % interval {found.interval}",
                allowed="an interval that holds the value",
                remedy="fix the plugin, or return no interval",
            )
        estimate: Estimate = found
        return estimate


def open_metrics(plugins: PluginManager, names: Iterable[str]) -> list[Metric]:
    """Return the metrics of these names, ready to use.

    Raises:
        UserError: a name that no plugin registers and no extractor implies.
        PluginError: a function that cannot be imported; the message names its distribution.
    """
    specs, registry, found = all_metrics(plugins), plugins.metrics, []
    for name in dict.fromkeys(names):
        spec = specs[name] if name in specs else registry.get(name, "metrics")
        owner = registry.owners.get(name)
        compute = load_object(spec.factory) if owner is None else registry.load(name)
        version = spec.version or (f"{owner.distribution}-{owner.version}" if owner else "")
        family = {s.name: s.extractors for s in specs.values() if s.factory == spec.factory}
        found.append(Metric(spec, compute, version, family))
    return found
