"""All metrics of a cell from one pass over its samples.

    metrics = open_metrics(plugins, ("fd-digits", "precision"))
    suite = MetricSuite(metrics, extractor=…, reference=…, quantization="round")
    for batch in stream:
        suite.update(batch.images, batch.noise, batch.labels)
    values = suite.finalize()          # {"fd-digits": MetricValue, …}

Features are kept (float32, 2048 wide, 50,000 samples: 410 MB) on the extractor's device; every
metric is computed from them at the end, in the order of sample numbers, so the result does not
depend on how the samples came in batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.census import Census, CensusTaker, census_warnings, class_warnings
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.flow_map import ExactFlowMap, FlowMapAccumulator
from cmbench.metrics.memorisation import Copies, copy_warnings, find_copies
from cmbench.metrics.metric import NEEDS, OF_REFERENCE, OF_SAMPLES, Metric, MetricData
from cmbench.metrics.quantize import quantize
from cmbench.metrics.reference import ANY, Reference
from cmbench.metrics.samples import SampleCollector, Samples
from cmbench.metrics.values import Json, MetricValue

NO_CENSUS = (
    "no census of real images (the reference is statistics alone): pixel guards are off, that is"
    " the checks of colour, texture and shared images"
)


class MetricSuite:
    """Accumulates samples, then computes the metrics asked for.

    Args:
        metrics: what to compute, see :func:`cmbench.metrics.metric.open_metrics`.
        extractor: one pass of it feeds every metric; None if only flow-map metrics are asked for.
        reference: real images under the same extractor and quantization.
        quantization: rule from floats to bytes, see :mod:`cmbench.metrics.quantize`.
        exact: the dataset's exact flow map, for the flow-map metrics.
        data_std: standard deviation of the data, the unit of the flow-map metrics.
        class_counts: real images per class; labels that do not follow them are a warning.
        census: of real images, for a reference that has none (imported statistics).
        rule_of_bytes: what the key says of samples that come as bytes: "stored" where the rule
            that made them is unknown; ``quantization`` by default.

    Raises:
        UserError: a metric that the extractor or the reference cannot serve, or a reference made
            with another extractor, weights, preprocessing or quantization.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        *,
        extractor: Extractor | None = None,
        reference: Reference | None = None,
        quantization: str = "round",
        exact: ExactFlowMap | None = None,
        data_std: float = 1.0,
        class_counts: Sequence[int] = (),
        census: Census | None = None,
        rule_of_bytes: str | None = None,
    ) -> None:
        self.metrics = tuple(metrics)
        self.extractor, self.reference = extractor, reference
        self.quantization = quantization
        self._rule_of_bytes = rule_of_bytes or quantization
        self._floats = False
        self.real_census = census
        if reference is not None and reference.census is not None:
            self.real_census = reference.census
        for metric in self.metrics:
            check_metric(metric, extractor, reference)
        if extractor is not None and reference is not None:
            check_reference(extractor, reference, quantization)
        wanted = {need for metric in self.metrics for need in metric.needs}
        self._extracts = not wanted.isdisjoint(OF_SAMPLES)
        self._flow = _flow_accumulator(exact, data_std) if "flow map" in wanted else None
        self._collector = SampleCollector()
        self._census = CensusTaker()
        self._copies: tuple[int, Copies] | None = None
        self._labels: Counter[int] = Counter()
        self._class_counts = tuple(class_counts)

    @property
    def count(self) -> int:
        """Number of images so far."""
        return self._collector.count

    def update(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            images: ``[N, C, H, W]``, float in [-1, 1] (quantized here) or uint8 (taken as it is).
            noise: the unit noise they were made from, for the flow-map metrics.
            labels: int64 ``[N]``, for class counts and the exact flow map.
            indices: int64 ``[N]`` sample numbers; consecutive if left out.
        """
        if indices is None:
            indices = torch.arange(self.count, self.count + len(images))
        if self._flow is not None:
            if noise is None:
                raise UserError("flow-map error", "no noise", allowed="images with their noise")
            self._flow.update(images, noise, labels)
        if labels is not None:
            self._labels.update(labels.tolist())
        features = None
        if self._extracts and self.extractor is not None:
            self._floats = self._floats or images.is_floating_point()
            pixels = quantize(images, self.quantization) if images.is_floating_point() else images
            self._census.update(pixels)
            features = self.extractor(pixels)
        self._collector.add(indices, features, labels)

    def finalize(self) -> dict[str, MetricValue]:
        """Return every metric by name, in the order asked for.

        Raises:
            UserError: no samples, or none of the features, logits or labels that a metric needs.
            PluginError: a metric that raises, reads undeclared data or returns no number.
        """
        samples, reference = self._collector.samples(), self.reference
        parts: dict[str, Any] = {need: getattr(samples, name) for need, name in OF_SAMPLES.items()}
        if reference is not None:
            parts |= {need: getattr(reference, name) for need, name in OF_REFERENCE.items()}
            parts |= {"radii": reference.radii, "kernel": reference.kernel}
            parts["floors"] = reference.floors
            parts["real score"] = reference.score.mean if reference.score else None
        parts["labels"] = samples.labels
        parts["flow map"] = self._flow.result() if self._flow is not None else None
        results: dict[Any, Any] = {}
        return {
            metric.name: self._value(metric, parts, samples.count, results)
            for metric in self.metrics
        }

    def _value(
        self, metric: Metric, parts: Mapping[str, Any], count: int, results: dict[Any, Any]
    ) -> MetricValue:
        for need in metric.needs:
            if parts.get(need) is None:
                raise self._missing(need)
        found = metric.evaluate(MetricData(metric.spec, parts, results))
        return MetricValue(
            found.value,
            found.standard_error,
            found.interval,
            self._counts(metric, count) | dict(found.detail),
            found.facts,
            metric.name,
            metric.higher_is_better,
            self._key(metric, found.facts, count),
        )

    def _missing(self, need: str) -> UserError:
        if need not in OF_SAMPLES:
            return UserError("metrics", f"no {need}", allowed=f"samples with {need}")
        name = self.extractor.name if self.extractor is not None else "none"
        return UserError(
            "metrics",
            f"the extractor {name!r} gave no {need}",
            allowed="an extractor with classifier logits and spatial features where asked for",
            remedy="leave the metric out",
        )

    def _counts(self, metric: Metric, count: int) -> dict[str, Json]:
        detail: dict[str, Json] = {"samples": count}
        if metric.spec.unit:
            detail["unit"] = metric.spec.unit
        reference = self.reference
        if reference is not None and not OF_REFERENCE.keys().isdisjoint(metric.needs):
            detail["reference_samples"] = reference.count
            if reference.features is not None:
                detail["reference_features"] = len(reference.features)
        if not OF_SAMPLES.keys().isdisjoint(metric.needs):
            for fact in ("implementation", "deviation"):
                if hasattr(self.extractor, fact):
                    detail[f"extractor_{fact}"] = getattr(self.extractor, fact)
        return detail

    def _key(self, metric: Metric, facts: Sequence[str], count: int) -> str:
        """Return e.g. ``fd:digits-cnn@1a2b3c4d:none:round:n-1:float64:ref=5e6f7a8b:n=2000:v1``."""
        parts = [metric.spec.family or metric.name]
        x = self.extractor
        if x is not None and not OF_SAMPLES.keys().isdisjoint(metric.needs):
            rule = self.quantization if self._floats else self._rule_of_bytes
            parts += [f"{x.name}@{x.weights_sha256[:8]}", x.preprocessing, rule]
        parts += facts
        if self.reference is not None and not OF_REFERENCE.keys().isdisjoint(metric.needs):
            parts.append(f"ref={self.reference.key.digest[:8]}")
        return ":".join([*parts, f"n={count}", metric.version])

    @property
    def samples(self) -> Samples:
        """Features of all samples so far, in the order of their numbers."""
        return self._collector.samples()

    @property
    def warnings(self) -> list[str]:
        """Warnings about samples and reference: too few samples, duplicates, imbalance."""
        reference = self.reference
        notes = list(reference.notes) if reference is not None else []
        notes += self.samples.warnings(reference)
        notes += class_warnings(self.class_counts, self._class_counts)
        if reference is not None and self.real_census is None and self._extracts:
            notes.append(NO_CENSUS)
        return notes + census_warnings(self.census, self.real_census) + copy_warnings(self.copies)

    @property
    def copies(self) -> Copies:
        """Copies of real images among the samples, as far as real images are known."""
        if self._copies is None or self._copies[0] != self.count:
            real = self.reference.features if self.reference is not None else None
            found = find_copies(self.census, self.real_census, self.samples.pool, real)
            self._copies = self.count, found
        return self._copies[1]

    @property
    def census(self) -> Census:
        """Pixel statistics of the samples."""
        return self._census.result()

    @property
    def class_counts(self) -> dict[int, int]:
        """Number of samples per requested class."""
        return dict(sorted(self._labels.items()))


def check_metric(metric: Metric, extractor: Extractor | None, reference: Reference | None) -> None:
    """Refuse a metric that this extractor or reference cannot serve, before any sampling."""
    who = f"metric {metric.name!r}"
    unknown = sorted(set(metric.needs) - set(NEEDS))
    if unknown:
        raise UserError(
            who,
            f"needs {', '.join(unknown)}, which no evaluation provides",
            allowed=", ".join(NEEDS),
            remedy="leave the metric out",
        )
    if not OF_SAMPLES.keys().isdisjoint(metric.needs):
        _check_extractor(metric, extractor)
    for need, part in OF_REFERENCE.items():
        if need not in metric.needs:
            continue
        if reference is None:
            raise UserError(who, "no reference", allowed="a reference of real images")
        if need == "real features":
            reference.require_features(metric.name)
        elif getattr(reference, part) is None:
            raise UserError(
                who,
                f"the reference {reference.key.source!r} has no spatial features",
                allowed="a reference with spatial features",
                remedy="compute it from images",
            )


def _check_extractor(metric: Metric, extractor: Extractor | None) -> None:
    who = f"metric {metric.name!r}"
    if extractor is None:
        raise UserError(who, "no extractor", allowed="a feature extractor")
    names = metric.names_for(extractor.short_name)
    if metric.name in names:
        return
    problem = f"the extractor is {extractor.name!r}"
    if not names:
        owners = ", ".join(metric.spec.extractors)
        raise UserError(who, problem, allowed=f"extractors {owners}", remedy="choose one of them")
    raise UserError(
        who,
        problem,
        allowed=f"{', '.join(names)} (FID and KID belong to the 2015 Inception network with"
        " verified weights)",
        remedy=f"ask for {names[0]!r} instead",
    )


def check_reference(extractor: Extractor, reference: Reference, quantization: str) -> None:
    """Refuse a reference whose features are not comparable with the extractor's."""
    key = reference.key
    pairs = {
        "extractor": (key.extractor, extractor.name),
        # An imported file stands for the published weights, of which the first digits are known.
        "weights": (key.extractor_sha256, extractor.weights_sha256[: len(key.extractor_sha256)]),
        "preprocessing": (key.preprocessing, extractor.preprocessing),
        "quantization": (key.quantization, quantization),
    }
    for what, (found, wanted) in pairs.items():
        if found not in (wanted, ANY):
            raise UserError(
                f"reference {key.source!r}",
                f"was made with {what} {found!r}",
                allowed=f"{wanted!r}, as the samples",
                remedy="compute the reference with the extractor and rule of the samples",
            )


def _flow_accumulator(exact: ExactFlowMap | None, data_std: float) -> FlowMapAccumulator:
    if exact is None:
        raise UserError(
            "flow-map error",
            "the dataset has no exact flow map",
            allowed="analytic datasets such as gmm",
            remedy="leave out the flow-map metrics",
        )
    return FlowMapAccumulator(exact, data_std)
