"""Runs: trained once, resumed if they were interrupted, reused if they are there.

A run's folder holds ``run.json`` (the resolved recipe, written before work starts), checkpoints,
``log.jsonl``, one ``weights-<variant>`` per result, and ``result.json`` when training is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cmbench.errors import MissingError, UserError
from cmbench.networks.counted import to_device
from cmbench.plugin.method import Method, Teacher
from cmbench.sweep.context import Context
from cmbench.sweep.kit import TrainingKit, seeded
from cmbench.sweep.plans import RunPlan
from cmbench.training.checkpoint import Checkpoint, load_checkpoint
from cmbench.training.posthoc import asked_width, reconstruct

#: What a run says of itself, written before work starts.
RUN_FILE = "run.json"
#: What a training has led to, written when it is complete.
RESULT_FILE = "result.json"
_SAVED = ("run", "method", "dataset", "recipe", "seed", "config", "teacher")
#: Name of the weights that training ends with.
MAIN = "final"
#: Folder of the power-function averages that others are reconstructed from.
SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run on disk."""

    plan: RunPlan
    folder: Path
    result: Mapping[str, Any]

    def weights(self, variant: str = "") -> Checkpoint:
        """Return the weights of a variant (a phase's export), or the final ones."""
        name = variant or MAIN
        if name not in self.result["exports"]:
            raise UserError(
                f"run {self.plan.run_id}",
                f"has no variant {name!r}",
                allowed=", ".join(sorted(self.result["exports"])),
                remedy="choose an NFE it supports",
            )
        if self.plan.imported is not None:
            return self.plan.imported.export()
        return load_checkpoint(
            weights_file(self.folder, name),
            remedy=f"restore the file, or delete {self.folder} to train the run again",
        )


def weights_file(folder: Path, name: str) -> Path:
    """Return where a variant's weights lie."""
    return folder / f"weights-{name}.safetensors"


def read_run_file(folder: Path) -> Mapping[str, Any]:
    """Return what a run's folder says of the run: its method, resolved recipe, teacher and so on.

    Raises:
        MissingError: there is no such file, or it cannot be read.
    """
    try:
        saved = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return {**saved, **{key: saved[key] for key in _SAVED}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MissingError(
            f"run {folder}",
            f"has no readable {RUN_FILE} ({type(error).__name__}: {error})",
            remedy="name the folder of a finished run",
        ) from error


def read_result(plan: RunPlan, folder: Path) -> TrainedRun | None:
    """Return the finished run in ``folder``, or None if training is not complete."""
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["parameters"], result["images_seen"], int(result["threads"])
        files = [weights_file(folder, name) for name in result["exports"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"run file {path}",
            f"cannot be read ({type(error).__name__}: {error})",
            remedy="delete it to finish the run again from its last checkpoint",
        ) from error
    if not all(file.exists() and file.with_suffix(".json").exists() for file in files):
        return None  # the last checkpoint gives them back
    return TrainedRun(plan, folder, result)


def build_modules(
    context: Context, plan: RunPlan, teacher: Teacher | None
) -> tuple[Method, dict[str, nn.Module]]:
    """Build a run's method and modules, with initial weights from the run's seed."""
    method = plan.method(context)
    kit = TrainingKit(context, plan, method.data, teacher)
    with seeded(plan.seed, "modules"):  # what a method builds without the kit, such as heads
        modules = method.build(kit)
    if "model" not in modules:
        raise UserError(
            f"method {plan.spec.name!r}",
            f"its build returned {sorted(modules)}",
            allowed="a dict with at least 'model'",
            remedy="fix the plugin",
        )
    return method, {name: on_device(context, module) for name, module in modules.items()}


def on_device(context: Context, module: nn.Module) -> nn.Module:
    """Move a network to the context's device; on CUDA its convolutions are channels-last."""
    return to_device(module, context.device, channels_last=context.device.type == "cuda")


def load_weights(weights: Checkpoint, modules: dict[str, nn.Module], ema: str) -> Mapping[str, str]:
    """Load an export into freshly built modules; ``ema`` names the average, or ``raw``.

    A power-function average that was not kept is reconstructed from the run's snapshots, whose
    SHA-256 by file name is returned (nothing for averages that were kept).
    """
    snapshots: Mapping[str, str] = {}
    prefix = f"{ema}/model."
    state = {k.removeprefix(prefix): v for k, v in weights.tensors.items() if k.startswith(prefix)}
    model = modules["model"]
    width = asked_width(ema)
    if not state and width is not None and weights.path.stem == f"weights-{MAIN}":
        raw = "raw/model."
        state = {k.removeprefix(raw): v for k, v in weights.tensors.items() if k.startswith(raw)}
        found = reconstruct(weights.path.parent / SNAPSHOTS, width, weights.meta.get("seen_nimg"))
        state, snapshots = state | found.parameters, found.snapshots
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if {k: tuple(v.shape) for k, v in state.items()} != expected:
        raise UserError(
            f"checkpoint {weights.path}",
            f"holds another network: {len(state)} tensors under {prefix!r}, "
            f"{len(expected)} expected",
            allowed="the network that the recipe describes",
            remedy="delete the run's folder to train it again, or correct the recipe",
        )
    model.load_state_dict(state)
    return snapshots
