"""Checks of sampling: plans, counted evaluations, and images that depend on their seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cmbench.errors import Declined
from cmbench.networks.counted import SampledNetworks
from cmbench.plugin.method import SamplingPlan
from cmbench.sampling.draws import ImageDraws
from cmbench.sampling.stream import Sampler
from cmbench.sweep.planning import NO_REASON
from cmbench.sweep.run_files import MAIN
from cmbench.testing.building import first_difference, same, scramble, tensors_of
from cmbench.testing.case import Case, Subject
from cmbench.testing.check import CheckFailure
from cmbench.testing.draws import RowDraws
from cmbench.testing.losses import require_distinct

#: Of image values, for batches of another size: float32 sums in another order.
TOLERANCE = 1e-3
COUNT, SEED = 5, 3
#: A reason shorter than this tells nobody anything.
_REASON = 15
#: A name that no sampler has.
_NO_SAMPLER = "no-such-sampler"


def plans(subject: Subject) -> list[SamplingPlan]:
    """Return the plans of NFE 1 to 8 that the method makes; at least one.

    Raises:
        CheckFailure: a plan is not valid, or a reason to decline says nothing.
    """
    found = []
    for cell in subject.cells():
        if cell.broken:
            raise CheckFailure(cell.broken, "see SamplingPlan in cmbench.plugin.method")
        if cell.sampling is not None:
            found.append(cell.sampling)
        elif cell.declined == NO_REASON or len(cell.declined) < _REASON:
            raise CheckFailure(
                f"NFE {cell.nfe} is declined with the reason {cell.declined!r}",
                "say in Declined(...) which budgets can be spent",
            )
    if not found:
        raise CheckFailure("every NFE from 1 to 8 is declined", "plan at least one of them")
    return found


def sampler(case: Case, plan: SamplingPlan, *, rolled: int = 0, precision: str = "fp32") -> Sampler:
    """Return the harness's sampler; ``rolled`` gives every image another class."""
    classes = case.data.num_classes

    def labels(start: int, count: int) -> Tensor | None:
        return (torch.arange(start, start + count) + rolled) % classes if classes else None

    return Sampler(case.method, case.modules, plan, seed=SEED, labels=labels, precision=precision)


def with_each_plan(
    subject: Subject, most: int = 2, case: Case | None = None
) -> Iterator[tuple[Case, SamplingPlan]]:
    """Yield the method, built once, with its first plans and its last one."""
    case = case or subject.case()
    found = plans(subject)
    for plan in dict.fromkeys((*found[:most], found[-1])):
        yield case, plan


def counted_nfe(subject: Subject) -> None:
    """Every plan from NFE 1 to 8 costs what it declares and returns float32 images."""
    for case, plan in with_each_plan(subject, most=8):
        made = sampler(case, plan)
        images = made.make(0, 3).images
        made.check_nfe()
        if images.dtype != torch.float32:
            raise CheckFailure(
                f"sample at NFE {plan.nfe} returns {images.dtype}", "return it as noise.dtype"
            )


def noise_levels(subject: Subject) -> None:
    """Noise levels descend, those that are asked for are used, unknown samplers are declined."""
    for case, plan in with_each_plan(subject, most=8):
        if any(a <= b for a, b in pairwise(plan.sigmas)):
            raise CheckFailure(
                f"the noise levels of NFE {plan.nfe} do not descend: {plan.sigmas}",
                "return them from the largest to the smallest",
            )
        asked = tuple(0.9 * sigma for sigma in plan.sigmas) or (1.0,) * plan.nfe
        try:
            given = case.method.plan_sampling(plan.nfe, sigmas=asked).sigmas
        except Declined:
            continue
        if tuple(given) != asked:
            raise CheckFailure(
                f"plan_sampling({plan.nfe}, sigmas={asked}) plans {tuple(given)} instead",
                "use the noise levels that are given, or raise Declined",
            )
    try:
        case.method.plan_sampling(plan.nfe, sampler=_NO_SAMPLER)
    except Declined:
        return
    raise CheckFailure(
        f"plan_sampling accepts sampler={_NO_SAMPLER!r}",
        "raise Declined for every name but the method's own",
    )


def exports(subject: Subject) -> None:
    """The variant that a plan names is exported by a phase."""
    case = subject.case()
    there = {"", MAIN, *(p.export for p in case.state().phases if p.export is not None)}
    for plan in plans(subject):
        if plan.variant not in there:
            raise CheckFailure(
                f"NFE {plan.nfe} samples the variant {plan.variant!r}, which no phase exports",
                f"give a phase that export, or plan one of {sorted(there - {''})}",
            )


def batch_size(subject: Subject) -> None:
    """An image does not depend on the batch that it is made in."""
    for case, plan in with_each_plan(subject):
        made = sampler(case, plan)
        together = made.make(0, COUNT).images
        alone = torch.cat([made.make(index, 1).images for index in range(COUNT)])
        gap = float((alone - together).abs().max() / together.abs().max().clamp_min(1e-6))
        if gap > TOLERANCE:
            raise CheckFailure(
                f"at NFE {plan.nfe} an image alone differs by {gap:.1%} from the same image in a "
                f"batch of {COUNT}",
                "compute each image from its own noise, label and draws",
            )


def seeded_samples(subject: Subject) -> None:
    """An image is decided by its noise, label and draws, not by what was made before."""
    for case, plan in with_each_plan(subject):
        made, found = sampler(case, plan), []
        for seed in (1, 2):
            scramble(seed)
            found.append(made.make(0, COUNT).images.clone())
        if not same(*found):
            raise CheckFailure(
                f"sample at NFE {plan.nfe} gives other images for the same noise",
                "draw with draws.normal only, and keep nothing between calls",
            )


def sampling_draws(subject: Subject) -> None:
    """``sample`` asks for each draw by a name of its own, and not for its starting noise again."""
    for case, plan in with_each_plan(subject):
        draws = RowDraws(range(COUNT))
        noise, labels = RowDraws(range(COUNT)).normal("noise", _images(case)), _labels(case)
        names = case.method.sampled_modules(case.modules)
        nets = SampledNetworks(subject.name, case.modules, names)
        with torch.no_grad():
            case.method.sample(nets, noise, labels, plan, draws)
        require_distinct(f"sample at NFE {plan.nfe}", draws.asked)
        if "noise" in draws.asked:
            raise CheckFailure(
                f"sample at NFE {plan.nfe} draws 'noise', which is the noise that it starts from",
                "give later noise another name, for example 'step-1'",
            )


def _images(case: Case, count: int = COUNT) -> Tensor:
    return torch.zeros(count, *case.data.data_shape)


def _labels(case: Case, indices: Sequence[int] = range(COUNT)) -> Tensor | None:
    classes = case.data.num_classes
    return torch.tensor([i % classes for i in indices]) if classes else None


def unchanged(subject: Subject) -> None:
    """``sample`` changes neither weights nor buffers, noise or labels."""
    for case, plan in with_each_plan(subject):
        before, made = tensors_of(case.modules), sampler(case, plan).make(0, COUNT)
        changed = first_difference(before, tensors_of(case.modules))
        if changed is not None:
            raise CheckFailure(
                f"sample at NFE {plan.nfe} changes {changed!r}",
                "update weights and buffers in the loss or in after_step only",
            )
        given = ImageDraws(SEED, range(COUNT)).normal("noise", _images(case))
        if made.noise is not None and not same(made.noise, given):
            raise CheckFailure(
                f"sample at NFE {plan.nfe} changes its noise",
                "write x = noise * sigma instead of noise *= sigma",
            )
        expected = _labels(case)
        if made.labels is not None and expected is not None and not same(made.labels, expected):
            raise CheckFailure(f"sample at NFE {plan.nfe} changes its labels", "copy them first")


def labels_of_samples(subject: Subject) -> str | None:
    """Other labels give other images, and without labels there are images too."""
    if not subject.conditional:
        return "the data have no labels, or the method takes none"
    for case, plan in with_each_plan(subject):
        first, other = (sampler(case, plan, rolled=r).make(0, COUNT).images for r in (0, 1))
        if same(first, other):
            raise CheckFailure(
                f"sample at NFE {plan.nfe} does not change with the labels",
                "pass labels to the network, or refuse conditional = true",
            )
    if (without := subject.unconditional()) is not None:
        for case, plan in with_each_plan(subject, case=without):
            sampler(case, plan).make(0, COUNT)
    return None
