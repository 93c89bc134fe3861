"""A plugin with metrics of its own, good and bad."""

from __future__ import annotations

from typing import Any

from cmbench.metrics.extractor import Extractor
from cmbench.metrics.reference import Reference
from cmbench.metrics.samples import Samples
from cmbench.metrics.values import MetricValue
from cmbench.plugin import hookimpl
from cmbench.plugin.specs import MetricSpec


def mean_gap(samples: Samples, reference: Reference | None, extractor: Extractor) -> float:
    """Distance of the mean features."""
    assert samples.pool is not None
    assert reference is not None
    return float((samples.pool.double().mean(0) - reference.moments.mean).norm())


def with_interval(
    samples: Samples, reference: Reference | None, extractor: Extractor
) -> MetricValue:
    """A value that says how sure it is; name, direction and key are the harness's business."""
    gap = mean_gap(samples, reference, extractor)
    return MetricValue("ignored", gap, True, "ignored", 0.5, (gap - 1, gap + 1), {"who": "toy"})


def breaks(samples: Samples, reference: Reference | None, extractor: Extractor) -> float:
    raise RuntimeError("out of\nluck")


def nonsense(samples: Samples, reference: Reference | None, extractor: Extractor) -> Any:
    return "seven"


def not_a_number(samples: Samples, reference: Reference | None, extractor: Extractor) -> float:
    return float("nan")


def spec(name: str, function: str, needs: str = "features") -> MetricSpec:
    return MetricSpec(name, name, False, needs, unit="levels", factory=f"toy_metric:{function}")


class MetricPlugin:
    """The hook, as an object."""

    @hookimpl
    def cmbench_register_metrics(self) -> list[MetricSpec]:
        return [
            spec("mean-gap", "mean_gap"),
            spec("mean-gap-sure", "with_interval"),
            spec("gap-breaks", "breaks"),
            spec("gap-nonsense", "nonsense"),
            spec("gap-nan", "not_a_number"),
            spec("gap-logits", "mean_gap", "logits"),
        ]


PLUGIN = MetricPlugin()
