"""What start-up imports, and the options that users rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click
import pytest

from cmbench.cli.main import COMMANDS, cli

#: Packages that take longer to import than a listing should run.
HEAVY = (
    "torch",
    "pydantic",
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "rich",
    "jinja2",
    "PIL",
    "torch_fidelity",
    "cleanfid",
)

IMPORTED = """
import json, sys
from cmbench.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code or 0
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def imports(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("list", "methods"),
        ("list", "datasets", "--json"),
        ("list", "recipes"),
        ("import", "--list"),
        ("plugins",),
        ("plugins", "--json"),
        ("completion", "bash"),
    ],
)
def test_listings_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not imports(*arguments) & set(HEAVY)


def test_help_of_the_group_loads_no_verb_and_no_plugin() -> None:
    modules = imports("--help")
    assert not any(m.startswith(("cmbench_plugins", "cmbench.plugin", "pluggy")) for m in modules)
    assert {m for m in modules if m.startswith("cmbench")} == {
        "cmbench",
        "cmbench.cli",
        "cmbench.cli.main",
        "cmbench.cli.output",
        "cmbench.errors",
    }


@pytest.mark.parametrize("arguments", [("status",), ("run", "--help"), ("report", "--help")])
def test_commands_without_tensors_import_no_torch(arguments: tuple[str, ...]) -> None:
    assert "torch" not in imports(*arguments)


def test_no_verb_needs_torch_for_its_help_or_completion() -> None:
    code = (
        "import sys, click; from cmbench.cli.main import COMMANDS, cli\n"
        "for verb in COMMANDS: assert cli.get_command(click.Context(cli), verb), verb\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- frozen options -----------------------------------------------------------------------------

#: What scripts may rely on. A name may be added here; taking one away breaks somebody.
OPTIONS = {
    "run": (
        "--batch-size",
        "--checkpoint",
        "--compile",
        "--dataset",
        "--device",
        "--dry-run",
        "--ema",
        "--executor",
        "--help",
        "--labels",
        "--method",
        "--metrics",
        "--nfe",
        "--no-compile",
        "--no-report",
        "--no-split",
        "--option",
        "--precision",
        "--quiet",
        "--recipe",
        "--sampler",
        "--samples",
        "--save-samples",
        "--seeds",
        "--sigmas",
        "--split",
        "--threads",
        "--time-limit",
        "--workspace",
        "-d",
        "-h",
        "-m",
        "-o",
        "-q",
        "-r",
        "-w",
        "FILE.toml",
    ),
    "status": ("--help", "--workspace", "-h", "-w"),
    "show": ("--help", "--json", "--workspace", "-h", "-w", "CELL"),
    "list": ("--help", "--json", "-h", "KIND"),
    "plugins": ("--help", "--json", "-h"),
    "env": ("--help", "--json", "--workspace", "-h", "-w"),
    "completion": ("--help", "-h", "SHELL"),
    "report": (
        "--dataset",
        "--help",
        "--leaderboards",
        "--out",
        "--template",
        "--workspace",
        "-O",
        "-d",
        "-h",
        "-w",
    ),
}
VERBS = ("run", "report", "status", "show", "list", "plugins", "env", "completion")


def parameters(verb: str) -> set[str]:
    context = click.Context(cli, info_name="cmbench", **cli.context_settings)
    command = cli.get_command(context, verb)
    assert command is not None
    inner = click.Context(command, parent=context, info_name=verb)
    # click keeps the help option of the first call, which may have been another test's
    found = set(cli.context_settings["help_option_names"])
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            found.add(
                parameter.make_metavar(inner).strip("[].{}").partition("|")[0]
                if not isinstance(parameter.type, click.Choice)
                else parameter.human_readable_name.upper()
            )
        else:
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_are_frozen(verb: str) -> None:
    assert sorted(parameters(verb)) == sorted(OPTIONS[verb])


def test_verbs_stay() -> None:
    assert [verb for verb in COMMANDS if verb in VERBS] == list(VERBS)


def test_every_option_is_described() -> None:
    context = click.Context(cli, **cli.context_settings)
    for verb in COMMANDS:
        command: Any = cli.get_command(context, verb)
        for leaf in getattr(command, "commands", {"": command}).values():
            for parameter in leaf.params:
                if isinstance(parameter, click.Option):
                    assert parameter.help, f"{verb} {leaf.name} {parameter.opts}"
