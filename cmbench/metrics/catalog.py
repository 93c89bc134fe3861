"""The built-in metrics and feature extractors, as specs. Imports no torch.

``needs`` says what a metric is computed from: "features" (of samples and reference), "logits" (of
the extractor's classifier), "spatial" features, or "flow map" (the dataset's exact one).
"""

from __future__ import annotations

from cmbench.plugin.specs import ExtractorSpec, MetricSpec

_HEUSEL = "Heusel et al. 2017, arXiv:1706.08500"
_SALIMANS = "Salimans et al. 2016, arXiv:1606.03498"
_KYNKAANNIEMI = "Kynkäänniemi et al. 2019, arXiv:1904.06991"
_NAEEM = "Naeem et al. 2020, arXiv:2002.09797"
_PARMAR = "Parmar et al. 2022, arXiv:2104.11222"
_NASH = "Nash et al. 2021, arXiv:2103.03841"
_STEIN = "Stein et al. 2023, arXiv:2306.04675"
_BINKOWSKI = "Bińkowski et al. 2018, arXiv:1801.01401"

METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("fid", "Fréchet Inception distance", False, "features", _HEUSEL),
    MetricSpec("fid-clean", "clean-FID (clean-fid's bicubic)", False, "features", _PARMAR),
    MetricSpec(
        "fid-legacy-tensorflow", "FID of EDM's detector (TF1 resize)", False, "features", _PARMAR
    ),
    MetricSpec(
        "fid-legacy-pytorch", "FID of pytorch-fid (half-pixel resize)", False, "features", _PARMAR
    ),
    MetricSpec("sfid", "Spatial FID (mixed_6/conv)", False, "spatial", _NASH),
    MetricSpec("fd-dinov2", "Fréchet distance on DINOv2 ViT-L/14", False, "features", _STEIN),
    MetricSpec(
        "fd-dinov2-edm2", "Fréchet distance on DINOv2, EDM2's resize", False, "features", _STEIN
    ),
    MetricSpec("fd-digits", "Fréchet distance on digits-cnn", False, "features", _HEUSEL),
    MetricSpec("fd-cifar-cnn", "Fréchet distance on cifar-cnn", False, "features", _HEUSEL),
    MetricSpec("fd-pixels", "Fréchet distance on pixel values", False, "features", _HEUSEL),
    MetricSpec("is", "Inception score of the extractor's classifier", True, "logits", _SALIMANS),
    MetricSpec(
        "is-openai",
        "Inception score of OpenAI's evaluator (5,000 in order)",
        True,
        "logits",
        _SALIMANS,
    ),
    MetricSpec("precision", "Improved precision (k = 3)", True, "features", _KYNKAANNIEMI),
    MetricSpec("recall", "Improved recall (k = 3)", True, "features", _KYNKAANNIEMI),
    MetricSpec("density", "Density (k = 3)", True, "features", _NAEEM),
    MetricSpec("coverage", "Coverage (k = 3)", True, "features", _NAEEM),
    MetricSpec("kid", "Kernel Inception distance", False, "features", _BINKOWSKI),
    MetricSpec("kd", "Kernel distance on the extractor", False, "features", _BINKOWSKI),
    MetricSpec(
        "flow-map-mean", "Mean flow-map error", False, "flow map", unit="data standard deviations"
    ),
    MetricSpec(
        "flow-map-max", "Largest flow-map error", False, "flow map", unit="data standard deviations"
    ),
)

EXTRACTORS: tuple[ExtractorSpec, ...] = (
    ExtractorSpec(
        "inception",
        "cmbench.metrics.inception:InceptionExtractor",
        "2015 Inception, torch-fidelity's weights and resize",
        "Szegedy et al. 2015, arXiv:1512.00567",
    ),
    ExtractorSpec(
        "inception-clean",
        "cmbench.metrics.clean_fid:clean",
        "2015 Inception as clean-fid's clean mode",
        _PARMAR,
    ),
    ExtractorSpec(
        "inception-legacy-tensorflow",
        "cmbench.metrics.clean_fid:legacy_tensorflow",
        "2015 Inception as NVIDIA's TorchScript file: EDM's detector",
        _PARMAR,
    ),
    ExtractorSpec(
        "inception-legacy-pytorch",
        "cmbench.metrics.clean_fid:legacy_pytorch",
        "2015 Inception as pytorch-fid",
        _PARMAR,
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
        "digits-cnn", "cmbench.metrics.digits_cnn:DigitsExtractor", "Small CNN for 8x8 digits, 64-d"
    ),
    ExtractorSpec(
        "cifar-cnn", "cmbench.metrics.cifar_cnn:CifarExtractor", "Small ResNet for CIFAR, 256-d"
    ),
    ExtractorSpec(
        "pixels",
        "cmbench.metrics.extractor:PixelExtractor",
        "Identity: the pixel values themselves",
    ),
)
