"""A dataset of the golden networks' shape: 3x16x16, ten classes."""

from __future__ import annotations

import numpy as np

from cmbench.data.locations import DataLocations
from cmbench.data.stored import ArrayDataset
from cmbench.plugin import hookimpl
from cmbench.plugin.specs import DatasetSpec

PATCHES = DatasetSpec(
    name="patches",
    factory="patches:build_patches",
    title="Noise in colour",
    data_shape=(3, 16, 16),
    num_classes=10,
    extractor="pixels",
    metrics=("fd-pixels",),
    nfe=(1, 2),
    num_samples=12,
    embedded=True,
)

#: The recipe file of the fixture ``recipe``: students of an imported teacher.
RECIPES = """
[base]
batch_size = 4
duration_kimg = 0.008
network = { name = "unet-tiny", dropout = 0.1 }

[patches.tiny]
teacher = "import:m"
"""


def build_patches(spec: DatasetSpec, locations: DataLocations) -> ArrayDataset:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    return ArrayDataset(spec, pixels, np.arange(40) % 10, sha256="1" * 64, revision="1")


class Patches:
    @hookimpl
    def cmbench_register_datasets(self) -> list[DatasetSpec]:
        return [PATCHES]


#: What an entry point names.
PLUGIN = Patches()
