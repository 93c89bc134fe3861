"""Plans of finished sweeps, kept in the workspace's cache. Imports no torch.

A finished sweep needs no tensor, but planning it again imports torch and the code of its methods.
A plan follows from the request, the plugins with their recipes, the code that made it, and the
installed packages. It is kept under a hash of the request, the plugins and the packages, with the
files of all other code that was imported for it; one that has changed makes it void. Plans that
depend on anything else are not kept: on weights (imported checkpoints, finished runs as teachers),
tuned noise levels, or recipe files and datasets of the user.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmbench.files import UNREADABLE, read_sealed, write_sealed
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
    """Return the hash of a request, the plugins and the installed packages.

    ``request`` has what the user asked for as plain data.
    """
    installed = [Path(folder) for folder in sys.path if Path(folder).name in _PACKAGE_FOLDERS]
    decides = [
        dict(request),
        sys.version,
        [(str(folder), folder.stat().st_mtime_ns) for folder in installed if folder.is_dir()],
        sorted((p.name, p.distribution, p.version, p.module, p.status) for p in plugins.plugins),
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _code(plugins: PluginManager) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of the imported code and of the plugins' recipes.

    The standard library and installed packages are left out: they change with their folder.
    """
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths = {Path(file) for file in files if file is not None}
    library = Path(sysconfig.get_path("stdlib"))
    own = {p for p in paths if not (_PACKAGE_FOLDERS & set(p.parts) or p.is_relative_to(library))}
    own |= {spec.recipes for spec in plugins.methods.specs.values() if spec.recipes is not None}
    own |= {spec.recipes for spec in plugins.datasets.specs.values() if spec.recipes is not None}
    return [_stamp(path) for path in sorted(own) if path.is_file()]


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_ctime_ns


def find_plan(workspace: Workspace, key: str) -> KeptPlan | None:
    """Return the plan that was kept under ``key``; None if there is none, or its code changed."""
    try:
        data = read_sealed(_path(workspace, key))
        if any(_stamp(Path(file)) != (file, size, time) for file, size, time in data["code"]):
            return None
        cells = tuple(KeptCell(**cell) for cell in data["cells"])
        return KeptPlan(str(data["dataset"]), tuple(map(str, data["runs"])), cells)
    except UNREADABLE:
        return None


def keep_plan(workspace: Workspace, key: str, plan: SweepPlan, plugins: PluginManager) -> None:
    """Keep the plan of a finished sweep, unless it depends on more than its key and code say."""
    cells, runs = plan.cells, plan.runs
    if plan.refused or not all(map(_follows, runs)):
        return
    kept = KeptPlan(
        runs[0].dataset,
        tuple(run.run_id for run in runs),
        tuple(KeptCell(c.cell, c.nfe, c.seed, c.num_samples, c.declined) for c in cells),
    )
    data = {**asdict(kept), "code": _code(plugins)}
    write_sealed(_path(workspace, key), data)


def _follows(run: RunPlan) -> bool:
    """Say whether a run's plan follows from the code alone."""
    looks_up = run.imported is not None or (run.teacher is not None and run.teacher.looks_up)
    return not looks_up and ".toml:" not in run.recipe


def _path(workspace: Workspace, key: str) -> Path:
    return workspace.cache / "plans" / f"{key[:32]}.json"
