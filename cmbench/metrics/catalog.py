"""The built-in metrics and feature extractors, as specs. Imports no torch.

They are registered through the hooks that plugins use. :func:`all_metrics` adds the Fréchet
distances that follow from the registered extractors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import ExtractorSpec, MetricSpec

_HEUSEL = "Heusel et al. 2017, arXiv:1706.08500"
_SALIMANS = "Salimans et al. 2016, arXiv:1606.03498"
_KYNKAANNIEMI = "Kynkäänniemi et al. 2019, arXiv:1904.06991"
_NAEEM = "Naeem et al. 2020, arXiv:2002.09797"
_PARMAR = "Parmar et al. 2022, arXiv:2104.11222"
_NASH = "Nash et al. 2021, arXiv:2103.03841"
_STEIN = "Stein et al. 2023, arXiv:2306.04675"
_BINKOWSKI = "Bińkowski et al. 2018, arXiv:1801.01401"

#: Version of the formulas: a change that moves a value raises it, and with it every metric key.
VERSION = "v1"

EXTRACTORS: tuple[ExtractorSpec, ...] = (
    ExtractorSpec(
        "inception",
        "cmbench.metrics.inception:InceptionExtractor",
        "2015 Inception, torch-fidelity's weights and resize",
        "Szegedy et al. 2015, arXiv:1512.00567",
        ("fid", "inception-unverified"),
    ),
    ExtractorSpec(
        "inception-clean",
        "cmbench.metrics.clean_fid:clean",
        "2015 Inception as clean-fid's clean mode",
        _PARMAR,
        ("fid-clean", "inception-clean-unverified"),
    ),
    ExtractorSpec(
        "inception-legacy-tensorflow",
        "cmbench.metrics.clean_fid:legacy_tensorflow",
        "2015 Inception as NVIDIA's TorchScript file: EDM's detector",
        _PARMAR,
        ("fid-legacy-tensorflow", "inception-legacy-tensorflow-unverified"),
    ),
    ExtractorSpec(
        "inception-legacy-pytorch",
        "cmbench.metrics.clean_fid:legacy_pytorch",
        "2015 Inception as pytorch-fid",
        _PARMAR,
        ("fid-legacy-pytorch", "inception-legacy-pytorch-unverified"),
    ),
    ExtractorSpec(
        "dinov2",
        "cmbench.metrics.dinov2:DinoExtractor",
        "DINOv2 ViT-L/14 with dgm-eval's resize (needs timm)",
        "Oquab et al. 2023, arXiv:2304.07193",
    ),
    ExtractorSpec(
        "dinov2-edm2",
        "cmbench.metrics.dinov2:edm2",
        "DINOv2 ViT-L/14 with EDM2's resize (needs timm)",
        "Karras et al. 2024, arXiv:2312.02696",
    ),
    ExtractorSpec(
        "digits-cnn",
        "cmbench.metrics.shipped_cnn:DigitsExtractor",
        "Small CNN for 8x8 digits, 64-d",
        short_names=("digits",),
    ),
    ExtractorSpec(
        "cifar-cnn", "cmbench.metrics.shipped_cnn:CifarExtractor", "Small ResNet for CIFAR, 256-d"
    ),
    ExtractorSpec(
        "pixels",
        "cmbench.metrics.extractor:PixelExtractor",
        "Identity: the pixel values themselves",
    ),
)
_TENSORFLOW, _PYTORCH = "fid-legacy-tensorflow", "fid-legacy-pytorch"


def _distance(
    name: str, title: str, extractor: str, reference: str = _HEUSEL, *, spatial: bool = False
) -> MetricSpec:
    """Return the spec of a Fréchet distance on the features of ``extractor`` (a short name)."""
    needs = ("features", "real moments")
    if spatial:
        needs = ("spatial features", "real spatial moments")
    return MetricSpec(
        name,
        title,
        False,
        needs,
        f"cmbench.metrics.frechet:{'spatial_distance' if spatial else 'pooled_distance'}",
        reference,
        extractors=(extractor,),
        family="sfd" if spatial else "fd",
        version=VERSION,
    )


def _metric(
    name: str, title: str, factory: str, reference: str = "", *, higher: bool = True, **facts: Any
) -> MetricSpec:
    """Return the spec of a metric, of samples and real images unless ``needs`` says otherwise."""
    needs = facts.pop("needs", ("features", "real features"))
    factory = f"cmbench.metrics.{factory}"
    return MetricSpec(name, title, higher, needs, factory, reference, version=VERSION, **facts)


_LOGITS: dict[str, Any] = {"needs": ("logits",)}
_FLOW: dict[str, Any] = {"needs": ("flow map",), "higher": False}
_FLOW["unit"] = "data standard deviations"

METRICS: tuple[MetricSpec, ...] = (
    _distance("fid", "Fréchet Inception distance", "fid"),
    _distance("fid-clean", "clean-FID (clean-fid's bicubic)", "fid-clean", _PARMAR),
    _distance(_TENSORFLOW, "FID of EDM's detector (TF1 resize)", _TENSORFLOW, _PARMAR),
    _distance(_PYTORCH, "FID of pytorch-fid (half-pixel resize)", _PYTORCH, _PARMAR),
    _distance("sfid", "Spatial FID (mixed_6/conv)", "fid", _NASH, spatial=True),
    _distance("fd-dinov2", "Fréchet distance on DINOv2 ViT-L/14", "dinov2", _STEIN),
    _distance("fd-dinov2-edm2", "Fréchet distance on DINOv2, EDM2's resize", "dinov2-edm2", _STEIN),
    _distance("fd-digits", "Fréchet distance on digits-cnn", "digits"),
    _distance("fd-cifar-cnn", "Fréchet distance on cifar-cnn", "cifar-cnn"),
    _distance("fd-pixels", "Fréchet distance on pixel values", "pixels"),
    _metric(
        "is",
        "Inception score of the extractor's classifier",
        "inception_score:torch_fidelity_score",
        _SALIMANS,
        **_LOGITS,
    ),
    _metric(
        "is-openai",
        "Inception score of OpenAI's evaluator (5,000 in order)",
        "inception_score:openai_score",
        _SALIMANS,
        **_LOGITS,
    ),
    _metric("precision", "Improved precision (k = 3)", "precision_recall:precision", _KYNKAANNIEMI),
    _metric("recall", "Improved recall (k = 3)", "precision_recall:recall", _KYNKAANNIEMI),
    _metric("density", "Density (k = 3)", "precision_recall:density", _NAEEM),
    _metric("coverage", "Coverage (k = 3)", "precision_recall:coverage", _NAEEM),
    _metric(
        "kid",
        "Kernel Inception distance",
        "kernel_distance:metric",
        _BINKOWSKI,
        higher=False,
        extractors=("fid", "fid-clean", _TENSORFLOW, _PYTORCH),
    ),
    _metric(
        "kd", "Kernel distance on the extractor", "kernel_distance:metric", _BINKOWSKI, higher=False
    ),
    _metric("flow-map-mean", "Mean flow-map error", "flow_map:mean_error", **_FLOW),
    _metric("flow-map-max", "Largest flow-map error", "flow_map:largest_error", **_FLOW),
)


def all_metrics(plugins: PluginManager) -> dict[str, MetricSpec]:
    """Return the registered metrics and the distances that follow from registered extractors.

    An extractor's distances are ``fd-<short name>`` and ``sfd-<short name>`` unless a registered
    metric of the same factory lists that short name (as ``fid`` does for ``inception``).
    """
    found = dict(plugins.metrics.specs)
    named = {(spec.factory, short) for spec in found.values() for short in spec.extractors}
    for extractor in plugins.extractors.specs.values():
        for spec in distances_of(extractor):
            if (spec.factory, *spec.extractors) not in named:
                found.setdefault(spec.name, spec)
    return found


def distances_of(extractor: ExtractorSpec) -> Iterator[MetricSpec]:
    """Yield the pooled and the spatial Fréchet distance of each short name of ``extractor``."""
    for short in extractor.short_names or (extractor.name,):
        yield _distance(f"fd-{short}", f"Fréchet distance on {short}", short)
        title = f"Fréchet distance on spatial features of {short}"
        yield _distance(f"sfd-{short}", title, short, spatial=True)


def extractor_of(metric: MetricSpec, default: str, plugins: PluginManager) -> str:
    """Return the registered extractor that computes ``metric``: ``default`` wherever it can."""
    able = [
        name
        for name, spec in plugins.extractors.specs.items()
        if {*metric.extractors} & {*(spec.short_names or (name,))}
    ]
    return default if not able or default in able else able[0]
