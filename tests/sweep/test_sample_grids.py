"""The sample grid of a record: the first images of the sampling seed, all of them, in order."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy import Toy

from cmbench.plugin import hookimpl
from cmbench.plugin.discovery import PluginInfo
from cmbench.plugin.method import Draws, Nets, SamplingPlan
from cmbench.plugin.specs import MethodSpec
from cmbench.seeds import derive_seed
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep

SIDE, COLUMNS = 2, 8


class Noise(Toy):
    """Calls its network once, as declared, and returns a third of its noise as the images."""

    def sample(
        self, nets: Nets, noise: Tensor, labels: Tensor | None, plan: SamplingPlan, draws: Draws
    ) -> Tensor:
        return noise / 3 + 0 * self.denoise(nets["model"], noise, labels)


class NoisePlugin:
    """Registers the method above with the recipes of the toy."""

    @hookimpl
    def cmbench_register_methods(self) -> list[MethodSpec]:
        recipes = Path(__file__).parents[1] / "toy.toml"
        return [MethodSpec("noise", "test_sample_grids:Noise", "Noise", recipes=recipes)]


def expected_pixels(seed: int, index: int) -> npt.NDArray[np.uint8]:
    """Image ``index`` of the sampling seed, from its definition: named noise, rounded to bytes."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise", index))
    image = torch.randn(SIDE, SIDE, generator=generator) / 3
    return (image * 127.5 + 128).clamp(0, 255).floor().numpy().astype(np.uint8)


@pytest.mark.parametrize(("count", "batch_size"), [(100, 40), (64, 64), (64, 63), (65, 500)])
def test_the_grid_has_the_first_64_images(toys: Context, count: int, batch_size: int) -> None:
    toys.plugins.register(NoisePlugin(), PluginInfo("noise", "n", "noise-distribution", "1"))
    settings = SampleSettings(num_samples=count, batch_size=batch_size)
    asked = SweepRequest(("noise",), "toys", nfes=(1,), seeds=(3,), sampling=settings)
    (record,) = execute(toys, plan_sweep(toys, asked), Local())
    assert (record.status, record.sampling.num_samples) == ("finished", count)
    png = (toys.workspace.records("toys") / record.artifacts["grid"].file).read_bytes()
    grid = np.asarray(Image.open(io.BytesIO(png)))
    assert grid.shape == (64 // COLUMNS * SIDE, COLUMNS * SIDE)
    for index in range(64):
        top, left = SIDE * (index // COLUMNS), SIDE * (index % COLUMNS)
        tile = grid[top : top + SIDE, left : left + SIDE]
        assert np.array_equal(tile, expected_pixels(record.sampling.seed, index)), index


def test_the_grid_of_fewer_images_has_them_all(toys: Context) -> None:
    toys.plugins.register(NoisePlugin(), PluginInfo("noise", "n", "noise-distribution", "1"))
    settings = SampleSettings(num_samples=11, batch_size=4)
    asked = SweepRequest(("noise",), "toys", nfes=(1,), sampling=settings)
    (record,) = execute(toys, plan_sweep(toys, asked), Local())
    png = (toys.workspace.records("toys") / record.artifacts["grid"].file).read_bytes()
    grid = np.asarray(Image.open(io.BytesIO(png)))
    assert grid.shape == (2 * SIDE, COLUMNS * SIDE)
    last = grid[SIDE:, 2 * SIDE : 3 * SIDE]
    assert np.array_equal(last, expected_pixels(record.sampling.seed, 10))
    assert not grid[SIDE:, 3 * SIDE :].any()
