"""Frozen specs: what a plugin returns from its registration hooks.

A spec names things and says where their code is (``"package.module:Object"``); the code itself is
imported when it is first used, so that listing plugins never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

#: More images per batch are a typing error.
MAX_BATCH = 1_000_000


class SamplerSpec(NamedTuple):
    """A sampler that a method has by name, for listings: plans and errors come from the method.

    ``nfe`` says which numbers of network evaluations it takes, ``order`` its order of convergence
    (or ``stochastic``), ``grid`` where its noise levels lie and ``one_step`` what it does at NFE 1.
    ``reference`` cites the paper.
    """

    name: str
    title: str
    nfe: str = "any"
    order: str = ""
    grid: str = ""
    one_step: str = "denoises at sigma_max"
    reference: str = ""


class TrainingCost(NamedTuple):
    """What a training step of a method costs at its default options, for listings.

    The four counts are network evaluations per image of the batch and step, of all networks and the
    teacher's; means where networks take turns.

    Args:
        calls: evaluations without a gradient (of a teacher, a target, another network).
        graded: evaluations whose weights receive a gradient.
        input_graded: evaluations of frozen weights that pass a gradient on to their input.
        tangents: derivatives carried along with an evaluation (``forward_with_tangent``).
        teacher: ``"no"``, ``"weights"`` (training starts from its network), ``"yes"`` (every step
            evaluates it) or ``"for data"`` (it makes what ``generated`` says).
        data: what a step takes of the dataset: ``"images"``, ``"labels"``, ``"no"``.
        generated: what a model makes before training, such as ``"1M pairs x 35 NFE"``.
        nfe: which numbers of evaluations it samples with.
        notes: what changes the counts, such as ``"6 with solver = heun"``.
    """

    calls: float = 0.0
    graded: float = 1.0
    input_graded: float = 0.0
    tangents: float = 0.0
    teacher: str = "no"
    data: str = "images"
    generated: str = "no"
    nfe: str = "any"
    notes: str = ""

    @property
    def forward_equivalents(self) -> float:
        """The step in forward passes: a backward pass is two, one to the input alone is one."""
        return self.calls + 3 * self.graded + 2 * self.input_graded + self.tangents

    @property
    def summary(self) -> str:
        """The counts in words, as ``2 + 1 graded``."""
        parts = [f"{self.calls:g}"] if self.calls else []
        for count, kind in (
            (self.tangents, "tangent"),
            (self.graded, "graded"),
            (self.input_graded, "graded to its input"),
        ):
            parts += [f"{count:g} {kind}"] if count else []
        return " + ".join(parts)


class MethodSpec(NamedTuple):
    """A way to get a generator.

    ``factory`` points at a subclass of :class:`cmbench.plugin.method.Method`. ``recipes`` is the
    TOML file with its recipes. ``needs_teacher`` says that training starts from or distils a
    diffusion model (the recipe names which). ``reference`` cites the paper. ``default`` marks the
    method that ``cmbench run`` takes when none is named; of several, the first that is loaded.
    ``samples_imported`` says which imported networks the method can sample: their parameterization
    (``"edm"`` for a denoiser, ``"boundary"`` for a consistency function) -> the options under which
    the method reads a network so. ``samplers`` are those that ``--sampler`` chooses from. ``cost``
    says what training takes; ``cmbench list methods`` shows it.
    """

    name: str
    factory: str
    title: str
    reference: str = ""
    year: int = 0
    family: str = "other"
    recipes: Path | None = None
    needs_teacher: bool = False
    is_teacher: bool = False
    default: bool = False
    samples_imported: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    #: set by the loader: datasets with recipe files of their own, which may have some for this one
    dataset_recipes: tuple[tuple[str, Path], ...] = ()
    samplers: tuple[SamplerSpec, ...] = ()
    cost: TrainingCost | None = None


class DatasetSpec(NamedTuple):
    """Images, labels, resolution and protocol.

    ``factory(spec, locations)`` returns a :class:`cmbench.data.base.Dataset`. ``metrics`` names the
    protocol's metrics, the first being the one that leaderboards rank by. ``num_samples`` is the
    protocol's sample count for one cell, ``nfe`` the default sweep. ``latent`` says that the data
    are an autoencoder's latents: unbounded, decoded before they are measured, and compared with
    imported statistics of the original pictures. ``class_order`` names the numbering of the classes
    where it is not the usual one, the sorted order of their names or folders: networks from
    elsewhere would be asked for other classes than theirs. ``recipes`` is a TOML file with recipes
    of existing methods for this dataset, ``[<method>.<recipe>]``.
    """

    name: str
    factory: str
    title: str
    data_shape: tuple[int, int, int]
    num_classes: int
    extractor: str
    metrics: tuple[str, ...]
    nfe: tuple[int, ...]
    num_samples: int
    quantize: str = "round"
    sigma_data: float = 0.5
    license: str = ""
    source: str = ""
    embedded: bool = False
    latent: bool = False
    class_order: str = ""
    recipes: Path | None = None


class NetworkSpec(NamedTuple):
    """An architecture: ``factory`` points at a ``torch.nn.Module`` class with a ``Config``."""

    name: str
    factory: str
    title: str
    reference: str = ""


class ExtractorSpec(NamedTuple):
    """A feature extractor; ``factory(location)`` returns a :class:`cmbench.metrics.extractor`.

    ``short_names`` are the values that ``short_name`` of the opened extractor may have; by default
    ``name`` alone. Each has the Fréchet distances ``fd-<short name>`` (of pooled features) and
    ``sfd-<short name>`` (of spatial features) unless a :class:`MetricSpec` names them otherwise.
    """

    name: str
    factory: str
    title: str
    reference: str = ""
    short_names: tuple[str, ...] = ()


class MetricSpec(NamedTuple):
    """One number of a cell; everything about it except the computation.

    Args:
        name: what users type and what the record calls it. Names of FID and KID (``fid``,
            ``fid-…``, ``sfid``, ``sfid-…``, ``kid``) are reserved for the 2015 Inception network.
        title: one line for listings.
        higher_is_better: direction.
        needs: what it is computed from, see :class:`cmbench.metrics.metric.MetricData`. The set is
            open; a metric whose needs an evaluation does not provide is refused before sampling.
        factory: the function that computes it, ``"package.module:function"``. It takes one
            :class:`cmbench.metrics.metric.MetricData` and returns a number or a
            :class:`cmbench.metrics.values.Estimate`.
        reference: the paper.
        unit: of the value; empty for pure numbers.
        extractors: short names of the extractors whose metric it is; empty for any.
        family: first part of the metric key; ``name`` by default. Distances of all extractors share
            one, since the extractor is part of the key itself.
        version: version of the formula, last part of the metric key. By default the distribution
            and its version, so that values of two releases are never ranked together.
    """

    name: str
    title: str
    higher_is_better: bool
    needs: tuple[str, ...]
    factory: str
    reference: str = ""
    unit: str = ""
    extractors: tuple[str, ...] = ()
    family: str = ""
    version: str = ""


class ExecutorSpec(NamedTuple):
    """A way to run cells: ``factory()`` returns a ``cmbench.sweep.executors.Executor``."""

    name: str
    factory: str
    title: str


class StudySpec(NamedTuple):
    """A comparison that anybody can repeat: ``file`` is its TOML, see ``docs/plugins.md``."""

    name: str
    title: str
    file: Path


Spec = (
    MethodSpec | DatasetSpec | NetworkSpec | ExtractorSpec | MetricSpec | ExecutorSpec | StudySpec
)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,59}")
_FACTORY = re.compile(r"[\w.]+:[\w.]+")
#: Names of the 2015 Inception network's distances, which no other distribution may use.
_RESERVED = re.compile(r"s?fid(-.*)?|kid(-.*)?")


def spec_problem(spec: Any, distribution: str = "cmbench") -> str:
    """Return what is wrong with a spec of ``distribution``, or an empty string.

    Names become file names, table cells and parts of comma-separated lists: a conservative
    alphabet. Python does not check a tuple's fields, so it is done here.
    """
    name = spec.name
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        return f"name {name!r} (allowed: up to 60 letters, digits and . _ + -)"
    if not isinstance(spec.title, str):
        return f"{name!r}: title {spec.title!r} (allowed: a string)"
    factory = getattr(spec, "factory", "module:Object")
    if not (isinstance(factory, str) and _FACTORY.fullmatch(factory)):
        return f"{name!r}: factory {factory!r} (allowed: 'package.module:Object')"
    recipes = getattr(spec, "recipes", None)
    if not isinstance(recipes, Path | None):
        return f"{name!r}: recipes {recipes!r} (allowed: a pathlib.Path or None)"
    file = getattr(spec, "file", Path())
    if not isinstance(file, Path):
        return f"{name!r}: file {file!r} (allowed: a pathlib.Path)"
    problem = _dataset_problem(spec) if isinstance(spec, DatasetSpec) else ""
    cost = getattr(spec, "cost", None)
    if not isinstance(cost, TrainingCost | None):
        problem = f"cost {cost!r} (allowed: a TrainingCost or None)"
    ours = distribution == "cmbench"
    if isinstance(spec, MetricSpec) and not ours and _RESERVED.fullmatch(name):
        problem = "FID and KID are names of the 2015 Inception network (use fd-NAME or kd-NAME)"
    for key in ("needs", "extractors", "short_names"):
        names = getattr(spec, key, ())
        if not (isinstance(names, tuple) and all(isinstance(n, str) and n for n in names)):
            problem = f"{key} {names!r} (allowed: a tuple of strings)"
    return f"{name!r}: {problem}" if problem else ""


def _dataset_problem(spec: Any) -> str:
    if spec.name == "base":
        return "the name is reserved for what recipes share"
    if len(spec.data_shape) != 3 or not all(_positive(n) for n in spec.data_shape):
        return f"data_shape {spec.data_shape!r} (allowed: channels, height, width)"
    if not spec.nfe or not all(_positive(n) for n in spec.nfe):
        return f"nfe {spec.nfe!r} (allowed: whole numbers from 1)"
    if not spec.metrics or isinstance(spec.metrics, str):
        return f"metrics {spec.metrics!r} (allowed: at least one metric's name)"
    if not _positive(spec.num_samples) or not _positive(spec.num_classes + 1):
        return "num_samples and num_classes must be counts"
    sigma_data = float(spec.sigma_data)
    return "" if sigma_data > 0 else f"sigma_data {sigma_data} (allowed: above 0)"


def _positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


def load_object(path: str) -> Callable[..., Any]:
    """Import ``"package.module:Object"`` and return the object."""
    module, _, name = path.partition(":")
    target: Any = import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target  # type: ignore[no-any-return]
