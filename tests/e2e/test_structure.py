"""The shape of the code: layers, names, sizes, and a package list that is complete."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cmbench.plugin.manager import load_plugins

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cmbench"
#: Modules that belong to no layer: everybody may use them.
COMMON = {"downloads", "errors", "locks", "files", "reporter", "seeds", "zips", "__init__"}
#: Lines of a module, and of a function from `def` to its end without the docstring.
MAX_MODULE, MAX_FUNCTION = 350, 40


def documented_order(text: str) -> tuple[str, ...]:
    """Return the layers from the top down as the line `cli > report > …` of a document has them."""
    found = re.search(r"`(cli > [a-z >\n]+)`", text)
    assert found is not None
    return tuple(name.strip() for name in found[1].split(">"))


#: From the top down: a layer imports only those after it (and itself).
LAYERS = documented_order((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, *, at_load: bool) -> Iterator[str]:
    """Yield the modules of the package that a module imports.

    Without ``at_load`` those in functions and for type checking too.
    """
    skipped: set[ast.AST] = set()
    if at_load:
        for node in ast.walk(tree(path)):
            checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                skipped |= set(ast.walk(node))
    for node in ast.walk(tree(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("cmbench"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cmbench"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else str(node.module)


def layer(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


# ---- imports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    own = layer(name)
    if own not in LAYERS:
        assert own in COMMON | {"", "__main__"}, f"{name} is in no layer"
        return
    for target in imported(modules()[name], at_load=False):
        other = layer(target)
        if other in LAYERS:
            assert LAYERS.index(other) >= LAYERS.index(own), f"{name} imports {target}"


#: What shows results knows records, and nothing of how they came about.
SHOW_RECORDS = {"report", "leaderboard"}
BELOW_REPORTS = {"records", "metrics"}


@pytest.mark.parametrize("name", sorted(n for n in modules() if layer(n) in SHOW_RECORDS))
def test_reports_and_leaderboards_know_records_only(name: str) -> None:
    layers = {layer(target) for target in imported(modules()[name], at_load=False)}
    assert layers <= SHOW_RECORDS | BELOW_REPORTS | COMMON | {""}, name


def test_the_documents_state_one_order() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert documented_order(contributing) == LAYERS
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(LAYERS) == folders


def test_the_common_modules_import_no_layer() -> None:
    for name in COMMON - {"__init__"}:
        targets = set(imported(modules()[f"cmbench.{name}"], at_load=False))
        assert {layer(t) for t in targets} <= COMMON, name


def test_nothing_imports_the_builtin_plugins() -> None:
    for name, path in modules().items():
        for target in imported(path, at_load=False):
            assert not target.startswith("cmbench_plugins"), f"{name} imports {target}"


def test_no_cycles() -> None:
    graph = {n: {t for t in imported(p, at_load=True) if t != n} for n, p in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in graph.get(name, ()):
            visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


# ---- names --------------------------------------------------------------------------------------

#: EDM is also a parameterization, a network and a file format; pid also a process' number.
NOT_ONLY_A_METHOD = {"edm", "pid"}


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and each word of every identifier and string literal of a module."""
    for node in ast.walk(tree(path)):
        texts: list[str] = []
        if isinstance(node, ast.Name):
            texts = [node.id]
        elif isinstance(node, ast.Attribute):
            texts = [node.attr]
        elif isinstance(node, ast.arg):
            texts = [node.arg]
        elif isinstance(node, ast.keyword):
            texts = [node.arg or ""]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            texts = [node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts = [node.value]
        for text in texts:
            for word in re.findall(r"[A-Za-z0-9]+(?:-[a-z0-9]+)*", text):
                yield getattr(node, "lineno", 0), word


def test_no_module_names_a_method() -> None:
    methods = set(load_plugins().methods.specs) - NOT_ONLY_A_METHOD
    found = [
        f"{path.relative_to(ROOT)}:{line} {word}"
        for path in modules().values()
        for line, word in words(path)
        if word in methods
    ]
    assert found == []


# ---- sizes --------------------------------------------------------------------------------------


def sized() -> dict[str, Path]:
    """The package's modules, and the built-in methods'."""
    methods = sorted((ROOT / "plugins").glob("*.py"))
    return {**modules(), **{f"plugins.{path.stem}": path for path in methods}}


@pytest.mark.parametrize("name", sorted(sized()))
def test_modules_and_functions_are_short(name: str) -> None:
    path = sized()[name]
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_MODULE, f"{name} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            assert length <= MAX_FUNCTION, f"{name}.{node.name} has {length} lines"


def test_no_class_name_is_used_twice() -> None:
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert {k: v for k, v in places.items() if len(v) > 1} == {}


# ---- packaging ----------------------------------------------------------------------------------


def test_the_package_list_is_complete() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(table["tool"]["setuptools"]["packages"])
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    plugins = {
        ".".join(["cmbench_plugins", *path.parent.relative_to(ROOT / "plugins").parts])
        for path in (ROOT / "plugins").rglob("__init__.py")
    }
    assert listed == there | plugins | {"cmbench_leaderboards"}


def test_the_wheel_contains_the_boards() -> None:
    """From any folder, an installed cmbench finds the boards, rows and records that are here."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns = table["setuptools"]["package-data"]["cmbench_leaderboards"]
    boards = ROOT / table["setuptools"]["package-dir"]["cmbench_leaderboards"]
    packed = {path for pattern in patterns for path in boards.glob(pattern)}
    names = {".csv", ".toml", ".json", ".png"}
    assert packed == {path for path in boards.rglob("*") if path.suffix in names}
    assert {"board.toml", "published.csv"} <= {path.name for path in packed}


def test_every_folder_of_modules_is_a_package() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path
