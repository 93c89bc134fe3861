"""Real distributions of other people, installed by pip, run through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cmbench.plugin.manager import load_plugins
from cmbench.records.record import Record, read_record

EXAMPLE = Path(__file__).parents[2] / "examples" / "cmbench-example-plugin"

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "1.0"
[project.entry-points.cmbench]
{entry} = "{package}"
[tool.setuptools]
packages = ["{package}"]
[tool.setuptools.package-data]
{package} = ["*.toml"]
"""

REGISTER = """
from pathlib import Path
from cmbench.plugin import hookimpl
from cmbench.plugin.specs import MethodSpec

@hookimpl
def {hook}():
    recipes = Path(__file__).with_name("recipes.toml")
    return [{specs}]
"""

RECIPES = """
[digits.smoke]
network = { name = "unet-tiny", channels = 8, channel_mult = [1], blocks = 1 }
duration_kimg = 0.064
"""

#: Methods that each do one thing wrong.
ROGUES = """
import torch
from cmbench.plugin.method import Method, SamplingPlan

class Good(Method):
    def build(self, kit):
        return {"model": kit.network()}

    def loss(self, nets, batch, draws, progress):
        noise = draws.normal("noise", batch.images)
        out = nets["model"](batch.images + noise, torch.zeros(len(noise)))
        return (out - batch.images).square().flatten(1).sum(1)

    def plan_sampling(self, nfe, sigmas=None, sampler=None):
        return SamplingPlan(nfe, "one-step", (1.0,) * nfe)

    def sample(self, nets, noise, labels, plan, draws):
        return nets["model"](noise, torch.zeros(len(noise)))

class RaisesWhileTraining(Good):
    def loss(self, nets, batch, draws, progress):
        raise ZeroDivisionError("by nothing")

class ReturnsNaN(Good):
    def sample(self, nets, noise, labels, plan, draws):
        return super().sample(nets, noise, labels, plan, draws) * float("nan")

class LiesAboutNFE(Good):
    def sample(self, nets, noise, labels, plan, draws):
        for _ in range(3):
            images = super().sample(nets, noise, labels, plan, draws)
        return images
"""


def distribution(folder: Path, name: str, entry: str, files: dict[str, str]) -> Path:
    """Write a distribution with its own ``pyproject.toml`` and package."""
    package = name.replace("-", "_")
    (folder / name / package).mkdir(parents=True)
    text = PYPROJECT.format(name=name, entry=entry, package=package)
    (folder / name / "pyproject.toml").write_text(text)
    for file, content in files.items():
        (folder / name / package / file).write_text(content)
    return folder / name


def registering(hook: str = "cmbench_register_methods", **methods: str) -> str:
    specs = ", ".join(
        f"MethodSpec('{name.replace('_', '-')}', '{factory}', 'T', recipes=recipes)"
        for name, factory in methods.items()
    )
    return REGISTER.format(hook=hook, specs=specs)


def write_all(folder: Path) -> list[Path]:
    taken = load_plugins().default_method
    rogues = registering(
        rogue_raises="acme_rogues.code:RaisesWhileTraining",
        rogue_nan="acme_rogues.code:ReturnsNaN",
        rogue_lies="acme_rogues.code:LiesAboutNFE",
        rogue_is_good="acme_rogues.code:Good",
        rogue_is_missing="acme_rogues.code:Missing",
    )
    return [
        Path(shutil.copytree(EXAMPLE, folder / "example")),
        distribution(
            folder,
            "acme-import",
            "acme-import",
            {"__init__.py": "import a_module_that_nobody_has\n"},
        ),
        distribution(
            folder,
            "acme-misspelt",
            "acme-misspelt",
            {"__init__.py": registering("cmbench_register_method", acme_m="acme_misspelt:M")},
        ),
        distribution(
            folder,
            "acme-taken",
            "acme-taken",
            {"__init__.py": registering(acme_first="a:A", **{taken: "a:A"})},
        ),
        distribution(
            folder,
            "acme-specs",
            "acme-specs",
            {"__init__.py": registering(acme_specs="no factory")},
        ),
        distribution(
            folder,
            "acme-rogues",
            "acme-rogues",
            {"__init__.py": rogues, "code.py": ROGUES, "recipes.toml": RECIPES},
        ),
    ]


@dataclass(frozen=True)
class Installed:
    """An environment with the distributions on its path."""

    site: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CMBENCH_")}
        environment |= {"PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1", **variables}
        return subprocess.run(
            [sys.executable, "-m", "cmbench", *arguments],
            cwd=self.site,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build and install every distribution with pip, offline."""
    folder = tmp_path_factory.mktemp("third-party")
    site = folder / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    sources = [str(path) for path in write_all(folder)]
    done = subprocess.run([*pip, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Installed(site)


FAILURES = {
    "acme-import": "cannot be imported: ModuleNotFoundError: No module named 'a_module_that_nobody",
    "acme-misspelt": "hook check: unknown hook 'cmbench_register_method'; allowed: ",
    "acme-taken": "is already taken by plugin 'cmbench-builtins' (cmbench ",
    "acme-specs": "'acme-specs': factory 'no factory' (allowed: 'package.module:Object')",
}


def test_plugins_lists_each_with_status_and_error(installed: Installed) -> None:
    done = installed.run("plugins", "--json")
    assert done.returncode == 1
    found = {p["name"]: p for p in json.loads(done.stdout)}
    assert {n for n, p in found.items() if p["status"] == "ok"} == {
        "cmbench-builtins",
        "example",
        "acme-rogues",
    }
    assert (found["example"]["distribution"], found["example"]["version"]) == (
        "cmbench-example-plugin",
        "0.1.0",
    )
    for name, error in FAILURES.items():
        assert error in found[name]["error"]
        assert "\n" not in found[name]["error"]
    lines = installed.run("plugins").stdout.splitlines()
    assert len(lines) == len(found)
    version = installed.run("--version").stdout
    assert "plugin example from cmbench-example-plugin 0.1.0\n" in version
    assert "plugin acme-import from acme-import 1.0 (failed)\n" in version


def test_a_failed_plugin_brings_nothing(installed: Installed) -> None:
    names = {row["name"] for row in json.loads(installed.run("list", "methods", "--json").stdout)}
    assert {"example-flow", "example-reflow", "example-diff-instruct", "rogue-is-good"} <= names
    assert not names & {"acme-m", "acme-first", "acme-specs"}
    assert load_plugins().methods.specs.keys() < names
    studies = {row["name"] for row in json.loads(installed.run("list", "studies", "--json").stdout)}
    assert studies - load_plugins().studies.specs.keys() == {"example-steps"}


def test_strict_mode_is_fatal_in_one_line(installed: Installed) -> None:
    done = installed.run("list", "methods", CMBENCH_STRICT_PLUGINS="1")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: CMBENCH_STRICT_PLUGINS=1: 4 plugin(s) failed: ")
    assert all(name in line for name in FAILURES)


def test_the_examples_keep_the_contract_and_the_rogues_do_not(installed: Installed) -> None:
    done = installed.run(
        "check", "example-flow", "example-reflow", "example-diff-instruct", "rogue-lies"
    )
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed
    assert all(line.startswith("FAILED method 'rogue-lies' on digits, ") for line in failed)
    assert any("declares NFE 1 but 3 network evaluations per image" in line for line in failed)


METHODS = (
    "rogue-raises",
    "rogue-nan",
    "rogue-lies",
    "rogue-is-missing",
    "rogue-is-good",
    "example-flow",
)


@pytest.fixture(scope="module")
def sweep(
    installed: Installed, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], dict[str, Record]]:
    """One sweep over good and bad methods of other people."""
    folder = tmp_path_factory.mktemp("sweep")
    done = installed.run(
        "run",
        "--method",
        ",".join(METHODS),
        "--recipe",
        "smoke",
        "--nfe",
        "1",
        "--samples",
        "64",
        "--workspace",
        str(folder),
        "-o",
        "duration_kimg=0.064",
        "-o",
        "batch_size=32",
    )
    paths = (folder / "records" / "digits").glob("*.json")
    records = [read_record(path) for path in paths]
    return done, {r.method: r for r in records}


def test_good_methods_finish_among_bad_ones(
    sweep: tuple[subprocess.CompletedProcess[str], dict[str, Record]],
) -> None:
    done, records = sweep
    assert done.returncode == 1, done.stderr
    assert {m for m, r in records.items() if r.status == "finished"} == {
        "rogue-is-good",
        "example-flow",
    }
    record = records["example-flow"]
    assert record.plugin.model_dump() == {
        "name": "example",
        "distribution": "cmbench-example-plugin",
        "version": "0.1.0",
    }
    assert record.sampling.nfe_measured == record.sampling.nfe == 1
    assert record.metrics["fd-digits"].value is not None
    assert record.training.images_seen == 64


def test_each_failure_is_a_record_and_one_clear_line(
    sweep: tuple[subprocess.CompletedProcess[str], dict[str, Record]],
) -> None:
    done, records = sweep
    reasons = {m: r.reason for m, r in records.items() if r.status == "failed"}
    assert reasons.keys() == {"rogue-raises", "rogue-nan", "rogue-lies"}
    assert reasons["rogue-raises"].startswith(
        "method 'rogue-raises' failed while training: ZeroDivisionError: by nothing ("
    )
    assert "64 of 64 images have NaN or infinite values" in reasons["rogue-nan"]
    assert "declares NFE 1 but 3 network evaluations per image" in reasons["rogue-lies"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: plugin 'acme-rogues' (acme-rogues 1.0): cannot import 'acme_rogues.code:Missing' "
        "for method 'rogue-is-missing': AttributeError: module 'acme_rogues.code' has no "
        "attribute 'Missing'; fix or reinstall that distribution",
        *(f"error: 1 cell(s) failed: {reasons[m]}" for m in METHODS[:3]),
    ]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: plugin")]
    assert len(warnings) == len(FAILURES)
    assert "Traceback" not in done.stderr


def test_the_table_shows_all_of_them(
    sweep: tuple[subprocess.CompletedProcess[str], dict[str, Record]],
) -> None:
    table = {line.split()[0]: line.split()[-1] for line in sweep[0].stdout.splitlines() if line}
    assert table["method"] == "status"
    assert (table["example-flow"], table["rogue-nan"]) == ("finished", "failed")
    assert table["report:"].endswith("digits.html")
