"""The workspace: the folder of everything that cmbench makes.

``runs/<dataset>/<run>/`` trainings, ``records/<dataset>/<cell>.json`` records with their artifacts,
``imported/<name>`` checkpoints of other projects, ``downloads/<address>`` their files,
``generated/<dataset>/`` pairs of noise and images that trainings share, ``reports/`` pages,
``cache/`` what can be computed again, ``samples/`` pictures if asked for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cmbench.errors import MissingError, UserError
from cmbench.files import readable

WORKSPACE_VARIABLE = "CMBENCH_WORKSPACE"
DEFAULT_WORKSPACE = "cmbench-out"
#: Folder of trainings below the root.
RUNS = "runs"


@dataclass(frozen=True)
class Workspace:
    """Paths below ``root``."""

    root: Path

    @classmethod
    def choose(cls, given: str | None = None) -> Workspace:
        """Return the workspace given, or ``$CMBENCH_WORKSPACE``, or ``./cmbench-out``.

        Raises ``UserError`` if its path is not UTF-8.
        """
        root = Path(given or os.environ.get(WORKSPACE_VARIABLE) or DEFAULT_WORKSPACE)
        try:
            str(root.absolute()).encode()
        except UnicodeEncodeError:
            raise UserError(
                "--workspace",
                f"{readable(str(root.absolute()))!r} is not UTF-8",
                allowed="a path in UTF-8: records name it",
                remedy="choose another folder with --workspace",
            ) from None
        return cls(root)

    @classmethod
    def existing(cls, given: str | None = None) -> Workspace:
        """Return what :meth:`choose` does, for commands that only read one.

        Raises:
            MissingError: the workspace that was given does not exist. The default one may be
                missing: then nothing has been made yet.
        """
        chosen = cls.choose(given)
        if given and not chosen.root.is_dir():
            raise MissingError(
                "--workspace",
                f"workspace {chosen.root} does not exist",
                remedy="check the path; `cmbench run --workspace DIR` makes one",
            )
        return chosen

    @property
    def reports(self) -> Path:
        """Folder of rendered pages."""
        return self.root / "reports"

    @property
    def cache(self) -> Path:
        """Folder of reference statistics and other things that can be computed again."""
        return self.root / "cache"

    @property
    def downloads(self) -> Path:
        """Folder of published files, by their addresses."""
        return self.root / "downloads"

    @property
    def generated(self) -> Path:
        """Folder of data that models have generated for trainings, by dataset."""
        return self.root / "generated"

    @property
    def imported(self) -> Path:
        """Folder of checkpoints of other projects."""
        return self.root / "imported"

    @property
    def all_records(self) -> Path:
        """Folder with one folder of records per dataset."""
        return self.root / "records"

    def records(self, dataset: str) -> Path:
        """Return the folder of a dataset's records."""
        return self.all_records / dataset

    def run(self, run_id: str) -> Path:
        """Return the folder of a run, whose id is ``<dataset>/<name>``."""
        return self.root / RUNS / run_id

    def samples(self, cell: str) -> Path:
        """Return the folder for a cell's pictures."""
        return self.root / "samples" / cell

    def require_writable(self) -> None:
        """Raise ``UserError`` if nothing can be written here."""
        probe = self.root / f".write-probe-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"cmbench")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"workspace {self.root}",
                f"cannot be written ({error.strerror})",
                allowed="a writable folder with free space",
                remedy=f"choose another with --workspace or {WORKSPACE_VARIABLE}",
            ) from error
