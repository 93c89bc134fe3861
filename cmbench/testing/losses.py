"""Checks of the loss: one value per image, decided by its draws, with gradients where it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from cmbench.plugin.method import Batch, Objective
from cmbench.testing.building import same, scramble
from cmbench.testing.case import Case, Subject, rows
from cmbench.testing.check import CheckFailure
from cmbench.testing.draws import RowDraws
from cmbench.training.loop import require_one_per_image
from cmbench.training.state import TrainingState

#: float32 in another order, relative to the largest loss of the batch.
TOLERANCE = 1e-3


def every_loss(case: Case) -> Iterator[tuple[str, Objective, Callable[[Batch, RowDraws], Tensor]]]:
    """Yield each objective of each phase, with its name and a function that returns its loss."""
    for state, objective in case.objectives():
        trains = ", ".join(objective.trains)
        who = f"the loss of phase {state.phase.name!r} that trains {trains}"
        yield who, objective, partial(checked_loss, case, state, objective)


def checked_loss(
    case: Case, state: TrainingState, objective: Objective, batch: Batch, draws: RowDraws
) -> Tensor:
    """Return the loss ``[N]``; raise unless it is one graded value per image."""
    found = case.loss(objective, batch, draws)
    require_one_per_image(state, found, len(batch.images))
    return found


def case_draws(case: Case, seed: int = 0) -> RowDraws:
    """Return the draws of a training step."""
    return RowDraws(range(case.batch_size), seed)


def seeded_loss(subject: Subject) -> None:
    """The loss is finite, the same wherever the global generators are, and changes no image."""
    case = subject.case()
    for who, objective, loss in every_loss(case):
        scramble(4)
        batch, draws = case.batch(), case_draws(case)
        first = loss(batch, draws).detach()
        if not same(batch.images, case.batch().images):
            raise CheckFailure(f"{who} changes batch.images", "compute with copies of the images")
        if not bool(torch.isfinite(first).all()):
            raise CheckFailure(f"{who} is not finite: {first.tolist()}", "guard its divisions")
        scramble(5)
        # Past require_one_per_image and the harness's own seed: as if it drew from elsewhere.
        again = case.loss(objective, case.batch(), case_draws(case), seed=1).detach()
        if not same(first, again):
            raise CheckFailure(
                f"{who} changes with the global generators",
                "draw with draws.normal and draws.uniform only",
            )
        other = loss(case.batch(), case_draws(case, seed=1)).detach()
        # Pairs have their noise already: a loss of them may draw nothing.
        if same(first, other) and (draws.asked or not case.generated):
            raise CheckFailure(
                f"{who} is the same for other draws", "use the noise that draws.normal gives"
            )


def draw_names(subject: Subject) -> None:
    """A loss asks for each draw by a name of its own."""
    case = subject.case()
    for who, _, loss in every_loss(case):
        draws = case_draws(case)
        loss(case.batch(), draws)
        require_distinct(who, draws.asked)


def require_distinct(who: str, asked: list[str]) -> None:
    """Raise if a name was drawn twice."""
    twice = [name for name in dict.fromkeys(asked) if asked.count(name) > 1]
    if twice:
        raise CheckFailure(
            f"{who} draws {twice[0]!r} more than once, which gives the same numbers again",
            "give each draw its own name, or keep the first result",
        )


def independent_images(subject: Subject) -> None:
    """The loss of an image does not depend on the other images of its batch, or of its group."""
    case = subject.case()
    for who, _, loss in every_loss(case):
        together = loss(case.batch(), case_draws(case)).detach()
        halves = [
            loss(rows(case.batch(), slice(i, i + case.shard)), RowDraws(range(i, i + case.shard)))
            for i in range(0, case.batch_size, case.shard)
        ]
        gap = (torch.cat(halves).detach() - together).abs().max() / together.abs().max()
        if gap > TOLERANCE:
            raise CheckFailure(
                f"{who} of a batch differs from that of its halves by {float(gap):.1%}",
                "compute each image's value from that image alone: no means, ranks or batch norms "
                "over the batch; a loss of sets of images declares its group size",
            )


def gradients(subject: Subject) -> None:
    """Every trained module receives a gradient, and nothing else does."""
    case = subject.case()
    for state, objective in case.objectives():
        who = f"phase {state.phase.name!r}"
        for _, parameter in all_parameters(case):
            parameter.grad = None
        loss = checked_loss(case, state, objective, case.batch(), case_draws(case))
        loss.sum().backward()  # type: ignore[no-untyped-call]
        for name, module in case.modules.items():
            _check_module(who, name, module, name in objective.trains)
        _require_nothing_beside(who, case)


def _check_module(who: str, name: str, module: nn.Module, trained: bool) -> None:
    found = [p.grad for p in module.parameters() if p.grad is not None]
    if trained and not any(bool((g != 0).any()) for g in found):
        raise CheckFailure(
            f"{who} trains module {name!r}, which receives no gradient",
            "use it in the loss without detaching it, or leave it out of trains",
        )
    if not all(bool(torch.isfinite(g).all()) for g in found):
        raise CheckFailure(
            f"{who} gives module {name!r} a gradient that is not finite", "guard square roots at 0"
        )
    if found and not trained:
        raise CheckFailure(
            f"{who} does not train module {name!r}, which receives a gradient",
            "evaluate it under torch.no_grad(), or add its name to trains",
        )


def all_parameters(case: Case) -> list[tuple[str, nn.Parameter]]:
    """Return every parameter within reach of the method, with where it is."""
    owners: dict[str, object] = {f"module {name!r}": m for name, m in case.modules.items()}
    for name, value in vars(case.method).items():
        parts = value if isinstance(value, list | tuple) else (value,)
        owners |= {f"attribute {name!r}" + " " * i: part for i, part in enumerate(parts)}
    if case.teacher is not None:
        owners["the teacher"] = case.teacher.network
    found = []
    for where, owner in owners.items():
        own = owner.parameters() if isinstance(owner, nn.Module) else (owner,)
        found += [(where.strip(), p) for p in own if isinstance(p, nn.Parameter)]
    return found


def _require_nothing_beside(who: str, case: Case) -> None:
    built = {id(p) for module in case.modules.values() for p in module.parameters()}
    for where, parameter in all_parameters(case):
        if id(parameter) not in built and parameter.grad is not None:
            raise CheckFailure(
                f"{who} gives {where} a gradient, but build did not return it: it is never trained",
                "return it from build and name it in trains, or freeze it",
            )


def labels(subject: Subject) -> str | None:
    """Other labels give another loss, and without labels there is one too."""
    if not subject.conditional:
        return "the data have no labels, or the method takes none"
    case = subject.case()
    for who, _, loss in every_loss(case):
        batch = case.batch()
        assert batch.labels is not None
        first = loss(batch, case_draws(case)).detach()
        other = loss(replace(batch, labels=batch.labels.roll(1)), case_draws(case)).detach()
        if same(first, other):
            raise CheckFailure(
                f"{who} does not change with the labels",
                "pass batch.labels to the network, or refuse conditional = true",
            )
    if (without := subject.unconditional()) is not None:
        for _, _, loss in every_loss(without):
            loss(without.batch(), case_draws(without))
    return None
