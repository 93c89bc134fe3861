"""The snippets of docs/plugins.md are files of one package, which works."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cmbench.metrics.metric import open_metrics
from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.testing.suite import check_method

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
STUDENT = ("my_package/student.py", "my_package/my-student.toml")
SNIPPET = re.compile(r"^```(python|toml)\n# ([\w./-]+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> list[tuple[str, str]]:
    """Return path and text of each snippet; a path may have several."""
    return [(path, text) for _, path, text in SNIPPET.findall(PAGE.read_text(encoding="utf-8"))]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write the snippets as files; those of one path follow each other."""
    for path, text in snippets():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(text + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def registered(package: Path) -> PluginManager:
    pyproject = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
    ((name, module),) = pyproject["project"]["entry-points"]["cmbench"].items()
    manager = load_plugins()
    loaded = manager.load_one(PluginInfo(name, module, "my-distribution", "1.0"))
    assert loaded.status == "ok", loaded.error
    return manager


def test_every_snippet_names_its_file() -> None:
    blocks = PAGE.read_text(encoding="utf-8").count("\n```") / 2
    assert len(snippets()) == blocks >= 6


@pytest.mark.parametrize("name", ["my-method", "my-student"])
def test_the_methods_keep_the_contract(registered: PluginManager, name: str) -> None:
    found = list(check_method(registered, name))
    assert [str(result) for result in found if result.problem] == []
    assert len(found) > 10


def test_knowledge_distillation_is_short() -> None:
    """With its recipe; registration is the same for everybody."""
    texts = [text for path, text in snippets() if path in STUDENT]
    assert len(texts) == len(STUDENT)
    assert len([line for text in texts for line in text.splitlines() if line.strip()]) <= 45


def test_the_metric_is_computed(registered: PluginManager) -> None:
    (metric,) = open_metrics(registered, ["mean-gap"])
    assert metric.name == "mean-gap"
    compute: Any = registered.metrics.load("mean-gap")
    features = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    data = SimpleNamespace(features=features, real_moments=SimpleNamespace(mean=torch.zeros(2)))
    assert compute(data) == pytest.approx((1 + 9) ** 0.5)


def test_the_test_file_makes_the_checks(package: Path, registered: PluginManager) -> None:
    text = (package / "tests" / "test_contract.py").read_text(encoding="utf-8")
    module = ModuleType("contract_of_my_method")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmbench.plugin.manager.load_plugins", lambda: registered)
        exec(compile(text, "test_contract.py", "exec"), vars(module))  # noqa: S102
    names = [mark.name for mark in module.test_contract.pytestmark]
    assert names == ["parametrize", "parametrize"]
