"""Runs of this harness to score: a run's folder or id, its weights, a checkpoint, an import."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cmbench.errors import UserError
from cmbench.networks.base import num_parameters
from cmbench.samples.source import ReadOptions
from cmbench.sweep.cells import CellSamples, open_samples_of
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells, plan_imported_run
from cmbench.sweep.plans import CellPlan, RunPlan, SampleSettings
from cmbench.sweep.run_files import MAIN, RUN_FILE, read_run_file, require_run
from cmbench.sweep.run_writer import export_facts
from cmbench.sweep.runs import TrainedRun, build_modules
from cmbench.sweep.teachers import saved_run, stored_plan
from cmbench.sweep.training_run import obtain_run, restore
from cmbench.training.checkpoint import Checkpoint, load_checkpoint
from cmbench.training.state import TrainingState

_WEIGHTS = "weights-"
_DEFAULTS = SampleSettings()


def find_run(context: Context, given: str) -> Path | None:
    """Return the run's folder, or its file of weights, that ``given`` means; None if it means none.

    A run's folder has ``run.json``; a bare id is looked up in the workspace.
    """
    path = Path(given)
    if path.is_dir():
        return path if (path / RUN_FILE).is_file() else None
    if path.is_file():
        return path if _folder_of(path) is not None else None
    stored = context.workspace.run(given)
    return stored if (stored / RUN_FILE).is_file() else None


def run_dataset(path: Path) -> str:
    """Return the dataset that a run was trained on."""
    return str(read_run_file(_folder_of(path) or path)["dataset"])


def open_run(context: Context, path: Path, nfe: int | None, options: ReadOptions) -> CellSamples:
    """Return the samples of the run at ``path`` (see :func:`find_run`).

    With the seed of the run's own cell, and its number of samples, they are those of that cell.

    Args:
        context: plugins and device.
        path: the run's folder, one of its ``weights-*.safetensors``, or a training checkpoint.
        nfe: network evaluations per image; None takes the least of the dataset's protocol that the
            method does not decline.
        options: seed, and ``limit``, the number of samples (the protocol's by default).

    Raises:
        MissingError: the run is not finished, or has no readable ``run.json``.
        UserError: the method declines the NFE, or the weights do not fit the recipe.
    """
    folder, weights = _folder_of(path) or path, None
    if path.parent.name == "checkpoints":
        trained, weights = _from_checkpoint(context, folder, path)
    else:
        remedy = "finish it with `cmbench run`, or name one of its checkpoints"
        trained = saved_run(context, folder, remedy)
        if path != folder:
            weights = trained.weights(path.stem.removeprefix(_WEIGHTS))
    cell = choose_cell(context, trained.plan, nfe, options)
    return open_samples_of(context, trained, cell, weights, options)


def open_imported_samples(
    context: Context,
    given: str,
    dataset: str | None,
    nfe: int | None,
    options: ReadOptions,
    settings: SampleSettings = _DEFAULTS,
) -> CellSamples:
    """Return the samples of an imported checkpoint, as ``cmbench run --checkpoint`` makes them.

    ``settings`` may name the sampler and its noise levels.

    Raises:
        MissingError: there is no such checkpoint.
        UserError: no dataset is named, or none of its NFE can be sampled.
    """
    if dataset is None:
        raise UserError(
            "cmbench eval",
            f"{given} has no dataset of its own",
            allowed="--dataset NAME",
            remedy="name the dataset that it was trained on",
        )
    plan = plan_imported_run(context, given, None, dataset, None, options.seed)
    cell = choose_cell(context, plan, nfe, options, settings)
    return open_samples_of(context, obtain_run(context, plan), cell, options=options)


def _folder_of(path: Path) -> Path | None:
    """Return the run's folder of a file of weights, or None for other files."""
    if path.suffix != ".safetensors":
        return None
    for folder in (path.parent, path.parent.parent):
        if (folder / RUN_FILE).is_file():
            return folder
    return None


def choose_cell(
    context: Context,
    plan: RunPlan,
    nfe: int | None,
    options: ReadOptions,
    settings: SampleSettings = _DEFAULTS,
) -> CellPlan:
    """Return the cell at ``nfe``, or the first of the protocol that can be sampled."""
    spec = context.dataset_spec(plan.dataset)
    settings = replace(settings, num_samples=options.limit)
    cells = plan_cells(context, plan, [nfe] if nfe else sorted(spec.nfe), options.seed, settings)
    for cell in cells:
        if cell.sampling is not None:
            return cell
    why = cells[0].broken or cells[0].declined
    raise UserError(
        f"run {plan.run_id}",
        f"cannot be sampled at NFE {cells[0].nfe}: {why}",
        remedy="choose another --nfe",
    )


def _from_checkpoint(context: Context, folder: Path, path: Path) -> tuple[TrainedRun, Checkpoint]:
    """Return the weights that a training checkpoint would export, and what is known of it."""
    plan, checkpoint = stored_plan(context, folder), load_checkpoint(path)
    remedy = "put the run's own checkpoints back"
    require_run(f"checkpoint {path}", checkpoint.meta.get("run"), plan.run_id, remedy)
    method, modules = build_modules(context, plan, None)
    state = TrainingState(method, modules)
    with torch.no_grad():
        restore(state, checkpoint, remedy="score the finished run instead")
    result = {
        "exports": {MAIN: export_facts(state, checkpoint.sha256)},
        "images_seen": state.seen_nimg,
        "threads": int(checkpoint.meta.get("threads", context.threads)),
        "parameters": num_parameters(state.sampled),
    }
    weights = Checkpoint(path, state.export(), {}, checkpoint.sha256)
    return TrainedRun(plan, folder, result), weights
