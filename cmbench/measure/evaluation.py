"""Which extractor computes which of the metrics that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from cmbench.errors import UserError
from cmbench.metrics.catalog import EXTRACTORS, METRICS
from cmbench.metrics.custom import CustomMetric
from cmbench.metrics.scores import needs

#: Short names of groups of metrics.
GROUPS = {"pr": ("precision", "recall"), "prdc": ("precision", "recall", "density", "coverage")}
#: Extractor of each distance that names one.
EXTRACTOR_OF = {
    "fid": "inception",
    "sfid": "inception",
    "kid": "inception",
    "fid-clean": "inception-clean",
    "fid-legacy-tensorflow": "inception-legacy-tensorflow",
    "fid-legacy-pytorch": "inception-legacy-pytorch",
    "fd-digits": "digits-cnn",
    "fd-dinov2": "dinov2",
    **{f"fd-{spec.name}": spec.name for spec in EXTRACTORS},
}


def plan_metrics(
    names: Sequence[str], default: str, custom: Mapping[str, CustomMetric] | None = None
) -> dict[str, list[str]]:
    """Return the metrics asked for by the extractor that computes them.

    Groups ("pr", "prdc") are expanded; what names no extractor (precision, is, kd, a plugin's)
    goes to ``default``.

    Raises:
        UserError: an unknown metric, or no metric.
    """
    metrics = list(dict.fromkeys(chain.from_iterable(GROUPS.get(n, (n,)) for n in names)))
    if not metrics:
        raise UserError("--metrics", "no metric", allowed=", ".join(spec.name for spec in METRICS))
    plan: dict[str, list[str]] = {}
    for metric in metrics:
        if needs(metric, custom) == "flow map":
            raise UserError(
                f"metric {metric!r}",
                "stored samples have no noise to compare with",
                allowed="a metric of features",
                remedy="it is measured by `cmbench run`",
            )
        plan.setdefault(EXTRACTOR_OF.get(metric, default), []).append(metric)
    return plan
