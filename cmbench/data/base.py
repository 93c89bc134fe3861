"""What every dataset offers: a stateless training stream, labels for sampling, a reference.

Shapes: training images float32 ``[N, C, H, W]`` in [-1, 1] (unbounded for the 2-D mixture); labels
int64 ``[N]``; reference images uint8 ``[N, C, H, W]``, or float32 where ``quantize`` is "none".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from cmbench.data.locations import DataLocations
from cmbench.errors import UserError
from cmbench.plugin.method import Batch
from cmbench.plugin.specs import DatasetSpec
from cmbench.seeds import derive_seed


class Dataset(ABC):
    """Images with labels and a protocol.

    ``sha256`` identifies the content and ``revision`` its origin and preprocessing; both go into
    every record. ``size`` is the number of training images, None when the stream is infinite.
    ``class_counts`` is the number of images per class (empty without labels), ``class_names`` what
    the classes are called in the order of their numbers (empty if that is not known).
    """

    spec: DatasetSpec
    name: str
    data_shape: tuple[int, int, int]
    num_classes: int
    sha256: str
    revision: str
    size: int | None
    sigma_data: float
    class_counts: tuple[int, ...]
    class_names: tuple[str, ...]
    device: torch.device
    #: Total, seed and result of the last :meth:`quota_labels`.
    _quota: tuple[int, int, Tensor] | None = None

    def __init__(self, spec: DatasetSpec, *, sha256: str, revision: str, size: int | None) -> None:
        self.spec, self.name = spec, spec.name
        self.data_shape, self.num_classes = spec.data_shape, spec.num_classes
        self.sigma_data = spec.sigma_data
        self.sha256, self.revision, self.size = sha256, revision, size
        self.class_counts, self.class_names = (), ()
        self.device = torch.device("cpu")

    @abstractmethod
    def batch(self, start: int, count: int, seed: int, *, xflip: bool = False) -> Batch:
        """Return images ``start … start + count - 1`` of the training stream of ``seed``.

        The result depends on (seed, position) only. ``xflip`` mirrors each image with probability
        1/2, drawn from the seed and the position.
        """

    @abstractmethod
    def reference_images(self, batch_size: int = 500) -> Iterator[Tensor]:
        """Yield the protocol's reference set in a fixed order, uint8 (float32 if not quantized)."""

    def to(self, device: torch.device | str) -> Self:
        """Return this dataset with its batches on ``device``; the original is untouched."""
        if torch.device(device) == self.device:
            return self
        raise NotImplementedError(f"{type(self).__name__} cannot move to {device}")

    @property
    def reference_count(self) -> int:
        """Number of images that :meth:`reference_images` yields."""
        if self.size is None:
            raise NotImplementedError(f"{type(self).__name__} does not say its reference count")
        return self.size

    def labels_for(self, count: int, seed: int, start: int = 0) -> Tensor:
        """Return class labels int64 ``[count]`` for sampled images ``start …``, on the CPU.

        Image i's label is drawn from the dataset's class frequencies with the seed
        (seed, "label", i), so it does not depend on batches or processes.
        """
        return draw_labels(self._counts(), count, seed, start)

    def quota_labels(self, total: int, seed: int) -> Tensor:
        """Return the class labels int64 ``[total]`` of all sampled images, on the CPU.

        See :func:`quota_labels`; the last result is kept.
        """
        if self._quota is None or self._quota[:2] != (total, seed):
            self._quota = total, seed, quota_labels(self._counts(), total, seed)
        return self._quota[2]

    def _counts(self) -> Sequence[int]:
        """Return the images per class; raise ``UserError`` if there are no classes."""
        if not self.class_counts:
            raise UserError(
                f"dataset {self.name!r}",
                "it has no labels, but class-conditional sampling asks for them",
                allowed="unconditional training and sampling",
                remedy="set conditional=false in the recipe",
            )
        return self.class_counts

    def exact_flow_map(
        self, noise: Tensor, labels: Tensor | None = None, *, sigma_max: float = 80.0
    ) -> Tensor | None:
        """Return the exact PF-ODE sample ``[N, C, H, W]`` of unit ``noise``, in its dtype.

        The ODE starts at ``sigma_max * noise`` and ends at noise level zero; with ``labels`` it is
        that of the class. None without a closed form, as for every dataset of pictures.
        """
        return None

    def to_pixels(self, images: Tensor) -> Tensor:
        """Return pictures ``[N, 3, H, W]`` in [-1, 1] of data ``[N, C, H, W]``, as generated.

        The identity, unless the data are latents of an autoencoder.
        """
        return images

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the network in :meth:`to_pixels`; 0 where it is the identity."""
        return 0

    def require_pixels(self) -> None:  # noqa: B027
        """Raise ``MissingError`` if something that :meth:`to_pixels` needs is missing."""


def draw_labels(frequencies: Sequence[int], count: int, seed: int, start: int = 0) -> Tensor:
    """Return class labels int64 ``[count]`` of images ``start …``, drawn by class frequencies.

    Image i's label is drawn with the seed (seed, "label", i).
    """
    edges = list(accumulate(frequencies))
    total = edges[-1]
    drawn = (derive_seed(seed, "label", i) * total >> 63 for i in range(start, start + count))
    return torch.tensor([bisect_right(edges, d) for d in drawn], dtype=torch.int64)


def quota_labels(frequencies: Sequence[int], total: int, seed: int) -> Tensor:
    """Return class labels int64 ``[total]`` in exact proportion to the class frequencies.

    A class of frequency f has total · f labels, rounded down or up: systematic sampling, whose one
    offset has the seed (seed, "label quota"). Their order is that of the seeds (seed, "label", i).
    Exact quotas take the variance of class counts out of every metric.
    """
    edges = list(accumulate(frequencies))
    offset, unit = derive_seed(seed, "label quota"), total << 63
    places = (((i << 63) + offset) * edges[-1] // unit for i in range(total))
    ordered = [bisect_right(edges, place) for place in places]
    order = sorted(range(total), key=lambda i: derive_seed(seed, "label", i))
    labels = torch.empty(total, dtype=torch.int64)
    labels[torch.tensor(order, dtype=torch.int64)] = torch.tensor(ordered, dtype=torch.int64)
    return labels


def load_dataset(
    spec: DatasetSpec, factory: Callable[..., Any], locations: DataLocations | None = None
) -> Dataset:
    """Build the dataset of ``spec`` and check that it is a :class:`Dataset`."""
    dataset = factory(spec, locations or DataLocations())
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"dataset {spec.name!r}",
            f"its factory {spec.factory!r} returned {type(dataset).__name__}",
            allowed="a cmbench.data.base.Dataset",
            remedy="fix the plugin that registers it",
        )
    counts = len(dataset.class_counts)
    if counts and counts != spec.num_classes:
        raise UserError(
            f"dataset {spec.name!r}",
            f"its labels are of {counts} classes, its spec says {spec.num_classes}",
            allowed=f"labels from 0 to {spec.num_classes - 1}",
            remedy="fix num_classes in the plugin that registers it, or its labels",
        )
    return dataset
