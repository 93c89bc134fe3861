"""The one place where text reaches the terminal: names in files of strangers cannot command it."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys

import click

from cmbench.errors import UserError

#: What moves a cursor, sets colours, hides or reorders text, or is half a character.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
#: What characters become that a terminal cannot show; any other becomes a question mark.
_PLAIN = {"→": "->", "…": "...", "×": "x", "−": "-", "±": "+-", "–": "-", "∞": "inf", "·": "."}
_ERRORS = "cmbench-plain"


def printable(text: str) -> str:
    """Return text in which control characters are question marks; lines and tabs stay."""
    return _COMMANDS.sub("?", text)


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text of any origin.

    Raises:
        UserError: stdout cannot be written, for example on a full disk.
    """
    try:
        click.echo(printable(str(text)), err=err, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        if not err:
            raise _unwritable(error) from None


def echo_line(text: str, *, err: bool = False) -> None:
    """Print one line, whatever line breaks the text has."""
    echo(re.sub("[\n\t]", "?", text), err=err)


def _unwritable(error: OSError) -> UserError:
    _drop_stdout()
    return UserError(
        "stdout",
        f"cannot be written: {error.strerror or error}",
        remedy="results that were computed are in the workspace: see `cmbench status`",
    )


def _drop_stdout() -> None:
    """Let nothing more be written to stdout: Python would try again when it ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, io.UnsupportedOperation, AttributeError):
        return  # not a file: a test's buffer


def flush() -> None:
    """Write what is left; raise ``UserError`` if that cannot be."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from None


def accept_any_character() -> None:
    """Make stdout and stderr write what their encoding has, and something like it for the rest."""
    codecs.register_error(_ERRORS, _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    there = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, "?") for c in there), error.end
