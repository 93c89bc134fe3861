"""Valid synthetic records for the tests of reports and leaderboards."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cmbench.records.record import (
    GRID_TILE,
    Artifact,
    DatasetRecord,
    EnvironmentRecord,
    MetricRecord,
    PluginRecord,
    Record,
    SamplingRecord,
    TrainingRecord,
    write_record,
)


def sha(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def metric(
    value: float | None, name: str = "fd-digits", *, higher: bool = False, **other: Any
) -> MetricRecord:
    key = other.pop("key", f"{name}|digits@1|train-half|n1797|cnn-1")
    return MetricRecord(value=value, higher_is_better=higher, key=key, **other)


def record(
    method: str = "alpha",
    *,
    value: float | None = 1.0,
    nfe: int = 1,
    seed: int = 0,
    sampling_seed: int | None = None,
    dataset: str = "digits",
    recipe: str = "demo",
    metrics: dict[str, MetricRecord] | None = None,
    training: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    **fields: Any,
) -> Record:
    """One finished cell; every part can be overridden."""
    config = {"batch_size": 128, "lr": 1e-3, "p_mean": -1.0, "p_std": 1.4, "steps": 2000}
    if metrics is None:
        metrics = {
            "fd-digits": metric(value, detail={"floor": 0.8}),
            "precision": metric(0.7 + seed / 100, "precision", higher=True),
            "recall": metric(0.6 + seed / 100, "recall", higher=True),
        }
    cell = f"{dataset}-{method}-{recipe}-nfe{nfe}-s{seed}"
    base: dict[str, Any] = {
        "cell": cell if sampling_seed is None else f"{cell}-e{sampling_seed}",
        "status": "finished",
        "created": f"2026-01-02T03:04:{seed % 60:02d}Z",
        "command": f"cmbench run --method {method} --dataset {dataset} --recipe {recipe} "
        f"--nfe {nfe} --seeds {seed + 1}",
        "method": method,
        "title": f"{method.title()} models",
        "family": "consistency training" if method < "m" else "diffusion",
        "reference": f"{method.title()} et al., 2024",
        "year": 2024,
        "conditional": True,
        "plugin": PluginRecord(name="builtins", distribution="cmbench", version="0.1.0"),
        "dataset": DatasetRecord(
            name=dataset,
            revision="1",
            sha256=sha("data"),
            reference_count=898,
            reference_sha256=sha("ref"),
            extractor="cnn-1",
            extractor_sha256=sha("cnn"),
        ),
        "training": TrainingRecord(
            **{
                "run": f"{dataset}/{method}-{recipe}-s{seed}-{sha(method)[:8]}",
                "seed": seed,
                "recipe": recipe,
                "config": config,
                "config_sha256": sha(json.dumps([method, config])),
                "parameters": 100_000,
                "images_seen": 256_000,
                "network_evaluations": 1_024_000,
                "seconds_by_phase": {"train": 61.5 + seed, "teacher": 30.0},
                "checkpoint_sha256": sha(cell),
                "ema": "halflife-10kimg",
                **(training or {}),
            }
        ),
        "sampling": SamplingRecord(
            **{
                "nfe": nfe,
                "nfe_measured": float(nfe),
                "sampler": "multistep",
                "sigmas": [80.0, 0.8][: min(nfe, 2)],
                "seed": seed if sampling_seed is None else sampling_seed,
                "num_samples": 1797,
                "protocol_samples": 1797,
                "batch_size": 256,
                "seconds": 2.5,
                "images_per_s": 718.8,
                "labels": "balanced",
                "quantize": "round",
                **(sampling or {}),
            }
        ),
        "rank_metric": "fd-digits",
        "metrics": metrics,
        "environment": EnvironmentRecord(
            cmbench="0.1.0",
            python="3.11.9",
            packages={"torch": "2.15.0", "numpy": "2.4.6"},
            git_commit=sha("commit")[:40],
            git_dirty=False,
            platform="Linux",
            cpu="x86_64",
            threads=1,
        ),
    }
    return Record(**{**base, **fields})


def sweep(
    methods: tuple[str, ...] = ("alpha", "beta", "omega"),
    nfes: tuple[int, ...] = (1, 2, 4),
    seeds: int = 3,
    **fields: Any,
) -> list[Record]:
    """Records of several methods whose distance falls with NFE and wobbles with the seed."""
    return [
        record(
            method,
            nfe=nfe,
            seed=seed,
            value=(i + 1) * 10 / nfe + (0.1 - 0.01 * i) * ((seed * 7 + nfe) % 3),
            **fields,
        )
        for i, method in enumerate(methods)
        for nfe in nfes
        for seed in range(seeds)
    ]


def png(
    colour: tuple[int, int, int] = (200, 30, 30),
    size: tuple[int, int] = (32, 16),
    *,
    tile: bool = True,
) -> bytes:
    """A small PNG, as a sample grid if ``tile``."""
    buffer, info = io.BytesIO(), PngInfo()
    if tile:
        info.add_text(GRID_TILE, "8x8")
    Image.new("RGB", size, colour).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def with_artifact(folder: Path, item: Record, name: str, file: str, data: bytes) -> Record:
    """Write ``data`` beside the records and return ``item`` naming it."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(data)
    artifacts = {**item.artifacts, name: Artifact(file=file, sha256=sha(data))}
    return item.model_copy(update={"artifacts": artifacts})


def on_disk(folder: Path, records: list[Record]) -> list[tuple[Path, Record]]:
    """Write the records and return them as ``read_records`` would."""
    return [(write_record(item, folder), item) for item in records]
