"""Files of ``torch.save``: our reader finds what torch's own does."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cmbench.errors import UserError
from cmbench.importers.tensors import read_torch, storage_from_bytes

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
both = pytest.mark.parametrize("zipped", [True, False])


def content() -> dict[str, Any]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        **{str(dtype): torch.arange(7).to(dtype) for dtype in DTYPES},
        "view": base[1:3, ::2],
        "turned": base.T,
        "base": base,
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "nested": OrderedDict(a=[torch.zeros(2), {"b": torch.ones(1)}], c=(1, "x", None, 2.5)),
        "array": np.arange(6.0).reshape(2, 3),
        "size": torch.Size([1, 2]),
    }


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, np.ndarray):
        np.testing.assert_array_equal(ours, theirs)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert ours == theirs


@both
def test_what_torch_saved_comes_back(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save(content(), path, _use_new_zipfile_serialization=zipped)
    ours = read_torch(path, "file")
    assert_same(ours, torch.load(path, weights_only=False))  # our own file
    whole = ours["torch.float32"]
    assert whole.data_ptr() % 64 == 0, "last bits of products depend on where a tensor begins"


@both
def test_one_tensor(tmp_path: Path, zipped: bool) -> None:
    torch.save(torch.arange(5), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_torch(tmp_path / "a.pt", "file"), torch.arange(5))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_in_a_pickle() -> None:
    buffer = io.BytesIO()
    storage = torch.arange(5).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.int64, _internal=True)
    torch.save(typed, buffer, _use_new_zipfile_serialization=False)
    assert torch.equal(storage_from_bytes(buffer.getvalue()), torch.arange(5))


@both
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.995])
def test_a_cut_file_says_so(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.rand(200)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"^file: truncated or corrupt pickle .*download it again"):
        read_torch(path, "file")


def test_a_directory_that_begins_before_the_file(tmp_path: Path) -> None:
    """Python's zipfile seeks to a negative place, which raises OSError."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
    data = (tmp_path / "a.pt").read_bytes()
    end = data.rindex(b"PK\5\6")
    claimed = data[: end + 12] + struct.pack("<II", 2**31, 0) + data[end + 20 :]
    (tmp_path / "a.pt").write_bytes(claimed)
    with pytest.raises(UserError, match="file: truncated or corrupt pickle"):
        read_torch(tmp_path / "a.pt", "file")


def test_a_storage_of_another_size_than_its_tensors_say(tmp_path: Path) -> None:
    torch.save({"x": torch.rand(200)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as given,
        zipfile.ZipFile(tmp_path / "b.pt", "w") as changed,
    ):
        for info in given.infolist():
            data = given.read(info)
            changed.writestr(info.filename, data[:-4] if info.filename == "a/data/0" else data)
    with pytest.raises(UserError, match="storage '0' of 796 bytes"):
        read_torch(tmp_path / "b.pt", "file")


def test_an_older_file_that_claims_a_large_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.rand(200)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    claimed = data.replace(b"K\xc8N", b"J" + struct.pack("<i", 2**30) + b"N")
    assert claimed != data, "the count of elements in the storage's name"
    path.write_bytes(claimed)
    with pytest.raises(UserError, match="its storages are cut off"):
        read_torch(path, "file")


def test_a_file_of_another_byte_order(tmp_path: Path) -> None:
    torch.save({"x": torch.rand(2)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as given,
        zipfile.ZipFile(tmp_path / "b.pt", "w") as changed,
    ):
        for info in given.infolist():
            name = info.filename
            changed.writestr(name, b"big" if name == "a/byteorder" else given.read(info))
    with pytest.raises(UserError, match="not little-endian"):
        read_torch(tmp_path / "b.pt", "file")


def test_untrusted_files_have_one_reader_each() -> None:
    """Calls that unpickle, or that unpack without a guard, are in the guarded readers alone."""
    root = Path(__file__).parents[2]
    calls = {
        r"\btorch\.load\(|\bpickle\.loads?\(|\bUnpickler\(": set(),
        r"\bZipFile\(": {"zips.py", "archives.py", "submit.py"},  # images by place; writing
        r"\bnp\.load\(": {"npy.py", "store.py"},
    }
    for pattern, allowed in calls.items():
        found = {
            path.name
            for folder in ("cmbench", "plugins")
            for path in (root / folder).rglob("*.py")
            if re.search(pattern, path.read_text(encoding="utf-8"))
        }
        assert found <= allowed, pattern
