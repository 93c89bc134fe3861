"""The check of generated data: pairs depend on their own noise and label only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import GeneratedData
from cmbench.testing.building import same, scramble
from cmbench.testing.case import Case, Subject, trainer
from cmbench.testing.check import CheckFailure
from cmbench.training.generating import PairMaker
from cmbench.training.state import TrainingState

#: Of image values, for batches of another size: float32 sums in another order.
TOLERANCE = 1e-3
COUNT = 5


def generated_data(subject: Subject) -> str | None:
    """Pairs have the declared shape and cost, are finite, and depend on nothing beside."""
    case, found = subject.case(), False
    for state, wanted in _phases_with_pairs(case):
        _check_pairs(f"phase {state.phase.name!r}", case, wanted)
        found = True
    return None if found else "no phase has generated data"


def _phases_with_pairs(case: Case) -> Iterator[tuple[TrainingState, GeneratedData]]:
    ready = trainer(case)
    for index in range(len(ready.state.phases)):
        ready.state.enter(index, start=ready.phase_start(index))
        if ready.state.phase.generated is not None:
            yield ready.state, ready.state.phase.generated
        ready.watchers.phase_done(ready.state)


def _check_pairs(who: str, case: Case, wanted: GeneratedData) -> None:
    nets = case.nets
    taught = getattr(case.teacher.model, "network", None) if case.teacher is not None else None
    counted = [*nets.values(), *([taught] if isinstance(taught, CountedNetwork) else [])]
    maker = PairMaker(nets, counted, torch.device("cpu"), COUNT)
    batch = case.batch(COUNT)
    noise, labels = torch.randn(batch.images.shape, generator=_generator()), batch.labels

    def made(rows: slice) -> Tensor:
        return maker.images(wanted, noise[rows], None if labels is None else labels[rows])

    scramble(4)
    together = made(slice(None))
    if not bool(torch.isfinite(together).all()):
        raise CheckFailure(f"{who}: make returns images that are not finite", "check the solver")
    scramble(5)
    if not same(together, made(slice(None))):
        raise CheckFailure(
            f"{who}: make changes with the global generators",
            "use the noise that it is given, and no other",
        )
    alone = torch.cat([made(slice(i, i + 1)) for i in range(COUNT)])
    gap = float((alone - together).abs().max() / together.abs().max().clamp_min(1e-6))
    if gap > TOLERANCE:
        raise CheckFailure(
            f"{who}: the images that make returns alone differ by {gap:.1%} from the same in a "
            f"batch of {COUNT}",
            "compute each image from its own noise and label",
        )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
