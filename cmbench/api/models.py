"""``cmbench.open_run``: a trained run or an imported checkpoint as a generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from cmbench.api.session import Where, open_context
from cmbench.errors import MissingError, UserError
from cmbench.plugin.method import ConsistencyFunction
from cmbench.plugin.specs import MAX_BATCH
from cmbench.samples.source import ReadOptions
from cmbench.sweep.asked import as_count, as_nfes, as_options, as_sigmas
from cmbench.sweep.cells import CellSamples, open_samples_of
from cmbench.sweep.context import Context
from cmbench.sweep.imported import is_import
from cmbench.sweep.opened_runs import choose_cell, find_run
from cmbench.sweep.planning import plan_imported_run, plan_run
from cmbench.sweep.plans import RunPlan, SampleSettings
from cmbench.sweep.run_files import RUN_FILE
from cmbench.sweep.runs import TrainedRun
from cmbench.sweep.teachers import saved_run
from cmbench.sweep.training_run import obtain_run


class OpenedRun:
    """A generator with its weights.

    Args:
        context: plugins, workspace and device.
        trained: the run.
    """

    def __init__(self, context: Context, trained: TrainedRun) -> None:
        self._context, self.trained = context, trained

    @property
    def plan(self) -> RunPlan:
        """Method, dataset, recipe and resolved options."""
        return self.trained.plan

    @property
    def run_id(self) -> str:
        """Id of the run, as records name it."""
        return self.plan.run_id

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what is generated."""
        return self.plan.data_info(self._context).data_shape

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 where the generator is unconditional."""
        return self.plan.data_info(self._context).num_classes

    def sample(
        self,
        count: int,
        nfe: int | None = None,
        seed: int = 0,
        *,
        labels: Sequence[int] | Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: str | None = None,
        ema: str | None = None,
        precision: str = "fp32",
        batch_size: int = 500,
    ) -> Tensor:
        """Return images ``[count, C, H, W]``, float in [-1, 1] for pictures, on the CPU.

        Image i depends on ``seed`` and i only, not on ``count`` or ``batch_size``; with the seed of
        a run they are the images of its records.

        Args:
            count: images to make.
            nfe: network evaluations per image; by default the fewest of the dataset's sweep.
            seed: of the noise and of classes that are drawn.
            labels: class of each image, int ``[count]``; by default drawn by the dataset's
                frequencies.
            sigmas: descending noise levels.
            sampler: of methods that have several.
            ema: label of the average to sample.
            precision: ``fp32``, ``bf16`` or ``fp16``.
            batch_size: images per batch.

        Raises:
            UserError: the method declines the NFE, or an argument is out of range.
            NonFiniteError: an image has NaN or infinite values.
        """
        samples = self.samples(
            count, nfe, seed, sigmas=sigmas, sampler=sampler, ema=ema, precision=precision
        )
        if labels is not None:
            given = self._labels(labels, count)
            samples.sampler.labels = lambda start, number: given[start : start + number]
        batches = samples.source.batches(as_count(batch_size, "sample, batch_size", 1, MAX_BATCH))
        return torch.cat([batch.images.cpu() for batch in batches])

    def samples(
        self,
        count: int,
        nfe: int | None = None,
        seed: int = 0,
        *,
        labels: Sequence[int] | Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: str | None = None,
        ema: str | None = None,
        precision: str = "fp32",
    ) -> CellSamples:
        """Return what makes the images of :meth:`sample`, with its counted evaluations."""
        count, seed = as_count(count, "sample, count"), as_count(seed, "sample, seed", 0)
        levels = as_sigmas(sigmas, "sample, sigmas") if sigmas is not None else None
        if nfe is None and levels is not None and sampler is None:
            nfe = len(levels)
        settings = SampleSettings(sigmas=levels, sampler=sampler, ema=ema, precision=precision)
        options = ReadOptions(limit=count, seed=seed)
        nfe = None if nfe is None else as_nfes(nfe, "sample, nfe")[0]
        cell = choose_cell(self._context, self.plan, nfe, options, settings)
        made = open_samples_of(self._context, self.trained, cell, options=options)
        if labels is not None:
            given = self._labels(labels, count)
            made.sampler.labels = lambda start, number: given[start : start + number]
        return made

    def consistency_function(self, ema: str | None = None) -> ConsistencyFunction:
        """Return ``f(x, sigma, labels)``, the origin of the trajectory through noisy images.

        ``x`` is ``[N, C, H, W]`` in EDM's frame ``x0 + sigma z``, ``sigma`` ``[N]``, labels int64
        ``[N]`` or None; all on the run's device. No gradients are recorded.

        Args:
            ema: label of the average to use.

        Raises:
            Declined: the method has none.
        """
        made = self.samples(1, ema=ema)
        function = made.sampler.method.consistency_function(made.sampler.nets)
        return torch.no_grad()(function)

    def _labels(self, labels: Sequence[int] | Tensor, count: int) -> Tensor:
        values = labels.tolist() if isinstance(labels, Tensor) else np.asarray(labels).tolist()
        values = values if isinstance(values, list) else [values]
        given = torch.tensor([as_count(value, "sample, labels", 0) for value in values])
        if not self.num_classes:
            raise UserError(
                f"run {self.run_id}",
                "labels were given, but it is unconditional",
                remedy="leave labels out",
            )
        if len(given) != count or int(given.min()) < 0 or int(given.max()) >= self.num_classes:
            raise UserError(
                f"run {self.run_id}",
                f"{len(given)} labels from {int(given.min())} to {int(given.max())}",
                allowed=f"{count} labels from 0 to {self.num_classes - 1}",
            )
        return given

    def __repr__(self) -> str:
        return f"OpenedRun({self.run_id!r}, {self.data_shape}, {self.num_classes} classes)"


def open_run(
    run: str | Path,
    dataset: str | None = None,
    *,
    recipe: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    **where: Unpack[Where],
) -> OpenedRun:
    """Open a finished run of a workspace, or an imported checkpoint, to sample from it.

    Args:
        run: a method, whose run on ``dataset`` with ``recipe``, ``seed`` and ``options`` is meant;
            or a run's id or folder; or ``import:NAME``.
        dataset: of a method or an imported checkpoint.
        recipe: by default the one that ``cmbench run`` uses.
        seed: training seed.
        options: overrides of the recipe, ``{"optimizer.lr": 1e-3}``.
        where: workspace, device, threads …, see :class:`cmbench.api.session.Where`.

    Raises:
        MissingError: there is no such run, or it is not finished.
        UserError: the names do not fit.
    """
    context = open_context("cmbench.open_run", where)
    return opened(context, str(run), dataset, recipe, seed, as_options(options))


def opened(
    context: Context,
    run: str,
    dataset: str | None,
    recipe: str | None,
    seed: int,
    options: Mapping[str, Any],
) -> OpenedRun:
    """Open what :func:`open_run` names, in a context that exists."""
    if not is_import(run) and (folder := find_run(context, run)) is not None:
        return OpenedRun(context, saved_run(context, folder))
    if dataset is None:
        raise MissingError(
            f"run {run}",
            f"is not in {context.workspace.root}",
            allowed="a run's id or folder, or a method or import:NAME with its dataset",
            remedy="see `cmbench status`, or name the dataset",
        )
    if is_import(run):
        plan = plan_imported_run(context, run, None, dataset, recipe, seed, options)
        return OpenedRun(context, obtain_run(context, plan))
    plan = plan_run(context, run, dataset, recipe, seed, options)
    remedy = f"train it: cmbench.run({run!r}, {dataset!r}, …) with the same arguments"
    folder = context.workspace.run(plan.run_id)
    if not (folder / RUN_FILE).is_file():
        raise MissingError(f"run {plan.run_id}", f"is not in {folder.parent}", remedy=remedy)
    return OpenedRun(context, saved_run(context, folder, remedy))
