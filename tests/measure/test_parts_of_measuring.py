"""What surrounds the measuring loop: pictures, options of extractors, references, progress."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmbench.errors import MissingError, UserError
from cmbench.measure.extractors import load_extractor
from cmbench.measure.gallery import grid_png
from cmbench.measure.loop import measure
from cmbench.measure.observers import FirstImages, progress_of, saved_to
from cmbench.measure.references import imported_reference
from cmbench.metrics.extractor import PixelExtractor
from cmbench.metrics.reference_cache import cached_reference
from cmbench.plugin.manager import PluginManager
from cmbench.records.workspace import Workspace
from cmbench.reporter import Reporter
from cmbench.samples.source import ReadOptions, SampleSource
from cmbench.sampling.stream import SampleBatch

# ---- pictures -----------------------------------------------------------------------------------


def test_points_are_drawn_where_they_are() -> None:
    """From -1.2 to 1.2, upwards; a point outside lies on the edge."""
    points = torch.tensor([[0.6, 0.6], [9.0, -0.6]])[..., None, None]
    plot = np.asarray(Image.open(io.BytesIO(grid_png(points))))
    assert plot.shape == (256, 256, 3)
    drawn = (plot != 255).any(-1)
    first, second = np.argwhere(drawn[:128]), np.argwhere(drawn[128:])
    assert first.mean(0) == pytest.approx([255 / 4, 255 * 3 / 4], abs=1)
    assert all(4 <= side <= 6 for side in np.ptp(first, 0) + 1), "a disc"
    assert second.mean(0)[0] == pytest.approx(255 * 3 / 4 - 128, abs=1)
    assert second.max(0)[1] == 255


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 3), (8, 3)])
def test_a_grid_of_latents_shows_their_first_channels(channels: int, shown: int) -> None:
    latents = torch.rand(3, channels, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert grid_png(latents) == grid_png(latents[:, :shown])


# ---- extractors ---------------------------------------------------------------------------------


def opened_with(
    plugins: PluginManager, monkeypatch: pytest.MonkeyPatch, *metrics: str, **asked: Any
) -> Any:
    """Return the options that an extractor which knows all of them is opened with."""

    def factory(
        weights: Path | None,
        *,
        implementation: str = "",
        spatial: bool | None = None,
        trust: bool | None = None,
        precision: str = "",
        compiled: bool | None = None,
    ) -> dict[str, Any]:
        given = {"implementation": implementation, "spatial": spatial, "trust": trust}
        given |= {"precision": precision, "compiled": compiled}
        return {name: value for name, value in given.items() if value not in (None, "")}

    monkeypatch.setattr(plugins.extractors, "load", lambda _: factory)
    return load_extractor(plugins, "any", metrics, **asked)


def test_an_extractor_is_opened_with_what_was_asked_for_and_nothing_else(
    plugins: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened_with(plugins, monkeypatch, "fid", "unregistered") == {}
    assert opened_with(plugins, monkeypatch, "fid", "sfid") == {"spatial": True}
    assert opened_with(plugins, monkeypatch, "fid", trust=True) == {"trust": True}
    library = opened_with(plugins, monkeypatch, "fid", library=True)
    assert library == {"implementation": "library"}
    quick = opened_with(plugins, monkeypatch, "fid", approximations=("bfloat16", "compiled"))
    assert quick == {"precision": "bfloat16", "compiled": True}
    with pytest.raises(UserError, match="extractor 'any': has no channels-last path; allowed: in"):
        opened_with(plugins, monkeypatch, "fid", approximations=("channels-last",))


def test_an_extractor_without_options_is_opened_without_them(
    plugins: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins.extractors, "load", lambda _: lambda weights: [weights])
    place = Path("weights.pt")
    found: Any = load_extractor(plugins, "any", ("sfid",), place, library=True, trust=True)
    assert found == [place]


# ---- references ---------------------------------------------------------------------------------


def test_imported_statistics_are_found_by_name_and_extractor(workspace: Workspace) -> None:
    """Whatever else is in the folder: other names, other extractors, damaged files."""
    folder = workspace.root / "references"
    for name, count in (("ours", 20), ("others", 30)):
        cached_reference(
            lambda count=count: iter([torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8)]),
            PixelExtractor(),
            source=name,
            source_sha256="0" * 64,
            quantization="round",
            folder=folder,
        )
    (folder / "damaged.safetensors").write_bytes(b"damaged")
    extractor = PixelExtractor()
    assert imported_reference(workspace, "ours", extractor).count == 20
    extractor.name = "another"
    with pytest.raises(MissingError, match=r"dataset 'ours': .*\(another\), which are not in "):
        imported_reference(workspace, "ours", extractor)


# ---- the loop -----------------------------------------------------------------------------------


def test_a_source_without_samples_is_refused() -> None:
    class Empty(SampleSource):
        kind, count = "empty", 0

        def batches(self, batch_size: int) -> Iterator[SampleBatch]:
            yield from ()

    with pytest.raises(UserError, match="nothing: holds no samples; allowed: at least 2"):
        measure(Empty("nothing", ReadOptions()), [], batch_size=4)


# ---- observers ----------------------------------------------------------------------------------


def test_the_first_images_are_kept_whatever_the_batches() -> None:
    images = torch.rand(9, 1, 2, 2)
    for size in (3, 4, 9):
        first = FirstImages(4)
        for start in range(0, 9, size):
            first(SampleBatch(images[start : start + size], start))
        assert torch.equal(first.images, images[:4]), size


def test_saved_samples_are_named_by_their_number(tmp_path: Path) -> None:
    """Grey levels from -1 to 1; what lies outside is clipped."""
    images = torch.tensor([-1.0, 0.0, 1.0, 1.5])[:, None, None, None].expand(4, 3, 2, 2)
    observe = saved_to(tmp_path / "samples")
    observe(SampleBatch(images[:3], 7))
    observe(SampleBatch(images[3:], 10))
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == [f"{number:06d}.png" for number in (7, 8, 9, 10)]
    assert [np.unique(Image.open(path)).tolist() for path in files] == [[0], [128], [255], [255]]


class Told(Reporter):
    """Keeps what is said of progress."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def task_progress(self, task: str, done: int, scalars: Any) -> None:
        self.said.append((task, done, scalars))

    def task_finished(self, task: str) -> None:
        self.said.append(task)


def test_progress_is_in_images_per_second_of_the_time_that_counts() -> None:
    told = Told()
    with progress_of(told, "sample", 8, lambda: 4.0) as observe:
        for first, count in ((0, 6), (6, 2)):
            observe(SampleBatch(torch.zeros(count, 1, 2, 2), first))
    assert told.said == [
        ("sample", 6, {"images_per_s": 1.5}),
        ("sample", 8, {"images_per_s": 2.0}),
        "sample",
    ]


def test_tolerances_of_records_are_those_that_the_documentation_states() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "records.md").read_text().split())
    stated = re.findall(r"(\d+)(?: levels)? and (\de-\d) in (fp32|fp16|bf16)", text)
    assert len(stated) == 3
    first = FirstImages(2)
    first(SampleBatch(torch.rand(3, 1, 2, 2), 0))
    for levels, relative, precision in stated:
        kept = first.summary(PixelExtractor(), "round", precision)
        assert (kept.pixel_tolerance, kept.feature_tolerance) == (float(levels), float(relative))
        assert kept.count == 2
