"""The log of a run: ``log.jsonl``, one line per logging interval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmbench.errors import UserError
from cmbench.files import write_atomically
from cmbench.training.state import TrainingState


class RunLog:
    """``log.jsonl``: one line per logging interval; later lines are removed when it resumes."""

    def __init__(self, path: Path, nimg: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["nimg"] <= nimg:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut off by a kill
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    def add(self, state: TrainingState, scalars: Mapping[str, float]) -> None:
        """Append one line."""
        row = {"nimg": state.seen_nimg, "phase": state.phase.name} | {
            k: float(f"{v:.6g}") for k, v in scalars.items()
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}",
                error.strerror or str(error),
                remedy="free space, then start the same command again: training resumes",
            ) from error


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the logged rows of a run."""
    try:
        text = (folder / "log.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
