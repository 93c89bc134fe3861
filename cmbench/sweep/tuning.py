"""Choosing the intermediate noise levels of multistep sampling on held-out seeds.

Records sample with the seeds of their runs, all below :data:`~cmbench.seeds.HELD_OUT_FROM`; the
search samples with seeds from there on. So no record's noise has been looked at when its levels
were chosen, only its generator and the reference images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from cmbench.errors import MissingError, UserError
from cmbench.files import write_sealed
from cmbench.measure.loop import measure
from cmbench.measure.observers import stopped_by
from cmbench.metrics.values import MetricValue
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.folders import read_records
from cmbench.records.options import value_text
from cmbench.records.record import Record
from cmbench.sampling.search import FoundLevels, Levels, search_levels
from cmbench.sampling.stream import Sampler
from cmbench.seeds import HELD_OUT_FROM
from cmbench.sweep.cell_record import now
from cmbench.sweep.cells import open_samples_of
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells
from cmbench.sweep.plans import CellPlan, RunPlan, SampleSettings
from cmbench.sweep.protocol import open_protocol
from cmbench.sweep.runs import TrainedRun
from cmbench.sweep.sweep import is_trained
from cmbench.sweep.training_run import obtain_run
from cmbench.sweep.trajectory_search import FINE_STEPS, IMAGES, trajectory_levels
from cmbench.sweep.tuned_sigmas import TunedSigmas, read_tuned, tuned_file

WHO = "cmbench tune-times"


@dataclass(frozen=True)
class TuneSettings:
    """How the levels are searched."""

    seeds: Sequence[int] = (HELD_OUT_FROM,)
    num_samples: int | None = None
    batch_size: int = 500
    metric: str | None = None
    sampler: str | None = None
    ema: str | None = None
    sigma_min: float = 0.02
    evaluations: int = 10
    rounds: int = 2
    algorithm: Literal["golden-section", "trajectories"] = "golden-section"

    @property
    def search(self) -> str:
        """The algorithm with its settings, in words."""
        if self.algorithm == "trajectories":
            return (
                f"GITS: the best of {FINE_STEPS} Karras steps down to sigma {self.sigma_min:g} by "
                f"the bends of {IMAGES} trajectories"
            )
        return (
            f"golden section over ln sigma, {self.evaluations} evaluations per level and "
            f"round, at most {self.rounds} rounds, down to sigma {self.sigma_min:g}"
        )


class LevelScore:
    """The metric at given noise levels, mean over the held-out seeds, and what asking has cost."""

    def __init__(
        self, context: Context, trained: TrainedRun, cells: Sequence[CellPlan], metric: str
    ) -> None:
        self.cells, self.metric = cells, metric
        self.protocol = open_protocol(context, cells[0].run.dataset)
        self.samples = [open_samples_of(context, trained, cell) for cell in cells]
        self.observers = [stopped_by(context.should_stop, WHO, "nothing has been written")]
        self.values: dict[Levels, float] = {}
        self.other_evaluations = 0
        self.key, self.sign = "", 1.0

    def __call__(self, levels: Levels) -> float:
        """Return the metric at these levels; smaller is better (others change their sign)."""
        found = [self._measure(i, levels) for i in range(len(self.cells))]
        self.key = found[0].key
        self.sign = -1.0 if found[0].higher_is_better else 1.0
        self.values[levels] = fmean(value.value for value in found)
        return self.sign * self.values[levels]

    def _measure(self, index: int, levels: Levels) -> MetricValue:
        cell, samples = self.cells[index], self.samples[index]
        assert cell.sampling is not None
        samples.sampler.plan = plan = replace(cell.sampling, sigmas=levels)
        suite = self.protocol.suite(replace(cell, sampling=plan), [self.metric])
        found = measure(
            samples.source, [suite], batch_size=cell.batch_size, observers=self.observers
        )
        return found.metrics[self.metric]

    @property
    def images(self) -> int:
        """Images sampled so far."""
        return sum(samples.sampler.images for samples in self.samples)


def tune(context: Context, run: RunPlan, nfe: int, settings: TuneSettings) -> TunedSigmas:
    """Search the levels of one run at one NFE, write them to the workspace and return them.

    Levels that the same search has found before are returned as they were kept.

    Raises:
        UserError: there is nothing to tune, or a held-out seed is one that records use.
        MissingError: the run is not trained.
    """
    cells = check(context, run, nfe, settings)
    metric = objective_metric(context, context.dataset_spec(run.dataset), settings.metric)
    if (kept := kept_levels(context, cells[0], settings, metric)) is not None:
        return kept
    if not is_trained(context, run):
        raise MissingError(
            WHO,
            f"run {run.run_id} is not trained in {context.workspace.root}",
            remedy="train it first with `cmbench run` and the same method, recipe and options",
        )
    began = time.perf_counter()
    trained = obtain_run(context, run)
    score = LevelScore(context, trained, cells, metric)
    start = cells[0].sampling
    assert start is not None
    if settings.algorithm == "trajectories":
        sampler = open_samples_of(context, trained, cells[0]).sampler
        found = _by_trajectories(score, sampler, start.sigmas, settings.sigma_min)
    else:
        found = search_levels(
            score,
            start.sigmas,
            settings.sigma_min,
            evaluations=settings.evaluations,
            rounds=settings.rounds,
        )
    if not math.isfinite(found.value):
        raise UserError(
            WHO,
            f"{metric} is not finite at any noise levels that were tried",
            remedy="choose another --metric, or more --samples",
        )
    tuned = _result(context, cells[0], settings, score, found)
    tuned = tuned.model_copy(update={"seconds": round(time.perf_counter() - began, 3)})
    write_sealed(tuned_file(context.workspace, run, start), tuned.model_dump(mode="json"))
    return tuned


def kept_levels(
    context: Context, cell: CellPlan, settings: TuneSettings, metric: str
) -> TunedSigmas | None:
    """Return what the same search has found before; None if nothing that can be read is kept.

    Raises:
        UserError: another search's levels are kept: nothing is replaced without a word.
    """
    assert cell.sampling is not None
    path = tuned_file(context.workspace, cell.run, cell.sampling)
    try:
        kept = read_tuned(path) if path.exists() else None
    except UserError:
        return None
    if kept is None:
        return None
    asked = {
        "run": cell.run.run_id,
        "ema": cell.ema,
        "metric": metric,
        "held_out_seeds": tuple(settings.seeds),
        "samples_per_seed": cell.num_samples,
        "search": settings.search,
    }
    changed = [
        f"{name} {value_text(getattr(kept, name))} there, {value_text(value)} now"
        for name, value in asked.items()
        if getattr(kept, name) != value
    ]
    if changed:
        raise UserError(
            WHO,
            f"{path} holds the levels of another search: {'; '.join(changed)}",
            remedy="delete the file to search again; records that used its levels keep them",
        )
    return kept


def _by_trajectories(
    score: LevelScore, sampler: Sampler, start: Levels, sigma_min: float
) -> FoundLevels:
    """Return the levels of :mod:`trajectory_search`, measured as the method's own are."""
    levels = trajectory_levels(sampler, len(start), sigma_min)
    score.other_evaluations = FINE_STEPS * IMAGES
    score(start)
    return FoundLevels(levels, score(levels), len(score.values))


def _result(
    context: Context, cell: CellPlan, settings: TuneSettings, score: LevelScore, found: FoundLevels
) -> TunedSigmas:
    """Return what is kept of a search."""
    run, start = cell.run, cell.sampling
    assert start is not None
    return TunedSigmas(
        method=run.spec.name,
        dataset=run.dataset,
        recipe=run.recipe,
        config_sha256=run.config_sha256,
        run=run.run_id,
        ema=cell.ema,
        nfe=cell.nfe,
        sampler=start.sampler,
        sigmas=found.levels,
        start_sigmas=start.sigmas,
        metric=score.metric,
        metric_key=score.key,
        value=score.values[found.levels],
        start_value=score.values[start.sigmas],
        held_out_seeds=tuple(settings.seeds),
        samples_per_seed=cell.num_samples,
        search=settings.search,
        evaluations=found.evaluations,
        samples=score.images,
        network_evaluations=score.images * cell.nfe + score.other_evaluations,
        seconds=0.0,
        created=now(),
        command=context.command,
    )


def check(context: Context, run: RunPlan, nfe: int, settings: TuneSettings) -> list[CellPlan]:
    """Return one cell per held-out seed, with the method's own levels to start from."""
    check_seeds(context, run.dataset, settings.seeds)
    sampling = SampleSettings(
        settings.num_samples, settings.batch_size, None, settings.sampler, settings.ema
    )
    cells = [
        cell for seed in settings.seeds for cell in plan_cells(context, run, [nfe], seed, sampling)
    ]
    plan, who = cells[0].sampling, f"{WHO}, method {run.spec.name!r} at NFE {nfe}"
    if plan is None:
        raise UserError(
            who, cells[0].declined or cells[0].broken, remedy="choose another --nfe or --sampler"
        )
    if len(plan.sigmas) < 2:
        raise UserError(
            who,
            "has no intermediate noise level, so there is nothing to tune",
            allowed="an NFE with at least two noise levels",
            remedy="choose --nfe from 2",
        )
    if settings.sigma_min >= plan.sigmas[0]:
        raise UserError(
            "--sigma-min",
            f"{settings.sigma_min:g} leaves no noise level to choose",
            allowed=f"below {plan.sigmas[0]:g}, the first level",
            remedy="choose a smaller one",
        )
    return cells


def check_seeds(context: Context, dataset: str, seeds: Sequence[int]) -> None:
    """Raise ``UserError`` if a seed is, or could be, one that a record was sampled with."""
    low = [seed for seed in seeds if seed < HELD_OUT_FROM]
    if low:
        raise UserError(
            "--held-out-seeds",
            f"{low[0]} is a seed that records may use: not held out",
            allowed=f"from {HELD_OUT_FROM:,} on, which `cmbench run` refuses",
            remedy=f"leave the option out, or give for example {HELD_OUT_FROM}",
        )
    used = {
        record.sampling.seed: path
        for path, record in read_records(context.workspace.records(dataset))
        if isinstance(record, Record)
    }
    both = sorted(used.keys() & set(seeds))
    if both:
        raise UserError(
            "--held-out-seeds",
            f"{both[0]} is the seed of record {used[both[0]]}",
            allowed="seeds of no record",
            remedy="choose others",
        )


def objective_metric(context: Context, spec: DatasetSpec, asked: str | None) -> str:
    """Return the metric to tune by: the one asked for, or the protocol's first of samples.

    The error of the flow map is none: steps after the first add fresh noise, so their images are
    not on the trajectory of the first noise.
    """
    able = [
        name
        for name in spec.metrics
        if (known := context.plugins.metrics.specs.get(name)) is None
        or "flow map" not in known.needs
    ]
    if asked is not None and asked not in able:
        raise UserError(
            "--metric",
            f"{asked!r} cannot be used for tuning on {spec.name!r}",
            allowed=", ".join(able) or "none",
            remedy="flow-map errors say nothing of sampling with fresh noise"
            if asked in spec.metrics
            else "name a metric of the dataset's protocol",
        )
    if not able:
        raise UserError(
            WHO,
            f"dataset {spec.name!r} measures no metric of samples",
            remedy="choose another dataset",
        )
    return asked or able[0]
