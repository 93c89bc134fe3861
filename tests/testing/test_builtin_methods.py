"""The built-in methods keep the contract, by the checks that anybody's methods are checked with."""

from __future__ import annotations

import pytest

from cmbench.plugin.manager import load_plugins
from cmbench.sweep.recipes import recipe_names
from cmbench.testing import method_tests
from cmbench.testing.case import Subject

PLUGINS = load_plugins()
METHODS = sorted(PLUGINS.methods.specs)

test_contract = method_tests()


@pytest.mark.parametrize("name", METHODS)
def test_one_step_is_planned(name: str) -> None:
    for subject in Subject.all_of(PLUGINS, name):
        assert subject.cells()[0].sampling is not None, "one step is the main case"


#: Methods whose papers have no run on CIFAR-10.
NOT_ON_CIFAR10 = {"mscd"}
#: Methods whose papers have no run on ImageNet-64.
NOT_ON_IMAGENET64 = {"knowledge-distillation"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_recipes(name: str) -> None:
    found = recipe_names(PLUGINS.methods.get(name))
    wanted = {(data, recipe) for data in ("digits", "gmm") for recipe in ("demo", "smoke")}
    published = set() if name in NOT_ON_CIFAR10 else {("cifar10", "paper")}
    assert wanted | published <= set(found)
    if name in NOT_ON_IMAGENET64:
        return
    # Four crops of ImageNet-64 are four datasets: each paper's recipe is with its own.
    assert any(data.startswith("imagenet64") and "paper" in recipe for data, recipe in found)
