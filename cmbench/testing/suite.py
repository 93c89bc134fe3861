"""All checks, in the order in which an author meets them, and what they find in a method."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cmbench.errors import UserError
from cmbench.plugin.manager import PluginManager
from cmbench.sweep.failures import method_failure
from cmbench.testing import building, conditions, generated, losses, maps, samples, trainings, truth
from cmbench.testing.case import Subject
from cmbench.testing.check import CheckFailure, CheckResult, ContractCheck

__all__ = ["CHECKS", "ContractCheck", "Subject", "broken_plugins", "check_method", "make_check"]

CHECKS = (
    ContractCheck("recipes", building.recipes),
    ContractCheck("seeded build", building.seeded_build),
    ContractCheck("seeded loss", losses.seeded_loss),
    ContractCheck("draw names", losses.draw_names),
    ContractCheck("independent images", losses.independent_images),
    ContractCheck("gradients", losses.gradients),
    ContractCheck("labels in the loss", losses.labels),
    ContractCheck("augmentation labels", conditions.augmentation_labels),
    ContractCheck("generated data", generated.generated_data),
    ContractCheck("consistency function", truth.stationary),
    ContractCheck("flow map", maps.flow_map),
    ContractCheck("diffusion model", maps.diffusion_model),
    ContractCheck("counted NFE", samples.counted_nfe),
    ContractCheck("noise levels", samples.noise_levels),
    ContractCheck("exports", samples.exports),
    ContractCheck("batch size", samples.batch_size),
    ContractCheck("seeded samples", samples.seeded_samples),
    ContractCheck("draw names in sampling", samples.sampling_draws),
    ContractCheck("nothing changed", samples.unchanged),
    ContractCheck("labels in sampling", samples.labels_of_samples),
    ContractCheck("determinism", trainings.determinism),
    ContractCheck("restored samples", trainings.restored_samples),
    ContractCheck("kill and resume", trainings.resuming),
    ContractCheck("two processes", trainings.two_processes),
    ContractCheck("half precision", trainings.half_precision),
)


#: What a plugin that cannot be loaded breaks; it has no method to name.
LOADING = "loading"


def make_check(subject: Subject, check: ContractCheck) -> CheckResult:
    """Make one check; whatever the method raises is what it found."""
    began, problem, skipped = time.perf_counter(), "", None
    try:
        skipped = check.body(subject)
    except (CheckFailure, UserError) as error:
        problem = str(error)
    except (Exception, SystemExit) as error:
        problem = method_failure(subject.name, f"checking {check.name!r}", error)
    seconds = time.perf_counter() - began
    return CheckResult(subject.name, check.name, subject.dataset, problem, skipped or "", seconds)


def check_method(
    plugins: PluginManager, name: str, dataset: str | None = None
) -> Iterator[CheckResult]:
    """Yield what each check of a method found; the others are not made if it cannot be built.

    Raises:
        UserError: the method is unknown.
    """
    plugins.methods.get(name, "cmbench check")
    try:
        subjects = Subject.all_of(plugins, name, dataset)
    except UserError as error:
        yield CheckResult(name, CHECKS[0].name, problem=str(error))
        return
    for subject in subjects:
        for check in CHECKS:
            found = make_check(subject, check)
            yield found
            if found.problem and check.body is building.seeded_build:
                return


def broken_plugins(plugins: PluginManager) -> Iterator[CheckResult]:
    """Yield a failed check for each plugin that could not be loaded."""
    for info in plugins.failed:
        yield CheckResult("", LOADING, problem=f"{info}: {info.error}")
