"""``cmbench check``: one line per failed check, a summary per method, exit code 1."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench.plugin import manager as manager_module
from cmbench.plugin.discovery import PluginInfo
from cmbench.testing.processes import why_no_children
from cmbench.testing.suite import CHECKS, LOADING

Command = Callable[..., Any]


#: What does not apply to a consistency model.
NOT_MADE = ("generated data", "flow map", "diffusion model")
FORKED = ("kill and resume", "two processes")


def test_a_good_method_passes_in_one_line(cmbench: Command) -> None:
    names = NOT_MADE if why_no_children() is None else NOT_MADE + FORKED
    done = cmbench("check", "ict", "--dataset", "gmm")
    assert (done.code, done.err) == (0, "")
    counts = f"{len(CHECKS) - len(names)} passed, {len(names)} not made ({', '.join(names)})"
    assert re.fullmatch(re.escape(f"ict on gmm: {counts}, ") + r"[0-9.]+ s\n", done.out)


def test_checks_that_cannot_be_made_say_why(
    cmbench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        why = why_no_children()
    assert why is not None
    assert why.endswith("cannot be forked; set CUDA_VISIBLE_DEVICES= for this check")
    monkeypatch.setattr("cmbench.testing.trainings.why_no_children", lambda: why)
    done = cmbench("check", "ict", "--dataset", "gmm", "--json")
    assert done.code == 0
    skipped = {row["check"]: row["skipped"] for row in json.loads(done.out) if row["skipped"]}
    reasons = dict.fromkeys(FORKED, why)
    assert set(skipped) == {*NOT_MADE, *FORKED}
    assert skipped.items() >= reasons.items()
    assert skipped["diffusion model"] == "the method has no diffusion model"
    assert skipped["generated data"] == "no phase has generated data"


def test_a_bad_method_fails_with_the_line_of_the_contract(cmbench_with_toys: Command) -> None:
    done = cmbench_with_toys("check", "broken-toy", "toy")
    assert done.code == 1
    failed = [line for line in done.out.splitlines() if line.startswith("FAILED ")]
    assert failed[0] == (
        "FAILED method 'broken-toy' on toys, recipes: plugin 'toys' (toy-distribution 1.2.3): "
        "cannot import 'toy:Missing' for method 'broken-toy': AttributeError: module 'toy' has no "
        "attribute 'Missing'; fix or reinstall that distribution "
        "(docs/plugins.md, \"What is checked\", 'recipes')"
    )
    # The toy takes one noise level twice.
    assert [line for line in failed if "broken-toy" not in line] == [
        "FAILED method 'toy' on toys, noise levels: the noise levels of NFE 2 do not descend: "
        "(2.0, 2.0); return them from the largest to the smallest "
        "(docs/plugins.md, \"What is checked\", 'noise levels')"
    ]
    assert re.search(r"^toy on toys: \d+ passed, 1 failed, \d not made \(", done.out, re.MULTILINE)


def test_json_has_every_check(cmbench: Command) -> None:
    done = cmbench("check", "ict", "--dataset", "gmm", "--json")
    rows = json.loads(done.out)
    assert [row["check"] for row in rows] == [check.name for check in CHECKS]
    assert {row["problem"] for row in rows} == {""}


def test_an_unknown_method_is_refused(cmbench: Command) -> None:
    done = cmbench("check", "no-such-method")
    assert done.code == 2
    assert "cmbench check: unknown method 'no-such-method'; allowed: " in done.err


def test_a_plugin_that_cannot_be_loaded_is_a_failed_check(
    cmbench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = PluginInfo("bad", "a_module_that_nobody_has", "bad-distribution", "1.0")
    monkeypatch.setattr(manager_module, "installed_plugins", lambda: [bad])
    done = cmbench("check")
    assert done.code == 1
    assert done.out.startswith("FAILED loading: plugin 'bad' (bad-distribution 1.0): cannot be ")


def test_the_page_lists_every_check_once_and_in_order() -> None:
    text = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
    section = text.partition("## What is checked")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert listed == [LOADING, *(check.name for check in CHECKS)]
