"""Facts beside tensors: whoever reads an edited one is told, whatever the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cmbench.data import verify as verify_module
from cmbench.data.layout import Layout
from cmbench.data.prepared import PreparedDataset
from cmbench.data.store import (
    BLOCKS,
    IMAGES,
    MANIFEST,
    DatasetManifest,
    SourceNote,
    content_hash,
    open_store,
)
from cmbench.data.verify import CheckedBlocks
from cmbench.errors import UserError
from cmbench.files import FormatError, read_sealed, sealed, unsealed, write_sealed
from cmbench.leaderboard.verify import verify_record
from cmbench.metrics.extractor import PixelExtractor
from cmbench.metrics.reference import Reference, ReferenceKey
from cmbench.metrics.reference_cache import cached_reference, load_reference, save_reference
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace
from cmbench.samples.source import ReadOptions
from cmbench.sweep.context import Context
from cmbench.sweep.opened_runs import open_run
from cmbench.sweep.planning import plan_run
from cmbench.sweep.run_files import read_run_file
from cmbench.sweep.runs import TrainedRun, read_result
from cmbench.sweep.training_run import obtain_run

Command = Callable[..., Any]
UNSEALED = "has no hash of its contents"
CHANGED = "was changed after it was written: its contents do not match their hash"


# ---- the seal ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"a": 1},
        {"b": [1.5, None, {"c": "ä"}], "a": {"10": 1, "9": 2}},
        {"t": (1, 2), "n": {3: 4}},
    ],
)
def test_what_is_written_can_be_read(tmp_path: Path, data: dict[str, Any]) -> None:
    write_sealed(tmp_path / "x.json", data)
    assert read_sealed(tmp_path / "x.json") == json.loads(json.dumps(data))


def test_changes_and_missing_seals_are_found() -> None:
    data = sealed({"a": 1, "b": {"c": [1, 2]}})
    for edited in ({**data, "a": 2}, {**data, "d": 0}, {k: data[k] for k in ("a", "seal")}):
        with pytest.raises(FormatError, match="was changed after it was written"):
            unsealed(edited)
    with pytest.raises(FormatError, match="was changed"):
        unsealed({**data, "seal": None})
    with pytest.raises(FormatError, match=UNSEALED):
        unsealed({"a": 1})


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file as a person does, with an editor."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=1))


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def two(toys: Context) -> tuple[TrainedRun, TrainedRun]:
    """Runs of seed 0 and seed 1."""
    runs = [obtain_run(toys, plan_run(toys, "toy", "toys", "demo", seed)) for seed in (0, 1)]
    return runs[0], runs[1]


def test_weights_of_another_seed_are_refused(two: tuple[TrainedRun, TrainedRun]) -> None:
    """Whether the manifest comes with them, and even the result."""
    zero, one = two
    for name in ("weights-final.safetensors", "weights-final.json"):
        shutil.copy(one.folder / name, zero.folder / name)
    told = rf"is of run {one.plan.run_id}; allowed: {zero.plan.run_id}; restore"
    with pytest.raises(UserError, match=rf"weights-final.safetensors: {told} the file"):
        zero.weights()
    shutil.copy(one.folder / "result.json", zero.folder / "result.json")
    with pytest.raises(UserError, match=rf"result.json: {told} {zero.folder}, or delete it"):
        read_result(zero.plan, zero.folder)


def test_a_run_of_another_seed_in_its_place_is_refused(
    toys: Context, two: tuple[TrainedRun, TrainedRun], tmp_path: Path
) -> None:
    """Every file of the folder agrees with the others; none is of the run that was asked for."""
    zero, one = two
    shutil.rmtree(zero.folder)
    shutil.copytree(one.folder, zero.folder)
    told = rf"is of run {one.plan.run_id}; allowed: {zero.plan.run_id}; "
    with pytest.raises(UserError, match=rf"run.json: {told}restore"):
        obtain_run(toys, zero.plan)
    checkpoint = max((zero.folder / "checkpoints").glob("*.safetensors"))
    for path in (zero.folder, zero.folder / "weights-final.safetensors", checkpoint):
        with pytest.raises(UserError, match=rf"run folder {zero.folder}: {told}restore"):
            open_run(toys, path, 1, ReadOptions(limit=2))
    # Its description alone, where training would go on.
    (zero.folder / "result.json").unlink()
    for manifest in (zero.folder / "checkpoints").glob("*.json"):
        facts = read_sealed(manifest)
        facts["meta"]["run"] = zero.plan.run_id
        write_sealed(manifest, facts)
    with pytest.raises(UserError, match=rf"run.json: {told}restore"):
        obtain_run(toys, zero.plan)
    # Elsewhere a folder may have any name, but its description is of the run that it names.
    named = tmp_path / "named"
    shutil.copytree(one.folder, named)
    assert open_run(toys, named, 1, ReadOptions(limit=2)).trained.plan.run_id == one.plan.run_id
    write_sealed(named / "run.json", {**read_sealed(named / "run.json"), "seed": 0})
    with pytest.raises(UserError, match=rf"run.json: {told}restore"):
        open_run(toys, named, 1, ReadOptions(limit=2))


def test_a_sweep_measures_no_seed_from_the_weights_of_another(
    cmbench_with_toys: Command, workspace: Workspace
) -> None:
    sweep = (*RUN, "--seeds", "2")
    assert cmbench_with_toys(*sweep).code == 0
    records = sorted(workspace.records("toys").glob("*-s0-*.json"))
    zero, one = sorted((workspace.root / "runs" / "toys").iterdir())
    assert ("-s0-" in zero.name, "-s1-" in one.name) == (True, True)
    shutil.rmtree(zero)
    shutil.copytree(one, zero)
    runs = workspace.root / "runs"
    (check,) = [c for c in verify_record(records[0], runs=runs) if c.name == "training"]
    words = f"a record of toys/{zero.name}, but files there of toys/{one.name}"
    assert (check.state, check.detail) == ("failed", words)
    shutil.rmtree(workspace.records("toys"))
    done = cmbench_with_toys(*sweep)
    assert done.code != 0
    assert f"is of run toys/{one.name}; allowed: toys/{zero.name}; restore" in done.err
    (failed,) = map(read_record, workspace.records("toys").glob("*-s0-*.json"))
    assert (failed.status, failed.metrics) == ("failed", {})
    scored = cmbench_with_toys("eval", f"toys/{zero.name}", "-d", "toys", "--limit", "8", "-q")
    assert scored.code != 0
    assert f"is of run toys/{one.name}; allowed: toys/{zero.name}; restore" in scored.err
    status = cmbench_with_toys("status").out
    assert f"result.json: is of run toys/{one.name}; allowed: toys/{zero.name}; move" in status


def test_weights_that_were_trained_again_are_not_those_of_the_result(
    two: tuple[TrainedRun, TrainedRun],
) -> None:
    zero, _ = two
    edited = {**zero.result["exports"]["final"], "images_seen": 1}
    fewer = replace(zero, result={**zero.result, "exports": {"final": edited}})
    with pytest.raises(UserError, match=r"other files describe: images \d+; allowed: 1; "):
        fewer.weights()


def believed(run: TrainedRun) -> None:
    """Read everything in a run's folder that numbers rest on."""
    read_run_file(run.folder)
    found = read_result(run.plan, run.folder)
    assert found is not None
    found.weights()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("result", lambda result: result.update(parameters=1)),
        ("result", lambda result: result.update(images_seen=1)),
        ("result", lambda result: result["exports"]["final"].update(images_seen=1)),
        ("run", lambda run: run.update(seed=1)),
        ("weights-final", lambda data: data["meta"].update(seen_nimg=10**9)),
    ],
)
@pytest.mark.parametrize("seal", ["kept", "removed"])
def test_edited_facts_of_a_run_are_refused(
    two: tuple[TrainedRun, TrainedRun],
    file: str,
    change: Callable[[dict[str, Any]], None],
    seal: str,
) -> None:
    """With its seal or without: the line names the file and what to do."""
    zero, _ = two
    path = zero.folder / f"{file}.json"
    edit(path, change)
    if seal == "removed":
        edit(path, lambda data: data.pop("seal"))
    told = CHANGED if seal == "kept" else UNSEALED
    with pytest.raises(UserError, match=rf"{file}.*: {told}.*; (delete it|restore)") as raised:
        believed(zero)
    assert str(zero.folder) in str(raised.value)


def test_an_edited_state_of_a_checkpoint_is_refused(
    toys: Context, two: tuple[TrainedRun, TrainedRun]
) -> None:
    zero, _ = two
    path = max((zero.folder / "checkpoints").glob("*.json"))

    def fewer(data: dict[str, Any]) -> None:
        data["meta"]["state"]["nimg"] = 1
        del data["seal"]

    edit(path, fewer)
    with pytest.raises(UserError, match=rf"manifest: {UNSEALED}.*; restore the file"):
        open_run(toys, path.with_suffix(".safetensors"), 1, ReadOptions(limit=2))


def test_checkpoints_of_another_run_are_not_resumed(
    toys: Context, two: tuple[TrainedRun, TrainedRun]
) -> None:
    zero, one = two
    shutil.rmtree(zero.folder / "checkpoints")
    shutil.copytree(one.folder / "checkpoints", zero.folder / "checkpoints")
    (zero.folder / "result.json").unlink()
    words = rf"is of run {one.plan.run_id}; allowed: {zero.plan.run_id}; put the run's own back"
    with pytest.raises(UserError, match=words):
        obtain_run(toys, zero.plan)
    path = max((zero.folder / "checkpoints").glob("*.safetensors"))
    with pytest.raises(UserError, match=rf"is of run {one.plan.run_id}"):
        open_run(toys, path, 1, ReadOptions(limit=2))


RUN = ("run", "-m", "toy", "-d", "toys", "--nfe", "1", "--samples", "8", "--no-report", "-q")


def test_verify_compares_a_record_with_the_runs_result(
    cmbench_with_toys: Command, workspace: Workspace
) -> None:
    done = cmbench_with_toys(*RUN)
    assert done.code == 0, done.err
    (path,) = workspace.records("toys").glob("*.json")
    record = read_record(path)
    result = workspace.run(record.training.run) / "result.json"
    runs = workspace.root / "runs"

    def training() -> Any:
        (check,) = [c for c in verify_record(path, runs=runs) if c.name == "training"]
        return check

    assert training().state == "ok"
    good = result.read_bytes()
    for name in ("parameters", "images_seen"):
        told = record.training.model_copy(update={name: 12345})
        path.write_text(record.model_copy(update={"training": told}).to_json())
        assert training().state == "failed"
        assert "12,345" in training().detail
    path.write_text(record.to_json())
    edit(result, lambda data: data.update(parameters=1))
    assert training().state == "failed"
    assert CHANGED in training().detail
    result.write_bytes(good)
    # sealed again by a forger: sampling counts the parameters itself
    write_sealed(result, {**read_sealed(result), "parameters": 1})
    refused = cmbench_with_toys("eval", record.training.run, "-d", "toys", "--limit", "8", "-q")
    assert refused.code != 0
    assert "its result says 1 parameters, the network that is sampled has" in refused.err


# ---- references ----------------------------------------------------------------------------------


def reference_of(rows: int) -> tuple[Reference, list[torch.Tensor]]:
    images = torch.rand(rows, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    key = ReferenceKey(
        "real", "0" * 64, "pixels", PixelExtractor.weights_sha256, "identity", "none"
    )
    return Reference.compute([images], PixelExtractor(), key), [images]


def test_an_edited_floor_is_refused_and_a_cached_reference_is_computed_again(
    tmp_path: Path,
) -> None:
    reference, images = reference_of(200)
    assert reference.floors is not None
    path = tmp_path / reference.key.file_name
    save_reference(reference, path)
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    better = facts["floor"].replace("0.", "0.0", 1)
    assert better != facts["floor"]
    save_file(tensors, path, {**facts, "floor": better})
    with pytest.raises(UserError, match=CHANGED):
        load_reference(path)
    without = {name: value for name, value in facts.items() if name != "seal"}
    save_file(tensors, path, without)
    with pytest.raises(UserError, match="has no hash of its contents"):
        load_reference(path)
    again = cached_reference(
        lambda: images,
        PixelExtractor(),
        source="real",
        source_sha256="0" * 64,
        quantization="none",
        folder=tmp_path,
    )
    assert again.floors == reference.floors
    assert "has no hash of its contents" in again.notes[0]
    assert load_reference(path).floors == reference.floors


# ---- prepared data -------------------------------------------------------------------------------


def prepared(folder: Path, count: int = 3000) -> tuple[DatasetSpec, Path]:
    """A dataset of three blocks."""
    layout = Layout((3, 4, 4))
    pixels = np.random.RandomState(0).randint(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    folder.mkdir()
    np.save(folder / IMAGES, pixels)
    size = layout.block_images
    blocks = [
        verify_module.hashlib.sha256(pixels[i : i + size].tobytes()).hexdigest()
        for i in range(0, count, size)
    ]
    (folder / BLOCKS).write_text("\n".join(blocks) + "\n")
    manifest = DatasetManifest(
        dataset="tiny",
        revision="as-is",
        shape=pixels.shape,
        dtype="uint8",
        num_classes=0,
        sha256=content_hash(pixels.shape, "uint8", blocks, ""),
        block_images=size,
        transform="none",
        source=SourceNote(kind="folder", name="x", fingerprint=""),
        created="now",
    )
    write_sealed(folder / MANIFEST, manifest.model_dump(mode="json"))
    spec = DatasetSpec("tiny", "none", "Tiny", (3, 4, 4), 0, "pixels", ("fd-pixels",), (1,), 10)
    return spec, folder


def flip_a_bit(folder: Path, image: int) -> None:
    path = folder / IMAGES
    data = bytearray(path.read_bytes())
    data[Layout((3, 4, 4)).offset(image)] ^= 1
    path.write_bytes(bytes(data))


def test_a_changed_bit_is_found_when_its_block_is_read(tmp_path: Path) -> None:
    spec, folder = prepared(tmp_path / "tiny")
    good = PreparedDataset(spec, open_store(folder))
    assert good.gather(torch.tensor([0, 2999])).shape == (2, 3, 4, 4)
    assert sum(len(batch) for batch in good.reference_images()) == 3000
    flip_a_bit(folder, 2000)
    changed = PreparedDataset(spec, open_store(folder))
    assert changed.gather(torch.tensor([0, 1023])).shape[0] == 2, "another block"
    words = "images 1024-2047 have changed since they were prepared"
    with pytest.raises(UserError, match=words):
        changed.gather(torch.tensor([3, 1024]))
    with pytest.raises(UserError, match=words):
        changed.batch(0, 1000, 0)
    with pytest.raises(UserError, match=words):
        list(changed.reference_images())


def test_a_large_dataset_is_sampled_and_checked_where_it_is_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = prepared(tmp_path / "tiny")
    monkeypatch.setattr(verify_module, "CHECKED_BYTES", 1)
    monkeypatch.setattr(verify_module, "SAMPLED_BLOCKS", 1)
    flip_a_bit(folder, 2000)
    found = 0
    for _ in range(60):
        try:
            CheckedBlocks(open_store(folder))
        except UserError:
            found += 1
    assert 0 < found < 60, "one of three blocks each time: 1e-11 to miss it always"
    monkeypatch.setattr(verify_module, "SAMPLED_BLOCKS", 0)
    large = PreparedDataset(spec, open_store(folder))
    assert large.gather(torch.tensor([2000])).shape[0] == 1, "costs no whole block"
    with pytest.raises(UserError, match="images 1024-2047 have changed"):
        list(large.reference_images())


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    _, folder = prepared(tmp_path / "tiny")
    edit(folder / MANIFEST, lambda data: data.update(class_names=["a"]))
    with pytest.raises(UserError, match=CHANGED):
        open_store(folder)
    edit(folder / MANIFEST, lambda data: data.pop("seal"))
    with pytest.raises(UserError, match=rf"{MANIFEST}: {UNSEALED}.*; run `cmbench prepare tiny"):
        open_store(folder)
