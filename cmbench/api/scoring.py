"""``cmbench.evaluate`` and ``cmbench.frechet_distance``: numbers of samples from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from cmbench.api.results import Results
from cmbench.api.session import Where, open_context
from cmbench.errors import UserError
from cmbench.metrics import frechet
from cmbench.metrics.statistics import moments_of
from cmbench.plugin.specs import MAX_BATCH
from cmbench.records.record import Record, write_record
from cmbench.samples.arrays import ArraySamples
from cmbench.samples.generators import GeneratorSamples
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sweep.asked import as_count, as_names
from cmbench.sweep.context import Context
from cmbench.sweep.scored import score
from cmbench.sweep.scored_record import OpenSamples, ScoreRequest


class Evaluation(Mapping[str, float | None]):
    """Metric values by name, with the record behind them.

    Args:
        record: what ``cmbench eval`` would leave: intervals, floors, keys, warnings.
    """

    def __init__(self, record: Record) -> None:
        self.record = record

    def __getitem__(self, name: str) -> float | None:
        return self.record.metrics[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.record.metrics)

    def __len__(self) -> int:
        return len(self.record.metrics)

    @property
    def warnings(self) -> list[str]:
        """What decides how far the values can be trusted."""
        return list(self.record.warnings)

    def dataframe(self) -> Any:
        """Return one row per metric, see :meth:`Results.dataframe`."""
        return Results([self.record]).dataframe()

    def __repr__(self) -> str:
        return f"Evaluation({dict(self)})"

    def _repr_html_(self) -> str:
        return Results([self.record])._repr_html_()


def evaluate(
    samples: Any,
    reference: str | Path = "digits",
    metrics: tuple[str, ...] | list[str] | None = None,
    *,
    labels: Any = None,
    value_range: str | None = None,
    extractor: str | None = None,
    weights: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    nfe: int | None = None,
    label: str | None = None,
    quantize: str | None = None,
    held_out: str | Path | None = None,
    batch_size: int = 250,
    keep_record: bool = False,
    **where: Unpack[Where],
) -> Evaluation:
    """Score samples against a dataset or other real images, as ``cmbench eval``.

    Args:
        samples: an array or tensor ``[N, C, H, W]`` or ``[N, H, W, C]`` (uint8, or floats with
            ``value_range``); a path of images, arrays, a run or ``import:NAME``; or a function of
            ``(indices, seed)`` that returns images ``[N, C, H, W]``, uint8 or float in [-1, 1].
        reference: a dataset, whose protocol is then used, or real images or their statistics.
        metrics: names; by default those of the dataset's protocol.
        labels: int ``[N]`` of an array of samples.
        value_range: of floats in an array: ``"-1,1"``, ``"0,1"`` or ``"0,255"``.
        extractor: of the features; by default the dataset's.
        weights: file of the extractor's weights.
        limit: read or make at most this many samples.
        seed: of samples that a function makes.
        nfe: network evaluations per sample, if they are known; of a run, those to spend.
        label: name of the samples in tables; by default that of a file, or "samples".
        quantize: rule by which floats become bytes; by default the dataset's.
        held_out: real images that the generator never saw, for the check of memorised ones.
        batch_size: images per batch.
        keep_record: write the record to the workspace.
        where: workspace, device, threads …, see :class:`cmbench.api.session.Where`.

    Raises:
        UserError: samples, reference or metrics cannot be used.
        MissingError: data or weights are not here.
    """
    context = open_context("cmbench.evaluate", where)
    dataset = _dataset_of(context, str(reference))
    limit = None if limit is None else as_count(limit, "limit")
    asked = as_names(metrics, "metrics") if metrics is not None else ()
    read = ReadOptions(value_range=value_range, limit=limit, seed=seed, device=str(context.device))
    request = ScoreRequest(
        samples=_opened(samples, labels, label or "samples"),
        dataset=dataset,
        reference=None if dataset is not None else str(reference),
        metrics=asked,
        extractor=extractor,
        weights=None if weights is None else Path(weights),
        label=label,
        nfe=as_count(nfe or 0, "nfe", 0),
        seed=as_count(seed, "seed", 0),
        quantize=quantize,
        read=read,
        batch_size=as_count(batch_size, "batch_size", 1, MAX_BATCH),
        held_out=None if held_out is None else str(held_out),
    )
    return _scored(context, request, keep_record)


def _scored(context: Context, request: ScoreRequest, keep_record: bool) -> Evaluation:
    record = score(context, request)
    for warning in record.warnings:
        context.reporter.warn(warning)
    if keep_record:
        write_record(record, context.workspace.records(record.dataset.name))
        context.notify("cmbench_cell_finished", record=record)
    return Evaluation(record)


def _dataset_of(context: Context, reference: str) -> str | None:
    """Return the dataset that ``reference`` names; None for images and statistics."""
    if reference in context.plugins.datasets.specs:
        return reference
    try:
        return context.dataset_spec(reference, "cmbench.evaluate").name
    except UserError:
        if Path(reference).exists():
            return None
        raise


def _opened(samples: Any, labels: Any, name: str) -> str | OpenSamples:
    if isinstance(samples, str | Path):
        return str(samples)
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu().numpy()
    if isinstance(samples, np.ndarray):
        images = samples
        classes = None if labels is None else np.asarray(labels)
        return lambda read: ArraySamples(name, images, classes, read, "array")
    if callable(samples):
        return _generator(samples, name)
    raise UserError(
        "cmbench.evaluate, samples",
        f"is a {type(samples).__name__}",
        allowed="an array, a tensor, a path, or a function of (indices, seed)",
    )


def _generator(generate: Callable[..., Any], name: str) -> OpenSamples:
    def opened(read: ReadOptions) -> SampleSource:
        return GeneratorSamples(name, generate, read)

    return opened


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """Return the squared Fréchet distance between two sets of features, exact and in float64.

    The distance of the Gaussians with their means and unbiased covariances (Heusel et al. 2017:
    of Inception features, this is FID).

    Args:
        features_a: array or tensor ``[N, D]``, N >= 2.
        features_b: array or tensor ``[M, D]``, M >= 2.

    Raises:
        UserError: shapes do not fit, or values are not finite.
    """
    first, second = (_features(name, x) for name, x in (("a", features_a), ("b", features_b)))
    return frechet.frechet_distance(moments_of(first), moments_of(second))


def _features(name: str, given: Any) -> Tensor:
    who = f"cmbench.frechet_distance, features_{name}"
    found = torch.as_tensor(given).detach()
    if found.ndim != 2 or len(found) < 2:
        raise UserError(who, f"shape {tuple(found.shape)}", allowed="[N, D] with N >= 2")
    found = found.double()
    if not torch.isfinite(found).all():
        raise UserError(who, "holds NaN or infinite values", allowed="finite features")
    return found
