"""A dataset's protocol, opened: what its samples are measured with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.measure.extractors import load_extractor, plan_metrics
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


def open_protocol(
    context: Context, name: str, extractor: str = "", metrics: Sequence[str] = ()
) -> Protocol:
    """Return a dataset's protocol; extractor and reference are opened once per context.

    ``extractor`` is another than the dataset's own, that ``metrics`` ask for.

    Raises:
        MissingError: data or weights are not here; the message says how to get them.
    """
    spec, dataset = context.dataset_spec(name), context.dataset(name)
    key = f"{spec.name}:{extractor}" if extractor else spec.name
    if key not in context.references:
        size = () if spec.latent else spec.data_shape
        asked = (extractor, metrics) if extractor else (spec.extractor, spec.metrics)
        loaded = placed(load_extractor(context.plugins, *asked), context.device, size)
        context.references[key] = (
            loaded,
            dataset_reference(context.workspace, dataset, loaded, spec.quantize, context.device),
        )
    return Protocol(context, spec, dataset, *context.references[key])


def further_metrics(context: Context, spec: DatasetSpec, asked: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics asked for that are not the dataset's own; raise for an unknown one."""
    further = tuple(name for name in asked if name not in spec.metrics)
    if further:
        plan_metrics(further, spec.extractor, context.plugins)
    return further


def open_protocols(
    context: Context, name: str, further: Sequence[str]
) -> list[tuple[Protocol, tuple[str, ...]]]:
    """Return a dataset's protocol with its metrics, then one per extractor that others ask for.

    ``further`` are metrics beside the dataset's own; those of its extractor join these.
    """
    own = open_protocol(context, name)
    plan = plan_metrics(further, own.spec.extractor, context.plugins) if further else {}
    joined = (*own.spec.metrics, *plan.pop(own.spec.extractor, ()))
    others = [(open_protocol(context, name, e, m), tuple(m)) for e, m in plan.items()]
    return [(own, joined), *others]


def require_metrics(context: Context, name: str, further: Sequence[str] = ()) -> None:
    """Open everything that a sweep's metrics need, before any training or sampling.

    Raises:
        MissingError: data or weights are not here; the message says how to get them.
        UserError: a metric that the extractor or the reference cannot serve.
    """
    for protocol, names in open_protocols(context, name, further):
        for metric in open_metrics(context.plugins, names):
            check_metric(metric, protocol.extractor, protocol.reference)
