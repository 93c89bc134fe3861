"""Sample grids as the harness writes them stand side by side, one seed in one row."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from record_factory import on_disk, record, with_artifact

from cmbench.leaderboard.labels import row_labels
from cmbench.leaderboard.rows import aggregate
from cmbench.measure.gallery import grid_png
from cmbench.metrics.quantize import quantize
from cmbench.records.folders import read_records
from cmbench.report import render
from cmbench.report.artifacts import STRIP_SIDE, picture


def numbered(count: int, side: int, channels: int = 1) -> torch.Tensor:
    """Images whose grey level is their index."""
    levels = torch.arange(count, dtype=torch.float32) / 127.5 - 1
    return levels[:, None, None, None].expand(count, channels, side, side)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3)])
def test_a_grid_of_the_harness_is_cut_into_its_images(side: int, channels: int) -> None:
    data, is_strip = picture(grid_png(numbered(20, side, channels)), "a.png")
    assert is_strip
    strip = Image.open(io.BytesIO(data)).convert("L")
    assert strip.size == (side, 8 * side)
    assert [strip.getpixel((1, side * i + 1)) for i in range(8)] == list(range(8))


def test_fewer_images_than_a_row_and_points_are_fine() -> None:
    data, is_strip = picture(grid_png(numbered(3, 8)), "a.png")
    assert is_strip
    assert Image.open(io.BytesIO(data)).size == (8, 64)
    plot = grid_png(torch.zeros(5, 2, 1, 1))
    assert picture(plot, "a.png") == (plot, False)


def test_large_images_are_scaled_down_for_the_page() -> None:
    data, _ = picture(grid_png(numbered(8, 256, 3)), "a.png")
    assert Image.open(io.BytesIO(data)).size == (STRIP_SIDE, 8 * STRIP_SIDE)


def test_strips_of_one_seed_share_a_panel_and_have_one_size(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    items = []
    for seed in range(2):
        for method in ("alpha", "beta"):
            item = record(method, seed=seed)
            data = grid_png(numbered(16, 8))
            items.append(with_artifact(folder, item, "grid", f"{method}{seed}.png", data))
    on_disk(folder, items)
    render({"digits": read_records(folder)}, tmp_path)
    html = (tmp_path / "digits.html").read_text()
    (panel,) = re.findall(r'<div class="strips".*?</div>\n</div>', html, re.DOTALL)
    found = re.findall(r'base64,([^"]+)" width="(\d+)" alt="grid of (\w+)', panel)
    assert [(name, width) for _, width, name in found] == [("alpha", "64"), ("beta", "64")]
    sizes = {Image.open(io.BytesIO(base64.b64decode(text))).size for text, *_ in found}
    assert sizes == {(8, 64)}


def test_the_page_shows_the_first_images_of_a_grid_unchanged(tmp_path: Path) -> None:
    """A grid that lacks an image, or a strip that skips one, shows another noise in that row."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((64, 3, 8, 8), generator=generator) * 2 - 1
    folder = tmp_path / "records"
    item = with_artifact(folder, record("alpha"), "grid", "a.png", grid_png(images))
    on_disk(folder, [item])
    render({"digits": read_records(folder)}, tmp_path)
    (data,) = re.findall(r"data:image/png;base64,([^\"]+)", (tmp_path / "digits.html").read_text())
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    expected = quantize(images[:8], "round").permute(0, 2, 3, 1).reshape(64, 8, 3)
    assert np.array_equal(strip, expected.numpy())


def test_tuned_cells_are_labelled_in_tables_and_series(tmp_path: Path) -> None:
    found = {"tries": 9, "best": [80.0, 0.9]}
    items = [
        record("alpha", nfe=2, seed=seed, sampling={"tuned": tuned})
        for seed in range(2)
        for tuned in (None, found)
    ]
    rows = aggregate([(Path(f"{i}.json"), item) for i, item in enumerate(items)])
    assert sorted(row_labels(rows).values()) == ["alpha", "alpha, tuned sigmas"]
    render({"digits": [(Path(f"{i}.json"), item) for i, item in enumerate(items)]}, tmp_path)
    table = (tmp_path / "digits.md").read_text()
    assert "| Marks |" in table
    assert table.count("| tuned sigmas |") == 1
