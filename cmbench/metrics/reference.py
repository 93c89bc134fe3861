"""References: features of real images, computed once and cached.

A reference holds the features' moments, the truncated covariance factor, the features themselves
(precision, recall and KID need them), their ball radii and their kernel sums, so that an evaluation
against it does no reference work at all. :mod:`cmbench.metrics.reference_cache` keeps it in a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.census import Census, CensusTaker
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.floor import Floors
from cmbench.metrics.inception_score import InceptionScore, inception_score
from cmbench.metrics.kernel_distance import SelfKernel, self_kernel
from cmbench.metrics.precision_recall import NEIGHBOURS, reference_radii
from cmbench.metrics.quantize import quantize
from cmbench.metrics.real_splits import FEWEST, measure_floors
from cmbench.metrics.statistics import FeatureStatistics, Moments, moments_of

#: Part of every metric key through the reference's digest: raise it only if the numbers change.
LAYOUT_VERSION = 3
#: A quantization that fits every rule: imported statistics of real, stored images.
ANY = "any"


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that decides a reference."""

    source: str
    source_sha256: str
    extractor: str
    extractor_sha256: str
    preprocessing: str
    quantization: str
    #: Who computed it: "cmbench", or the library or paper that an imported file comes from.
    origin: str = "cmbench"
    layout_version: int = LAYOUT_VERSION

    @property
    def digest(self) -> str:
        """Hash of all of it, the same on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """File name in the cache folder."""
        source = re.sub(r"[^A-Za-z0-9._+-]", "_", self.source)
        return f"{source}-{self.extractor}-{self.digest[:16]}.safetensors"


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of real images and what metrics compute of them.

    ``moments`` are those of the pooled features. ``features`` is None where only moments are known
    (imported statistics); metrics that need them refuse such a reference. ``radii`` and ``kernel``
    are what precision, recall and kernel distances compute of the features; ``spatial`` are the
    moments of spatial features, if any.
    """

    key: ReferenceKey
    moments: Moments
    features: Tensor | None = None
    radii: Tensor | None = None
    kernel: SelfKernel | None = None
    spatial: Moments | None = None
    score: InceptionScore | None = None
    census: Census | None = None
    floors: Floors | None = None
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int | None:
        """Number of real images, None where an imported file does not say."""
        return self.moments.count

    @classmethod
    def compute(
        cls, images: Iterable[Tensor], extractor: Extractor, key: ReferenceKey
    ) -> Reference:
        """Extract and summarise a stream of images.

        ``images`` are batches ``[N, C, H, W]``, uint8, or float in [-1, 1] (then quantized).
        """
        pool: list[Tensor] = []
        logits: list[Tensor] = []
        spatial: FeatureStatistics | None = None
        census = CensusTaker()
        for batch in images:
            pixels = quantize(batch, key.quantization) if batch.is_floating_point() else batch
            census.update(pixels)
            features = extractor(pixels)
            pool.append(features.pool)
            if features.logits is not None:
                logits.append(features.logits)
            if features.spatial is not None:
                width, device = features.spatial.shape[1], features.spatial.device
                spatial = FeatureStatistics(width, device) if spatial is None else spatial
                spatial.update(features.spatial)
        if not pool:
            raise UserError(
                f"reference {key.source!r}",
                "no images",
                allowed="at least 2",
                remedy="check the reference data",
            )
        rows = torch.cat(pool)
        reference = cls.of_features(key, rows)
        if logits:
            score = inception_score(torch.cat(logits), splits=min(10, len(rows)))
            reference = replace(reference, score=score)
        if spatial is not None:
            reference = replace(reference, spatial=spatial.moments())
        return replace(reference, census=census.result()).with_floors()

    @classmethod
    def of_features(cls, key: ReferenceKey, rows: Tensor) -> Reference:
        """Return the reference of pooled features ``[M, D]``, M >= 2."""
        return cls(key, moments_of(rows)).with_features(rows)

    def with_features(self, rows: Tensor) -> Reference:
        """Return a copy with the features ``[M, D]`` of real images and what follows from them."""
        return replace(
            self,
            features=rows,
            radii=reference_radii(rows) if len(rows) > NEIGHBOURS else None,
            kernel=self_kernel(rows) if len(rows) >= 4 else None,
        )

    def with_floors(self) -> Reference:
        """Return a copy with the floor, which takes a while; itself where images are too few."""
        if self.features is None or self.radii is None or len(self.features) < FEWEST:
            return self
        return replace(self, floors=measure_floors(self.features, self.radii))

    def require_features(self, metric: str) -> Tensor:
        """Return the features, or raise the error that ``metric`` cannot do without them."""
        if self.features is None:
            raise UserError(
                f"metric {metric!r}",
                f"the reference {self.key.source!r} holds a mean and a covariance only",
                allowed="a reference with features",
                remedy="compute the reference from images, or leave the metric out",
            )
        return self.features

    def to(self, device: torch.device | str) -> Reference:
        """Return a copy on ``device``."""
        kernel = self.kernel
        if kernel is not None:
            kernel = SelfKernel(kernel.row_means.to(device), kernel.mean_square)
        return replace(
            self,
            moments=self.moments.to(device),
            features=None if self.features is None else self.features.to(device),
            radii=None if self.radii is None else self.radii.to(device),
            kernel=kernel,
            spatial=None if self.spatial is None else self.spatial.to(device),
        )
