"""``cmbench.load_dataset``: prepared images as torch datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmbench.api.session import Where, open_context
from cmbench.data.stored import ArrayDataset, to_float
from cmbench.errors import UserError


class Images(TorchDataset[tuple[Tensor, int]]):
    """Images float32 ``[C, H, W]`` in [-1, 1] with their class (-1 without labels).

    Args:
        dataset: the prepared images, in the order in which they are stored.
    """

    def __init__(self, dataset: ArrayDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.host_pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)} images")
        position = torch.tensor([index % len(self)])
        labels = self.dataset.host_labels
        label = -1 if labels is None else int(labels[int(position)])
        return to_float(self.dataset.gather(position))[0], label


def load_dataset(name: str, **where: Unpack[Where]) -> Mapping[str, Images]:
    """Return the images that training and the reference use, ``{"train": …}``.

    Args:
        name: of a dataset that is built in or prepared, or ``folder:PATH``.
        where: see :class:`cmbench.api.session.Where`; only plugins and data matter.

    Raises:
        MissingError: the dataset is not prepared here.
        UserError: it has no stored images (closed-form data are drawn, latents are not pictures).
    """
    context = open_context("cmbench.load_dataset", where)
    dataset = context.dataset(name)
    if not isinstance(dataset, ArrayDataset) or dataset.spec.latent:
        raise UserError(
            f"dataset {name!r}",
            "has no stored images",
            allowed="datasets of pictures",
            remedy="draw batches of its training stream with Context.dataset(name).batch",
        )
    return {"train": Images(dataset)}
