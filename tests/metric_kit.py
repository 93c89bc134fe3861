"""Metrics by name, as evaluations and sweeps open them."""

from __future__ import annotations

from cmbench.metrics.extractor import Extractor
from cmbench.metrics.metric import Metric, open_metrics
from cmbench.plugin.manager import load_plugins
from cmbench.plugin.specs import ExtractorSpec


def metrics(*names: str, extractor: Extractor | None = None) -> list[Metric]:
    """Open metrics of the installed plugins; ``extractor`` counts as a plugin's that is here."""
    plugins = load_plugins()
    if extractor is not None:
        spec = ExtractorSpec("here", "none:none", "", short_names=(extractor.short_name,))
        plugins.extractors.specs[spec.name] = spec
    return open_metrics(plugins, names)
