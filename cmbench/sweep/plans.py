"""Plans of runs and cells, and their identities, which are hashes of their content."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from cmbench.errors import PluginError, UserError
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.method import DataInfo, Method, SamplingPlan, Teacher
from cmbench.plugin.specs import MethodSpec
from cmbench.records.record import LABELS
from cmbench.sweep.context import Context
from cmbench.sweep.imported import ImportedModel

#: Name of the weights without averaging.
RAW = "raw"


@dataclass(frozen=True)
class RunPlan:
    """One training: method x dataset x recipe x seed, with its resolved configuration."""

    spec: MethodSpec
    dataset: str
    recipe: str
    seed: int
    config: MethodConfig
    teacher: TeacherSource | None
    method_class: type[Method]
    #: the imported checkpoint that is sampled; nothing is trained then
    imported: ImportedModel | None = None
    #: what the user changed of the recipe, by dotted key; None if it is not known
    overrides: Mapping[str, Any] | None = None

    @property
    def table(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        table: dict[str, Any] = self.config.model_dump(mode="json")
        return table if self.imported is None else {**table, "imported": self.imported.table}

    @property
    def config_sha256(self) -> str:
        """Hash of the resolved configuration, and of the id of a teacher that is trained first."""
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

    @property
    def main_average(self) -> str:
        """Label of the average that is sampled and taught from unless another is named."""
        return self.config.ema[0].label if self.config.ema else RAW

    def data_info(self, context: Context) -> DataInfo:
        """Return the properties of the data that the method receives."""
        spec = context.dataset_spec(self.dataset)
        sigma_data = self.config.sigma_data or spec.sigma_data
        classes = spec.num_classes if self.config.conditional else 0
        bounded = spec.quantize != "none" and not spec.latent
        return DataInfo(self.dataset, spec.data_shape, classes, sigma_data, bounded)

    def method(self, context: Context) -> Method:
        """Build the method object."""
        return self.method_class(self.config, self.data_info(context))


#: ``plan_run(context, method, dataset, recipe, seed, overrides)`` of :mod:`cmbench.sweep.planning`.
PlanRun = Callable[[Context, str, str, str | None, int, Mapping[str, Any]], RunPlan]
#: Builds a run's method and its modules: ``build(context, plan, teacher)``.
Builder = Callable[[Context, RunPlan, Teacher | None], tuple[Method, dict[str, nn.Module]]]


@dataclass(frozen=True)
class TeacherSource(ABC):
    """Where a student's teacher comes from. The kinds are in :mod:`cmbench.sweep.teachers`.

    Attributes:
        reference: what the student's resolved recipe holds. It names the content, not a path.
        run: the run that must be trained first, if the teacher is one.
        run_id: the id of that run, which is part of the student's identity.
    """

    #: whether planning looks at the teacher's weights
    looks_up: ClassVar[bool] = False

    reference: str
    run: RunPlan | None = None
    run_id: str | None = None

    @property
    def parameterization(self) -> str | None:
        """How the output of its network is read; None if that is not known or does not matter."""
        return None

    def planned(
        self, context: Context, config: MethodConfig, dataset: str, plan_run: PlanRun
    ) -> TeacherSource:
        """Return this source with what a student's resolved ``config`` decides of the teacher.

        Raises:
            UserError: the two do not fit.
        """
        return self

    @abstractmethod
    def open(self, context: Context, student: RunPlan) -> Teacher:
        """Return the frozen teacher on the context's device, in the student's precision.

        Raises:
            MissingError: it is not here; the message says what was expected.
            UserError: what is here has another content.
        """

    @abstractmethod
    def stand_in(self, context: Context, student: RunPlan, build: Builder) -> Teacher:
        """Return a teacher of the same shapes with random weights, for estimates of cost."""


def load_method_class(plugins: PluginManager, spec: MethodSpec) -> type[Method]:
    """Import a method's class; raise ``PluginError`` if it is not what the contract asks for."""
    loaded: Any = plugins.methods.load(spec.name)
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise PluginError(
            f"method {spec.name!r}",
            f"its factory {spec.factory!r} is not a Method class",
            allowed="a subclass of cmbench.plugin.method.Method",
            remedy="fix the plugin",
        )
    if not (isinstance(loaded.Config, type) and issubclass(loaded.Config, MethodConfig)):
        raise PluginError(
            f"method {spec.name!r}",
            f"its Config is {loaded.Config!r}",
            allowed="a subclass of cmbench.plugin.config.MethodConfig",
            remedy="fix the plugin",
        )
    return loaded


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
    #: to measure beside the dataset's own
    metrics: tuple[str, ...] = ()
    #: of conditional runs: drawn by class frequencies, or their exact quota
    labels: str = "drawn"

    def __post_init__(self) -> None:
        """Refuse a way to choose labels that does not exist."""
        if self.labels not in LABELS:
            raise UserError("labels", f"{self.labels!r}", allowed=" or ".join(LABELS))


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
    #: ``ema``, ``sampler`` and ``sigmas`` where the user chose others than the recipe's
    overrides: Mapping[str, Any] = field(default_factory=dict)
    #: Metrics that are measured beside the dataset's own.
    metrics: tuple[str, ...] = ()
    #: How class labels are chosen, a key of ``LABELS``.
    labels: str = "drawn"

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
        if self.labels != "drawn":
            decides.append({"labels": self.labels})
        if self.metrics:
            decides.append({"metrics": sorted(self.metrics)})
        if plan is None and self.asked != (None, None):
            decides.append(self.asked)  # two requests that were refused are two cells
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        recipe = self.run.recipe.rpartition(":")[2]
        return f"{self.run.spec.name}-{recipe}-s{self.run.seed}-nfe{self.nfe}-{digest[:10]}"
