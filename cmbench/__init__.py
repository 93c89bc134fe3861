"""cmbench: the reference harness for few-step image generators.

The functions below are the Python interface, see ``docs/python.md``. They are imported when they
are first used: ``import cmbench`` imports neither torch nor pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmbench.api.data import load_dataset as load_dataset
    from cmbench.api.models import open_run as open_run
    from cmbench.api.results import load as load
    from cmbench.api.scoring import evaluate as evaluate
    from cmbench.api.scoring import frechet_distance as frechet_distance
    from cmbench.api.sweeps import run as run

__version__ = "0.1.0"

_PUBLIC = {
    "evaluate": "cmbench.api.scoring",
    "frechet_distance": "cmbench.api.scoring",
    "load": "cmbench.api.results",
    "load_dataset": "cmbench.api.data",
    "open_run": "cmbench.api.models",
    "run": "cmbench.api.sweeps",
}
__all__ = ["__version__", "evaluate", "frechet_distance", "load", "load_dataset", "open_run", "run"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cmbench' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
