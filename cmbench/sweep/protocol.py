"""A dataset's protocol, opened: what its samples are measured with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.measure.extractors import load_extractor
from cmbench.measure.references import dataset_reference
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.metric import open_metrics
from cmbench.metrics.probe import placed
from cmbench.metrics.reference import Reference
from cmbench.metrics.suite import MetricSuite, check_metric
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.record import DatasetRecord
from cmbench.sweep.cell_record import dataset_record
from cmbench.sweep.context import Context
from cmbench.sweep.plans import CellPlan


@dataclass(frozen=True)
class Protocol:
    """A dataset with the extractor and the reference of its protocol."""

    context: Context
    spec: DatasetSpec
    dataset: Dataset
    extractor: Extractor
    reference: Reference

    def suite(self, cell: CellPlan, metrics: Sequence[str] | None = None) -> MetricSuite:
        """Return the suite of the protocol's metrics, or of ``metrics``, for one cell.

        A method that follows no probability flow, or a plan without a first noise level, has no
        flow-map metrics.
        """
        analytic = getattr(self.dataset, "mixture", None) is not None
        sigmas = cell.sampling.sigmas if cell.sampling else ()
        sigma_max = sigmas[0] if sigmas else math.inf
        opened = open_metrics(self.context.plugins, metrics or self.spec.metrics)
        if not cell.run.method_class.follows_probability_flow or math.isinf(sigma_max):
            opened = [metric for metric in opened if "flow map" not in metric.needs]

        def exact(noise: Tensor, labels: Tensor | None) -> Tensor:
            conditional = labels if cell.run.config.conditional else None
            found = self.dataset.exact_flow_map(noise, conditional, sigma_max=sigma_max)
            assert found is not None
            return found

        return MetricSuite(
            opened,
            extractor=self.extractor,
            reference=self.reference,
            quantization=self.spec.quantize,
            exact=exact if analytic else None,
            data_std=self.dataset.sigma_data,
            class_counts=self.dataset.class_counts,
        )

    @property
    def record(self) -> DatasetRecord:
        """What a record keeps of it."""
        return dataset_record(self.spec.name, self.dataset, self.reference, self.extractor)


def open_protocol(context: Context, name: str) -> Protocol:
    """Return a dataset's protocol; extractor and reference are opened once per context.

    Raises:
        MissingError: data or weights are not here; the message says how to get them.
    """
    spec, dataset = context.dataset_spec(name), context.dataset(name)
    if spec.name not in context.references:
        size = () if spec.latent else spec.data_shape
        extractor = placed(
            load_extractor(context.plugins, spec.extractor, spec.metrics), context.device, size
        )
        context.references[spec.name] = (
            extractor,
            dataset_reference(context.workspace, dataset, extractor, spec.quantize, context.device),
        )
    return Protocol(context, spec, dataset, *context.references[spec.name])


def require_metrics(context: Context, name: str) -> None:
    """Open everything that a dataset's metrics need, before any training or sampling.

    Raises:
        MissingError: data or weights are not here; the message says how to get them.
        UserError: a metric that the extractor or the reference cannot serve.
    """
    protocol = open_protocol(context, name)
    for metric in open_metrics(context.plugins, protocol.spec.metrics):
        check_metric(metric, protocol.extractor, protocol.reference)
