"""Deliberate mistakes: each is reported, by the check that is meant for it, with what to change."""

from __future__ import annotations

import pytest
from mistakes import MISTAKES, TAUGHT, Good, Mistaken, method_name

from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.plugin.method import Method
from cmbench.testing.check import SECTION
from cmbench.testing.suite import CHECKS, Subject, make_check

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
    assert (found.problem, found.skipped) == ("", "")


def test_there_are_forty() -> None:
    assert len(MISTAKES) >= 40
