"""Shared by the mathematics tests: seeds, mixtures, and raw networks that are formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from cmbench.diffusion.frames import append_dims
from cmbench.diffusion.gaussian_mixture import GaussianMixture, image_mixture, ring_mixture

# torch's first calls take longer than any deadline; the same examples in every run.
settings.register_profile("mathematics", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mathematics")

Network = Callable[..., Tensor]


def student_formula(x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
    """The student of the golden file."""
    return 0.3 * torch.sin(1.7 * x + 0.5 * append_dims(c_noise, x)) + 0.2 * x


def teacher_formula(x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
    """The teacher of the golden file."""
    return 0.25 * torch.cos(1.1 * x - 0.4 * append_dims(c_noise, x)) - 0.1 * x


@pytest.fixture
def student() -> Network:
    return student_formula


@pytest.fixture
def teacher() -> Network:
    return teacher_formula


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240229)


@pytest.fixture(scope="session")
def ring() -> GaussianMixture:
    return ring_mixture()


@pytest.fixture(scope="session")
def images() -> GaussianMixture:
    return image_mixture()


@pytest.fixture(scope="session")
def lopsided() -> GaussianMixture:
    """Three components of unequal weight and shape, a mean that is not zero, two classes."""
    return GaussianMixture(
        means=torch.tensor([[0.9, -0.2], [-0.4, 0.8], [0.3, 1.1]], dtype=torch.float64)[
            ..., None, None
        ],
        stds=torch.tensor([[0.3, 0.2], [0.15, 0.4], [0.25, 0.25]], dtype=torch.float64)[
            ..., None, None
        ],
        weights=torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64),
        labels=torch.tensor([0, 1, 1]),
    )
