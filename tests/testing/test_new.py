"""``cmbench new``: what it writes installs and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench.errors import UserError
from cmbench.plugin.manager import load_plugins
from cmbench.testing.scaffold import Scaffold

Command = Callable[..., Any]
WRITTEN = {
    "acme-loss": ("method",),
    "acme-stages": ("method", "--staged"),
    "acme-student": ("method", "--teacher"),
    "acme-both": ("method", "--staged", "--teacher"),
    "acme-stripes": ("dataset",),
    "acme-gap": ("metric",),
    "acme-queue": ("executor",),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write every kind and install all with pip, offline; return both folders."""
    folder = tmp_path_factory.mktemp("new")
    plugins = load_plugins()
    for name, (kind, *options) in WRITTEN.items():
        scaffold = Scaffold(kind, name, "--staged" in options, "--teacher" in options)
        scaffold.require_free(plugins, folder / name)
        scaffold.write(folder / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    done = subprocess.run(
        [*pip, *offline, *(str(folder / name) for name in WRITTEN)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, folder / "site"


def run(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CMBENCH_")}
    environment |= {"PYTHONPATH": str(site), "CMBENCH_STRICT_PLUGINS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # some checks fork
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_it_passes_its_own_tests(installed: tuple[Path, Path], name: str) -> None:
    folder, site = installed
    done = run(site, folder / name, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    # It has no generated data, flow map or diffusion model, on either dataset.
    assert ("6 skipped" in done.stdout) is (WRITTEN[name][0] == "method")


def test_it_is_listed(installed: tuple[Path, Path]) -> None:
    folder, site = installed
    for kind in ("method", "dataset", "metric", "executor"):
        listed = run(site, folder, "cmbench", "list", f"{kind}s").stdout
        for name, (written, *_) in WRITTEN.items():
            assert (name in listed) is (kind == written)


def test_it_names_its_files_and_the_next_step(cmbench: Command, tmp_path: Path) -> None:
    done = cmbench("new", "metric", "acme-gap", "--into", str(tmp_path))
    folder = tmp_path / "acme-gap"
    assert done.code == 0
    assert set(map(Path, done.out.splitlines())) == {
        folder / "pyproject.toml",
        folder / "README.md",
        folder / "acme_gap" / "__init__.py",
        folder / "acme_gap" / "metric.py",
        folder / "tests" / "test_acme_gap.py",
    }
    assert done.err == f"next: pip install -e {folder}, then pytest {folder}\n"


REFUSED = {
    "Upper": "name 'Upper'; allowed: up to 40 small letters, digits and single -, beginning with",
    "../evil": "name '../evil'; allowed: ",
    "a" * 41: "allowed: up to 40 small letters",
    "class": "name 'class': Python has a module 'class'; allowed: a name that cannot be imported",
    "json": "name 'json': Python has a module 'json'",
    "ict": "'ict' is registered by plugin 'cmbench-builtins' (cmbench ",
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_would_clash_are_refused(cmbench: Command, tmp_path: Path, name: str) -> None:
    done = cmbench("new", "method", name, "--into", str(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert f"error: cmbench new method: {REFUSED[name]}" in done.err or REFUSED[name] in done.err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_and_idle_options_are_refused(tmp_path: Path) -> None:
    plugins = load_plugins()
    with pytest.raises(UserError, match=r"exists; allowed: a folder that does not exist; choose"):
        Scaffold("metric", "acme-gap").require_free(plugins, tmp_path)
    with pytest.raises(UserError, match=r"cmbench new metric: has neither stages nor a teacher"):
        Scaffold("metric", "acme-gap", staged=True).require_free(plugins, tmp_path / "acme-gap")


def test_a_folder_that_cannot_be_written_is_one_line(cmbench: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cmbench("new", "metric", "acme-gap", "--into", str(tmp_path / "file"))
    assert done.code == 2
    assert "cannot be written (Not a directory); choose a writable folder with --into" in done.err
