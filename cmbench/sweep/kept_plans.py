"""Plans of finished sweeps, kept in the workspace's cache. Imports no torch.

A finished sweep needs no tensor, but planning it again imports torch and the code of its methods.
A plan follows from the request, the code of the harness and of the plugins with their recipes, and
the installed packages. A kept plan is found by a hash of all these, so it is what planning would
give. Plans that depend on anything else are not kept: on weights (imported checkpoints, finished
runs as teachers), tuned noise levels, or recipe files and datasets of the user.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmbench.files import write_atomically
from cmbench.plugin.manager import PluginManager
from cmbench.records.record import Record, read_record
from cmbench.records.workspace import Workspace

if TYPE_CHECKING:
    from cmbench.sweep.plans import RunPlan
    from cmbench.sweep.sweep import SweepPlan

_PACKAGE_FOLDERS = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class KeptCell:
    """What is printed of a cell; ``declined`` says why its method does not sample it."""

    cell: str
    nfe: int
    seed: int
    num_samples: int
    declined: str


@dataclass(frozen=True)
class KeptPlan:
    """The ids of a sweep's runs, teachers first, and its cells."""

    dataset: str
    runs: tuple[str, ...]
    cells: tuple[KeptCell, ...]

    def records(self, workspace: Workspace) -> list[Record] | None:
        """Return the record of every cell, or None if one is not there or is not finished."""
        records = []
        for cell in self.cells:
            path = workspace.records(self.dataset) / f"{cell.cell}.json"
            record = read_record(path) if path.is_file() else None
            wanted = "skipped" if cell.declined else "finished"
            if record is None or record.status != wanted:
                return None
            records.append(record)
        return records


def plan_key(request: Mapping[str, Any], plugins: PluginManager) -> str:
    """Return the hash of all that decides the plan of a request.

    ``request`` has what the user asked for as plain data.
    """
    installed = [Path(folder) for folder in sys.path if Path(folder).name in _PACKAGE_FOLDERS]
    decides = [
        dict(request),
        sys.version,
        [(str(folder), folder.stat().st_mtime_ns) for folder in installed if folder.is_dir()],
        sorted(_files(plugins)),
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _files(plugins: PluginManager) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of change of every file of the harness and of the plugins."""
    names = {"cmbench", *(info.module.partition(":")[0] for info in plugins.plugins)}
    paths = {spec.recipes for spec in plugins.methods.specs.values() if spec.recipes is not None}
    for top in {name.partition(".")[0] for name in names} & sys.modules.keys():
        module = sys.modules[top]
        is_package = hasattr(module, "__path__")
        folders = list(module.__path__) if is_package else [str(Path(module.__file__ or "").parent)]
        for folder in map(Path, folders):
            paths |= set(folder.rglob("*") if is_package else folder.glob("*"))
    for path in paths:
        if path.parent.name != "__pycache__" and path.is_file():
            stat = path.stat()
            yield str(path), stat.st_size, stat.st_mtime_ns


def find_plan(workspace: Workspace, key: str) -> KeptPlan | None:
    """Return the plan that was kept under ``key``; None if there is none that can be read."""
    try:
        data = json.loads(_path(workspace, key).read_text(encoding="utf-8"))
        cells = tuple(KeptCell(**cell) for cell in data["cells"])
        return KeptPlan(str(data["dataset"]), tuple(map(str, data["runs"])), cells)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_plan(workspace: Workspace, key: str, plan: SweepPlan) -> None:
    """Keep the plan of a sweep that is finished, unless it depends on more than its key says."""
    cells, runs = plan.cells, plan.runs
    if plan.refused or any(cell.tuned for cell in cells) or not all(map(_follows, runs)):
        return
    kept = KeptPlan(
        runs[0].dataset,
        tuple(run.run_id for run in runs),
        tuple(KeptCell(c.cell, c.nfe, c.seed, c.num_samples, c.declined) for c in cells),
    )
    write_atomically(_path(workspace, key), json.dumps(asdict(kept)).encode())


def _follows(run: RunPlan) -> bool:
    """Say whether a run's plan follows from the code alone."""
    looks_up = run.imported is not None or (run.teacher is not None and run.teacher.looks_up)
    return not looks_up and ".toml:" not in run.recipe


def _path(workspace: Workspace, key: str) -> Path:
    return workspace.cache / "plans" / f"{key[:32]}.json"
