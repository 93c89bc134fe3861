"""The check that augmentation labels describe augmentations, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from cmbench.testing.case import Case, Subject
from cmbench.testing.check import CheckFailure
from cmbench.testing.losses import case_draws, every_loss
from cmbench.testing.samples import sampler, with_each_plan

#: Position among a network's arguments: ``(x, c_noise, labels, augment_labels)``.
_POSITION = 3


@contextmanager
def _watched(case: Case, who: str) -> Iterator[None]:
    """Raise if a network is given augmentation labels other than zero meanwhile."""

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("augment_labels", args[_POSITION] if len(args) > _POSITION else None)
        if isinstance(given, Tensor) and bool((given != 0).any()):
            raise CheckFailure(
                f"{who} gives a network augment_labels, and the batch has none",
                "name further scalars in kit.network(conditions=...) and pass them as conditions",
            )

    modules = case.modules.values()
    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def augmentation_labels(subject: Subject) -> None:
    """Networks receive the augmentation labels of the batch, and none of the method's own."""
    case = subject.case()
    for who, _, loss in every_loss(case):
        with _watched(case, who):
            loss(case.batch(), case_draws(case))
    for made, plan in with_each_plan(subject):
        with _watched(made, f"sample at NFE {plan.nfe}"):
            sampler(made, plan).make(0, 2)
