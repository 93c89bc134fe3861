"""Methods as other people write them: how long they are, and that they keep the contract."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.testing.suite import CHECKS, ContractCheck, Subject, make_check

TESTS = Path(__file__).parents[1]
THIRD_PARTY = TESTS / "third_party"
EXAMPLE = TESTS.parent / "examples" / "cmbench-example-plugin" / "cmbench_example"
sys.path.insert(0, str(TESTS))

from third_party import meanflow, tcm  # noqa: E402


def lines_of(path: Path) -> int:
    """Return the lines of a file without blank ones, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    left = {
        n for n, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"
    }
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            left -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(left)


def registration_of(path: Path, name: str) -> int:
    """Return the lines of a module that register one method: without other specs and studies."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    others = 0
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "MethodSpec":
            if ast.literal_eval(node.args[0]) != name:
                others += (node.end_lineno or 0) - node.lineno + 1
        elif isinstance(node, ast.FunctionDef) and node.name == "cmbench_register_studies":
            body = node.body[1:]  # the docstring is not counted anyway
            others += 2 + (body[-1].end_lineno or 0) - body[0].lineno + 1
    return lines_of(path) - others


@pytest.mark.parametrize(
    ("name", "files", "most"),
    [
        ("example-flow", [EXAMPLE / "flow.py", EXAMPLE / "flow.toml"], 60),
        (
            "example-diff-instruct",
            [EXAMPLE / "diff_instruct.py", EXAMPLE / "diff_instruct.toml"],
            80,
        ),
    ],
)
def test_lines_of_an_example_with_recipes_and_registration(
    name: str, files: list[Path], most: int
) -> None:
    assert sum(map(lines_of, files)) + registration_of(EXAMPLE / "__init__.py", name) <= most


@pytest.mark.parametrize(("name", "most"), [("meanflow", 60), ("tcm", 90)])
def test_lines_of_a_method_of_other_people(name: str, most: int) -> None:
    """The method and its recipes; registration is the same for everybody."""
    files = [THIRD_PARTY / name / file for file in ("method.py", "recipes.toml")]
    assert sum(map(lines_of, files)) <= most


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    found = load_plugins()
    for plugin in (meanflow, tcm):
        name = plugin.__name__.rpartition(".")[2]
        info = found.register(plugin, PluginInfo(name, name, name, "1.0"))
        assert info.status == "ok", info.error
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name.replace(" ", "-"))
@pytest.mark.parametrize(
    ("name", "dataset"), [("meanflow", "gmm"), ("meanflow", "digits"), ("tcm", "gmm")]
)
def test_they_keep_the_contract(
    manager: PluginManager, name: str, dataset: str, check: ContractCheck
) -> None:
    (subject,) = Subject.all_of(manager, name, dataset)
    found = make_check(subject, check)
    assert found.problem == ""


def test_a_flow_map_to_zero_is_a_consistency_function(manager: PluginManager) -> None:
    """Without any other words of the method."""
    (subject,) = Subject.all_of(manager, "meanflow", "digits")
    case = subject.case()
    x, sigma = case.batch().images, torch.linspace(0.1, 60.0, case.batch_size)
    labels = case.batch().labels
    with torch.no_grad():
        found = case.method.consistency_function(case.nets)(x, sigma, labels)
        expected = case.method.flow_map(case.nets)(x, sigma, torch.zeros_like(sigma), labels)
    assert torch.equal(found, expected)
