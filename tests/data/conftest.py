from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from cmbench.data.locations import DataLocations
from cmbench.data.rules import Rule
from cmbench.plugin.specs import DatasetSpec

# How long an example takes says more about the machine than about the code.
settings.register_profile("cmbench-data", deadline=None, max_examples=50)
settings.load_profile("cmbench-data")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def locations(tmp_path: Path) -> DataLocations:
    return DataLocations(tmp_path / "data")


@pytest.fixture
def spec() -> DatasetSpec:
    """Three classes of 8x8 colour pictures."""
    return DatasetSpec(
        "tiny",
        "cmbench.data.prepared:build",
        "tiny",
        (3, 8, 8),
        3,
        "pixels",
        ("fd-pixels",),
        (1,),
        10,
    )


@pytest.fixture
def rule() -> Rule:
    return Rule("the tiny pictures", kinds=("folder", "zip", "tar", "lmdb", "cifar-python"))


@pytest.fixture(scope="session")
def cifar10_jpeg() -> Path:
    """The real archive, if it is at hand."""
    given = os.environ.get("CMBENCH_CIFAR10_JPEG")
    path = Path(given) if given else REPOSITORY.parent / "shared/data/cifar10-jpeg.tar.xz"
    if not path.is_file():
        pytest.skip("cifar10-jpeg.tar.xz is not here; set CMBENCH_CIFAR10_JPEG to its path")
    return path
