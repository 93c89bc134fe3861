"""Frozen specs: what a plugin returns from its registration hooks.

A spec names things and says where their code is (``"package.module:Object"``); the code itself is
imported when it is first used, so that listing plugins never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class MethodSpec(NamedTuple):
    """A way to get a generator.

    ``factory`` points at a subclass of :class:`cmbench.plugin.method.Method`. ``recipes`` is the
    TOML file with its recipes. ``needs_teacher`` says that training starts from or distils a
    diffusion model (the recipe names which). ``reference`` cites the paper.
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


class DatasetSpec(NamedTuple):
    """Images, labels, resolution and protocol.

    ``factory(spec, locations)`` returns a :class:`cmbench.data.base.Dataset`. ``metrics`` names the
    protocol's metrics, the first being the one that leaderboards rank by. ``num_samples`` is the
    protocol's sample count for one cell, ``nfe`` the default sweep.
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


class NetworkSpec(NamedTuple):
    """An architecture: ``factory`` points at a ``torch.nn.Module`` class with a ``Config``."""

    name: str
    factory: str
    title: str
    reference: str = ""


class ExtractorSpec(NamedTuple):
    """A feature extractor; ``factory(location)`` returns a ``cmbench.metrics`` extractor."""

    name: str
    factory: str
    title: str
    reference: str = ""


class MetricSpec(NamedTuple):
    """One number of a cell."""

    name: str
    title: str
    higher_is_better: bool
    needs: str
    reference: str = ""
    unit: str = ""


class ExecutorSpec(NamedTuple):
    """A way to run cells: ``factory()`` returns a ``cmbench.bench.executors.Executor``."""

    name: str
    factory: str
    title: str


Spec = MethodSpec | DatasetSpec | NetworkSpec | ExtractorSpec | MetricSpec | ExecutorSpec


def load_object(path: str) -> Callable[..., Any]:
    """Import ``"package.module:Object"`` and return the object."""
    module, _, name = path.partition(":")
    target: Any = import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target  # type: ignore[no-any-return]
