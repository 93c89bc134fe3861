"""``cmbench status``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from cmbench.cli.options import workspace_option
from cmbench.cli.output import echo_line
from cmbench.cli.record_files import record_folders
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.files import UNREADABLE, read_sealed, reading
from cmbench.records.folders import read_records
from cmbench.records.options import pair_text
from cmbench.records.workspace import Workspace
from cmbench.sweep.run_files import RESULT_FILE, RUN_FILE, read_run_file, require_run, weights_path


@click.command()
@workspace_option
def status(workspace_dir: str | None) -> int:
    """Show runs, imported checkpoints and records of the workspace.

    Exits 1 if a record failed or cannot be read.
    """
    workspace = Workspace.existing(workspace_dir)
    echo_line(f"workspace {workspace.root}")
    for folder in sorted((workspace.root / "runs").glob("*/*")):
        if folder.is_dir():
            name = " ".join([f"{folder.parent.name}/{folder.name}", *run_overrides(folder)])
            echo_line(f"run  {name}  {run_state(folder)}")
    for path in sorted(workspace.imported.glob("*.json")):
        echo_line(f"imported  {path.stem}  {imported_state(path)}")
    trouble = 0
    for dataset in record_folders(workspace).values():
        counts: Counter[str] = Counter()
        for path, found in read_records(dataset, dataset.name):
            if isinstance(found, UserError):
                trouble += 1
                echo_line(f"unreadable  {found}")
                continue
            counts[found.status] += 1
            if found.status != "finished":
                trouble += found.status == "failed"
                echo_line(f"{found.status}  {path.stem}: {found.reason}")
        summary = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
        echo_line(f"records  {dataset.name}  {summary}")
    return EXIT_CELLS_FAILED if trouble else EXIT_OK


def imported_state(manifest: Path) -> str:
    """Describe an imported checkpoint."""
    try:
        with reading("its manifest", "import the original file again with --force"):
            facts = read_sealed(manifest)["meta"]["imported"]
            size = "x".join(map(str, facts["data_shape"]))
            classes = f"{facts['num_classes'] or 'no'} classes"
            return f"{facts['network']['name']}, {size}, {classes}, from {facts['source']['name']}"
    except UserError as error:
        return str(error)


def run_overrides(folder: Path) -> list[str]:
    """Return what differs from a run's recipe: ``["+optimizer.lr=0.01"]``."""
    try:
        changed = read_run_file(folder).get("overrides") or {}
        return [f"+{text}" for text in pair_text(sorted(changed.items()))]
    except (UserError, *UNREADABLE):
        return []  # its state says what is wrong


def run_state(folder: Path) -> str:
    """Describe how far a run is."""
    try:
        if (folder / RESULT_FILE).exists():
            with reading(RESULT_FILE, "delete it and run again"):
                return _result_state(folder)
        if (folder / RUN_FILE).exists():
            with reading(RUN_FILE, "delete the folder of the run and run again"):
                read_sealed(folder / RUN_FILE)
    except UserError as error:
        return str(error)
    files = (folder / "checkpoints").glob("*.json")
    seen = [int(path.stem) for path in files if path.stem.isdecimal()]
    return f"unfinished, checkpoint at {max(seen):,} images" if seen else "not started"


def _result_state(folder: Path) -> str:
    result = read_sealed(folder / RESULT_FILE)
    named = f"{folder.parent.name}/{folder.name}"
    require_run(RESULT_FILE, result["run"], named, "move the folder to the name of its run")
    lost = [name for name in result["exports"] if not weights_path(folder, name).exists()]
    gone = f"; the weights {', '.join(lost)} are not here" if lost else ""
    return f"trained, {result['images_seen']:,} images{gone}"
