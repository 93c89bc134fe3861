from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Inception weights in torch-fidelity's format."""
    from random_inception import write_random_weights

    return write_random_weights(tmp_path_factory.mktemp("weights") / "random.pth")
