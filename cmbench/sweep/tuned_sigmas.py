"""Tuned noise levels: found by ``cmbench tune-times`` on held-out seeds, kept in the workspace.

``tuned/<dataset>/<method>-<recipe>-<sampler>-nfe<N>-<hash>.json``; the hash is the run's
configuration without its seed, so the levels found on one training seed serve all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

from cmbench.errors import MissingError, UserError
from cmbench.files import read_sealed, reading
from cmbench.plugin.method import SamplingPlan
from cmbench.records.fields import Finite, Part
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.plans import RunPlan, SampleSettings


class Tuning(Part):
    """How noise levels were found, and at what cost: what records that use them repeat."""

    run: str = Field(description="the run they were tuned on")
    ema: str = Field(description="the average of its weights that was sampled")
    start_sigmas: tuple[Finite, ...] = Field(description="the method's own levels")
    metric: str
    metric_key: str
    value: Finite = Field(description="of the levels found, mean over the held-out seeds")
    start_value: Finite = Field(description="of the method's own levels, on the same seeds")
    held_out_seeds: tuple[int, ...] = Field(min_length=1, description="sampling seeds searched on")
    samples_per_seed: int
    search: str = Field(description="the algorithm with its settings")
    evaluations: int = Field(description="schedules that were sampled and measured")
    samples: int = Field(description="images that were sampled for it")
    network_evaluations: int = Field(description="images through the network for it")


class TunedSigmas(Tuning):
    """Noise levels, what they are for, and how they were found."""

    schema_version: int = Field(1, ge=1, le=1)
    method: str
    dataset: str
    recipe: str
    config_sha256: str
    nfe: int = Field(ge=1)
    sampler: str
    sigmas: tuple[Finite, ...] = Field(min_length=2, description="the levels found, descending")
    seconds: float
    created: str
    command: str = ""

    def in_record(self) -> dict[str, Any]:
        """Return what a record that uses these levels says about their origin."""
        return self.model_dump(mode="json", include=set(Tuning.model_fields))


def tuned_file(workspace: Workspace, run: RunPlan, plan: SamplingPlan) -> Path:
    """Return where the levels of a run's configuration lie."""
    recipe = run.recipe.rpartition(":")[2]
    name = f"{run.spec.name}-{recipe}-{plan.sampler}-nfe{plan.nfe}-{run.config_sha256[:10]}.json"
    return workspace.root / "tuned" / run.dataset / name


def read_tuned(path: Path) -> TunedSigmas:
    """Read and validate a file of tuned levels."""
    who, remedy = f"tuned noise levels {path}", "run `cmbench tune-times` again"
    with reading(who, remedy):
        tuned = TunedSigmas.model_validate(read_sealed(path))
    levels = tuned.sigmas
    if levels[-1] <= 0 or any(a <= b for a, b in pairwise(levels)):
        raise UserError(
            who, f"noise levels {list(levels)}", allowed="positive and descending", remedy=remedy
        )
    return tuned


def with_tuned_sigmas(
    context: Context, run: RunPlan, nfe: int, settings: SampleSettings
) -> SampleSettings:
    """Return the settings with the tuned levels of this run and NFE.

    Where the method has one level only (NFE 1), or declines, there is nothing to tune and the
    settings stay as they are.

    Raises:
        MissingError: the levels have not been tuned in this workspace.
    """
    try:
        plan = run.method(context).plan_sampling(nfe, None, settings.sampler)
    except Exception:  # declined, or broken: planning the cell says which
        return settings
    if len(plan.sigmas) < 2:
        return settings
    path = tuned_file(context.workspace, run, plan)
    if not path.exists():
        which = f"--{'recipe' if run.imported is None else 'checkpoint'} {run.recipe}"
        name = f"{run.spec.name} on {run.dataset}, recipe {run.recipe}, NFE {nfe}"
        raise MissingError(
            "--sigmas tuned",
            f"no tuned noise levels for {name} in {context.workspace.root}",
            remedy=f"run `cmbench tune-times --method {run.spec.name} --dataset {run.dataset} "
            f"{which} --nfe {nfe}` with the same -o options first",
        )
    tuned = read_tuned(path)
    return replace(settings, sigmas=tuned.sigmas, tuned=tuned.in_record())


def describe(tuned: TunedSigmas) -> Mapping[str, str]:
    """Return the columns of a table that shows the result of a search."""
    return {
        "NFE": str(tuned.nfe),
        "levels before": ", ".join(f"{s:.4g}" for s in tuned.start_sigmas),
        "levels tuned": ", ".join(f"{s:.4g}" for s in tuned.sigmas),
        f"{tuned.metric} before": f"{tuned.start_value:.4g}",
        f"{tuned.metric} tuned": f"{tuned.value:.4g}",
        "schedules": str(tuned.evaluations),
        "images": f"{tuned.samples:,}",
        "evaluations": f"{tuned.network_evaluations:,}",
    }
