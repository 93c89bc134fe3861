"""Train a run, resume it if it was interrupted, or reuse it if it is finished."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cmbench.errors import InterruptedRunError, UserError, described
from cmbench.locks import locked
from cmbench.networks.base import num_parameters
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Teacher
from cmbench.sampling.memory import reset_peak_memory
from cmbench.sweep.context import Context
from cmbench.sweep.generated import pair_root, require_makers
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.rehearsal import rehearse
from cmbench.sweep.run_files import MAIN, read_result_file, require_described, require_run
from cmbench.sweep.run_writer import RunWriter
from cmbench.sweep.runs import TrainedRun, build_modules
from cmbench.sweep.threads import resumed_threads, use_threads
from cmbench.training.augment import DatasetFeed
from cmbench.training.checkpoint import Checkpoint, latest_checkpoint
from cmbench.training.contract import require_variants, require_whole_groups
from cmbench.training.distributed import SPLIT_FROM
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import OtherNetworkError, TrainingState

if TYPE_CHECKING:
    from cmbench.training.sharding import Sharding

#: The metadata of the checkpoint that a run is resumed from; None for a new run.
Saved = Mapping[str, Any] | None


def obtain_run(context: Context, plan: RunPlan, variants: Collection[str] = ()) -> TrainedRun:
    """Return the finished run, training or resuming it and its teacher if necessary.

    ``variants`` are those that its cells will sample; an unknown one is refused before training.

    Raises:
        PluginError: what the method returns cannot be trained or sampled.
        BusyError: another process is training it.
        InterruptedRunError: a stop was asked for; a checkpoint has been written.
        NonFiniteError: the loss is not finite; the last good checkpoint is kept.
    """
    folder = context.workspace.run(plan.run_id)
    if plan.imported is not None:
        return TrainedRun(plan, folder, plan.imported.result(context, MAIN))
    if done := _finished(context, plan, folder):
        return done
    if plan.teacher is not None and not (folder / "checkpoints").exists():
        context.world.lead(lambda: rehearse(context, plan, variants))
    teacher = obtain_teacher(context, plan)
    with ExitStack() as held:
        # The leader holds the lock for all processes; if it is taken, the error is raised in all.
        wait = "wait for it, or choose another --workspace"
        lock = locked(folder, f"run {plan.run_id}", "is training it", wait)
        context.world.lead(lambda: held.enter_context(lock))
        done = _finished(context, plan, folder)
        return done or _train(context, plan, folder, teacher, variants)


def _finished(context: Context, plan: RunPlan, folder: Path) -> TrainedRun | None:
    """Return the finished run that the leader sees, or None."""

    found = context.world.lead(lambda: read_result_file(folder, plan.run_id))
    return TrainedRun(plan, folder, found) if found is not None else None


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


def _train(
    context: Context,
    plan: RunPlan,
    folder: Path,
    teacher: Teacher | None,
    variants: Collection[str],
) -> TrainedRun:
    """Train or resume a run; the leader holds its lock."""
    world = context.world
    world.lead(lambda: bool(context.dataset(plan.dataset)))  # missing data: reported once
    with world.together():
        dataset = context.dataset(plan.dataset).to(context.device)
        state, saved, threads = _open_state(context, plan, folder, teacher)
        require_variants(state.method, state.phases, variants)
        require_makers(state.phases, plan)
    if world.lead(lambda: state.seen_nimg) != state.seen_nimg:
        raise UserError(
            f"run folder {folder}",
            "differs between two processes",
            allowed="a workspace on a file system that all processes share",
            remedy="choose one with --workspace",
        )
    settings = _settings(context, plan, state, saved)
    exports = dict(saved["exports"]) if saved else {}
    writer = RunWriter(context, plan, folder, settings, threads, teacher, exports)
    watchers = Watchers(should_stop=context.should_stop, exported=writer.exported)
    with world.together():
        if world.leads:
            watchers = writer.begin(state, dataset.sha256, resumed=saved is not None)
    watchers.pairs = pair_root(context, plan, dataset, state, teacher)
    _watch(context, plan, Trainer(state, DatasetFeed(dataset, plan.config), settings, watchers))
    return TrainedRun(plan, folder, world.lead(lambda: writer.finish(state)))


def _watch(context: Context, plan: RunPlan, trainer: Trainer) -> None:
    """Train to the end and report the progress.

    Raises:
        InterruptedRunError: it was stopped.
    """
    state = trainer.state
    total = sum(phase.images for phase in state.phases)
    if context.device.type == "cuda":
        reset_peak_memory(context.device)  # messages name this run's peak, not an earlier one's
    started = {"config": plan.table, "folder": str(context.workspace.run(plan.run_id))}
    context.notify("cmbench_run_started", run_id=plan.run_id, plan=started)
    context.reporter.task_started(plan.run_id, f"train {plan.name}", total, state.seen_nimg)
    try:
        stopped = trainer.train()
    finally:
        context.reporter.task_finished(plan.run_id)
    if stopped:
        raise InterruptedRunError(
            f"run {plan.run_id}",
            f"{stopped} after {state.seen_nimg} images; checkpoint saved",
            remedy="start the same command again to continue",
        )


def _open_state(
    context: Context, plan: RunPlan, folder: Path, teacher: Teacher | None
) -> tuple[TrainingState, Saved, int]:
    """Build the state of a run and load its latest good checkpoint, if there is one.

    Returns:
        The state, the metadata of the checkpoint (None without one), and the number of threads that
        this process uses from now on.
    """
    checkpoints = folder / "checkpoints"
    latest, warnings = latest_checkpoint(checkpoints) if checkpoints.exists() else (None, [])
    for warning in warnings:
        context.reporter.warn(f"{warning}; using the checkpoint before it")
    if latest is not None:
        remedy = f"put the run's own back, or delete {checkpoints} to train from the start"
        require_run(f"checkpoint {latest.path}", latest.meta.get("run"), plan.run_id, remedy)
        require_described(folder, plan.run_id)
    saved = latest.meta if latest else None
    threads = threads_of(context, plan, saved)
    use_threads(threads)
    method, modules = build_modules(context, plan, teacher)
    state = TrainingState(method, modules, _sharding(context, modules["model"]))
    network = getattr(teacher.model, "network", None) if teacher else None
    if isinstance(network, CountedNetwork):
        state.observed = [network]
    if latest is not None:
        restore(state, latest, compiled=context.compile)
    return state, saved, threads


def _settings(context: Context, plan: RunPlan, state: TrainingState, saved: Saved) -> Settings:
    """Return the settings of the training that starts or continues here."""
    config = plan.config
    if config.checkpoint_kimg is not None:
        checkpoint_nimg = max(round(config.checkpoint_kimg * 1000), 1)
    else:
        longest = max((phase.images for phase in state.phases), default=0)
        checkpoint_nimg = max(longest // 10, config.batch_size)
    shard = shard_size(context, plan, saved)
    require_whole_groups(state.phases, shard or config.batch_size // context.world.size)
    return Settings(
        seed=plan.seed,
        batch_size=config.batch_size,
        microbatch_size=shard,
        precision=config.precision,
        compile=context.compile,
        checkpoint_nimg=checkpoint_nimg,
        world=context.world,
    )


def _sharding(context: Context, model: nn.Module) -> Sharding | None:
    """Return how the run's networks are split over processes; None keeps them whole.

    The teacher is never split: it has neither gradients nor moments nor averages.
    """
    split = context.split
    if split is None:
        split = context.device.type == "cuda" and num_parameters(model) >= SPLIT_FROM
    if not split or context.world.size == 1:
        return None
    from cmbench.training.sharding import Sharding  # FSDP takes half a second to import

    context.reporter.note(f"networks are split over {context.world.size} processes")
    return Sharding.over(context.world, context.device)


# ---- resuming ------------------------------------------------------------------------------------


def threads_of(context: Context, plan: RunPlan, saved: Saved) -> int:
    """Return the threads of this process; warn if a resumed run cannot keep the number it had."""
    if saved is None:
        return context.threads
    before, split = int(saved["threads"]), saved.get("split")
    same = split is None or split["processes"] == context.world.size
    threads = resumed_threads(before, context.threads, same_processes=same)
    if same and threads != before:
        context.reporter.warn(
            f"run {plan.run_id}: had {before} threads, more than there are cores here, and "
            f"continues with {threads}: the result is the same up to rounding, not bit for bit"
        )
    return threads


def shard_size(context: Context, plan: RunPlan, saved: Saved) -> int | None:
    """Return the images per forward pass; warn about what another number of processes changes.

    The randomness of a step belongs to its shards, so a resumed run keeps its shard size if that
    still divides the share of each process.

    Raises:
        UserError: the batch does not divide evenly (on every process).
    """
    world, batch_size, wanted = context.world, plan.config.batch_size, plan.config.microbatch_size
    world.lead(lambda: list(world.shards(batch_size, wanted)))
    before = saved.get("split") if saved is not None else None
    share = batch_size // world.size
    shard = int(before["shard"]) if before is not None else min(wanted or share, share)
    kept = share % shard == 0
    if before is None or before["processes"] == world.size:
        return shard if kept else wanted  # perhaps of an earlier number of processes
    consequence = (
        f"still in shards of {shard} images: same randomness, same result up to rounding"
        if kept
        else f"shards of {shard} images do not divide a share of {share}: from here on the run "
        "draws other random numbers of the same distribution"
    )
    context.reporter.warn(
        f"run {plan.run_id}: was trained by {before['processes']} process(es) and continues with "
        f"{world.size}, {consequence}"
    )
    return shard if kept else wanted


def restore(
    state: TrainingState, checkpoint: Checkpoint, *, compiled: bool = False, remedy: str = ""
) -> None:
    """Load a checkpoint into new modules, and split them if the run is split.

    Raises:
        UserError: it does not fit; ``remedy`` is what to do, by default training from the start.
    """
    remedy = remedy or f"delete {checkpoint.path.parent.parent} to train the run from the start"
    try:
        state.load(checkpoint.tensors, checkpoint.meta["state"], compiled=compiled)
    except OtherNetworkError as error:
        raise UserError(
            f"checkpoint {checkpoint.path}",
            str(error),
            allowed="the network that the recipe describes",
            remedy=f"put the run's own checkpoints back, or {remedy}",
        ) from error
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {checkpoint.path}",
            f"does not match the method's modules ({described(error)})",
            allowed="checkpoints of the same plugin version and recipe",
            remedy=remedy,
        ) from error
