"""What a resumed run takes from its checkpoint: weights, shard size, threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmbench.errors import UserError
from cmbench.sweep.context import Context
from cmbench.sweep.failures import one_line
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.threads import resumed_threads
from cmbench.training.checkpoint import Checkpoint
from cmbench.training.state import OtherNetworkError, TrainingState

#: The metadata of the checkpoint that a run is resumed from; None for a new run.
Saved = Mapping[str, Any] | None


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


def restore(state: TrainingState, checkpoint: Checkpoint, *, compiled: bool) -> None:
    """Load a checkpoint into new modules, and split them if the run is split."""
    try:
        state.load(checkpoint.tensors, checkpoint.meta["state"], compiled=compiled)
    except OtherNetworkError as error:
        raise UserError(
            f"checkpoint {checkpoint.path}",
            str(error),
            allowed="the network that the recipe describes",
            remedy=f"put the run's own checkpoints back, or delete {checkpoint.path.parent.parent} "
            "to train the run from the start",
        ) from error
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {checkpoint.path}",
            f"does not match the method's modules ({type(error).__name__}: {one_line(str(error))})",
            allowed="checkpoints of the same plugin version and recipe",
            remedy=f"delete {checkpoint.path.parent.parent} to train the run from the start",
        ) from error
