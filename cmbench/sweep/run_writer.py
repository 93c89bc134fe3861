"""Write the files of a run's folder: description, log, checkpoints, weights, result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmbench.errors import UserError
from cmbench.files import write_atomically, write_sealed
from cmbench.networks.base import num_parameters
from cmbench.plugin.method import Teacher
from cmbench.sweep.context import Context
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.run_files import (
    LOG_FILE,
    MAIN,
    RESULT_FILE,
    RUN_FILE,
    SNAPSHOTS,
    read_log,
    weights_path,
)
from cmbench.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from cmbench.training.loop import checkpoint_due
from cmbench.training.posthoc import save_snapshot
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState, under


@dataclass
class RunWriter:
    """Writes a run's folder while it trains, in the leading process.

    ``exports`` are the results of finished phases, by name.
    """

    context: Context
    plan: RunPlan
    folder: Path
    settings: Settings
    threads: int
    teacher: Teacher | None
    exports: dict[str, Any]

    def begin(self, state: TrainingState, dataset_sha256: str, *, resumed: bool) -> Watchers:
        """Write the description of a new run; return the callbacks that write the rest."""
        if not resumed:
            plan = self.plan
            description = {
                "run": plan.run_id,
                "method": plan.spec.name,
                "dataset": plan.dataset,
                "dataset_sha256": dataset_sha256,
                "recipe": plan.recipe,
                "seed": plan.seed,
                "config": plan.table,
                "config_sha256": plan.config_sha256,
                "overrides": plan.overrides,
                "teacher": self.teacher.name if self.teacher else None,
                "command": self.context.command,
            }
            write_sealed(self.folder / RUN_FILE, description)
        kept = [row for row in read_log(self.folder) if row["nimg"] <= state.seen_nimg]
        lines = "".join(f"{json.dumps(row)}\n" for row in kept)
        write_atomically(self.folder / LOG_FILE, lines.encode())
        should_stop = self.context.should_stop
        return Watchers(self.log, self.checkpoint, self.phase_done, should_stop, self.exported)

    def log(self, state: TrainingState, scalars: Mapping[str, float]) -> None:
        """Log the means of an interval and pass them to the reporter and the observers."""
        if not scalars:
            return
        row = {"nimg": state.seen_nimg, "phase": state.phase.name} | {
            k: float(f"{v:.6g}") for k, v in scalars.items()
        }
        try:
            with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / LOG_FILE}",
                error.strerror or str(error),
                remedy="free space, then start the same command again: training resumes",
            ) from error
        run_id = self.plan.run_id
        self.context.reporter.task_progress(run_id, state.seen_nimg, scalars)
        self.context.notify(
            "cmbench_step_finished", run_id=run_id, nimg=state.seen_nimg, scalars=scalars
        )

    def checkpoint(self, state: TrainingState) -> None:
        """Write a checkpoint, and remove all but the newest."""
        settings = self.settings
        share = settings.batch_size // settings.world.size
        shard = min(settings.microbatch_size or share, share)
        meta = {
            "state": state.meta(),
            "threads": self.threads,
            "exports": self.exports,
            "run": self.plan.run_id,
            "split": {"processes": settings.world.size, "shard": shard},
        }
        # Not at a stop: an interrupted run must have the same snapshots as an uninterrupted one.
        if checkpoint_due(state, settings) or state.nimg >= state.phase.images:
            save_snapshot(self.folder / SNAPSHOTS, state, self.plan.run_id)
        path = self.folder / "checkpoints" / f"{state.seen_nimg:014d}.safetensors"
        save_checkpoint(path, state.tensors(), meta)
        prune_checkpoints(path.parent)

    def phase_done(self, state: TrainingState) -> None:
        """Write the final weights of a phase that is exported, and a checkpoint."""
        last = state.phase_index == len(state.phases) - 1
        names = {state.phase.export, MAIN if last else None}
        for name in filter(None, names):
            path = weights_path(self.folder, name)
            meta = {
                "run": self.plan.run_id,
                "seen_nimg": state.seen_nimg,
                "phase": state.phase.name,
                "averages": [average.config.label for average in state.averages],
            }
            self.exports[name] = export_facts(state, save_checkpoint(path, state.export(), meta))
        self.checkpoint(state)

    def exported(self, export: str, module: str = "model", index: int = 0) -> dict[str, Tensor]:
        """Return a module's state dict as a finished phase has exported it.

        Raises:
            UserError: no phase of that export is finished, or its file is damaged.
        """
        path = weights_path(self.folder, export)
        if not path.is_file():
            raise UserError(
                f"run {self.plan.run_id}",
                f"no finished phase has the export {export!r}",
                allowed=", ".join(p.stem.partition("-")[2] for p in self.folder.glob("weights-*s"))
                or "none",
                remedy="fix the method's phases",
            )
        saved = load_checkpoint(path)
        averages = [f"{label}/{module}." for label in saved.meta["averages"]] or [f"raw/{module}."]
        state = under(saved.tensors, averages[index])
        device = self.context.device
        return {key: value.to(device) for key, value in state.items()}

    def finish(self, state: TrainingState) -> Mapping[str, Any]:
        """Write and return the result of the finished run."""
        result = {
            "run": self.plan.run_id,
            "exports": self.exports,
            "parameters": num_parameters(state.sampled),
            "images_seen": state.seen_nimg,
            "threads": self.threads,
            "world_size": self.settings.world.size,
            "teacher": self.teacher.name if self.teacher else None,
        }
        write_sealed(self.folder / RESULT_FILE, result)
        return result


def export_facts(state: TrainingState, sha256: str) -> dict[str, Any]:
    """Return what a result says of exported weights with this hash; generated data are included."""
    costs = state.generated
    seconds = state.seconds | {f"{k}, generated data": cost.seconds for k, cost in costs.items()}
    evaluations = sum(cost.network_evaluations for cost in costs.values())
    return {
        "sha256": sha256,
        "images_seen": state.seen_nimg,
        "network_evaluations": state.network_evaluations + evaluations,
        "seconds_by_phase": {k: round(v, 3) for k, v in seconds.items()},
        "generated": {phase: asdict(cost) for phase, cost in costs.items()},
    }
