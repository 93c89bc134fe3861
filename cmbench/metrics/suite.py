"""All metrics of a cell from one pass over its samples.

    suite = MetricSuite(("fd-digits", "precision"), extractor=…, reference=…, quantization="round")
    for batch in stream:
        suite.update(batch.images, batch.noise, batch.labels)
    values = suite.finalize()          # {"fd-digits": MetricValue, …}

Features are kept (float32, 2048 wide, 50,000 samples: 410 MB) on the extractor's device; every
metric is computed from them at the end. Suites of several processes are merged by sample index, so
the result does not depend on how the samples were divided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.census import Census, CensusTaker, census_warnings, class_warnings
from cmbench.metrics.custom import CustomMetric
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.flow_map import ExactFlowMap, FlowMapAccumulator
from cmbench.metrics.quantize import quantize
from cmbench.metrics.reference import ANY, Reference
from cmbench.metrics.samples import SampleCollector, Samples
from cmbench.metrics.scores import Scores, check_metric, needs
from cmbench.metrics.values import MetricValue

NO_CENSUS = (
    "no census of real images (the reference is statistics alone): pixel guards are off, that is"
    " the checks of colour, texture and shared images"
)


class MetricSuite:
    """Accumulates samples, then computes the metrics asked for.

    Args:
        metrics: names as in ``cmbench list metrics``.
        extractor: one pass of it feeds every metric; None if only flow-map metrics are asked for.
        reference: real images under the same extractor and quantisation.
        quantization: rule from floats to bytes, see :mod:`cmbench.metrics.quantize`.
        exact: the dataset's exact flow map, for the flow-map metrics.
        data_std: standard deviation of the data, the unit of the flow-map metrics.
        class_counts: real images a class; labels that do not follow them are a warning.
        custom: metrics that plugins bring, by name.
        census: of real images, for a reference that has none (imported statistics).
        rule_of_bytes: what the key says of samples that come as bytes: "stored" where nobody said
            by which rule they were made, and ``quantization`` by default.

    Raises:
        UserError: an unknown metric, one that the extractor or reference cannot serve, or a
            reference made with another extractor, weights, preprocessing or quantisation.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        *,
        extractor: Extractor | None = None,
        reference: Reference | None = None,
        quantization: str = "round",
        exact: ExactFlowMap | None = None,
        data_std: float = 1.0,
        class_counts: Sequence[int] = (),
        custom: Mapping[str, CustomMetric] | None = None,
        census: Census | None = None,
        rule_of_bytes: str | None = None,
    ) -> None:
        self.metrics = tuple(dict.fromkeys(metrics))
        self.extractor, self.reference = extractor, reference
        self.quantization = quantization
        self._rule_of_bytes = rule_of_bytes or quantization
        self._floats = False
        self.real_census = census
        if reference is not None and reference.census is not None:
            self.real_census = reference.census
        for metric in self.metrics:
            check_metric(metric, extractor, reference, custom)
        if extractor is not None and reference is not None:
            check_reference(extractor, reference, quantization)
        wanted = {needs(metric, custom) for metric in self.metrics}
        self._extracts = bool(wanted - {"flow map"})
        self._flow = _flow_accumulator(exact, data_std) if "flow map" in wanted else None
        self._collector = SampleCollector()
        self._census = CensusTaker()
        self._labels: Counter[int] = Counter()
        self._class_counts = tuple(class_counts)
        self._custom = custom

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
            images: ``[N, C, H, W]``, float in [-1, 1] (quantised here) or uint8 (taken as it is).
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
        self._collector.add(indices, features)

    def merge(self, other: MetricSuite) -> None:
        """Add another process's samples."""
        self._collector.extend(other._collector)
        self._labels.update(other._labels)
        self._census.merge(other._census)
        self._floats = self._floats or other._floats
        if self._flow is not None and other._flow is not None:
            self._flow.merge(other._flow)

    def finalize(self) -> dict[str, MetricValue]:
        """Return every metric by name, in the order asked for."""
        flow = self._flow.result() if self._flow is not None else None
        scores = Scores(
            self._collector.samples(),
            self.extractor,
            self.reference,
            self.quantization if self._floats else self._rule_of_bytes,
            flow,
            self._custom,
        )
        return {metric: scores.value(metric) for metric in self.metrics}

    @property
    def samples(self) -> Samples:
        """Features of all samples so far, in the order of their numbers."""
        return self._collector.samples()

    @property
    def warnings(self) -> list[str]:
        """What the reader of the numbers should know: too few samples, duplicates, imbalance."""
        reference = self.reference
        notes = list(reference.notes) if reference is not None else []
        notes += self.samples.warnings(reference)
        notes += class_warnings(self.class_counts, self._class_counts)
        if reference is not None and self.real_census is None and self._extracts:
            notes.append(NO_CENSUS)
        return notes + census_warnings(self.census, self.real_census)

    @property
    def census(self) -> Census:
        """What the pixels of the samples say."""
        return self._census.result()

    @property
    def class_counts(self) -> dict[int, int]:
        """Number of samples a requested class."""
        return dict(sorted(self._labels.items()))


def check_reference(extractor: Extractor, reference: Reference, quantization: str) -> None:
    """Refuse a reference whose features are not comparable with the extractor's."""
    key = reference.key
    pairs = {
        "extractor": (key.extractor, extractor.name),
        # An imported file stands for the published weights, of which the first digits are known.
        "weights": (key.extractor_sha256, extractor.weights_sha256[: len(key.extractor_sha256)]),
        "preprocessing": (key.preprocessing, extractor.preprocessing),
        "quantisation": (key.quantization, quantization),
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
