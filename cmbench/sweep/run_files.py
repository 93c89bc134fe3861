"""Read the files of a run's folder. Imports no torch.

A folder holds ``run.json`` (the resolved recipe, written before training starts), checkpoints,
``log.jsonl``, one ``weights-<variant>`` per result, and ``result.json`` when training is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmbench.errors import MissingError, UserError

#: The run's description, written before training starts.
RUN_FILE = "run.json"
_SAVED = ("run", "method", "dataset", "recipe", "seed", "config", "teacher")
#: The result, written when training is complete.
RESULT_FILE = "result.json"
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
    try:
        saved = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return {**saved, **{key: saved[key] for key in _SAVED}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MissingError(
            f"run {folder}",
            f"has no readable {RUN_FILE} ({type(error).__name__}: {error})",
            remedy="name the folder of a finished run",
        ) from error


def read_result_file(folder: Path) -> Mapping[str, Any] | None:
    """Return the result of a finished run, or None if training is not complete.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    try:
        result: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        result["parameters"], result["images_seen"], int(result["threads"])
        files = [weights_path(folder, name) for name in result["exports"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"run file {path}",
            f"cannot be read ({type(error).__name__}: {error})",
            remedy="delete it to finish the run again from its last checkpoint",
        ) from error
    if not all(file.exists() and file.with_suffix(".json").exists() for file in files):
        return None  # they are written again from the last checkpoint
    return result
