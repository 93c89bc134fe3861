"""What `cmbench eval` leaves: written first, kept with the facts that were stated, by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmbench.leaderboard.rows import aggregate
from cmbench.records.record import Record, read_record
from cmbench.records.workspace import Workspace
from cmbench.sweep import scored

Cmbench = Callable[..., Any]
DIGITS = ("-d", "digits", "--metrics", "fd-digits", "-q")


def grey(path: Path, seed: int = 0, count: int = 60) -> str:
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    np.save(path, images)
    return str(path)


def kept(workspace: Workspace, dataset: str = "digits") -> list[Record]:
    return [read_record(path) for path in sorted(workspace.records(dataset).glob("*.json"))]


def test_the_record_outlives_whoever_reads_the_output(tmp_path: Path) -> None:
    """The pipe is closed before the first line is printed."""
    command = [sys.executable, "-c", "from cmbench.cli.main import main; main()", "eval"]
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "CMBENCH_WORKSPACE": str(tmp_path / "w")}
    subprocess.run(
        [*command, grey(tmp_path / "s.npy"), *DIGITS, "--nfe", "1"],
        stdout=writing,
        stderr=writing,
        env=environment,
        check=False,
    )
    os.close(writing)
    assert len(kept(Workspace(tmp_path / "w"))) == 1


def test_an_unreliable_extrapolation_is_called_that(
    cmbench: Cmbench, tmp_path: Path, workspace: Workspace
) -> None:
    for count in (60, 2000):
        found = cmbench("eval", grey(tmp_path / "s.npy", count=count), *DIGITS, "--nfe", "1")
        (record,) = [r for r in kept(workspace) if r.sampling.num_samples == count]
        reliable = record.metrics["fd-digits"].detail["infinity"]["reliable"]
        assert reliable is (count == 2000)
        assert (") unreliable " in found.out) is not reliable


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--nfe", "2"), "NFE not stated there, 2 now"),
        (("--seed", "3"), "seed 0 there, 3 now; records are never changed"),
    ],
)
def test_other_facts_about_the_same_samples_are_refused_by_name(
    cmbench: Cmbench, tmp_path: Path, workspace: Workspace, options: tuple[str, ...], told: str
) -> None:
    common = ("eval", grey(tmp_path / "s.npy"), *DIGITS, "--label", "m")
    assert cmbench(*common).code == 0
    before = kept(workspace)
    again = cmbench(*common, *options)
    (path,) = workspace.records("digits").glob("*.json")
    assert again.code == 2
    assert f"have the record {path} with other facts: {told}" in again.err
    assert "delete it and run the command again, or give the samples another --label" in again.err
    assert "fd-digits" in again.out, "what was measured is printed all the same"
    assert kept(workspace) == before
    path.unlink()
    assert cmbench(*common, *options).code == 0
    assert len(kept(workspace)) == 1


def test_other_held_out_images_are_another_cell(
    cmbench: Cmbench, tmp_path: Path, workspace: Workspace
) -> None:
    common = ("eval", grey(tmp_path / "s.npy"), *DIGITS, "--nfe", "1")
    held = [("--held-out", grey(tmp_path / f"h{seed}.npy", seed)) for seed in (1, 2)]
    for options in ((), held[0], held[1], held[0]):
        found = cmbench(*common, *options)
        assert found.code == 0, found.err
        assert "best of several looks" not in found.err
    records = kept(workspace)
    assert len(records) == 3
    rows = aggregate([(Path(f"{r.cell}.json"), r) for r in records])
    assert sorted(row.seeds for row in rows) == [1, 1, 1]
    told = {part for row in rows for part in row.apart}
    assert "held_out=none" in told
    assert len(told) == 3


def test_one_more_metric_on_the_same_samples_is_no_other_look(
    cmbench: Cmbench, tmp_path: Path, workspace: Workspace
) -> None:
    samples = grey(tmp_path / "s.npy")
    for metrics in ("fd-digits", "fd-digits,kd"):
        found = cmbench("eval", samples, "-d", "digits", "--metrics", metrics, "--nfe", "1", "-q")
        assert found.code == 0, found.err
        assert "looks" not in found.err
    grey(tmp_path / "s.npy", seed=1)
    for metrics in ("fd-digits", "fd-digits,kd"):
        found = cmbench("eval", samples, "-d", "digits", "--metrics", metrics, "--nfe", "1", "-q")
        assert "1 other set(s) of samples named 's'" in found.err
    assert len(kept(workspace)) == 4


@pytest.mark.parametrize(
    "labels", [("model λ=0.5", "model μ=0.5"), ("a/b", "a-b"), ("λ", "μ"), ("a b", "a-b")]
)
def test_labels_that_differ_are_different_rows(
    cmbench: Cmbench, tmp_path: Path, workspace: Workspace, labels: tuple[str, str]
) -> None:
    for seed, label in enumerate(labels):
        samples = grey(tmp_path / "s.npy", seed)
        options = ("--label", label, "--nfe", "1", "--seed", str(seed))
        found = cmbench("eval", samples, *DIGITS, *options)
        assert found.code == 0, found.err
        assert f"{label}: 60 samples" in found.out
    rows = aggregate([(Path(f"{r.cell}.json"), r) for r in kept(workspace)])
    assert {row.label for row in rows} == set(labels)
    assert len({row.method for row in rows}) == 2
    assert cmbench("report").code == 0
    table = (workspace.reports / "digits.csv").read_text()
    assert all(label in table for label in labels)
    assert cmbench("compare", *labels).code == 4, "one seed each"


@pytest.mark.parametrize("label", ["a\nb", "a\x1b[31mb", "a\x9bb", "λ" * 201, "a" * 300])
def test_labels_that_no_line_can_hold_are_refused_before_the_work(
    cmbench: Cmbench, tmp_path: Path, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "load_extractor", None)  # the first thing that takes long
    found = cmbench("eval", grey(tmp_path / "s.npy"), *DIGITS, "--label", label)
    assert found.code == 2
    assert "allowed: up to 200 characters in one line; give another name" in found.err


def test_samples_whose_file_no_row_can_be_called_are_refused_before_the_work(
    cmbench: Cmbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "measure", None)
    path = grey(tmp_path / "a\x1bb.npy")
    found = cmbench("eval", path, *DIGITS)
    assert found.code == 2
    assert "allowed: up to 200 characters in one line; give another name" in found.err


def test_a_reference_named_like_a_dataset_has_a_page_of_its_own(
    cmbench: Cmbench, tmp_path: Path, workspace: Workspace
) -> None:
    for seed, name in enumerate(("cifar10", "s")):
        images = np.random.default_rng(seed).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
        np.save(tmp_path / f"{name}.npy", images)
    found = cmbench(
        "eval",
        str(tmp_path / "s.npy"),
        *("--reference", str(tmp_path / "cifar10.npy"), "--extractor", "pixels"),
        *("--metrics", "fd-pixels", "--nfe", "1", "-q"),
    )
    assert found.code == 0, found.err
    assert not workspace.records("cifar10").exists()
    assert len(kept(workspace, "reference-cifar10")) == 1
