"""Where prepared datasets are stored on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_data_path

DATA_VARIABLE = "CMBENCH_DATA"


def default_data_dir() -> Path:
    """Return ``$CMBENCH_DATA`` or the user's data directory for cmbench."""
    given = os.environ.get(DATA_VARIABLE)
    return Path(given).expanduser() if given else user_data_path("cmbench")


@dataclass(frozen=True)
class DataLocations:
    """``data_dir`` holds one folder per prepared dataset."""

    data_dir: Path = field(default_factory=default_data_dir)

    def folder(self, dataset: str) -> Path:
        """Return the folder of a prepared dataset (which need not exist)."""
        return self.data_dir / dataset
