"""Distributions to begin with: a method, dataset, metric or executor that passes its own tests.

Imports neither torch nor the checks.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cmbench.errors import UserError
from cmbench.plugin.manager import PluginManager

KINDS = ("method", "dataset", "metric", "executor")
#: Names are distributions, entry points and parts of file names; with _ for - they are packages.
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TEMPLATES = Path(__file__).with_name("templates")
_MOST = 40


@dataclass(frozen=True)
class Scaffold:
    """What is to be written: a ``kind`` of plugin by the name ``name``.

    ``staged`` methods have several phases, methods with a ``teacher`` learn from one.
    """

    kind: str
    name: str
    staged: bool = False
    teacher: bool = False

    @property
    def package(self) -> str:
        """Name of the Python package."""
        return self.name.replace("-", "_")

    def files(self) -> dict[str, str]:
        """Return the template of each file by its path."""
        package = self.package
        files = {
            "pyproject.toml": "pyproject.toml",
            "README.md": "readme.md",
            f"{package}/__init__.py": f"init_{self.kind}.py",
            f"{package}/{self.kind}.py": f"{self.kind}.py",
            f"tests/test_{package}.py": f"test_{self.kind}.py",
        }
        return files | ({f"{package}/recipes.toml": "recipes.toml"} if self._is_method else {})

    @property
    def _is_method(self) -> bool:
        return self.kind == "method"

    def require_free(self, plugins: PluginManager, folder: Path) -> None:
        """Raise ``UserError`` unless the name is valid and used by nothing, nor the folder."""
        who = f"cmbench new {self.kind}"
        if not _NAME.fullmatch(self.name) or len(self.name) > _MOST:
            allowed = f"up to {_MOST} small letters, digits and single -, beginning with a letter"
            raise UserError(who, f"name {self.name!r}", allowed=allowed, remedy="choose another")
        if keyword.iskeyword(self.package) or find_spec(self.package) is not None:
            raise UserError(
                who,
                f"name {self.name!r}: Python has a module {self.package!r}",
                allowed="a name that cannot be imported yet",
                remedy="choose another",
            )
        owner = getattr(plugins, f"{self.kind}s").owners.get(self.name)
        if owner is not None:
            raise UserError(who, f"{self.name!r} is registered by {owner}", remedy="choose another")
        if (self.staged or self.teacher) and not self._is_method:
            raise UserError(who, "has neither stages nor a teacher", remedy="leave the option out")
        if folder.exists():
            raise UserError(
                who,
                f"{folder} exists",
                allowed="a folder that does not exist",
                remedy="choose another name, or another folder with --into",
            )

    def write(self, folder: Path) -> list[Path]:
        """Write the distribution into ``folder``; return its files."""
        environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        words = self.name.split("-")
        variables = {
            "kind": self.kind,
            "name": self.name,
            "package": self.package,
            "class_name": "".join(word.capitalize() for word in words),
            "title": " ".join(words).capitalize(),
            "staged": self.staged,
            "teacher": self.teacher,
        }
        written = []
        for path, template in self.files().items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            text = environment.get_template(f"{template}.j2").render(variables)
            file.write_text(text, encoding="utf-8")
            written.append(file)
        return written
