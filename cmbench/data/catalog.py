"""The built-in datasets and their protocols, as specs. Imports no torch.

ImageNet at 64x64 is four datasets here, because the papers cropped and shrank it differently and
their reference sets differ: each has its own name, and they are never mixed.
"""

from __future__ import annotations

from cmbench.plugin.specs import DatasetSpec

_PREPARED = "cmbench.data.prepared:build"
_PAPER_METRICS = ("fid", "is", "precision", "recall", "kid")
_IMAGENET_LICENSE = "ImageNet terms of access (non-commercial research)"
_IMAGENET = "https://image-net.org, ILSVRC 2012 training images"


def _paper(
    name: str,
    title: str,
    resolution: int,
    num_classes: int,
    license: str,
    source: str,
    *,
    channels: int = 3,
    factory: str = _PREPARED,
) -> DatasetSpec:
    """Return the spec of a dataset that papers report FID on: 50,000 samples, NFE 1, 2, 4."""
    return DatasetSpec(
        name=name,
        factory=factory,
        title=title,
        data_shape=(channels, resolution, resolution),
        num_classes=num_classes,
        extractor="inception",
        metrics=_PAPER_METRICS,
        nfe=(1, 2, 4),
        num_samples=50_000,
        license=license,
        source=source,
    )


def _imagenet64(suffix: str, title: str, source: str = _IMAGENET) -> DatasetSpec:
    return _paper(
        f"imagenet64{suffix}", f"ImageNet 64x64, {title}", 64, 1000, _IMAGENET_LICENSE, source
    )


DIGITS = DatasetSpec(
    name="digits",
    factory="cmbench.data.digits:build",
    title="UCI handwritten digits, 8x8, 10 classes",
    data_shape=(1, 8, 8),
    num_classes=10,
    extractor="digits-cnn",
    metrics=("fd-digits", "precision", "recall", "density", "coverage", "is", "kd"),
    nfe=(1, 2, 4),
    num_samples=2_000,
    sigma_data=0.75,
    license="CC BY 4.0",
    source="E. Alpaydin, C. Kaynak, https://doi.org/10.24432/C50P49, as scikit-learn ships it",
    embedded=True,
)

GMM = DatasetSpec(
    name="gmm",
    factory="cmbench.data.analytic:build_ring",
    title="Gaussian mixture on a ring, 2-D, closed form",
    data_shape=(2, 1, 1),
    num_classes=8,
    extractor="pixels",
    metrics=("flow-map-mean", "flow-map-max", "fd-pixels"),
    nfe=(1, 2, 4),
    num_samples=2_000,
    quantize="none",
    license="Apache-2.0",
    source="computed",
    embedded=True,
)

GMM_IMAGE = GMM._replace(
    name="gmm-8x8",
    factory="cmbench.data.analytic:build_image_mixture",
    title="Gaussian mixture of 8x8 images, closed form",
    data_shape=(1, 8, 8),
    num_classes=10,
)

CIFAR10_JPEG = DatasetSpec(
    name="cifar10-jpeg",
    factory=_PREPARED,
    title="CIFAR-10 as lossy JPEG, 32x32, 10 classes (never compared with cifar10)",
    data_shape=(3, 32, 32),
    num_classes=10,
    extractor="cifar-cnn",
    metrics=("fd-cifar-cnn", "precision", "recall"),
    nfe=(1, 2, 4),
    num_samples=10_000,
    license="as CIFAR-10",
    source="the CIFAR-10 images re-encoded as JPEG, quality about 75, 4:2:0, in class folders",
)

_LSUN = ("LSUN terms (research)", "https://www.yf.io/p/lsun")

BUILTIN_DATASETS: tuple[DatasetSpec, ...] = (
    DIGITS,
    GMM,
    GMM_IMAGE,
    CIFAR10_JPEG,
    _paper(
        "cifar10",
        "CIFAR-10, 32x32, 10 classes",
        32,
        10,
        "no licence stated",
        "A. Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    _imagenet64("", "EDM2/Dhariwal crop (EDM2, ECT, sCM)"),
    _imagenet64("-adm", "ADM crop (guided diffusion, CM, iCT)"),
    _imagenet64("-edm", "EDM centre crop (EDM)"),
    _imagenet64(
        "-small",
        "the official 64x64 downsampled batches",
        "P. Chrabaszcz et al. 2017, arXiv:1707.08819, https://image-net.org/download-images",
    )._replace(class_order="map_clsloc.txt"),
    _paper("lsun-bedroom256", "LSUN bedroom, 256x256", 256, 0, *_LSUN),
    _paper("lsun-cat256", "LSUN cat, 256x256", 256, 0, *_LSUN),
    _paper(
        "imagenet512",
        "ImageNet 512x512 as Stable Diffusion latents, 4x64x64 (EDM2)",
        64,
        1000,
        _IMAGENET_LICENSE,
        f"{_IMAGENET}, encoded with sd-vae-ft-mse",
        channels=4,
        factory="cmbench.data.latents:build",
    )._replace(
        # EDM2's statistics are of EDM's detector, and its pictures are truncated to bytes.
        extractor="inception-legacy-tensorflow",
        metrics=("fid-legacy-tensorflow",),
        quantize="truncate",
        latent=True,
    ),
)
