"""The built-in methods, datasets, networks, metrics and extractors.

They come in through the same entry-point group and the same hooks as anybody else's. Each method is
one file that follows its paper; its recipes lie in ``recipes/<name>.toml``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmbench.data.catalog import BUILTIN_DATASETS
from cmbench.metrics.catalog import EXTRACTORS, METRICS
from cmbench.networks.catalog import NETWORKS
from cmbench.plugin import hookimpl
from cmbench.plugin.specs import (
    DatasetSpec,
    ExecutorSpec,
    ExtractorSpec,
    MethodSpec,
    MetricSpec,
    NetworkSpec,
    StudySpec,
)
from cmbench_plugins._costs import COSTS
from cmbench_plugins._samplers import DDIM, DIFFUSION, FLOWS, MULTISTEP, ONE_STEP

_CONSISTENCY = {"boundary": dict[str, Any]()}
_RECIPES = Path(__file__).parent / "recipes"
_STUDIES = Path(__file__).parent / "studies"


def _method(name: str, factory: str, title: str, **facts: Any) -> MethodSpec:
    """Return a method's spec; its recipes are ``recipes/<name>.toml``, its cost is in `COSTS`."""
    facts |= {"recipes": _RECIPES / f"{name}.toml", "cost": COSTS.get(name)}
    return MethodSpec(name, f"cmbench_plugins.{factory}", title, **facts)


METHODS = [
    _method(
        "edm",
        "edm:EDM",
        "Diffusion model, sampled by an ODE solver",
        reference="Karras et al. 2022, arXiv:2206.00364",
        year=2022,
        family="diffusion",
        is_teacher=True,
        samples_imported={"edm": {"parameterization": "edm"}},
        samplers=DIFFUSION,
    ),
    _method(
        "cd",
        "cm:CD",
        "Consistency distillation",
        reference="Song et al. 2023, arXiv:2303.01469",
        year=2023,
        family="distillation",
        needs_teacher=True,
        samples_imported=_CONSISTENCY,
        samplers=MULTISTEP,
    ),
    _method(
        "ct",
        "cm:CT",
        "Consistency training",
        reference="Song et al. 2023, arXiv:2303.01469",
        year=2023,
        family="consistency training",
        samples_imported=_CONSISTENCY,
        samplers=MULTISTEP,
    ),
    _method(
        "cct",
        "cct:CCT",
        "Continuous-time consistency training of 2023",
        reference="Song et al. 2023, arXiv:2303.01469",
        year=2023,
        family="consistency training",
        needs_teacher=True,
        samplers=MULTISTEP,
    ),
    _method(
        "ict",
        "ict:ICT",
        "Improved consistency training",
        reference="Song & Dhariwal 2023, arXiv:2310.14189",
        year=2023,
        family="consistency training",
        samples_imported=_CONSISTENCY,
        samplers=MULTISTEP,
    ),
    _method(
        "ict-deep",
        "ict:ICT",
        "Improved consistency training, network twice as deep",
        reference="Song & Dhariwal 2023, arXiv:2310.14189",
        year=2023,
        family="consistency training",
        samples_imported=_CONSISTENCY,
        samplers=MULTISTEP,
    ),
    _method(
        "ect",
        "ect:ECT",
        "Easy consistency tuning",
        reference="Geng et al. 2024, arXiv:2406.14548",
        year=2024,
        family="consistency training",
        needs_teacher=True,
        samples_imported=_CONSISTENCY,
        samplers=MULTISTEP,
    ),
    _method(
        "sct",
        "scm:SCT",
        "Simplified continuous-time consistency training",
        reference="Lu & Song 2024, arXiv:2410.11081",
        year=2024,
        family="consistency training",
        needs_teacher=True,
        default=True,
        samplers=MULTISTEP,
    ),
    _method(
        "scd",
        "scm:SCD",
        "Simplified continuous-time consistency distillation",
        reference="Lu & Song 2024, arXiv:2410.11081",
        year=2024,
        family="distillation",
        needs_teacher=True,
        samplers=MULTISTEP,
    ),
    _method(
        "knowledge-distillation",
        "knowledge_distillation:KnowledgeDistillation",
        "Knowledge distillation of a sampler",
        reference="Luhman & Luhman 2021, arXiv:2101.02388",
        year=2021,
        family="distillation",
        needs_teacher=True,
        samplers=ONE_STEP,
    ),
    _method(
        "pd",
        "pd:PD",
        "Progressive distillation",
        reference="Salimans & Ho 2022, arXiv:2202.00512",
        year=2022,
        family="distillation",
        needs_teacher=True,
        samplers=DDIM,
    ),
    _method(
        "rf",
        "rf:RF",
        "Rectified flow, reflow and distillation",
        reference="Liu et al. 2022, arXiv:2209.03003",
        year=2022,
        family="distillation",
        needs_teacher=True,
        is_teacher=True,
        samplers=FLOWS,
    ),
    _method(
        "tract",
        "tract:TRACT",
        "Transitive closure time-distillation",
        reference="Berthelot et al. 2023, arXiv:2303.04248",
        year=2023,
        family="distillation",
        needs_teacher=True,
        samplers=DDIM,
    ),
    _method(
        "mscd",
        "mscd:MSCD",
        "Multistep consistency models",
        reference="Heek et al. 2024, arXiv:2403.06807",
        year=2024,
        family="distillation",
        needs_teacher=True,
        samplers=DDIM,
    ),
    _method(
        "pid",
        "pid:PID",
        "Physics-informed distillation",
        reference="Tee et al. 2024, arXiv:2411.08378",
        year=2024,
        family="distillation",
        needs_teacher=True,
        samplers=ONE_STEP,
    ),
    _method(
        "dfno",
        "dfno:DFNO",
        "Diffusion sampling by a neural operator in time (DSNO)",
        reference="Zheng et al. 2022, arXiv:2211.13449",
        year=2022,
        family="distillation",
        needs_teacher=True,
        samplers=ONE_STEP,
    ),
    _method(
        "diff-instruct",
        "score_distillation:DiffInstruct",
        "Diff-Instruct",
        reference="Luo et al. 2023, arXiv:2305.18455",
        year=2023,
        family="distillation",
        needs_teacher=True,
    ),
    _method(
        "sid",
        "score_distillation:SiD",
        "Score identity distillation",
        reference="Zhou et al. 2024, arXiv:2404.04057",
        year=2024,
        family="distillation",
        needs_teacher=True,
    ),
    _method(
        "dmd2",
        "dmd:DMD2",
        "Improved distribution matching distillation",
        reference="Yin et al. 2024, arXiv:2405.14867",
        year=2024,
        family="distillation",
        needs_teacher=True,
    ),
    _method(
        "f-distill",
        "dmd:FDistill",
        "Distillation by an f-divergence",
        reference="Xu et al. 2025, arXiv:2502.15681",
        year=2025,
        family="distillation",
        needs_teacher=True,
    ),
]


@hookimpl
def cmbench_register_methods() -> list[MethodSpec]:
    """Return the built-in methods."""
    return METHODS


@hookimpl
def cmbench_register_datasets() -> list[DatasetSpec]:
    """Return the built-in datasets."""
    return list(BUILTIN_DATASETS)


@hookimpl
def cmbench_register_networks() -> list[NetworkSpec]:
    """Return the built-in networks."""
    return [NetworkSpec(*entry) for entry in NETWORKS]


@hookimpl
def cmbench_register_extractors() -> list[ExtractorSpec]:
    """Return the built-in feature extractors."""
    return list(EXTRACTORS)


@hookimpl
def cmbench_register_metrics() -> list[MetricSpec]:
    """Return the built-in metrics."""
    return list(METRICS)


@hookimpl
def cmbench_register_executors() -> list[ExecutorSpec]:
    """Return the built-in executors."""
    return [ExecutorSpec("local", "cmbench.sweep.executors:Local", "this process, cell by cell")]


#: Name and title of every file in ``studies/``: the ablations of the papers.
STUDIES = [
    ("discretisation", "Discrete-time consistency against the number of noise levels"),
    ("tangent-normalisation", "Tangent normalised, clipped or as it is"),
    ("adaptive-weighting", "Learned weight over time, or none"),
    ("target-ema", "Target network: the student itself, or its moving average"),
    ("pseudo-huber", "Pseudo-Huber distance against squared l2"),
    ("noise-levels", "Noise levels from a lognormal or uniformly from the grid"),
    ("curriculum", "Number of noise levels: few, doubling, or many from the start"),
    ("time-embedding", "Fourier features, positional embedding and TrigFlow time"),
]


@hookimpl
def cmbench_register_studies() -> list[StudySpec]:
    """Return the built-in studies."""
    return [StudySpec(name, title, _STUDIES / f"{name}.toml") for name, title in STUDIES]
