"""Checkpoints: whole or absent, verified, and the last good one survives everything."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from cmbench.errors import UserError
from cmbench.files import read_sealed, sha256_file, write_atomically, write_sealed
from cmbench.training import checkpoint as module
from cmbench.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_manifest,
    save_checkpoint,
)

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}


def save(folder: Path, nimg: int, **extra: torch.Tensor) -> Path:
    path = folder / f"{nimg:014d}.safetensors"
    save_checkpoint(path, TENSORS | {"nimg": torch.tensor(nimg)} | extra, {"nimg": nimg})
    return path


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 5)
    found = load_checkpoint(path)
    assert found.meta == {"nimg": 5}
    assert found.tensors.keys() == {"a.weight", "b", "nimg"}
    assert torch.equal(found.tensors["a.weight"], TENSORS["a.weight"])
    assert found.sha256 == sha256_file(path)
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".safetensors"]


def test_the_same_state_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert first.read_bytes() == second.read_bytes()


def test_views_shared_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    shared = {
        "whole": base,
        "same": base,
        "part": base[3:6],
        "transposed": base.view(3, 4).t(),
        "last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "graded": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0),
        "none": torch.empty(0),
    }
    save_checkpoint(tmp_path / "x.safetensors", shared, {})
    found = load_checkpoint(tmp_path / "x.safetensors").tensors
    assert found.keys() == shared.keys()
    for name, tensor in shared.items():
        assert torch.equal(found[name], tensor), name


def test_only_what_shares_memory_is_copied() -> None:
    """A part of a larger tensor would be saved with a file of the whole one's size."""
    base = torch.arange(12.0)
    ready = module.unshared({"whole": base, "again": base})
    assert ready["whole"].data_ptr() == base.data_ptr() != ready["again"].data_ptr()
    part = module.unshared({"part": base[3:6]})["part"]
    assert part.untyped_storage().nbytes() == part.nbytes


def test_the_manifest_is_what_other_versions_read(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    manifest = json.loads(path.with_suffix(".json").read_text())
    facts = {"format": 1, "meta": {"nimg": 5}, "sha256": sha256_file(path)}
    text = json.dumps(facts, sort_keys=True)
    assert manifest == {**facts, "seal": hashlib.sha256(text.encode()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(
        UserError, match=r"5\.safetensors, manifest: has no hash of its .*; restore"
    ):
        load_checkpoint(path)
    path.with_suffix(".json").write_text(json.dumps({**manifest, "meta": {"nimg": 6}}))
    with pytest.raises(UserError, match="was changed after it was written"):
        load_checkpoint(path)


def test_a_state_with_buffers_is_saved(tmp_path: Path) -> None:
    """An average holds the network's own buffers: the same memory under two names."""
    norm = torch.nn.BatchNorm1d(3)
    tensors = {f"{p}.{k}": v for p in ("nets", "ema") for k, v in norm.state_dict().items()}
    save_checkpoint(tmp_path / "x.safetensors", tensors, {})
    assert load_checkpoint(tmp_path / "x.safetensors").tensors.keys() == tensors.keys()


def corrupt(path: Path, how: str) -> None:
    manifest = path.with_suffix(".json")
    match how:
        case "flipped bit":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-7])
        case "no tensors":
            path.unlink()
        case "torn manifest":
            manifest.write_text(manifest.read_text()[:-9])
        case "empty manifest":
            manifest.write_text("")
        case "list manifest":
            manifest.write_text("[]")
        case "deep manifest":
            manifest.write_text("[" * 100_000)
        case "no meta":
            write_sealed(manifest, {"format": 1, "sha256": "0"})
        case "bad meta":
            write_sealed(manifest, {"format": 1, "sha256": "0", "meta": 3})
        case "future format":
            write_sealed(manifest, read_sealed(manifest) | {"format": 2})
        case "other file":
            path.write_bytes(b"not safetensors")
            write_sealed(manifest, read_sealed(manifest) | {"sha256": sha256_file(path)})


HOW = [
    "flipped bit",
    "truncated",
    "no tensors",
    "torn manifest",
    "empty manifest",
    "list manifest",
    "deep manifest",
    "no meta",
    "bad meta",
    "future format",
    "other file",
]


@pytest.mark.parametrize("how", HOW)
def test_a_corrupt_newest_one_falls_back_with_a_warning(tmp_path: Path, how: str) -> None:
    save(tmp_path, 100)
    newest = save(tmp_path, 200)
    corrupt(newest, how)
    found, warnings = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.meta == {"nimg": 100}
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert str(newest) in warnings[0]


@pytest.mark.parametrize("how", HOW)
def test_all_corrupt_is_one_clear_error(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for nimg in (100, 200):
        corrupt(save(folder, nimg), how)
    with pytest.raises(UserError) as raised:
        latest_checkpoint(folder)
    text = str(raised.value)
    assert "\n" not in text
    assert text.startswith(f"run folder {folder.parent}: has no good checkpoint: ")
    assert text.endswith(f"restore it, or delete {folder} to train from the start")


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_byte_can_change_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = save(tmp_path_factory.mktemp("c"), 1)
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(UserError, match="is corrupt: its SHA-256 is"):
        load_checkpoint(path)


def test_an_empty_or_missing_folder_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / "orphan.safetensors").write_bytes(b"")
    assert latest_checkpoint(tmp_path) == (None, [])


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for nimg in (100, 200, 300):
        save(tmp_path, nimg)
    (tmp_path / "00000000000400.safetensors").write_bytes(b"no manifest")
    (tmp_path / ".00000000000500.json.77.tmp").write_bytes(b"cut off")
    prune_checkpoints(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{n:014d}.{kind}" for n in (200, 300) for kind in ("json", "safetensors")
    ]


def test_pruning_passes_over_what_is_gone_already(tmp_path: Path) -> None:
    paths = [save(tmp_path, nimg) for nimg in (100, 200, 300, 400)]
    paths[0].unlink()
    prune_checkpoints(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{400:014d}.{kind}" for kind in ("json", "safetensors")
    ]


# ---- what the disk can do -----------------------------------------------------------------------


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.parametrize(
    ("target", "fault"),
    [("save_file", full), ("save_file", full_in_rust), ("os.fsync", full), ("Path.replace", full)],
)
def test_a_full_disk_is_one_line_and_older_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, fault: Any
) -> None:
    older = save(tmp_path, 100)
    before = older.read_bytes()
    owner: Any = {"save_file": module, "os.fsync": os, "Path.replace": Path}[target]
    monkeypatch.setattr(owner, target.rpartition(".")[2], fault)
    with pytest.raises(UserError) as raised:
        save(tmp_path, 200)
    monkeypatch.undo()
    assert "No space left on device" in str(raised.value)
    assert "free space or choose a writable folder with --workspace" in str(raised.value)
    found, warnings = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.meta, warnings) == ({"nimg": 100}, [])
    assert older.read_bytes() == before
    assert not list(tmp_path.glob(".*")), "no leftovers"


LIMITED = """
import resource, sys, torch
from pathlib import Path
from cmbench.errors import UserError
from cmbench.training.checkpoint import latest_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
save_checkpoint(folder / "1.safetensors", {"x": torch.zeros(10)}, {"n": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(folder / "2.safetensors", {"x": torch.zeros(1_000_000)}, {"n": 2})
except UserError as error:
    print(error)
found, warnings = latest_checkpoint(folder)
print(found.meta, warnings, sorted(p.name for p in folder.iterdir()))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit of file sizes")
def test_a_write_that_the_system_cuts_off_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith(f"cannot write checkpoint {tmp_path / '2.safetensors'}: ")
    assert second == "{'n': 1} [] ['1.json', '1.safetensors']"


@pytest.mark.parametrize("write", [save, lambda folder, n: write_atomically(folder / "x", b"x")])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="choose a writable folder with --workspace"):
        write(tmp_path / "file" / "below", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        save(tmp_path, 1)


def test_an_atomic_write_replaces_or_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, b"one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device"):
        write_atomically(path, b"two")
    monkeypatch.undo()
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"


def test_any_order_of_saving_and_corruption_gives_the_newest_good_one(tmp_path: Path) -> None:
    source = random.Random(3)
    for case in range(30):
        folder, good = tmp_path / str(case), []
        for nimg in range(1, 6):
            path = save(folder, nimg)
            if source.random() < 0.5:
                corrupt(path, source.choice(HOW))
            else:
                good.append(nimg)
        if good:
            found, warnings = latest_checkpoint(folder)
            assert found is not None
            assert found.meta["nimg"] == good[-1]
            assert len(warnings) == 5 - good[-1]
        else:
            with pytest.raises(UserError, match="has no good checkpoint"):
                latest_checkpoint(folder)


def test_a_hash_that_is_no_text(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    write_sealed(path.with_suffix(".json"), {"format": 1, "sha256": {}, "meta": {}})
    with pytest.raises(UserError, match="has a dict as the hash of its tensors"):
        read_manifest(path)
