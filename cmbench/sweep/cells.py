"""Cells: sample, measure, and leave a record."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmbench.data.base import draw_labels
from cmbench.errors import NonFiniteError, PluginError, described
from cmbench.files import write_atomically
from cmbench.measure.gallery import grid_png
from cmbench.measure.loop import Observer, measure, sample_count_warnings
from cmbench.measure.observers import CHECKED_IMAGES, FirstImages, progress_of, saved_to, stopped_by
from cmbench.records.cost import SamplingCost
from cmbench.records.record import Artifact, Record
from cmbench.records.reproduction import Reproduction
from cmbench.samples.generated import GeneratedSamples
from cmbench.samples.source import ReadOptions
from cmbench.sampling import Sampler, guards
from cmbench.sampling.cost import Decoder, measure_cost
from cmbench.sampling.guards import weights_sha256
from cmbench.sweep.cell_record import base_record, metric_record, sampling_record
from cmbench.sweep.context import Context
from cmbench.sweep.plans import CellPlan
from cmbench.sweep.protocol import open_protocol, open_protocols
from cmbench.sweep.run_files import read_log
from cmbench.sweep.runs import TrainedRun, build_modules, load_weights, require_parameters
from cmbench.sweep.threads import use_threads
from cmbench.training.checkpoint import Checkpoint
from cmbench.training.contract import sampled_modules

#: Images in the sample grid of a record: always the first of the sampling seed.
GRID_IMAGES = 64
#: Points kept of a training curve.
CURVE_POINTS = 200


@dataclass(frozen=True)
class CellSamples:
    """The samples of a cell, and the run and weights that they are made with.

    ``snapshots`` are the SHA-256 by file that a reconstructed average was made from.
    """

    trained: TrainedRun
    cell: CellPlan
    weights_sha256: str
    source: GeneratedSamples
    sampler: Sampler
    snapshots: Mapping[str, str]


def open_samples_of(
    context: Context,
    trained: TrainedRun,
    cell: CellPlan,
    weights: Checkpoint | None = None,
    options: ReadOptions | None = None,
) -> CellSamples:
    """Load a run's weights and return the samples of one of its cells.

    Args:
        context: plugins and device.
        trained: the run.
        cell: a cell that its method can sample.
        weights: of the run; those that the cell's plan names by default.
        options: ``limit`` makes fewer images than the cell has; ``uniform_labels`` draws classes
            uniformly.
    """
    assert cell.sampling is not None
    use_threads(int(trained.result.get("threads", context.threads)))
    labels, to_pixels = _of_data(context, cell, options or ReadOptions())
    method, modules = build_modules(context, trained.plan, None)
    sampled = sampled_modules(method, modules)
    require_parameters(trained, sampled)
    weights = weights or trained.weights(cell.sampling.variant)
    snapshots = load_weights(weights, sampled, cell.ema)
    sampler = Sampler(
        method,
        modules,
        cell.sampling,
        seed=cell.seed,
        labels=labels,
        precision=cell.precision,
        compiled=context.compile,
    )
    name = trained.plan.run_id
    source = GeneratedSamples(name, sampler, to_pixels, cell.num_samples, options)
    return CellSamples(trained, cell, weights.sha256, source, sampler, snapshots)


def _of_data(
    context: Context, cell: CellPlan, options: ReadOptions
) -> tuple[Callable[[int, int], Tensor], Callable[[Tensor], Tensor]]:
    """Return the classes of images ``(start, count)`` of a cell, and the way to pictures."""
    spec, seed, total = context.dataset_spec(cell.run.dataset), cell.seed, cell.num_samples
    uniform = (1,) * spec.num_classes
    if not options.uniform_labels:
        dataset = context.dataset(spec.name)
        if cell.labels == "quota":
            return lambda start, count: dataset.quota_labels(total, seed)[start:][:count], (
                dataset.to_pixels
            )
        return lambda start, count: dataset.labels_for(count, seed, start), dataset.to_pixels
    to_pixels = context.dataset(spec.name).to_pixels if spec.latent else _unchanged
    return lambda start, count: draw_labels(uniform, count, seed, start), to_pixels


def _unchanged(images: Tensor) -> Tensor:
    return images


def measure_cell(
    context: Context, trained: TrainedRun, cell: CellPlan, *, save_samples: bool = False
) -> Record:
    """Sample a cell, measure every metric of the dataset's protocol, return the record.

    Raises:
        UserError: images that are not finite, an NFE that was not as declared, missing weights.
    """
    protocols = open_protocols(context, cell.run.dataset, cell.metrics)
    samples = open_samples_of(context, trained, cell)
    suites = [protocol.suite(cell, metrics) for protocol, metrics in protocols]
    protocol = protocols[0][0]
    first, kept = FirstImages(CHECKED_IMAGES), "finished cells have their records"
    observers: list[Observer] = [stopped_by(context.should_stop, f"cell {cell.cell}", kept), first]
    if save_samples:
        observers.append(saved_to(context.workspace.samples(cell.cell)))
    task, sampler = f"sample {cell.cell}", samples.sampler
    weights = weights_sha256(net.module for net in sampler.nets.values())
    with progress_of(context.reporter, task, cell.num_samples, lambda: sampler.seconds) as progress:
        found = measure(
            samples.source, suites, batch_size=cell.batch_size, observers=[*observers, progress]
        )
    record, spec = base_record(context, cell, "finished", trained), protocol.spec
    sampling = sampling_record(cell, spec, sampler)
    few = sample_count_warnings(found.count, spec.num_samples)
    guards = guard_warnings(samples, first.images, weights)
    grid = grid_png(first.images[:GRID_IMAGES])
    cost, unknown = cost_of(context, sampler, cell, record.environment.hardware)
    warnings = [*found.warnings, *few, *guards, *unknown]
    if sampling.images_per_s is None and cost is not None:  # one batch, which warmed up
        update = {"images_per_s": cost.throughput_images_per_s}
        sampling = sampling.model_copy(update=update)
    return record.model_copy(
        update={
            "cost": cost,
            "metrics": {n: metric_record(context, n, v) for n, v in found.metrics.items()},
            "dataset": protocol.record,
            "sampling": sampling,
            "first_samples": first.summary(protocol.extractor, spec.quantize, cell.precision),
            "training": record.training.model_copy(update={"snapshots": dict(samples.snapshots)}),
            "warnings": warnings,
            "copies": suites[0].copies,
            "artifacts": artifacts(context, trained, cell, grid),
        }
    )


def cost_of(
    context: Context, sampler: Sampler, cell: CellPlan, hardware: str
) -> tuple[SamplingCost | None, list[str]]:
    """Return what an image costs, or a warning: the images are made, whatever happens here."""
    dataset = context.dataset(cell.run.dataset)
    try:
        decoder = None
        if dataset.spec.latent:
            decoder = Decoder(dataset.to_pixels, dataset.decoder_parameters)
        return measure_cost(sampler, cell.batch_size, hardware, decoder), []
    except Exception as error:  # a method that fails for a batch of one, for example
        return None, [f"what an image costs was not measured: {described(error, 200)}"]


def guard_warnings(samples: CellSamples, first: Tensor, weights: str) -> list[str]:
    """Check what sampling has done, when it is over; return warnings for the record.

    Args:
        samples: the samples of a cell, made.
        first: the first of them.
        weights: hash of the weights before sampling.

    Raises:
        PluginError: sampling has changed the weights.
    """
    sampler = samples.sampler
    if weights_sha256(net.module for net in sampler.nets.values()) != weights:
        raise PluginError(
            f"method {type(sampler.method).__name__}, sample hook",
            "changed weights or buffers of a sampled module",
            allowed="sampling that leaves the weights as they are",
            remedy="fix the plugin",
        )
    first = first[: sum(guards.AGAIN)]
    try:
        again = samples.source.first_again(guards.AGAIN, samples.cell.batch_size)
    except NonFiniteError:  # in the other batch only
        again = torch.full_like(first, torch.inf)
    found = guards.batch_dependence(first, again, samples.cell.precision)
    return [found] if found else []


def reproduce_first(context: Context, trained: TrainedRun, cell: CellPlan) -> Reproduction:
    """Make the first samples of a cell again, in the batches they were made in."""
    protocol = open_protocol(context, cell.run.dataset)
    batches = math.ceil(CHECKED_IMAGES / cell.batch_size)
    count = min(cell.num_samples, batches * cell.batch_size)
    samples = open_samples_of(context, trained, cell, options=ReadOptions(limit=count))
    first = FirstImages(CHECKED_IMAGES)
    measure(samples.source, [], batch_size=cell.batch_size, observers=[first])
    summary = first.summary(protocol.extractor, protocol.spec.quantize, cell.precision)
    return Reproduction(summary, grid_png(first.images[:GRID_IMAGES]))


# ---- artifacts ----------------------------------------------------------------------------------


def artifacts(
    context: Context, trained: TrainedRun, cell: CellPlan, grid: bytes
) -> dict[str, Artifact]:
    """Write the sample grid and the training curve beside the record."""
    folder = context.workspace.records(cell.run.dataset)
    found = {"grid": _artifact(folder, f"{cell.cell}.png", grid)}
    curve = training_curve(trained.folder)
    if curve:
        found["curve"] = _artifact(folder, f"curves/{cell.run.name}.csv", curve)
    return found


def _artifact(folder: Path, name: str, data: bytes) -> Artifact:
    write_atomically(folder / name, data)
    return Artifact(file=name, sha256=hashlib.sha256(data).hexdigest())


def training_curve(run_folder: Path) -> bytes:
    """Return at most :data:`CURVE_POINTS` rows of a run's log as CSV."""
    rows = read_log(run_folder)
    if not rows:
        return b""
    stride = max(1, math.ceil(len(rows) / CURVE_POINTS))
    kept = rows[::stride]
    columns = list(dict.fromkeys(key for row in kept for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    return text.getvalue().encode()
