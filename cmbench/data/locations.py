"""Where prepared datasets are stored on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_data_path

from cmbench.files import expanded

DATA_VARIABLE = "CMBENCH_DATA"


def default_data_dir() -> Path:
    """Return ``$CMBENCH_DATA`` or the user's data directory for cmbench."""
    given = os.environ.get(DATA_VARIABLE)
    return expanded(given) if given else user_data_dir()


def user_data_dir() -> Path:
    """Return the user's data directory for cmbench; for a user without a home, one in here."""
    try:
        return user_data_path("cmbench")
    except RuntimeError:  # no HOME, and a user id without a name
        return Path("cmbench-data").resolve()


@dataclass(frozen=True)
class DataLocations:
    """``data_dir`` holds one folder per prepared dataset."""

    data_dir: Path = field(default_factory=default_data_dir)

    def folder(self, dataset: str) -> Path:
        """Return the folder of a prepared dataset (which need not exist)."""
        return self.data_dir / dataset
