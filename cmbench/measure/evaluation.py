"""Which extractor computes which of the metrics that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from cmbench.errors import UserError
from cmbench.metrics.catalog import extractor_of
from cmbench.metrics.metric import open_metrics
from cmbench.plugin.manager import PluginManager

#: Short names of groups of metrics.
GROUPS = {"pr": ("precision", "recall"), "prdc": ("precision", "recall", "density", "coverage")}


def plan_metrics(
    names: Sequence[str], default: str, plugins: PluginManager
) -> dict[str, list[str]]:
    """Return the metrics asked for by the extractor that computes them.

    Groups ("pr", "prdc") are expanded; a metric that belongs to no extractor (precision, is, kd) or
    to ``default`` goes to ``default``.

    Raises:
        UserError: an unknown metric, or no metric.
    """
    metrics = list(dict.fromkeys(chain.from_iterable(GROUPS.get(n, (n,)) for n in names)))
    if not metrics:
        allowed = ", ".join(plugins.metrics.specs)
        raise UserError("--metrics", "no metric", allowed=allowed)
    plan: dict[str, list[str]] = {}
    for metric in open_metrics(plugins, metrics):
        if "flow map" in metric.needs:
            raise UserError(
                f"metric {metric.name!r}",
                "stored samples have no noise to compare with",
                allowed="a metric of features",
                remedy="it is measured by `cmbench run`",
            )
        extractor = extractor_of(metric.spec, default, plugins)
        plan.setdefault(extractor, []).append(metric.name)
    return plan
