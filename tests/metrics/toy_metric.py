"""A plugin with metrics of its own, good and bad."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cmbench.metrics.extractor import Features, PixelExtractor
from cmbench.metrics.metric import MetricData
from cmbench.metrics.values import Estimate
from cmbench.plugin import hookimpl
from cmbench.plugin.specs import ExtractorSpec, MetricSpec

NEEDS = ("features", "real moments")


def mean_gap(data: MetricData) -> float:
    """Distance of the mean features."""
    return float((data.features.double().mean(0) - data.real_moments.mean).norm())


def with_interval(data: MetricData) -> Estimate:
    """A value that says how sure it is."""
    gap = mean_gap(data)
    return Estimate(gap, 0.5, (gap - 1, gap + 1), {"who": "toy"}, ("half-wide",))


def gap_of_digits(data: MetricData) -> float:
    return mean_gap(data)


def breaks(data: MetricData) -> float:
    raise RuntimeError("out of\nluck")


def nonsense(data: MetricData) -> Any:
    return "seven"


def not_a_number(data: MetricData) -> float:
    return float("nan")


def elsewhere(data: MetricData) -> Estimate:
    return Estimate(3.0, 0.5, (4.0, 5.0))


def spread_of_classes(data: MetricData) -> float:
    """Spread of the class means, which needs labels."""
    means = [data.features[data.labels == label].mean(0) for label in data.labels.unique()]
    return float(sum(mean.norm() for mean in means))


def spec(name: str, function: str, needs: tuple[str, ...] = NEEDS, **facts: Any) -> MetricSpec:
    factory = f"toy_metric:{function}"
    return MetricSpec(name, name, False, needs, factory, unit="levels", **facts)


class RowMeans(PixelExtractor):
    """An extractor of a plugin: the mean of each row of pixels, and on request the pixels too."""

    name = short_name = "row-means"

    def __init__(self, location: object = None, *, spatial: bool = False) -> None:
        super().__init__(location)
        self.spatial = spatial

    def __call__(self, images: Tensor) -> Features:
        rows = images.double().mean((1, 3))
        return Features(rows, spatial=images.flatten(1).double() if self.spatial else None)


class MetricPlugin:
    """The hooks, as an object."""

    @hookimpl
    def cmbench_register_extractors(self) -> list[ExtractorSpec]:
        return [ExtractorSpec("row-means", "toy_metric:RowMeans", "Means of rows")]

    @hookimpl
    def cmbench_register_metrics(self) -> list[MetricSpec]:
        return [
            spec("mean-gap", "mean_gap"),
            spec("mean-gap-sure", "with_interval", version="2"),
            spec("gap-breaks", "breaks"),
            spec("gap-nonsense", "nonsense"),
            spec("gap-nan", "not_a_number"),
            spec("gap-elsewhere", "elsewhere"),
            spec("gap-logits", "mean_gap", ("logits",)),
            spec("gap-secretly", "mean_gap", ("features",)),
            spec("gap-of-prompts", "mean_gap", ("features", "prompts")),
            spec("gap-of-digits", "gap_of_digits", extractors=("digits",)),
            spec("class-spread", "spread_of_classes", ("features", "labels")),
        ]


PLUGIN = MetricPlugin()
