"""Where a number comes from: versions, code, hardware."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cmbench import __version__
from cmbench.records.record import EnvironmentRecord

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "torch-fidelity",
    "clean-fid",
    "safetensors",
    "scikit-learn",
    "pluggy",
    "pydantic",
)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that can move a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return commit and dirty flag of the checkout that tracks the files of ``folder``, if any.

    An installed copy may lie in an environment inside somebody else's checkout: that commit says
    nothing about it.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git(folder, "rev-parse", "HEAD") if tracked is not None else None
    if commit is None:
        return None, None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, bool(status) if status is not None else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(threads: int | None, gpu: str | None = None, world: int = 1) -> EnvironmentRecord:
    """Return the environment part of a record."""
    commit, dirty = git_state(Path(__file__).resolve().parent)
    return EnvironmentRecord(
        cmbench=__version__,
        python=platform.python_version(),
        packages=package_versions(),
        git_commit=commit,
        git_dirty=dirty,
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        threads=threads,
        gpu=gpu,
        world_size=world,
    )
