"""Sweeps: several values of an option or several samplers, each with cells of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cmbench.errors import UserError
from cmbench.records.options import AnyOf, parse_values
from cmbench.records.workspace import Workspace
from cmbench.sweep.asked import as_options
from cmbench.sweep.combinations import MAX_RUNS, combinations
from cmbench.sweep.context import Context
from cmbench.sweep.recipes import parse_overrides
from cmbench.sweep.sweep import SweepRequest, plan_sweep


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3,3e-3", AnyOf((1e-3, 3e-3))),
        ("1e-3, 3e-3,1e-3", AnyOf((1e-3, 3e-3))),
        ("adam,radam", AnyOf(("adam", "radam"))),
        ("none,1", AnyOf((None, 1))),
        ("[1,2]", [1, 2]),
        ("[1,2],[3]", AnyOf(([1, 2], [3]))),
        ("{a=1,b=2}", {"a": 1, "b": 2}),
        ('"a,b"', "a,b"),
        ("'a,b'", "a,b"),
        (r'"a\",b"', 'a",b'),
        (r'"a\\",b', AnyOf(("a\\", "b"))),
        ("'a,b',c", AnyOf(("a,b", "c"))),
        ("f(1,2)", "f(1,2)"),
        ("1", 1),
        ("", ""),
    ],
)
def test_outer_commas_separate_values(text: str, value: Any) -> None:
    assert parse_values(text) == value


def test_combinations_are_the_product_with_the_last_option_first() -> None:
    given = parse_overrides(["a.b=1,2", "c=x", "d=[3,4]", "e=[5,6]"], several=True)
    found = combinations(given, lambda key: key == "e")
    assert [(t["a"]["b"], t["c"], t["d"], t["e"]) for t in found] == [
        (b, "x", d, [5, 6]) for b in (1, 2) for d in (3, 4)
    ]
    assert combinations({"a": [1, True]}, lambda _: False) == [{"a": 1}, {"a": True}]
    assert combinations({}, lambda _: False) == [{}]


def test_too_many_combinations_are_refused_before_they_are_made() -> None:
    values = list(range(100_000))
    with pytest.raises(UserError, match=rf"make 10,000,000,000 runs .* at most {MAX_RUNS:,}"):
        combinations({"a": values, "b": AnyOf(tuple(values))}, lambda _: False)


def lrs(context: Context, overrides: Any, seeds: Sequence[int]) -> list[tuple[float, int]]:
    if isinstance(overrides, dict):
        overrides = as_options(overrides)
    asked = SweepRequest(("toy",), "toys", nfes=(1,), seeds=seeds, overrides=overrides)
    plan = plan_sweep(context, asked)
    return [(run.table["optimizer"]["lr"], run.seed) for run in plan.runs]


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.lr=1e-3,3e-3",),
        ("optimizer.lr=[1e-3,3e-3]",),
        {"optimizer": {"lr": [1e-3, 3e-3]}},
        {"optimizer": {"lr": (1e-3, 3e-3)}},
        ("optimizer.lr=1e-3,0.003,0.001",),
        {"optimizer.lr": [1e-3, 3e-3, 1e-3]},
    ],
)
def test_each_value_makes_runs_of_its_own(toys: Context, overrides: Any) -> None:
    found = lrs(toys, overrides=overrides, seeds=(0, 1))
    assert found == [(1e-3, 0), (1e-3, 1), (3e-3, 0), (3e-3, 1)]


def test_an_option_that_takes_a_list_receives_it(toys: Context) -> None:
    asked = SweepRequest(("toy",), "toys", nfes=(1,), overrides=("optimizer.betas=[0.8,0.9]",))
    (run,) = plan_sweep(toys, asked).runs
    assert run.table["optimizer"]["betas"] == [0.8, 0.9]
    asked = SweepRequest(
        ("toy",), "toys", nfes=(1,), overrides=("optimizer.betas=[0.8,0.9],[0.9,0.99]",)
    )
    assert len(plan_sweep(toys, asked).runs) == 2


def test_options_of_networks_are_swept_too(toys: Context) -> None:
    asked = SweepRequest(("toy",), "toys", nfes=(1,), overrides={"network": {"width": [16, 32]}})
    assert [run.table["network"]["width"] for run in plan_sweep(toys, asked).runs] == [16, 32]


def test_each_sampler_has_cells_of_its_own_in_the_job_of_the_run(toys: Context) -> None:
    asked = SweepRequest(("toy",), "toys", nfes=(1, 2), samplers=("toy", "other"))
    (job,) = plan_sweep(toys, asked).jobs
    assert [(c.sampling.sampler, c.nfe) for c in job if c.sampling] == [
        ("toy", 1),
        ("toy", 2),
        ("other", 1),
        ("other", 2),
    ]
    assert len({cell.cell for cell in job}) == 4


def test_a_sampler_that_no_method_has_is_refused_beside_one_that_it_has(context: Context) -> None:
    asked = SweepRequest(("edm",), "digits", nfes=(3,), samplers=("heun", "nope"))
    with pytest.raises(UserError, match="--sampler nope: no cell supports these settings"):
        plan_sweep(context, asked)


def test_a_sweep_is_carried_out_and_found_finished(
    cmbench_with_toys: Callable[..., Any], workspace: Workspace
) -> None:
    words = ("run", "-m", "toy", "-d", "toys", "--nfe", "1", "--no-report", "-q")
    words += ("-o", "optimizer.lr=1e-3,3e-3", "--sampler", "toy,other")
    done = cmbench_with_toys(*words)
    assert done.code == 0, done.err
    assert len(list(workspace.records("toys").glob("*.json"))) == 4
    assert cmbench_with_toys(*words).out == done.out
