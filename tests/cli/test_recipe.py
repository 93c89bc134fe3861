"""``cmbench recipe``: list, show, diff, export."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmbench.plugin.manager import load_plugins
from cmbench.sweep.recipes import recipe_names

Command = Callable[..., Any]
RECIPES = [
    (name, f"{dataset}.{recipe}")
    for name, spec in load_plugins().methods.specs.items()
    for dataset, recipe in recipe_names(spec)
]


def entries(cmbench: Command, *words: str) -> dict[str, dict[str, Any]]:
    done = cmbench("recipe", "show", *words, "--json")
    assert done.code == 0, done.err
    return {entry["key"]: entry for entry in json.loads(done.out)}


def test_every_recipe_of_a_method_is_listed(cmbench: Command) -> None:
    lines = cmbench("recipe", "list", "ict").out.splitlines()[1:]
    found = [line.split()[0] for line in lines]
    assert found == [recipe for method, recipe in RECIPES if method == "ict"]
    assert {line.split()[0] for line in lines if line.endswith("default")} >= {"digits.demo"}


@pytest.mark.parametrize(("method", "recipe"), RECIPES)
def test_every_recipe_is_shown_with_the_meaning_of_every_value(
    cmbench: Command, method: str, recipe: str
) -> None:
    found = entries(cmbench, method, recipe)
    assert {"network.name", "batch_size", "duration_kimg", "optimizer.lr", "ema"} <= found.keys()
    assert all(entry["meaning"] for entry in found.values())
    assert {entry["origin"] for entry in found.values()} > {"default"}


def test_values_have_their_origin_and_default(cmbench: Command) -> None:
    found = entries(cmbench, "sct", "digits.smoke", "-o", "optimizer.lr=0.5")
    picked = {key: (e["value"], e["origin"], e["default"]) for key, e in found.items()}
    assert picked["duration_kimg"] == (2.56, "digits.smoke", None)
    assert found["duration_kimg"]["required"]
    assert picked["batch_size"] == (128, "digits.demo", 128)
    assert picked["optimizer.eps"] == (1e-8, "base", 1e-8)
    assert picked["optimizer.lr"] == (0.5, "-o", 1e-3)
    assert picked["p_mean"] == (-1.0, "default", -1.0)
    assert found["batch_size"]["meaning"] == "images per training step, over all processes"
    assert all(entry["paper"] is None for entry in found.values())
    text = cmbench("recipe", "show", "sct", "digits.smoke").out.splitlines()
    assert text[0].split() == ["key", "value", "from", "default", "meaning"]
    assert text[1].split()[:4] == ["network.name", "unet-tiny", "digits.demo", "required"]


def test_the_papers_values_stand_beside_others(cmbench: Command, tmp_path: Path) -> None:
    found = entries(cmbench, "ict", "cifar10.paper")
    assert all(entry["paper"] is None for entry in found.values()), "it is the paper's"
    method, recipe = next(
        (m, r)
        for m, r in RECIPES
        if not r.endswith(".paper") and (m, f"{r.partition('.')[0]}.paper") in RECIPES
    )
    others = entries(cmbench, method, recipe)
    paper = entries(cmbench, method, f"{recipe.partition('.')[0]}.paper")
    assert {k: e["paper"] for k, e in others.items() if k in paper} == {
        k: paper[k]["value"] for k in others if k in paper
    }
    assert "paper" in cmbench("recipe", "show", method, recipe).out.splitlines()[0].split()


def test_a_dataset_alone_means_its_default_recipe(cmbench: Command) -> None:
    assert entries(cmbench, "ict", "digits") == entries(cmbench, "ict", "digits.demo")


def test_differences_of_two_recipes(cmbench: Command) -> None:
    lines = cmbench("recipe", "diff", "ict:digits.demo", "ict:digits.smoke").out.splitlines()
    assert [line.split() for line in lines] == [
        ["key", "ict:digits.demo", "ict:digits.smoke"],
        ["duration_kimg", "256.0", "2.56"],
    ]
    across = cmbench("recipe", "diff", "ict:digits", "edm:digits").out
    assert any(line.split()[0] == "p_mean" for line in across.splitlines())


@pytest.mark.parametrize(("method", "recipe"), [("sct", "digits.smoke"), ("pd", "digits.demo")])
def test_an_exported_recipe_is_the_same_run(
    cmbench: Command, tmp_path: Path, method: str, recipe: str
) -> None:
    file = tmp_path / "mine.toml"
    done = cmbench("recipe", "export", method, recipe, str(file))
    assert done.code == 0, done.err
    dataset, _, name = recipe.partition(".")
    assert done.out.endswith(f"`cmbench run -m {method} -d {dataset} --recipe {file}:{name}`\n")
    table = tomllib.loads(file.read_text())[dataset][name]
    assert table["network"]["name"] == "unet-tiny"
    plans = [
        cmbench("run", "-m", method, "-d", dataset, "-r", r, "--dry-run").out.split("\n\n")[0]
        for r in (name, f"{file}:{name}")
    ]
    assert plans[0] == plans[1]
    changed = cmbench("recipe", "export", method, recipe, str(file), "-o", "optimizer.lr=0.5")
    assert (changed.code, "exists" in changed.err) == (2, True)
    again = ("recipe", "export", method, recipe, str(file), "-o", "optimizer.lr=0.5", "--force")
    assert cmbench(*again).code == 0
    assert tomllib.loads(file.read_text())[dataset][name]["optimizer"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "itc", "digits"), "unknown method 'itc'"),
        (("show", "ict", "digits.dmeo"), "unknown recipe 'digits.dmeo'; allowed: digits.demo"),
        (("show", "ict", "nothing"), "unknown recipe 'nothing'"),
        (("show", "ict", "digits", "-o", "optimizer.lrr=1"), "optimizer.lrr: unknown key"),
        (("show", "ict", "digits", "-o", "lr"), "'lr' is not key=value"),
        (("diff", "ict", "edm:digits"), "cmbench recipe diff: 'ict'; allowed: METHOD:DATASET"),
        (("export", "ict", "digits", "x.json"), "x.json is not named FILE.toml"),
        (
            ("export", "ict", "digits", "/proc/no/x.toml"),
            "cannot write /proc/no/x.toml: No such file",
        ),
        (("list", "itc"), "unknown method 'itc'"),
    ],
)
def test_bad_requests_are_one_line(cmbench: Command, words: tuple[str, ...], message: str) -> None:
    done = cmbench("recipe", *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
