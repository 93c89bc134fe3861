"""Runs on latents: decoded before they are measured, compared with imported statistics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmbench.bench import runs
from cmbench.bench.context import Context
from cmbench.bench.executors import Local
from cmbench.bench.planning import plan_run
from cmbench.bench.sweep import SweepRequest, execute, plan_sweep
from cmbench.data import latents
from cmbench.data.preparation.run import Request, prepare
from cmbench.data.rules import RULES
from cmbench.errors import MissingError
from cmbench.metrics.extractor import PixelExtractor
from cmbench.metrics.reference_cache import cached_reference

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
        lambda: iter([pictures]), PixelExtractor(), source=NAME, source_sha256="0" * 64,
        quantization="round", folder=context.workspace.root / "references",
    )  # fmt: skip


def test_samples_are_decoded_and_compared_with_imported_statistics(
    latent: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder()
    monkeypatch.setattr(latents, "_load_decoder", lambda *_: decoder)
    add_reference(latent)
    request = asked(tmp_path)
    (record,) = execute(latent, request, plan_sweep(latent, request), Local())
    assert record.status == "finished", record.reason
    assert record.metrics["fd-pixels"].value is not None
    assert record.dataset.reference_count == 40, "the statistics', not the latents'"
    assert decoder.sizes == [8, 8, 4], "a few at a time"
    grid = latent.workspace.records(NAME) / record.artifacts["grid"].file
    assert grid.is_file()


def test_what_is_missing_is_said_before_any_training(latent: Context, tmp_path: Path) -> None:
    request = asked(tmp_path)
    plan = plan_sweep(latent, request)

    def refused(message: str) -> None:
        with pytest.raises(MissingError, match=message):
            execute(latent, request, plan, Local())
        assert not latent.workspace.run(plan.runs[0].run_id).exists()

    refused(r"statistics of the original pictures .*run `cmbench refs import FILE --name imagenet5")
    add_reference(latent)
    refused(r"decoding its latents needs (the package diffusers|the autoencoder)")


def test_latents_are_not_bounded(latent: Context, tmp_path: Path) -> None:
    request = asked(tmp_path)
    plan = plan_run(latent, "edm", NAME, request.recipe, 0)
    assert not plan.problem(latent).bounded, "samplers must not clip them"
    assert runs.read_result(plan, latent.workspace.run(plan.run_id)) is None
