"""``cmbench reproduce``: settings, files, verdicts; end to end with stand-ins, offline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_server import local, serving
from oracle_edm import EDMNetwork
from oracle_parts import write_snapshot
from random_inception import write_random_torchscript, write_random_weights

from cmbench.cli import reproduce_work
from cmbench.cli.reproduce import find_reproducible, why_not
from cmbench.downloads import download
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_MISSING, EXIT_USAGE, UserError
from cmbench.importers import public
from cmbench.importers.public import fetch_listed, find_public, public_checkpoints, unproven
from cmbench.metrics import reference_import
from cmbench.metrics.catalog import METRICS
from cmbench.metrics.quantize import RULES
from cmbench.plugin.manager import PluginManager
from cmbench.records.record import MetricRecord, Record, read_record
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells, plan_imported_run
from cmbench.sweep.published_value import (
    NOT_CLAIMED,
    NOT_REPRODUCED,
    REPRODUCED,
    compared,
    doubts_of,
    request_of,
    verdict_of,
)

Command = Callable[..., Any]
ARCHIVE = "adm-imagenet256-guided-upsampled"
CIFAR = "edm-cifar10-uncond-vp"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Inception weights in torch-fidelity's format."""
    return write_random_weights(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no weights of this machine, no waiting."""
    monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path / "no-weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-hub"))

    def refused(*_: Any, **__: Any) -> None:
        raise public.DownloadError("its server is not found from here (offline?)")

    monkeypatch.setattr(public, "download", refused)


def pictures(path: Path, seed: int, side: int, count: int = 12) -> Path:
    drawn = np.random.RandomState(seed).randint(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(path, drawn)
    return path


def record_in(workspace: Workspace) -> Record:
    (path,) = workspace.all_records.glob("*/*.json")
    return read_record(path)


# ---- the list ------------------------------------------------------------------------------------


def test_settings_of_the_list_are_sound(plugins: PluginManager) -> None:
    names = {spec.name for spec in METRICS}
    reproducible = [row for row in public_checkpoints() if not why_not(row)]
    assert len(reproducible) >= 20
    for row in reproducible:
        assert set(row.values) <= names, row.name
        assert all(value > 0 for value, _ in row.values.values())
        reference = find_public(row.reference)
        assert reference is not None, row.name
        assert reference.kind.startswith("reference")
        assert reference.dataset == row.dataset
        assert int(row.samples) == 50_000
        assert row.quantize in (*RULES, "")
        assert bool(row.quantize) != row.is_archive
        assert bool(row.nfe) != row.is_archive
        assert row.settings_in, row.name


def test_the_published_values_of_adms_archive() -> None:
    row = find_reproducible(ARCHIVE)
    values = {name: value for name, (value, _) in row.values.items()}
    assert values == {"fid": 3.94256, "is-openai": 215.837, "sfid": 6.14043}
    assert row.values["is-openai"][1] == pytest.approx(5e-4), "half of its last digit"
    request = request_of(row, "samples.npz", "reference.npz", 0)
    assert (request.dataset, request.quantize, request.nfe) == (None, None, 0)
    assert not request.read.uniform_labels


def test_settings_of_a_checkpoint() -> None:
    row = find_reproducible("edm-imagenet64-cond-adm")
    request = request_of(row, "import:x", "ref.npz", 3)
    assert (request.nfe, request.quantize, request.read.limit) == (511, "round", 50_000)
    assert request.settings is not None
    assert request.settings.sampler == "stochastic-heun"
    assert request.read.uniform_labels
    one = request_of(find_reproducible("openai-ct-imagenet64"), "import:x", "ref.npz", 0)
    assert one.settings is not None
    assert one.settings.sigmas == (80.0,)
    assert (one.quantize, one.metrics) == ("truncate", ("fid",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("edm2-img512-s-guid-fid", "needs guidance by a second network"),
        ("dit-xl-2-256", "no value of it is published in the list"),
        ("nothing", "'nothing' is not listed; choose one that `cmbench reproduce --list` prints"),
        (None, "names nothing to reproduce"),
    ],
)
def test_what_cannot_be_reproduced_says_why(name: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_reproducible(name)


def test_the_list_is_printed(cmbench: Command) -> None:
    done = cmbench("reproduce", "--list")
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "stochastic-heun" in lines["edm-imagenet64-cond-adm"]
    assert lines["tcm-cifar10"].endswith("settings UNVERIFIED")
    assert "edm2-img512-s-guid-fid" not in lines


# ---- the verdict ---------------------------------------------------------------------------------


def record_of(row: Any, *values: tuple[float, float | None], count: int = 50_000) -> Record:
    """A record of the row's metrics with these values and standard errors."""
    metrics = {
        name: MetricRecord(value=v, higher_is_better=False, key=name, standard_error=e)
        for name, (v, e) in zip(row.values, values, strict=True)
    }
    known = reference_import.PUBLISHED["inception-legacy-tensorflow"][0]
    data = {"name": "d", "extractor": "inception-legacy-tensorflow", "extractor_sha256": known}
    shared = {"cell": "c", "status": "finished", "created": "now", "method": "m"}
    training = {"run": "r", "seed": 0, "recipe": "", "config": {}, "config_sha256": ""}
    return Record.model_validate(
        {
            **shared,
            "plugin": {"name": "p", "distribution": "d", "version": ""},
            "dataset": data,
            "training": {**training, "parameters": 0, "images_seen": 0},
            "sampling": {
                "nfe": 35,
                "seed": 0,
                "num_samples": count,
                "protocol_samples": count,
                "batch_size": 1,
            },
            "metrics": metrics,
            "environment": {"cmbench": "", "python": ""},
        }
    )


@pytest.mark.parametrize(
    ("value", "agrees"),
    # published 1.97, our error 0.02: the difference has 0.02 sqrt(2), and 1.97 is rounded
    [(1.97, True), (1.97 + 0.061, True), (1.97 + 0.063, False), (1.97 - 0.063, False)],
)
def test_a_checkpoints_value_agrees_within_two_standard_errors(value: float, agrees: bool) -> None:
    row = find_reproducible(CIFAR)
    record = record_of(row, (value, 0.02))
    (one,) = compared(row, record)
    assert one.agrees is agrees
    assert one.standard_error == pytest.approx(0.02 * math.sqrt(2))
    assert one.in_standard_errors == pytest.approx((value - 1.97) / (0.02 * math.sqrt(2)))
    assert doubts_of(row, record) == []
    assert verdict_of([one], []) == (REPRODUCED if agrees else NOT_REPRODUCED)
    assert verdict_of([one], ["a stand-in"]) == NOT_CLAIMED


def test_an_evaluator_has_no_sampling_noise_to_hide_behind() -> None:
    row = find_reproducible(ARCHIVE)
    near = record_of(row, (3.9435, 0.05), (215.84, 3.0), (6.1409, 0.1))
    assert [one.agrees for one in compared(row, near)] == [True, True, True]
    far = record_of(row, (3.9600, 0.05), (217.0, 3.0), (6.1409, 0.1))
    assert [one.agrees for one in compared(row, far)] == [False, False, True]


def test_without_a_standard_error_nothing_is_claimed() -> None:
    row = find_reproducible(CIFAR)
    (one,) = compared(row, record_of(row, (1.97, None)))
    assert (one.agrees, one.in_standard_errors) == (None, None)
    assert verdict_of([one], []) == NOT_CLAIMED


def test_other_settings_are_doubts() -> None:
    row = find_reproducible(CIFAR)
    assert doubts_of(row, record_of(row, (1.97, 0.02), count=100)) == [
        "100 samples instead of 50,000"
    ]
    record = record_of(row, (1.97, 0.02))
    data = record.dataset.model_copy(update={"extractor_sha256": "0" * 64})
    (doubt,) = doubts_of(row, record.model_copy(update={"dataset": data}))
    assert doubt.startswith("the extractor's weights are not known")
    row = replace(row, settings_in="a README; reference UNVERIFIED")
    assert doubts_of(row, record) == ["settings are UNVERIFIED in the list"]


# ---- files ---------------------------------------------------------------------------------------


def test_a_downloaded_file_is_known_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public, "download", partial(download, pause_s=0))
    row = find_reproducible(CIFAR)
    with serving(b"weights") as files:
        row = replace(row, url=files.url)
        path = fetch_listed(row, tmp_path, "again", allowed=local)
    assert unproven(row, path) == ""
    path.write_bytes(b"other weights")
    assert unproven(row, path) == "was given by hand, and no hash of the published file is listed"
    by_hand = tmp_path / "copy.pkl"
    by_hand.write_bytes(b"weights")
    assert "given by hand" in unproven(row, by_hand)
    known = "9c97a9ba87c21a3b7a9a9d7f4d9a1d3d6ab5a6c2bd67c0fa0f1f2a9d2a2b0f00"
    assert unproven(replace(row, sha256=known), by_hand).endswith(f"not {known}")


def test_offline_every_missing_file_is_named_with_its_place(
    cmbench: Command, workspace: Workspace
) -> None:
    done = cmbench("reproduce", CIFAR)
    assert done.code == EXIT_MISSING
    (line,) = done.err.splitlines()
    for name in (CIFAR, "ref-edm-cifar10"):
        row = find_public(name)
        assert row is not None
        assert f"fetch {row.url} and put it at {row.path(workspace.downloads)}" in line
    assert "run `cmbench prepare clean-fid`" in line
    assert f"then run `cmbench reproduce {CIFAR}` again" in line
    gone = cmbench("reproduce", CIFAR, "--file", "nowhere.pkl")
    assert (gone.code, "nowhere.pkl does not exist" in gone.err) == (EXIT_MISSING, True)
    bad = cmbench("reproduce", "no-name")
    assert (bad.code, bad.out) == (EXIT_USAGE, "")


# ---- end to end, with stand-ins ------------------------------------------------------------------


def test_a_checkpoint_from_file_to_record(
    cmbench: Command, workspace: Workspace, tmp_path: Path, weights: Path
) -> None:
    """A tiny network of EDM's kind, a random detector, twelve images: no reproduction."""
    network = EDMNetwork(0, "SongUNet", img_resolution=32, attn_resolutions=[16])
    detector = write_random_torchscript(weights, tmp_path / "detector.pt")
    given = (
        *("--file", str(write_snapshot(tmp_path / "tiny.pkl", network))),
        *("--reference", str(pictures(tmp_path / "reference.npz", 1, 32))),
        *("--weights", str(detector), "--trust-weights", "--samples", "12", "-q"),
    )
    done = cmbench("reproduce", CIFAR, *given)
    assert done.code == 0, done.err
    assert "verdict: not claimed (" in done.out
    record = record_in(workspace)
    (value,) = record.metrics.values()  # and nothing of it is called FID
    assert list(record.metrics) == ["fd-inception-legacy-tensorflow-unverified"]
    said = value.detail["published"]
    assert (said["published"], said["verdict"], said["name"]) == (1.97, NOT_CLAIMED, CIFAR)
    for doubt in ("the reference was given", "the checkpoint was given", "12 samples instead"):
        assert any(text.startswith(doubt) for text in said["doubts"]), said["doubts"]
    assert any("weights are not known" in text for text in said["doubts"])
    assert any(
        f"this does not count as a reproduction of {CIFAR}" in text for text in record.warnings
    )
    assert "warning: this does not count as a reproduction" in done.err
    assert record.kind == "imported checkpoint"
    assert (record.sampling.nfe, record.sampling.nfe_measured) == (35, 35)
    assert record.sampling.sampler == "heun"
    assert (record.sampling.quantize, record.sampling.num_samples) == ("round", 12)
    again = cmbench("reproduce", CIFAR, *given)
    assert again.code == 0
    assert record_in(workspace) == record, "the same again is the same record"


def test_an_archive_is_scored_without_a_generator(
    cmbench: Command, workspace: Workspace, tmp_path: Path, weights: Path
) -> None:
    given = (
        *("--file", str(pictures(tmp_path / "samples.npz", 0, 16))),
        *("--reference", str(pictures(tmp_path / "reference.npz", 1, 16))),
        *("--weights", str(weights), "-q"),
    )
    done = cmbench("reproduce", ARCHIVE, *given)
    assert done.code == 0, done.err
    record = record_in(workspace)
    assert record.kind == "scored samples"
    unverified = {"fd-inception-unverified", "is-openai", "sfd-inception-unverified"}
    assert record.metrics.keys() == unverified
    for text in ("ours", "published", "in standard errors", "3.94256", "215.837", "6.14043"):
        assert text in done.out


def test_a_value_that_differs_ends_with_code_1(
    cmbench: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path
) -> None:
    monkeypatch.setattr(reproduce_work, "doubts_of", lambda row, record: [])
    monkeypatch.setattr(reproduce_work, "unproven", lambda row, path: "")
    given = (
        *("--file", str(pictures(tmp_path / "samples.npz", 0, 16))),
        *("--reference", str(pictures(tmp_path / "reference.npz", 1, 16))),
        *("--weights", str(weights), "-q"),
    )
    done = cmbench("reproduce", ARCHIVE, *given)
    assert done.code == EXIT_CELLS_FAILED
    assert "verdict: not reproduced" in done.out


def test_labels_are_uniform_and_need_no_data(context: Context, tmp_path: Path) -> None:
    """A class-conditional checkpoint is sampled though its dataset is not prepared here."""
    from cmbench.cli.reproduce_work import PublishedFiles, samples_of
    from cmbench.samples.source import ReadOptions
    from cmbench.sweep.opened_runs import open_imported_samples

    network = EDMNetwork(0, "SongUNet", img_resolution=32, attn_resolutions=[16], label_dim=10)
    row = find_reproducible("edm-cifar10-cond-vp")
    files = PublishedFiles(row, context.workspace)
    files.file = write_snapshot(tmp_path / "tiny.pkl", network)
    given = samples_of(files)
    options = ReadOptions(limit=40, uniform_labels=True)
    opened = open_imported_samples(context, given, "cifar10", 1, options)
    (batch,) = opened.source.batches(40)
    assert batch.labels is not None
    assert set(batch.labels.tolist()) <= set(range(10))
    assert len(set(batch.labels.tolist())) > 5
    with pytest.raises(UserError, match="cifar10"):
        open_imported_samples(context, given, "cifar10", 1, ReadOptions(limit=4))
    plan = plan_imported_run(context, given, None, "cifar10", None, 0)
    settings = request_of(row, given, "", 0).settings
    assert settings is not None
    (cell,) = plan_cells(context, plan, [35], 0, settings)
    assert cell.sampling is not None
    assert (cell.sampling.sampler, len(cell.sampling.sigmas)) == ("heun", 18)
