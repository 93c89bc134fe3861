"""Runs: trained once, resumed if they were interrupted, reused if they are there.

A run's folder holds ``run.json`` (the resolved recipe, written before work starts), checkpoints,
``log.jsonl``, one ``weights-<variant>`` per result, and ``result.json`` when training is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import nn

from cmbench.data.base import Dataset
from cmbench.errors import BusyError, InterruptedRunError, UserError
from cmbench.files import write_atomically
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Teacher
from cmbench.sweep.context import Context
from cmbench.sweep.feed import DatasetFeed
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.resuming import restore, shard_size, threads_of
from cmbench.sweep.run_log import RunLog
from cmbench.sweep.runs import MAIN, SNAPSHOTS, TrainedRun, build_modules, read_result, weights_file
from cmbench.sweep.threads import use_threads
from cmbench.training.checkpoint import latest_checkpoint, prune_checkpoints, save_checkpoint
from cmbench.training.distributed import SPLIT_FROM
from cmbench.training.loop import Settings, Watchers, checkpoint_due, fit
from cmbench.training.posthoc import save_snapshot
from cmbench.training.state import TrainingState

if TYPE_CHECKING:
    from cmbench.training.sharding import Sharding


def obtain_run(context: Context, plan: RunPlan) -> TrainedRun:
    """Return the finished run, training or resuming it (and its teacher) if need be.

    Raises:
        BusyError: another process is training it.
        InterruptedRunError: a stop was asked for; a checkpoint has been written.
        NonFiniteError: the loss is not finite; the last good checkpoint is kept.
    """
    folder = context.workspace.run(plan.run_id)
    if plan.imported is not None:
        return TrainedRun(plan, folder, plan.imported.result(context, MAIN))
    world = context.world
    if world.lead(lambda: read_result(plan, folder) is not None):
        return _finished(plan, folder)
    teacher = obtain_teacher(context, plan)
    with ExitStack() as held:
        # The leader holds the lock for all of them, and all hear of it if it is taken.
        world.lead(lambda: held.enter_context(locked(folder, plan)))
        if world.lead(lambda: read_result(plan, folder) is not None):
            return _finished(plan, folder)
        return _train(context, plan, folder, teacher)


def _finished(plan: RunPlan, folder: Path) -> TrainedRun:
    done = read_result(plan, folder)
    if done is None:
        raise _not_shared(folder)
    return done


def _not_shared(folder: Path) -> UserError:
    return UserError(
        f"run folder {folder}",
        "looks different to two processes",
        allowed="a workspace on a file system that all processes share",
        remedy="choose one with --workspace",
    )


@contextmanager
def locked(folder: Path, plan: RunPlan) -> Iterator[None]:
    """Hold the run's lock; raise :class:`BusyError` if another process does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BusyError(
            f"run {plan.run_id}",
            f"another process is training it (lock {folder / '.lock'})",
            remedy="wait for it, or choose another --workspace",
        ) from error
    except OSError as error:
        raise UserError(
            f"workspace folder {folder}",
            f"cannot be written ({error.strerror})",
            remedy="choose a writable folder with --workspace",
        ) from error
    try:
        yield
    finally:
        lock.release()


def obtain_teacher(context: Context, plan: RunPlan) -> Teacher | None:
    """Return the frozen teacher that the plan names, trained first if it is a run of this sweep."""
    teacher = plan.teacher
    if teacher is None:
        return None
    if teacher.run is not None:
        context.reporter.note(f"teacher of {plan.run_id}: {teacher.run_id}")
        obtain_run(context, teacher.run)
    with context.world.together():
        return teacher.open(context, plan)


def _train(context: Context, plan: RunPlan, folder: Path, teacher: Teacher | None) -> TrainedRun:
    context.world.lead(lambda: bool(context.dataset(plan.dataset)))  # missing data: said once
    checkpoints = folder / "checkpoints"
    with context.world.together():
        dataset = context.dataset(plan.dataset).to(context.device)
        latest, warnings = latest_checkpoint(checkpoints) if checkpoints.exists() else (None, [])
        for warning in warnings:
            context.reporter.warn(f"{warning}; going back to the checkpoint before it")
        threads = threads_of(context, plan, latest)
        use_threads(threads)
        method, modules = build_modules(context, plan, teacher)
        state = TrainingState(method, modules, _sharding(context, modules["model"]))
        if teacher is not None:
            state.observed = _prepared_parts(teacher)
        if latest is not None:
            restore(state, latest, compiled=context.compile)
            latest = replace(latest, tensors={})  # the file's memory map: pruning frees the disk
    if context.world.lead(lambda: state.seen_nimg) != state.seen_nimg:
        raise _not_shared(folder)
    log = None
    with context.world.together():
        if context.world.leads:
            if latest is None:
                _write_run_json(context, plan, folder, teacher, dataset)
            log = RunLog(folder / "log.jsonl", state.seen_nimg)
    settings = Settings(
        seed=plan.seed,
        batch_size=plan.config.batch_size,
        microbatch_size=shard_size(context, plan, latest),
        precision=plan.config.precision,
        compile=context.compile,
        checkpoint_nimg=_checkpoint_nimg(plan, state),
        world=context.world,
    )
    exports: dict[str, Any] = dict(latest.meta["exports"]) if latest else {}
    watchers = (
        _watchers(context, plan, folder, log, exports, threads, settings)
        if log is not None
        else Watchers(should_stop=context.should_stop)
    )
    total = sum(phase.images for phase in state.phases)
    context.notify("cmbench_run_started", run_id=plan.run_id, plan={"config": plan.table})
    context.reporter.task_started(plan.run_id, f"train {plan.name}", total, state.seen_nimg)
    try:
        feed = DatasetFeed(dataset, plan.config)
        stopped = fit(state, feed, settings, watchers)
    finally:
        context.reporter.task_finished(plan.run_id)
    if stopped:
        raise InterruptedRunError(
            f"run {plan.run_id}",
            f"{stopped} after {state.seen_nimg} images; checkpoint saved",
            remedy="start the same command again to go on",
        )
    with context.world.together():  # the others wait for the leader's last files
        if context.world.leads:
            _finish(folder, state, exports, threads, teacher, context.world.size)
    return _finished(plan, folder)


def _sharding(context: Context, model: nn.Module) -> Sharding | None:
    """Return how the run's networks are split over processes; None keeps them whole.

    The teacher is never split: it has neither gradients nor moments nor averages.
    """
    split = context.split
    if split is None:
        size = sum(parameter.numel() for parameter in model.parameters())
        split = context.device.type == "cuda" and size >= SPLIT_FROM
    if not split or context.world.size == 1:
        return None
    from cmbench.training.sharding import Sharding  # FSDP takes half a second to import

    context.reporter.note(f"networks are split over {context.world.size} processes")
    return Sharding.over(context.world, context.device)


def _prepared_parts(teacher: Teacher) -> list[CountedNetwork]:
    network = getattr(teacher.model, "network", None)
    return [network] if isinstance(network, CountedNetwork) else []


def _checkpoint_nimg(plan: RunPlan, state: TrainingState) -> int:
    if plan.config.checkpoint_kimg is not None:
        return max(round(plan.config.checkpoint_kimg * 1000), 1)
    longest = max((phase.images for phase in state.phases), default=0)
    return max(longest // 10, plan.config.batch_size)


def _watchers(
    context: Context,
    plan: RunPlan,
    folder: Path,
    log: RunLog,
    exports: dict[str, Any],
    threads: int,
    settings: Settings,
) -> Watchers:
    share = settings.batch_size // settings.world.size
    split = {
        "processes": settings.world.size,
        "shard": min(settings.microbatch_size or share, share),
    }

    def on_log(state: TrainingState, scalars: Mapping[str, float]) -> None:
        if not scalars:
            return
        log.add(state, scalars)
        context.reporter.task_progress(plan.run_id, state.seen_nimg, scalars)
        context.notify(
            "cmbench_step_finished", run_id=plan.run_id, nimg=state.seen_nimg, scalars=scalars
        )

    def on_checkpoint(state: TrainingState) -> None:
        meta = {
            "state": state.meta(),
            "threads": threads,
            "exports": exports,
            "run": plan.run_id,
            "split": split,
        }
        # First, and not at a stop: a run that was disturbed has the snapshots of one that was not.
        if checkpoint_due(state, settings) or state.nimg >= state.phase.images:
            save_snapshot(folder / SNAPSHOTS, state)
        path = folder / "checkpoints" / f"{state.seen_nimg:014d}.safetensors"
        save_checkpoint(path, state.tensors(), meta)
        prune_checkpoints(folder / "checkpoints")

    def on_phase_done(state: TrainingState) -> None:
        last = state.phase_index == len(state.phases) - 1
        for name in {state.phase.export, MAIN if last else None} - {None}:
            assert name is not None
            path = weights_file(folder, name)
            meta = {"run": plan.run_id, "seen_nimg": state.seen_nimg, "phase": state.phase.name}
            exports[name] = {
                "sha256": save_checkpoint(path, state.export(), meta),
                "images_seen": state.seen_nimg,
                "network_evaluations": state.network_evaluations,
                "seconds_by_phase": {k: round(v, 3) for k, v in state.seconds.items()},
            }
        on_checkpoint(state)

    return Watchers(on_log, on_checkpoint, on_phase_done, context.should_stop)


def _write_run_json(
    context: Context, plan: RunPlan, folder: Path, teacher: Teacher | None, dataset: Dataset
) -> None:
    meta = {
        "run": plan.run_id,
        "method": plan.spec.name,
        "dataset": plan.dataset,
        "dataset_sha256": dataset.sha256,
        "recipe": plan.recipe,
        "seed": plan.seed,
        "config": plan.table,
        "config_sha256": plan.config_sha256,
        "teacher": teacher.name if teacher else None,
        "command": context.command,
    }
    write_atomically(folder / "run.json", json.dumps(meta, indent=1, sort_keys=True).encode())


def _finish(
    folder: Path,
    state: TrainingState,
    exports: dict[str, Any],
    threads: int,
    teacher: Teacher | None,
    world_size: int,
) -> None:
    result = {
        "exports": exports,
        "parameters": sum(p.numel() for p in state.modules["model"].parameters()),
        "images_seen": state.seen_nimg,
        "threads": threads,
        "world_size": world_size,
        "teacher": teacher.name if teacher else None,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1, sort_keys=True).encode())
