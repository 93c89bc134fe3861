"""Plans of runs and cells: what decides each, and the identities that follow from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cmbench.plugin.config import MethodConfig
from cmbench.plugin.method import DataInfo, Method, SamplingPlan
from cmbench.plugin.specs import MethodSpec
from cmbench.sweep.context import Context
from cmbench.sweep.imported import ImportedModel


@dataclass(frozen=True)
class RunPlan:
    """One training: method x dataset x recipe x seed, with its resolved configuration."""

    spec: MethodSpec
    dataset: str
    recipe: str
    seed: int
    config: MethodConfig
    teacher: RunPlan | None
    method_class: type[Method]
    #: The checkpoint from elsewhere that is sampled; nothing is trained then.
    imported: ImportedModel | None = None

    @property
    def table(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        table: dict[str, Any] = self.config.model_dump(mode="json")
        return table if self.imported is None else {**table, "imported": self.imported.table}

    @property
    def config_sha256(self) -> str:
        """Hash of the resolved configuration, its teacher's included."""
        data = [self.table, self.teacher.run_id if self.teacher else None]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        recipe = self.recipe.rpartition(":")[2]
        return f"{self.spec.name}-{recipe}-s{self.seed}-{self.config_sha256[:10]}"

    @property
    def run_id(self) -> str:
        """Identity: ``<dataset>/<method>-<recipe>-s<seed>-<hash>``."""
        return f"{self.dataset}/{self.name}"

    def data_info(self, context: Context) -> DataInfo:
        """Return what the method is told of the data that it models."""
        spec = context.dataset_spec(self.dataset)
        sigma_data = self.config.sigma_data or spec.sigma_data
        classes = spec.num_classes if self.config.conditional else 0
        bounded = spec.quantize != "none" and not spec.latent
        return DataInfo(self.dataset, spec.data_shape, classes, sigma_data, bounded)

    def method(self, context: Context) -> Method:
        """Build the method object."""
        return self.method_class(self.config, self.data_info(context))


@dataclass(frozen=True)
class SampleSettings:
    """How cells are sampled, apart from NFE and seed."""

    num_samples: int | None = None
    batch_size: int = 500
    sigmas: tuple[float, ...] | None = None
    sampler: str | None = None
    ema: str | None = None
    tuned: Mapping[str, Any] | None = None
    #: of the network's passes: fp32, or bf16 or fp16 by autocast
    precision: str = "fp32"


@dataclass(frozen=True)
class CellPlan:
    """One evaluation: run x NFE x sampler settings x sampling seed.

    ``sampling`` is None where the method ``declined`` the case, or is ``broken`` (each with why).
    """

    run: RunPlan
    nfe: int
    seed: int
    num_samples: int
    batch_size: int
    sampling: SamplingPlan | None
    ema: str
    declined: str = ""
    tuned: Mapping[str, Any] | None = None
    broken: str = ""
    precision: str = "fp32"
    #: Sampler and noise levels that the user asked for and the method did not plan.
    asked: tuple[str | None, tuple[float, ...] | None] = (None, None)

    @property
    def cell(self) -> str:
        """Identity and file name of the record."""
        plan = self.sampling
        decides = [
            self.run.run_id,
            self.nfe,
            self.seed,
            self.num_samples,
            self.ema,
            dict(self.tuned or {}),
            [plan.sampler, plan.sigmas, plan.variant] if plan else None,
        ]
        if self.precision != "fp32":  # what is usual names no cell: names of old records stay
            decides.append(self.precision)
        if plan is None and self.asked != (None, None):
            decides.append(self.asked)  # two requests that were refused are two cells
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        recipe = self.run.recipe.rpartition(":")[2]
        return f"{self.run.spec.name}-{recipe}-s{self.run.seed}-nfe{self.nfe}-{digest[:10]}"
