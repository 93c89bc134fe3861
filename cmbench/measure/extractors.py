"""Which extractor computes which metrics, and extractors opened."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cmbench.errors import UserError, blaming
from cmbench.metrics.catalog import all_metrics, extractor_of
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.metric import open_metrics
from cmbench.plugin.manager import PluginManager

#: Short names of groups of metrics.
GROUPS = {"pr": ("precision", "recall"), "prdc": ("precision", "recall", "density", "coverage")}
#: Approximation -> the option of a factory that asks for it.
_APPROXIMATIONS: dict[str, tuple[str, Any]] = {
    "bfloat16": ("precision", "bfloat16"),
    "channels-last": ("channels_last", True),
    "compiled": ("compiled", True),
}


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


def load_extractor(
    plugins: PluginManager,
    name: str,
    metrics: Iterable[str],
    weights: Path | None = None,
    *,
    library: bool = False,
    trust: bool = False,
    approximations: Collection[str] = (),
) -> Extractor:
    """Return an extractor, with the options that it knows and that the metrics ask for.

    Args:
        plugins: where the extractor is registered.
        name: as in ``cmbench list extractors``.
        metrics: what will be computed; a spatial one asks for spatial features.
        weights: the weights file; None looks in the usual places.
        library: run the library's own path where there is another.
        trust: run a TorchScript file whose hash is not the pinned one.
        approximations: of :data:`cmbench.metrics.values.APPROXIMATIONS`.

    Raises:
        MissingError: no weights; the message says how to get them.
        UserError: an approximation that the extractor does not offer.
        PluginError: the factory raised something that is no error of its user.
    """
    factory: Any = plugins.extractors.load(name)
    known = inspect.signature(factory).parameters
    specs = all_metrics(plugins)
    needs = {need for metric in metrics if metric in specs for need in specs[metric].needs}
    wanted: dict[str, tuple[Any, bool]] = {
        "implementation": ("library", library),
        "spatial": (True, "spatial features" in needs),
        "trust": (True, trust),
    }
    options = {k: value for k, (value, asked) in wanted.items() if asked and k in known}
    options |= _approximations(name, approximations, known)
    remedy = "fix the plugin, or choose another extractor"
    with blaming(f"extractor {name!r}", "cannot be opened:", remedy=remedy):
        extractor: Extractor = factory(weights, **options)
    return extractor


def _approximations(
    name: str, approximations: Collection[str], known: Collection[str]
) -> dict[str, Any]:
    """Return the options of approximations; raise ``UserError`` for one that is not ``known``."""
    options = dict(_APPROXIMATIONS[approximation] for approximation in approximations)
    for approximation in approximations:
        if _APPROXIMATIONS[approximation][0] not in known:
            raise UserError(
                f"extractor {name!r}",
                f"has no {approximation} path",
                allowed="inception",
                remedy="leave the option out",
            )
    return options
