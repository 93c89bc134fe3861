"""What click finds wrong with a command line, as one line. Imported when that happens only."""

from __future__ import annotations

import io
from difflib import get_close_matches

import click

from cmbench.errors import UserError


def usage_text(error: click.ClickException) -> str:
    """Return what is printed for an error of click: one line, or a group's help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        shown = io.StringIO()
        error.show(file=shown)
        return shown.getvalue().rstrip("\n")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "cmbench"
    problem = " ".join(error.format_message().split()).rstrip(".")
    near = ""
    if isinstance(error, click.NoSuchOption):
        problem, near = _no_such_option(error)
    elif isinstance(error, click.UsageError) and problem.startswith("No such command"):
        problem, near = _no_such_command(problem, context)
    problem = problem[:1].lower() + problem[1:]
    remedy = f"did you mean {near}? see `{path} --help`" if near else f"see `{path} --help`"
    return f"error: {UserError(path, problem, remedy=remedy)}"


def _no_such_option(error: click.NoSuchOption) -> tuple[str, str]:
    known = [] if error.ctx is None else _options(error.ctx)
    near = get_close_matches(error.option_name, known, n=1)
    return f"no option {error.option_name}", near[0] if near else ""


def _no_such_command(problem: str, context: click.Context | None) -> tuple[str, str]:
    name = problem.split("'")[1]
    group = context.command if context is not None else None
    known = group.list_commands(context) if isinstance(group, click.Group) and context else []
    near = get_close_matches(name, known, n=1)
    return f"no command {name!r}", f"`{near[0]}`" if near else ""


def _options(context: click.Context) -> list[str]:
    parameters = context.command.get_params(context)
    return [name for p in parameters if isinstance(p, click.Option) for name in p.opts]
