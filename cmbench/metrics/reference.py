"""What samples are compared with: features of real images, computed once and cached.

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
from functools import cached_property

import torch
from torch import Tensor

from cmbench.errors import UserError
from cmbench.metrics.census import Census, CensusTaker
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.frechet import FrechetReference, covariance_factor, frechet_distance
from cmbench.metrics.inception_score import InceptionScore, inception_score
from cmbench.metrics.kernel_distance import SelfKernel, kernel_distance, self_kernel
from cmbench.metrics.precision_recall import PrecisionRecall, precision_recall, reference_radii
from cmbench.metrics.quantize import quantize
from cmbench.metrics.statistics import FeatureStatistics, Moments
from cmbench.seeds import derive_seed

LAYOUT_VERSION = 3
#: A quantisation that fits every rule: imported statistics of real, stored images.
ANY = "any"
#: Neighbours that set a ball's radius in precision, recall, density and coverage.
NEIGHBOURS = 3


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


def reference_key(
    extractor: Extractor, *, source: str, source_sha256: str, quantization: str
) -> ReferenceKey:
    """Return the key of a reference.

    Args:
        extractor: what turns images into features.
        source: name of the dataset and split, for people.
        source_sha256: hash of its content.
        quantization: the rule of the samples, see :mod:`cmbench.metrics.quantize`.
    """
    return ReferenceKey(
        source=source,
        source_sha256=source_sha256,
        extractor=extractor.name,
        extractor_sha256=extractor.weights_sha256,
        preprocessing=extractor.preprocessing,
        quantization=quantization,
    )


@dataclass(frozen=True)
class Floor:
    """Scores of two disjoint halves of the real images, ``count`` images each."""

    count: int
    frechet: float
    kernel: float
    manifold: PrecisionRecall


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images as an extractor sees them.

    ``features`` is None where only moments are known (imported statistics); the metrics that need
    them refuse such a reference. ``spatial`` are the moments of spatial features, if any.
    """

    key: ReferenceKey
    frechet: FrechetReference
    features: Tensor | None = None
    radii: Tensor | None = None
    kernel: SelfKernel | None = None
    spatial: FrechetReference | None = None
    score: InceptionScore | None = None
    census: Census | None = None
    halves_floor: Floor | None = None
    notes: tuple[str, ...] = ()

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the pooled features."""
        return self.frechet.moments

    @property
    def count(self) -> int | None:
        """Number of real images, None where an imported file does not say."""
        return self.moments.count

    @cached_property
    def sha256(self) -> str:
        """Hash of the moments (rounding included, so it may differ between machines)."""
        return self.moments.sha256

    @classmethod
    def compute(
        cls, images: Iterable[Tensor], extractor: Extractor, key: ReferenceKey
    ) -> Reference:
        """Extract and summarise a stream of images (see :func:`reference_key`).

        ``images`` are batches ``[N, C, H, W]``, uint8, or float in [-1, 1] (then quantised).
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
        reference = cls._summarise(key, torch.cat(pool), logits, spatial)
        floor = reference._compute_floor() if len(reference.with_features("floor")) >= 10 else None
        return replace(reference, census=census.result(), halves_floor=floor)

    @classmethod
    def _summarise(
        cls,
        key: ReferenceKey,
        rows: Tensor,
        logits: list[Tensor],
        spatial: FeatureStatistics | None,
    ) -> Reference:
        moments = FeatureStatistics.from_features(rows).moments()
        return cls(
            key,
            FrechetReference(moments, covariance_factor(moments)),
            features=rows,
            radii=reference_radii(rows, k=NEIGHBOURS) if len(rows) > NEIGHBOURS else None,
            kernel=self_kernel(rows) if len(rows) >= 4 else None,
            spatial=FrechetReference(spatial.moments()) if spatial else None,
            score=inception_score(torch.cat(logits), splits=min(10, len(rows))) if logits else None,
        )

    def with_features(self, metric: str) -> Tensor:
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
        return Reference(
            self.key,
            _frechet_to(self.frechet, device),
            features=None if self.features is None else self.features.to(device),
            radii=None if self.radii is None else self.radii.to(device),
            kernel=kernel,
            spatial=None if self.spatial is None else _frechet_to(self.spatial, device),
            score=self.score,
            census=self.census,
            halves_floor=self.halves_floor,
            notes=self.notes,
        )

    def halves(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the features of two disjoint random halves of equal size."""
        rows = self.with_features("floor")
        generator = torch.Generator().manual_seed(derive_seed(seed, "halves"))
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        half = len(rows) // 2
        return rows[order[:half]], rows[order[half : 2 * half]]

    def floor(self) -> Floor:
        """Return what two disjoint halves of the real images score against each other.

        No generator should be expected below it at that sample count: the floor of distances, the
        ceiling of precision, recall, density and coverage. Stored with the reference.
        """
        return self._compute_floor() if self.halves_floor is None else self.halves_floor

    def _compute_floor(self) -> Floor:
        first, second = self.halves()
        return Floor(
            count=len(first),
            frechet=frechet_distance(
                FeatureStatistics.from_features(first), FeatureStatistics.from_features(second)
            ),
            kernel=kernel_distance(first, second).value,
            manifold=precision_recall(first, second, k=NEIGHBOURS),
        )


def _frechet_to(reference: FrechetReference, device: torch.device | str) -> FrechetReference:
    moments = reference.moments
    moved = Moments(moments.mean.to(device), moments.cov.to(device), moments.count, moments.divisor)
    return FrechetReference(moved, reference.factor.to(device))
