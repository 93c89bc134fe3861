"""``cmbench.run``: train, sample and measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from cmbench.api.results import Results
from cmbench.api.session import Where, open_context
from cmbench.errors import UserError
from cmbench.plugin.specs import MAX_BATCH
from cmbench.sweep.asked import as_count, as_names, as_nfes, as_options, as_seeds, as_sigmas
from cmbench.sweep.context import Context
from cmbench.sweep.executors import open_executor
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep


def run(
    method: str | Sequence[str] | None = None,
    dataset: str = "digits",
    *,
    recipe: str | None = None,
    nfe: int | Sequence[int] | None = None,
    seeds: int | Sequence[int] = 1,
    options: Mapping[str, Any] | None = None,
    samples: int | None = None,
    batch_size: int = 500,
    sigmas: Sequence[float] | None = None,
    sampler: str | Sequence[str] | None = None,
    ema: str | None = None,
    precision: str = "fp32",
    metrics: Sequence[str] = (),
    labels: str = "drawn",
    checkpoint: str | None = None,
    save_samples: bool = False,
    executor: str = "local",
    **where: Unpack[Where],
) -> Results:
    """Train (or resume, or reuse), sample and measure every cell of a sweep, as ``cmbench run``.

    Args:
        method: name, or names; by default the method marked in ``cmbench list methods``.
        dataset: name of a dataset, or ``folder:PATH``.
        recipe: of the method's file, or ``FILE.toml:NAME``; by default ``demo``, else ``paper``.
        nfe: network evaluations per image; by default the dataset's sweep.
        seeds: of training: 3 means seeds 0, 1, 2; a list names the seeds themselves.
        options: overrides of the recipe, ``{"optimizer.lr": 1e-3}``; a list for an option that
            takes one value, ``{"optimizer.lr": [1e-3, 3e-3]}``, makes runs of each value.
        samples: images per cell; by default the protocol's number.
        batch_size: images per sampling batch.
        sigmas: descending noise levels; the first is where sampling starts.
        sampler: of methods that have several; each of several names has cells of its own.
        ema: label of the average to sample.
        precision: ``fp32``, ``bf16`` or ``fp16``, of sampling.
        metrics: names of metrics to measure beside the dataset's.
        labels: of conditional runs: ``drawn`` by class frequencies, or their exact ``quota``.
        checkpoint: name of an imported checkpoint, sampled by ``method``.
        save_samples: keep the images as PNG files in the workspace.
        executor: name of the executor, see ``cmbench list executors``.
        where: workspace, device, threads …, see :class:`cmbench.api.session.Where`.

    Returns:
        The record of every cell in the order of methods, option values, seeds, samplers and NFE. A
        cell that fails or that its method declines has a record, too, with the reason.

    Raises:
        UserError: the input is bad; nothing was trained.
        MissingError: data, weights or a device are missing.
    """
    context = open_context("cmbench.run", where)
    names = as_names(method, "method") if method is not None else ()
    if not names and checkpoint is None:
        names = (context.plugins.default_method,)
    if samples is not None:
        samples = as_count(samples, "samples", 2)
    levels = as_sigmas(sigmas, "sigmas") if sigmas is not None else None
    if nfe is None and levels is not None and sampler is None:
        nfe = len(levels)
    nfes = as_nfes(nfe, "nfe") if nfe is not None else None
    samplers = as_names(sampler, "sampler") if sampler is not None else ()
    sampling = (samples, as_count(batch_size, "batch_size", 1, MAX_BATCH), levels, None, ema)
    settings = SampleSettings(*sampling, precision=precision, metrics=tuple(metrics), labels=labels)
    overrides = as_options(options)
    picked = (names, dataset, recipe, nfes, as_seeds(seeds, "seeds"), overrides)
    request = SweepRequest(*picked, settings, save_samples, checkpoint, samplers=samplers)
    return _carried_out(context, request, executor)


def _carried_out(context: Context, request: SweepRequest, executor: str) -> Results:
    plan = plan_sweep(context, request)
    for line in plan.refused:
        context.reporter.warn(line)
    known = context.plugins.executors
    if executor not in known.specs:
        raise UserError("cmbench.run, executor", f"{executor!r}", allowed=", ".join(known.specs))
    return Results(execute(context, plan, open_executor(context.plugins, executor)))
