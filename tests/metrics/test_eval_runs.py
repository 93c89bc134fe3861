"""Scoring a run of the harness: the same samples as its own cell's, against anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmbench.records.record import Record, read_record
from cmbench.records.workspace import Workspace

Cmbench = Callable[..., Any]


@pytest.fixture
def trained(cmbench_with_toys: Cmbench, workspace: Workspace) -> tuple[Cmbench, Path, Record]:
    """The command line, the folder of a run of the toy method, and its cell's record."""
    done = cmbench_with_toys(
        "run",
        "--method",
        "toy",
        "--dataset",
        "toys",
        "--nfe",
        "2",
        "--recipe",
        "classes",
        "--no-report",
        "-q",
    )
    assert done.code == 0, done.err
    (path,) = workspace.records("toys").glob("*.json")
    (folder,) = (workspace.root / "runs" / "toys").iterdir()
    return cmbench_with_toys, folder, read_record(path)


def scored(cmbench: Cmbench, *arguments: str) -> Record:
    found = cmbench("eval", *arguments, "--json", "--no-record", "-q")
    assert found.code == 0, found.err
    return Record.model_validate(json.loads(found.out))


def test_a_run_scores_as_its_own_cell(trained: tuple[Cmbench, Path, Record]) -> None:
    cmbench, folder, cell = trained
    for given in (str(folder), cell.training.run, str(folder / "weights-final.safetensors")):
        record = scored(cmbench, given, "--nfe", "2")
        assert record.kind == "scored samples"
        assert record.metrics["fd-pixels"].value == cell.metrics["fd-pixels"].value
        assert record.metrics["fd-pixels"].key == cell.metrics["fd-pixels"].key
        assert record.sampling.nfe == 2
        assert record.sampling.nfe_measured == 2
        assert record.sampling.sigmas == cell.sampling.sigmas
        assert record.training == cell.training
        assert record.method == "toy"
        assert not any("not stated" in warning for warning in record.warnings)


def test_other_files_of_a_run_are_no_run(trained: tuple[Cmbench, Path, Record]) -> None:
    cmbench, folder, _ = trained
    found = cmbench("eval", str(folder / "log.jsonl"), "--dataset", "toys", "-q")
    assert found.code == 2
    assert "log.jsonl: " in found.err
    assert "weights" not in found.err


def test_a_checkpoint_of_the_end_is_the_run(trained: tuple[Cmbench, Path, Record]) -> None:
    cmbench, folder, cell = trained
    last = sorted((folder / "checkpoints").glob("*.safetensors"))[-1]
    record = scored(cmbench, str(last), "--nfe", "2", "--label", "earlier")
    assert record.metrics["fd-pixels"].value == cell.metrics["fd-pixels"].value
    assert record.method == "earlier"
    assert record.training.images_seen == cell.training.images_seen
    assert record.training.checkpoint_sha256 != cell.training.checkpoint_sha256


def test_against_another_source_and_against_a_run(
    trained: tuple[Cmbench, Path, Record], tmp_path: Path
) -> None:
    cmbench, folder, _ = trained
    images = np.random.RandomState(0).randint(0, 256, (50, 2, 2, 1)).astype(np.uint8)
    np.save(tmp_path / "others.npy", images)
    against = scored(cmbench, str(folder), "--reference", str(tmp_path / "others.npy"))
    assert against.dataset.name == "reference-others"
    assert against.dataset.reference_count == 50
    assert against.sampling.nfe == 1, "the least of the protocol"
    itself = scored(cmbench, str(folder), "--reference", str(folder))
    assert itself.metrics["fd-pixels"].value == pytest.approx(0, abs=1e-9)


def test_mistakes_are_one_line(trained: tuple[Cmbench, Path, Record]) -> None:
    cmbench, folder, _ = trained
    declined = cmbench("eval", str(folder), "--nfe", "7", "-q")
    assert declined.code == 2
    assert "cannot be sampled at NFE 7: the toy takes one or two steps" in declined.err
    (folder / "result.json").unlink()
    unfinished = cmbench("eval", str(folder), "-q")
    assert unfinished.code == 4
    assert "is not finished; finish it with `cmbench run`" in unfinished.err
    (folder / "run.json").write_text("{}")
    unreadable = cmbench("eval", str(folder), "-q")
    assert unreadable.code == 4
    assert "run.json: has no hash of its contents" in unreadable.err
    assert "restore the file, or name the folder of a finished run" in unreadable.err
