"""``cmbench``: the entry point. Imports nothing heavy; a verb's module is loaded on use."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise

import click

from cmbench.cli.output import accept_any_character, echo, flush
from cmbench.errors import EXIT_USAGE, UserError, described

#: verb -> (module:command, one line of help). Kept here so that ``--help`` loads no verb.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("cmbench.cli.run:run", "Train, sample and measure every cell of a sweep."),
    "study": ("cmbench.cli.study:study", "Repeat a comparison of named arms, with plots."),
    "tune-times": ("cmbench.cli.tune_times:tune_times", "Choose noise levels on held-out seeds."),
    "report": ("cmbench.cli.report:report", "Render records as pages, Markdown, CSV and LaTeX."),
    "compare": ("cmbench.cli.compare:compare_", "Compare two methods, paired over seeds."),
    "leaderboard": ("cmbench.cli.leaderboard:leaderboard", "Published rows: list, show, validate."),
    "merge": ("cmbench.cli.merge:merge_", "Copy other workspaces' records into this one."),
    "verify": ("cmbench.cli.verify:verify", "Check records: hashes, samples, numbers."),
    "submit": ("cmbench.cli.submit:submit", "Pack records so that others can verify them."),
    "export": ("cmbench.cli.export:export", "Write rows as CSV, Parquet, LaTeX or JSON."),
    "prepare": ("cmbench.cli.prepare:prepare", "Convert a dataset into the prepared format."),
    "import": ("cmbench.cli.importing:import_", "Read a checkpoint of another project."),
    "parity": ("cmbench.cli.parity:parity", "Compare an import with the official outputs."),
    "sample": ("cmbench.cli.sample:sample", "Make images of a run or an imported checkpoint."),
    "reproduce": ("cmbench.cli.reproduce:reproduce", "Measure a published value again."),
    "eval": ("cmbench.cli.eval:eval_", "Score samples of any generator."),
    "refs": ("cmbench.cli.refs:refs", "List, show, import and compare reference statistics."),
    "status": ("cmbench.cli.status:status", "Show runs, checkpoints and records of the workspace."),
    "clean": ("cmbench.cli.clean:clean", "List and delete what the workspace can do without."),
    "show": ("cmbench.cli.show:show", "Show one record."),
    "recipe": ("cmbench.cli.recipe:recipe", "List, show, compare and export recipes."),
    "list": ("cmbench.cli.listing:list_", "List methods, datasets, metrics, networks, recipes."),
    "plugins": ("cmbench.cli.plugins:plugins", "List plugins with their status and errors."),
    "new": ("cmbench.cli.new:new", "Write a plugin to begin with, with its tests."),
    "check": ("cmbench.cli.check:check", "Check that methods keep the contract of plugins."),
    "env": ("cmbench.cli.env:env", "Show versions, hardware and paths."),
    "completion": ("cmbench.cli.completion:completion", "Print the shell completion script."),
}

EPILOG = """\b
Exit codes: 0 done; 1 some cells failed (their records say why); 2 bad usage or input;
3 a run failed; 4 a path, data, weights or hardware is missing; 5 busy; 75 stopped: repeat the
command to continue; 130 interrupted. For compare, 0, 1 and 4 are its verdict (compare --help).

\b
Examples:
  cmbench run                             the default method on digits, NFE 1, 2, 4
  cmbench run --method M1,M2 --dataset gmm --seeds 3
  cmbench list methods
  cmbench report
"""


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports each one on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a verb."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def print_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Print the version of cmbench and of every plugin."""
    if not value or ctx.resilient_parsing:
        return
    from cmbench import __version__  # on this path only: plugins take time to find
    from cmbench.plugin.manager import load_plugins

    echo(f"cmbench {__version__}")
    for info in load_plugins().plugins:
        state = "" if info.status == "ok" else f" ({info.status})"
        echo(f"plugin {info.name} from {info.distribution} {info.version}{state}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the versions of cmbench and its plugins.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Measure few-step image generators on equal terms.

    Results go to stdout, progress and messages to stderr.
    """
    ctx.ensure_object(dict)["debug"] = debug


def _unforeseen(error: Exception) -> str:
    """Return the line for an error that no code foresaw."""
    if isinstance(error, OSError) and error.filename is not None:
        from cmbench.files import readable  # on this path only

        place = readable(os.fsdecode(error.filename))
        return f"error: {place}: {error.strerror}; check it and its permissions"
    again = "run again with --debug for the traceback and report it"
    return f"error: unexpected {described(error)}; {again}"


def require_no_empty_words(given: Sequence[str]) -> None:
    """Raise ``UserError`` for an empty argument or value: no verb has a use for one."""
    for before, word in pairwise(["", *given]):
        name, equals, value = word.partition("=")
        if not word or (word.startswith("--") and equals and not value):
            who = name if word else before if before.startswith("-") else "cmbench"
            raise UserError(who, "an empty value", remedy="give a value, or leave it out")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every foreseeable error is one line and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"] if debug else given
    if debug:
        given.insert(0, "--debug")
    accept_any_character()
    try:
        require_no_empty_words(given)
        code = cli.main(args=given, prog_name="cmbench", standalone_mode=False)
        flush()
    except click.exceptions.Abort:
        echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        from cmbench.cli.usage import usage_text  # on this path only

        echo(usage_text(error), err=True)
        sys.exit(error.exit_code)
    except UserError as error:
        if debug:
            raise
        echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        echo(_unforeseen(error), err=True)
        sys.exit(EXIT_USAGE)
    sys.exit(code if isinstance(code, int) else 0)
