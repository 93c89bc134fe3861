"""From features to numbers: what each metric needs, and how it becomes a MetricValue."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property

import torch
from torch import Tensor

from cmbench.errors import UserError, unknown_name
from cmbench.metrics.catalog import METRICS
from cmbench.metrics.custom import CustomMetric
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.flow_map import FlowMapError
from cmbench.metrics.frechet import FrechetReference, half_split_infinity
from cmbench.metrics.inception_score import inception_score
from cmbench.metrics.kernel_distance import kernel_distance
from cmbench.metrics.precision_recall import PrecisionRecall, precision_recall
from cmbench.metrics.reference import NEIGHBOURS, Floor, Reference
from cmbench.metrics.samples import Samples
from cmbench.metrics.statistics import FeatureStatistics, Moments
from cmbench.metrics.values import Json, MetricValue, metric_key, normal_interval, share_interval
from cmbench.seeds import derive_seed

#: Version of the formulas: a change that moves a number raises it, and with it every key.
VERSION = "v1"
MAX_SPLITS = 10
#: Samples a chunk of OpenAI's evaluator, which takes them in order.
OPENAI_SPLIT = 5000
SCORES = ("is", "is-openai")
FLOW_MAP = ("flow-map-mean", "flow-map-max")
MANIFOLD = ("precision", "recall", "density", "coverage")


def is_distance(metric: str) -> bool:
    """Whether ``metric`` is a Fréchet distance on pooled features."""
    return metric == "fid" or metric.startswith(("fd-", "fid-"))


def is_spatial(metric: str) -> bool:
    """Whether ``metric`` is a Fréchet distance on spatial features."""
    return metric == "sfid" or metric.startswith(("sfd-", "sfid-"))


def distance_name(extractor: Extractor) -> str:
    """Return the name of the extractor's Fréchet distance; only Inception's are called FID."""
    short = extractor.short_name
    return short if is_fid(extractor) else f"fd-{short}"


def spatial_name(extractor: Extractor) -> str:
    """Return the name of the extractor's spatial Fréchet distance."""
    return f"s{distance_name(extractor)}"


def kernel_name(extractor: Extractor) -> str:
    """Return the name of the extractor's kernel distance."""
    return "kid" if is_fid(extractor) else "kd"


def is_fid(extractor: Extractor) -> bool:
    """Whether the extractor is the 2015 Inception network with verified weights."""
    return extractor.short_name == "fid" or extractor.short_name.startswith("fid-")


def needs(metric: str, custom: Mapping[str, CustomMetric] | None = None) -> str:
    """Return what ``metric`` is computed from: features, logits, spatial or flow map.

    ``custom`` are the metrics that plugins bring.
    """
    if custom and metric in custom:
        return custom[metric].spec.needs
    if metric in FLOW_MAP:
        return "flow map"
    if metric in SCORES:
        return "logits"
    if is_spatial(metric):
        return "spatial"
    if is_distance(metric) or metric in MANIFOLD or metric in ("kid", "kd"):
        return "features"
    known = [*(spec.name for spec in METRICS), *(custom or ())]
    raise unknown_name("metrics", "metric", metric, known)


def check_metric(
    metric: str,
    extractor: Extractor | None,
    reference: Reference | None,
    custom: Mapping[str, CustomMetric] | None = None,
) -> None:
    """Refuse a metric that this extractor or reference cannot serve, before any sampling.

    A Fréchet distance carries its extractor's name, see :func:`distance_name`.
    """
    need = needs(metric, custom)
    if need == "flow map":
        return
    if extractor is None:
        raise UserError(f"metric {metric!r}", "no extractor", allowed="a feature extractor")
    if custom and metric in custom:  # what it makes of the reference is its own business
        return
    own = {
        distance_name(extractor): is_distance(metric),
        spatial_name(extractor): is_spatial(metric),
        kernel_name(extractor): metric in ("kid", "kd"),
    }
    for name, same_kind in own.items():
        if same_kind and metric != name:
            raise UserError(
                f"metric {metric!r}",
                f"the extractor is {extractor.name!r}",
                allowed=f"{name} (FID and KID belong to the 2015 Inception network with verified"
                " weights)",
                remedy=f"ask for {name!r} instead",
            )
    if need == "logits":
        return
    if reference is None:
        raise UserError(f"metric {metric!r}", "no reference", allowed="a reference of real images")
    if need == "spatial" and reference.spatial is None:
        raise UserError(
            f"metric {metric!r}",
            f"the reference {reference.key.source!r} has no spatial features",
            allowed="a reference with spatial features",
            remedy="compute it from images",
        )
    if need == "features" and not is_distance(metric):
        reference.with_features(metric)


class Scores:
    """Computes metrics of one set of samples; what several share is computed once."""

    def __init__(
        self,
        samples: Samples,
        extractor: Extractor | None,
        reference: Reference | None,
        quantization: str,
        flow: FlowMapError | None,
        custom: Mapping[str, CustomMetric] | None = None,
    ) -> None:
        self.samples, self.extractor, self.reference = samples, extractor, reference
        self.quantization, self._flow, self._custom = quantization, flow, custom or {}

    def value(self, metric: str) -> MetricValue:
        """Return one metric by name."""
        if metric in self._custom:
            return self._of_plugin(self._custom[metric])
        if metric in FLOW_MAP:
            return self._flow_map(metric)
        if metric in SCORES:
            return self._inception_score(metric)
        if metric in MANIFOLD:
            return self._manifold_share(metric)
        if metric in ("kid", "kd"):
            return self._kernel(metric)
        assert self.reference is not None
        if needs(metric) == "spatial":
            assert self.reference.spatial is not None
            return self._distance(metric, self._rows(self.samples.spatial), self.reference.spatial)
        return self._distance(metric, self._rows(self.samples.pool), self.reference.frechet)

    def _distance(self, metric: str, rows: Tensor, reference: FrechetReference) -> MetricValue:
        statistics = FeatureStatistics.from_features(rows)
        moments = statistics.moments()
        value = reference.distance(moments)
        error = reference.standard_error(moments, rows)
        detail = (
            self._counts()
            | {
                "covariance_divisor": moments.divisor,
                "reference_covariance_divisor": reference.moments.divisor,
                "dtype": "float64",
                "rank_deficient": moments.rank_bound < moments.dim,
            }
            | self._of_halves(lambda floor: floor.frechet)
        )
        interval = None
        if len(rows) >= 4:
            halves = self._half_distances(rows, reference)
            infinity = half_split_infinity(value, halves, error)
            interval = (infinity.low, infinity.high)
            detail["infinity"] = {
                "value": infinity.value,
                "interval": [infinity.low, infinity.high],
                "half_distances": list(halves),
                # With fewer rows than features the bias does not fall as 1/N yet.
                "reliable": len(rows) // 2 > moments.dim,
            }
        key = self._key(metric, _divisors(moments, reference.moments), "float64")
        return MetricValue(metric, value, False, key, error, interval, detail)

    def _half_distances(self, rows: Tensor, reference: FrechetReference) -> tuple[float, float]:
        # A random split: labels may cycle through the sample numbers.
        generator = torch.Generator().manual_seed(derive_seed("half split"))
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        half = len(rows) // 2
        first, second = rows[order[:half]], rows[order[half : 2 * half]]
        return (
            reference.distance(FeatureStatistics.from_features(first)),
            reference.distance(FeatureStatistics.from_features(second)),
        )

    def _inception_score(self, metric: str) -> MetricValue:
        logits = self._rows(self.samples.logits)
        if metric == "is-openai":
            score = inception_score(logits, split_size=OPENAI_SPLIT, shuffle_seed=None)
            splits, facts = score.splits, (f"split-size={OPENAI_SPLIT}", "shuffle=none")
        else:
            splits = min(MAX_SPLITS, len(logits))
            score = inception_score(logits, splits=splits)
            facts = (f"splits={splits}", "shuffle=2020")
        error = score.std / math.sqrt(splits)
        detail: dict[str, Json] = {"samples": len(logits), "splits": splits, "std": score.std}
        known = self.reference.score if self.reference is not None else None
        if known is not None and metric == "is":
            detail["real"] = known.mean
        key = self._key(metric, *facts, reference=False)
        if splits == 1:  # nothing varies between chunks
            return MetricValue(metric, score.mean, True, key, None, None, detail)
        interval = normal_interval(score.mean, error)
        return MetricValue(metric, score.mean, True, key, error, interval, detail)

    @cached_property
    def _manifold(self) -> PrecisionRecall:
        assert self.reference is not None
        return precision_recall(
            self._rows(self.samples.pool),
            self.reference.with_features("precision"),
            k=NEIGHBOURS,
            reference_radii=self.reference.radii,
        )

    def _manifold_share(self, metric: str) -> MetricValue:
        value = float(getattr(self._manifold, metric))
        error = interval = None
        if metric == "precision":  # given the reference, samples are independent trials
            error = math.sqrt(value * (1 - value) / self.samples.count)
            interval = share_interval(value, self.samples.count)
        key = self._key(metric, f"k={NEIGHBOURS}", "float32")
        detail = self._counts() | {"k": NEIGHBOURS, "dtype": "float32, centred"}
        detail |= self._of_halves(lambda floor: float(getattr(floor.manifold, metric)))
        return MetricValue(metric, value, True, key, error, interval, detail)

    def _kernel(self, metric: str) -> MetricValue:
        assert self.reference is not None
        result = kernel_distance(
            self._rows(self.samples.pool),
            self.reference.with_features(metric),
            reference_self=self.reference.kernel,
        )
        detail = self._counts() | asdict(result) | {"estimator": "exact U-statistic, cubic kernel"}
        detail |= self._of_halves(lambda floor: floor.kernel)
        return MetricValue(
            metric,
            result.value,
            False,
            self._key(metric, "u-statistic", "float64"),
            result.standard_error,
            normal_interval(result.value, result.standard_error),
            detail,
        )

    def _of_plugin(self, metric: CustomMetric) -> MetricValue:
        assert self.extractor is not None
        wanted = {"features": "pool"}.get(metric.spec.needs, metric.spec.needs)
        self._rows(getattr(self.samples, wanted))
        key = self._key(metric.spec.name, metric.version)
        found = metric.evaluate(self.samples, self.reference, self.extractor, key)
        return replace(found, detail=self._counts() | dict(found.detail))

    def _flow_map(self, metric: str) -> MetricValue:
        assert self._flow is not None
        mean = metric == "flow-map-mean"
        error = self._flow.standard_error if mean else None
        if error is not None and not math.isfinite(error):
            error = None
        value = self._flow.mean if mean else self._flow.maximum
        return MetricValue(
            metric,
            value,
            False,
            f"{metric}:n={self._flow.count}:{VERSION}",
            error,
            None if error is None else normal_interval(value, error),
            {"samples": self._flow.count, "unit": "data standard deviations"},
        )

    def _rows(self, rows: Tensor | None) -> Tensor:
        if rows is None:
            name = self.extractor.name if self.extractor is not None else "none"
            raise UserError(
                "metrics",
                f"the extractor {name!r} gave no such features",
                allowed="an extractor with classifier logits and spatial features where asked for",
                remedy="leave the metric out",
            )
        return rows

    def _counts(self) -> dict[str, Json]:
        reference = self.reference
        detail: dict[str, Json] = {
            "samples": self.samples.count,
            "reference_samples": None if reference is None else reference.count,
        }
        if reference is not None and reference.features is not None:
            detail["reference_features"] = len(reference.features)
        for fact in ("implementation", "deviation"):
            if hasattr(self.extractor, fact):
                detail[f"extractor_{fact}"] = getattr(self.extractor, fact)
        return detail

    def _of_halves(self, choose: Callable[[Floor], float]) -> dict[str, Json]:
        """Return what two disjoint real halves score: the floor, or ceiling, of this metric."""
        floor = self.reference.halves_floor if self.reference is not None else None
        if floor is None:
            return {}
        return {"real_halves": choose(floor), "real_half_samples": floor.count}

    def _key(self, metric: str, *facts: str, reference: bool = True) -> str:
        assert self.extractor is not None
        kind = metric
        if metric not in self._custom:
            kind = "fd" if is_distance(metric) else "sfd" if is_spatial(metric) else metric
        if reference and self.reference is not None:
            facts = (*facts, f"ref={self.reference.key.digest[:8]}")
        return metric_key(
            kind,
            self.extractor.name,
            self.extractor.weights_sha256,
            self.extractor.preprocessing,
            self.quantization,
            *facts,
            f"n={self.samples.count}",
            VERSION,
        )


def _divisors(sample: Moments, reference: Moments) -> str:
    if sample.divisor == reference.divisor:
        return sample.divisor
    return f"{sample.divisor}/{reference.divisor}"
