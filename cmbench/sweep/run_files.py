"""Read the files of a run's folder. Imports no torch.

A folder holds ``run.json`` (the resolved recipe, written before training starts), checkpoints,
``log.jsonl``, one ``weights-<variant>`` per result, and ``result.json`` when training is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmbench.errors import MissingError, UserError
from cmbench.files import read_sealed, reading, regular
from cmbench.records.workspace import RUNS

#: The run's description, written before training starts.
RUN_FILE = "run.json"
_SAVED = ("run", "method", "dataset", "recipe", "seed", "config", "teacher")
#: Names of runs' folders, see :attr:`cmbench.sweep.plans.RunPlan.name`.
_RUN_NAME = re.compile(r".+-s\d+-[0-9a-f]{10}")
#: The result, written when training is complete.
RESULT_FILE = "result.json"
#: The log, one JSON object per line and logging interval.
LOG_FILE = "log.jsonl"
#: Name of the weights that training ends with.
MAIN = "final"
#: Folder of the power-function averages that others are reconstructed from.
SNAPSHOTS = "snapshots"


def weights_path(folder: Path, name: str) -> Path:
    """Return where a variant's weights are."""
    return folder / f"weights-{name}.safetensors"


def read_run_file(folder: Path) -> Mapping[str, Any]:
    """Return the description in a run's folder: its method, resolved recipe, teacher and so on.

    Raises:
        MissingError: there is no such file, or it cannot be read.
    """
    remedy = "restore the file, or name the folder of a finished run"
    with reading(f"run {folder}, {RUN_FILE}", remedy, MissingError):
        saved = read_sealed(folder / RUN_FILE)
        return {**saved, **{key: saved[key] for key in _SAVED}}


def require_run(who: str, found: object, run_id: str, remedy: str) -> None:
    """Raise ``UserError`` for a file or folder ``who`` that is of another run."""
    if found != run_id:
        raise UserError(who, f"is of run {found}", allowed=run_id, remedy=remedy)


def require_described(folder: Path, run_id: str) -> None:
    """Raise ``UserError`` unless a folder's ``run.json``, and its own name, are those of a run.

    The name matters in a workspace only, and only where it is that of a run.
    """
    remedy = f"restore {folder}, or delete it to train the run again"
    require_run(f"run file {folder / RUN_FILE}", read_run_file(folder)["run"], run_id, remedy)
    place = Path(os.path.abspath(folder))
    if place.parent.parent.name == RUNS and _RUN_NAME.fullmatch(place.name):
        named = f"{place.parent.name}/{place.name}"
        require_run(f"run folder {folder}", run_id, named, remedy)


def read_result_file(folder: Path, run_id: str) -> Mapping[str, Any] | None:
    """Return the result of a finished run, or None if training is not complete.

    Raises:
        UserError: the file cannot be read, or description or result are of another run.
    """
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    with reading(f"run file {path}", "delete it to finish the run again from its last checkpoint"):
        result: Mapping[str, Any] = read_sealed(path)
        result["parameters"], result["images_seen"], int(result["threads"])
        files = [weights_path(folder, name) for name in result["exports"]]
        found = result["run"]
    require_described(folder, run_id)
    remedy = f"restore {folder}, or delete it to train the run again"
    require_run(f"run file {path}", found, run_id, remedy)
    if not all(file.exists() and file.with_suffix(".json").exists() for file in files):
        return None  # they are written again from the last checkpoint
    return result


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the logged rows of a run, without lines that were cut off by a kill."""
    try:
        text = regular(folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("nimg"), int):
            rows.append(row)
    return rows
