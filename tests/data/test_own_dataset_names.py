"""The names that images of one's own get without ``--name``."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cmbench.cli.prepare import PrepareOptions, find_target
from cmbench.data.custom import slug


@pytest.mark.parametrize("folder", ["photos", "v1.2.data", "..x", "a b (c)", "été", "-", "___"])
def test_every_folder_has_a_name_that_can_be_prepared(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder
    path.mkdir()
    Image.new("RGB", (4, 4)).save(path / "0.png")
    target = f"folder:{path}"
    spec, _, source = find_target(PrepareOptions(target=target), {})
    assert source == path
    assert spec.name == slug(target)
    assert spec.name.startswith("folder-")
