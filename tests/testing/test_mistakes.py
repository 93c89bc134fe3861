"""Deliberate mistakes: each is reported, by the check that is meant for it, with what to change."""

from __future__ import annotations

import pytest
from mistakes import MISTAKES, PLUGINS, TAUGHT, Good, Mistaken, WithPairs, method_name

from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.plugin.method import Method
from cmbench.testing.check import SECTION
from cmbench.testing.suite import CHECKS, Subject, broken_plugins, make_check

BY_NAME = {check.name: check for check in CHECKS}


@pytest.fixture(scope="module")
def mistaken() -> PluginManager:
    manager = load_plugins()
    info = manager.register(Mistaken(), PluginInfo("mistakes", "mistakes", "mistakes", "1.0"))
    assert info.status == "ok", info.error
    return manager


def subject_of(manager: PluginManager, kind: type[Method]) -> Subject:
    (subject,) = Subject.all_of(manager, method_name(kind), "gmm")
    subject.recipe = "taught" if kind in TAUGHT else "smoke"
    return subject


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_mistake_is_reported(mistaken: PluginManager, kind: type[Method]) -> None:
    found = make_check(subject_of(mistaken, kind), BY_NAME[MISTAKES[kind]])
    assert found.problem, "it passes"
    line = str(found)
    assert f"'{method_name(kind)}'" in line
    assert line.endswith(f"({SECTION}, {found.check!r})")
    assert "\n" not in line


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_method_without_mistakes_passes(mistaken: PluginManager, check: object) -> None:
    found = make_check(subject_of(mistaken, Good), check)  # type: ignore[arg-type]
    assert found.problem == ""
    none = ("generated data", "flow map", "diffusion model")
    assert bool(found.skipped) is (found.check in none)


def test_pairs_without_mistakes_pass(mistaken: PluginManager) -> None:
    found = make_check(subject_of(mistaken, WithPairs), BY_NAME["generated data"])
    assert (found.problem, found.skipped) == ("", "")


@pytest.mark.parametrize("mistake", PLUGINS)
def test_a_plugin_that_is_refused_is_reported(mistake: str) -> None:
    plugin, problem = PLUGINS[mistake]
    manager = load_plugins()
    manager.register(plugin, PluginInfo("wrong-plugin", "mistakes", "wrong-distribution", "1.0"))
    lines = [str(found) for found in broken_plugins(manager)]
    (line,) = [line for line in lines if "wrong-plugin" in line]
    assert problem in line
    assert line.startswith("loading: plugin 'wrong-plugin' (wrong-distribution 1.0): ")
    assert line.endswith(f"({SECTION}, 'loading')")


def test_there_are_forty() -> None:
    assert len(MISTAKES) + len(PLUGINS) >= 40
