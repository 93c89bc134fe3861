"""Runs on latents: decoded before they are measured, compared with imported statistics."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmbench.data import latents
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.rules import RULES
from cmbench.errors import MissingError, UserError
from cmbench.measure.references import imported_reference, store_of
from cmbench.metrics.catalog import extractor_of
from cmbench.metrics.extractor import PixelExtractor
from cmbench.metrics.quantize import quantize
from cmbench.metrics.reference_cache import cached_reference
from cmbench.metrics.reference_import import import_reference
from cmbench.sweep import runs
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.planning import plan_run
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep
from cmbench.sweep.tuning import TuneSettings, tune

NAME = "imagenet512"
RECIPE = """
[imagenet512.tiny]
network = { name = "mlp", width = 8, blocks = 1 }
batch_size = 4
duration_kimg = 0.008
"""


class Decoder:
    """Makes a picture of 8x8 from the means of a latent."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.decoder, self.post_quant_conv = nn.Linear(2, 2), None

    def to(self, device: Any) -> Decoder:
        return self

    def decode(self, raw: Tensor) -> Any:
        self.sizes.append(len(raw))
        return SimpleNamespace(sample=F.avg_pool2d(raw[:, :3], 8))


@pytest.fixture
def latent(context: Context, tmp_path: Path) -> Context:
    """A context with five prepared latents, scored by their pixels."""
    source = tmp_path / "latents"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        np.save(source / f"img{i:08d}.npy", rng.normal(size=(8, 64, 64)).astype(np.float32) ** 2)
    labels = [[f"img{i:08d}.npy", i] for i in range(5)]
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    specs = context.plugins.datasets.specs
    specs[NAME] = specs[NAME]._replace(
        extractor="pixels", metrics=("fd-pixels",), nfe=(1,), num_samples=20
    )
    prepare(specs[NAME], RULES[NAME], Request(source, subset=True), context.locations)
    return context


def asked(tmp_path: Path) -> SweepRequest:
    (tmp_path / "own.toml").write_text(RECIPE)
    return SweepRequest(("edm",), NAME, f"{tmp_path / 'own.toml'}:tiny")


def add_reference(context: Context) -> None:
    pictures = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    cached_reference(
        lambda: iter([pictures]),
        PixelExtractor(),
        source=NAME,
        source_sha256="0" * 64,
        quantization="truncate",
        folder=context.workspace.root / "references",
    )


def test_samples_are_decoded_and_compared_with_imported_statistics(
    latent: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder()
    monkeypatch.setattr(latents, "_load_decoder", lambda *_: decoder)
    add_reference(latent)
    request = asked(tmp_path)
    (record,) = execute(latent, plan_sweep(latent, request), Local())
    assert record.status == "finished", record.reason
    assert record.metrics["fd-pixels"].value is not None
    assert record.dataset.reference_count == 40, "the statistics', not the latents'"
    assert decoder.sizes[:3] == [8, 8, 4], "a few at a time"
    assert max(decoder.sizes) == 8, "also where the run checks some of them again"
    grid = latent.workspace.records(NAME) / record.artifacts["grid"].file
    assert grid.is_file()


def test_noise_levels_are_tuned_on_decoded_samples(
    latent: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder()
    monkeypatch.setattr(latents, "_load_decoder", lambda *_: decoder)
    add_reference(latent)
    request = asked(tmp_path)
    execute(latent, plan_sweep(latent, request), Local())
    decoder.sizes.clear()
    run = plan_run(latent, "edm", NAME, request.recipe, 0)
    found = tune(latent, run, 2, TuneSettings(sampler="euler", evaluations=2, rounds=1))
    assert sum(decoder.sizes) == found.samples == 20 * found.evaluations
    assert found.value <= found.start_value


@pytest.mark.parametrize(("value", "stored"), [(-1.0, 0), (0.0, 0), (0.5, 127), (1.0, 255)])
def test_the_decoder_is_in_edm2s_range(latent: Context, value: float, stored: int) -> None:
    spec = latent.plugins.datasets.specs[NAME]
    dataset = latents.build(spec, latent.locations)
    dataset._decoder = SimpleNamespace(
        decode=lambda raw: SimpleNamespace(sample=torch.full((len(raw), 3, 8, 8), value))
    )
    dataset._decoder.to = lambda _: dataset._decoder
    pictures = quantize(dataset.to_pixels(torch.zeros(9, 4, 64, 64)), spec.quantize)
    assert pictures.shape == (9, 3, 8, 8)
    assert pictures.unique().tolist() == [stored]


@pytest.mark.usefixtures("any_width")
def test_edm2s_statistics_are_found(context: Context, tmp_path: Path) -> None:
    spec = context.plugins.datasets.specs[NAME]
    (metric,) = spec.metrics
    rows = np.random.default_rng(0).normal(size=(20, 6))
    entry = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps({"fid": entry, "fd_dinov2": entry}))
    add = store_of(context.workspace).add
    first = add(import_reference(path, name=NAME))
    add(import_reference(path, name=NAME, entry="fd_dinov2"))
    extractor: Any = SimpleNamespace(
        name=extractor_of(context.plugins.metrics.get(metric), "pixels", context.plugins)
    )
    assert extractor.name == spec.extractor
    found = imported_reference(context.workspace, NAME, extractor)
    assert np.array_equal(found.moments.mean, rows.mean(0))
    # A second file of the same name and extractor: neither is taken silently.
    path.write_bytes(pickle.dumps({"fid": {"mu": rows.mean(0) + 1, "sigma": entry["sigma"]}}))
    second = add(import_reference(path, name=NAME))
    assert second != first
    with pytest.raises(UserError, match=r"has 2 imported references: .*; remove the others"):
        imported_reference(context.workspace, NAME, extractor)


def test_what_is_missing_is_said_before_any_training(latent: Context, tmp_path: Path) -> None:
    request = asked(tmp_path)
    plan = plan_sweep(latent, request)

    def refused(message: str) -> None:
        with pytest.raises(MissingError, match=message):
            execute(latent, plan, Local())
        assert not latent.workspace.run(plan.runs[0].run_id).exists()

    refused(r"statistics of the original pictures .*run `cmbench refs import FILE --name imagenet5")
    add_reference(latent)
    refused(r"decoding its latents needs (the package diffusers|the autoencoder)")


def test_latents_are_not_bounded(latent: Context, tmp_path: Path) -> None:
    request = asked(tmp_path)
    plan = plan_run(latent, "edm", NAME, request.recipe, 0)
    assert not plan.data_info(latent).bounded, "samplers must not clip them"
    assert runs.read_result(plan, latent.workspace.run(plan.run_id)) is None
