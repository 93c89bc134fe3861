"""Jinja environments: strict about names, escaping by default, with errors that name the line.

Three environments share one loader: HTML (autoescaped by Jinja), and Markdown and LaTeX, in which
every value that a template prints passes through the format's own escape unless it was marked safe.
A user's template folder is searched first, so any template, style sheet or script can be replaced.
"""

from __future__ import annotations

import csv
import io
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import (
    BaseLoader,
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PackageLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
)
from markupsafe import Markup, escape

from cmbench.errors import UserError
from cmbench.leaderboard.export import spreadsheet_safe


class Raw(str):
    """Text that is already in the target format and is not escaped again."""


_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "—": "---",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "−": r"$-$",
    "…": r"\ldots{}",
    "†": r"\textdagger{}",
}
_CODE = re.compile(r"`([^`\n]+)`")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$])")


def escape_tex(value: object) -> str:
    """Return ``value`` as LaTeX text; letters that pdflatex cannot set become ``?``."""
    if isinstance(value, Raw):
        return value
    text = " ".join(str(value).split())
    # Latin letters with accents are in T1; everything else would stop the compiler.
    return "".join(_TEX.get(c, c if ord(c) < 0x180 and c.isprintable() else "?") for c in text)


def escape_markdown(value: object) -> str:
    """Return ``value`` as one line of Markdown text that is safe in a table cell."""
    if isinstance(value, Raw):
        return value
    return " ".join(_plain_markdown(str(value)).split())


def _plain_markdown(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return _MARKDOWN.sub(r"\\\1", text).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def markdown_code(value: object) -> Raw:
    """Return ``value`` for use between backticks."""
    return Raw(" ".join(str(value).replace("`", "'").split()))


def html_prose(value: object) -> Markup:
    """Return plain text as HTML; only code between backticks is marked up."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(str(value)))))


def markdown_prose(value: object) -> Raw:
    """Return plain text as Markdown; only code between backticks is marked up."""
    parts = _CODE.split(str(value))
    pieces = [f"`{p}`" if i % 2 else _plain_markdown(p) for i, p in enumerate(parts)]
    return Raw(" ".join("".join(pieces).split()))


def csv_line(cells: list[object]) -> Raw:
    """Return one CSV line; text that a spreadsheet would run as a formula gets a leading ``'``."""
    buffer = io.StringIO()
    flat = [" ".join(cell.split()) if isinstance(cell, str) else cell for cell in cells]
    csv.writer(buffer, lineterminator="").writerow([spreadsheet_safe(cell) for cell in flat])
    return Raw(buffer.getvalue())


class Templates:
    """The built-in templates, each of which a file of the same name in ``folder`` replaces."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise UserError(
                f"template folder {folder}",
                "is not a folder",
                remedy="give a folder with templates such as page.html.j2",
            )
        self.folder = folder
        loaders: list[BaseLoader] = [PackageLoader("cmbench.report", "templates")]
        if folder is not None:
            loaders.insert(0, FileSystemLoader(folder))
        self.loader = ChoiceLoader(loaders)
        self._environments = {
            ".html": self._environment(None, autoescape=True),
            ".md": self._environment(escape_markdown, autoescape=False),
            ".tex": self._environment(escape_tex, autoescape=False),
            ".csv": self._environment(None, autoescape=False),
        }

    def _environment(
        self, finalize: Callable[[object], object] | None, *, autoescape: bool
    ) -> Environment:
        environment = Environment(
            loader=self.loader,
            autoescape=autoescape,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            finalize=None if finalize is None else _finalizer(finalize),
        )
        environment.filters["csv_line"] = csv_line
        environment.filters["raw"] = Raw
        environment.filters["code"] = markdown_code
        environment.filters["prose"] = html_prose if autoescape else markdown_prose
        return environment

    def asset(self, name: str) -> str:
        """Return a style sheet or a script (not a template); the user's own one comes first."""
        environment = self._environments[".html"]
        return self.loader.get_source(environment, name)[0]

    def render(self, name: str, context: Mapping[str, Any]) -> str:
        """Render template ``name`` (``*.html.j2``, ``*.md.j2`` …).

        Raises:
            UserError: naming the template and the line, whatever went wrong in it.
        """
        environment = self._environments[Path(name.removesuffix(".j2")).suffix]
        try:
            return environment.get_template(name).render(context)
        except TemplateSyntaxError as error:
            raise self._error(error.name or name, error.lineno, error) from error
        except Exception as error:
            where = self._where(error)
            if where is None and not isinstance(error, TemplateError):
                raise
            template, line = where or (name, 0)
            raise self._error(template, line, error) from error

    def _where(self, error: Exception) -> tuple[str, int] | None:
        """Return the innermost template and line in the traceback (Jinja rewrites its frames)."""
        frames = traceback.extract_tb(error.__traceback__)
        for frame in reversed(frames):
            if frame.filename.endswith(".j2"):
                return Path(frame.filename).name, frame.lineno or 0
        return None

    def _error(self, template: str, line: int, error: Exception) -> UserError:
        owner = "built-in"
        if self.folder is not None and (self.folder / template).is_file():
            owner = str(self.folder / template)
        return UserError(
            f"template {template} line {line} ({owner})",
            f"{type(error).__name__}: {error}",
            remedy="correct that line, or remove the file to use the built-in template",
        )


def _finalizer(escape: Callable[[object], object]) -> Callable[[object], object]:
    def finalize(value: object) -> object:
        # Undefined must reach Jinja as it is, so that StrictUndefined can raise.
        return value if isinstance(value, Undefined) else escape(value)

    return finalize
