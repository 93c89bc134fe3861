"""Every registered method through the same checks, on the shapes of digits and gmm."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from method_kit import (
    DATASETS,
    Case,
    build,
    context,
    method_names,
    plan_or_reason,
    plugins,
    progress,
)

from cmbench.errors import Declined
from cmbench.plugin.method import Teacher
from cmbench.sampling import Sampler
from cmbench.sweep.planning import plan_run
from cmbench.sweep.recipes import recipe_names
from cmbench.sweep.runs import TrainingKit
from cmbench.training.randomness import StepDraws, seed_global

CASES = [
    pytest.param(name, dataset, conditional, id=f"{name}-{dataset}-{'cond' * conditional or 'un'}")
    for name in method_names()
    for dataset in DATASETS
    for conditional in (False, True)
]
methods = pytest.mark.parametrize(("name", "dataset", "conditional"), CASES)


def losses(case: Case, position: int = 0) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yield the loss of each objective of each phase, with what it trains.

    A phase may change weights when it begins: losses are differentiated before the next phase, and
    the weights are as before at the end.
    """
    state = case.state()
    before = {n: copy.deepcopy(m.state_dict()) for n, m in case.modules.items()}
    for index, phase in enumerate(state.phases):
        state.enter(index)
        for objective in phase.objectives:
            seed_global("dropout", position)
            draws = StepDraws(0, position)
            loss = objective.loss(case.nets, case.batch(), draws, progress())
            yield objective.trains, loss
    for name, module in case.modules.items():
        module.load_state_dict(before[name])


@methods
def test_loss_is_one_finite_number_an_image_with_gradients_where_it_trains(
    name: str, dataset: str, conditional: bool
) -> None:
    case = build(name, dataset, conditional=conditional)
    teacher = case.teacher.network if case.teacher else None
    for trains, loss in losses(case):
        assert loss.shape == (6,)
        assert bool(torch.isfinite(loss).all())
        for module in case.modules.values():
            module.zero_grad(set_to_none=True)
        loss.sum().backward()
        for key, module in case.modules.items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if key in trains:
                assert any(bool((g != 0).any()) for g in gradients), f"{key} learns nothing"
                assert all(bool(torch.isfinite(g).all()) for g in gradients)
            else:
                assert not gradients, f"{key} is not trained but has a gradient"
    if teacher is not None:
        assert all(p.grad is None for p in teacher.parameters())


@methods
def test_loss_is_decided_by_its_draws(name: str, dataset: str, conditional: bool) -> None:
    case = build(name, dataset, conditional=conditional, network={"dropout": 0.3})
    first, again, other = (list(losses(case, position)) for position in (0, 0, 64))
    for (_, a), (_, b), (_, c) in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def sampler(case: Case, nfe: int) -> Sampler:
    """Return a sampler of the method's plan."""
    classes = case.data.num_classes

    def labels(start: int, count: int) -> torch.Tensor | None:
        return torch.arange(start, start + count) % classes if classes else None

    plan = case.method.plan_sampling(nfe)
    return Sampler(case.method, case.modules, plan, seed=3, labels=labels)


@methods
def test_evaluations_are_as_declared_or_declined_with_a_reason(
    name: str, dataset: str, conditional: bool
) -> None:
    case = build(name, dataset, conditional=conditional)
    for nfe in (1, 2, 3, 4):
        plan = plan_or_reason(case.method, nfe)
        if isinstance(plan, str):
            assert nfe > 1, "one step is the main case"
            assert len(plan) > 20
            continue
        made = sampler(case, nfe)
        assert made.plan.nfe == nfe
        assert list(made.plan.sigmas) == sorted(made.plan.sigmas, reverse=True)
        images = made.make(0, 3).images
        made.check_nfe()
        assert images.dtype == torch.float32
        assert images.shape == (3, *case.data.data_shape)


@methods
def test_an_image_does_not_depend_on_its_batch(name: str, dataset: str, conditional: bool) -> None:
    case = build(name, dataset, conditional=conditional)
    for nfe in (1, 2):
        if isinstance(plan_or_reason(case.method, nfe), str):
            assert nfe > 1
            continue
        together = sampler(case, nfe).make(0, 5).images
        split = sampler(case, nfe)
        apart = torch.cat([split.make(start, count).images for start, count in ((3, 2), (0, 3))])
        torch.testing.assert_close(apart[[2, 3, 4, 0, 1]], together, rtol=1e-4, atol=1e-4)


@methods
def test_plans_that_cannot_be_are_declined(name: str, dataset: str, conditional: bool) -> None:
    method = build(name, dataset, conditional=conditional).method
    with pytest.raises(Declined, match="soduko"):
        method.plan_sampling(1, sampler="soduko")
    with pytest.raises(Declined, match=r"noise levels"):
        method.plan_sampling(1, sigmas=(80.0, 2.0, 0.5))


RECIPES = [
    (name, dataset, recipe)
    for name in method_names()
    for dataset, recipe in recipe_names(plugins().methods.get(name))
]


@pytest.mark.parametrize(("name", "dataset", "recipe"), RECIPES)
def test_every_recipe_is_valid(name: str, dataset: str, recipe: str) -> None:
    """Config, network and teacher: everything is built as the harness does, without memory."""
    ctx = context()
    plan = plan_run(ctx, name, dataset, recipe, 0)
    with torch.device("meta"):
        teacher = None
        if plan.teacher is not None and plan.teacher.run is not None:
            taught = plan.teacher.run.method(ctx)
            modules = taught.build(TrainingKit(ctx, plan.teacher.run, taught.data, None))
            teacher = Teacher("teacher", taught.diffusion_model(modules), modules["model"])
        method = plan.method(ctx)
        student = method.build(TrainingKit(ctx, plan, method.data, teacher))["model"]
    assert sum(p.numel() for p in student.parameters()) > 0
    assert method.plan_sampling(1).nfe == 1


#: Methods whose papers have no run on CIFAR-10.
NOT_ON_CIFAR10 = {"mscd"}


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_its_recipes(name: str) -> None:
    found = recipe_names(plugins().methods.get(name))
    wanted = {(data, recipe) for data in DATASETS for recipe in ("demo", "smoke")}
    published = set() if name in NOT_ON_CIFAR10 else {("cifar10", "paper")}
    assert wanted | published <= set(found)
    # Four crops of ImageNet-64 are four datasets: each paper's recipe is with its own.
    assert any(data.startswith("imagenet64") and "paper" in recipe for data, recipe in found)
