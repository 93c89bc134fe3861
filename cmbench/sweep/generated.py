"""Where a run's generated data are stored, and what decides them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.errors import UserError
from cmbench.plugin.method import Phase, Teacher
from cmbench.sampling.guards import weights_sha256
from cmbench.sweep.context import Context
from cmbench.sweep.plans import RunPlan
from cmbench.training.pairs import SEED, PairRoot
from cmbench.training.state import TrainingState


def pair_root(
    context: Context, plan: RunPlan, dataset: Dataset, state: TrainingState, teacher: Teacher | None
) -> PairRoot:
    """Return where the phases of a run store their generated data."""
    config = plan.config
    about = {
        "dataset": plan.dataset,
        "dataset_sha256": dataset.sha256,
        "network": config.network,
        "precision": config.precision,
        "sigma_data": state.method.sigma_data,
    }
    folder = context.workspace.generated / plan.dataset
    task = f"{plan.run_id}, generated data"

    begun = set[str]()

    def progress(done: int, total: int) -> None:
        if not context.world.leads:
            return
        if task not in begun:
            begun.add(task)
            context.reporter.task_started(task, f"generate data for {plan.name}", total)
        context.reporter.task_progress(task, done, {})
        if done >= total:
            context.reporter.task_finished(task)
            begun.remove(task)

    return PairRoot(
        folder,
        about,
        partial(teacher_content, teacher),
        partial(module_content, state),
        plan.data_info(context).data_shape,
        partial(labels_of, dataset) if config.conditional else None,
        progress,
    )


def labels_of(dataset: Dataset, first: int, count: int) -> Tensor:
    """Return the classes int64 ``[count]`` of pairs from number ``first`` on."""
    return dataset.labels_for(count, SEED, first)


def teacher_content(teacher: Teacher | None) -> str:
    """Return the hash of a teacher's weights and of how they are read."""
    assert teacher is not None, "checked before training"
    weights = teacher.name if teacher.network is None else weights_sha256([teacher.network])
    return hashlib.sha256(f"{teacher.parameterization} {weights}".encode()).hexdigest()


def module_content(state: TrainingState, names: Sequence[str]) -> str:
    """Return the hash of the weights of some of the run's modules."""
    if state.sharding is not None:
        raise UserError(
            f"phase {state.phase.name!r}",
            f"its data are made by {', '.join(names)}, which are split over processes",
            allowed="whole networks",
            remedy="add --no-split",
        )
    return weights_sha256(state.modules[name] for name in names)


def require_makers(phases: Sequence[Phase], plan: RunPlan) -> None:
    """Raise ``UserError`` for generated data that cannot be made, or would be used otherwise."""
    for phase in phases:
        if phase.generated is None:
            continue
        if not phase.generated.made_by and plan.teacher is None:
            raise UserError(
                f"method {plan.spec.name!r}, phase {phase.name!r}",
                "its data are made by a teacher, and the recipe names none",
                allowed="METHOD:RECIPE, run:PATH, import:NAME or analytic",
                remedy="set teacher in the recipe, or with -o teacher=…",
            )
        if plan.config.augment > 0:
            raise UserError(
                f"method {plan.spec.name!r}, phase {phase.name!r}",
                f"augment={plan.config.augment:g}, but its data are generated pairs",
                allowed="augment=0: a changed image is no longer that of its noise",
                remedy="add -o augment=0",
            )
