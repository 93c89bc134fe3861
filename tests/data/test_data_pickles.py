from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmbench.data.pickles import load_plain_pickle
from cmbench.errors import UserError

numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
plain = st.recursive(
    numbers | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
protocols = st.integers(0, pickle.HIGHEST_PROTOCOL)


@given(value=plain, protocol=protocols)
def test_plain_data_comes_back(value: object, protocol: int) -> None:
    assert load_plain_pickle(pickle.dumps(value, protocol), "file") == value


@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.int64, np.float32, np.dtype(">i4"), np.bool_]),
        hnp.array_shapes(max_dims=3, max_side=4),
    ),
    protocol=protocols,
    fortran=st.booleans(),
)
def test_arrays_come_back(array: np.ndarray, protocol: int, fortran: bool) -> None:
    given_ = np.asfortranarray(array) if fortran else array
    found = load_plain_pickle(pickle.dumps({"data": given_}, protocol), "file")["data"]
    assert found.dtype == array.dtype
    assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")


@given(st.binary(max_size=200))
def test_noise_is_one_clear_line(data: bytes) -> None:
    try:
        load_plain_pickle(data, "file f")
    except UserError as error:
        line = str(error)
    else:
        return
    assert line.startswith("file f: ")
    assert "\n" not in line


@given(cut=st.integers(0, 400))
def test_a_truncated_pickle_is_said_to_be_one(cut: int) -> None:
    data = pickle.dumps({"data": np.arange(300, dtype=np.uint8), "labels": [1, 2]})
    with pytest.raises(UserError, match=r"file f: truncated or corrupt pickle .*download it again"):
        load_plain_pickle(data[:cut], "file f")


class Runs:
    """Reduces to a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call  # type: ignore[return-value]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_of_the_file_runs(tmp_path: Path, protocol: int) -> None:
    flag = tmp_path / "owned"
    for hostile in (
        Runs(os.system, f"touch {flag}"),
        Runs(eval, f"open({str(flag)!r}, 'w')"),
        Runs(getattr, Runs(__import__, "os"), "system"),
        Runs(Path.touch, flag),
        np.array([Runs(os.system, f"touch {flag}")], dtype=object),
    ):
        with pytest.raises(UserError, match=r"refused: the pickle asks for .*not executed"):
            load_plain_pickle(pickle.dumps({"data": hostile}, protocol), "file")
        assert not flag.exists()


@pytest.mark.parametrize("name", ["numpy.ndarray", "numpy.dtype", "_codecs.encode"])
@pytest.mark.parametrize("attribute", ["__setstate__", "__init__", "__call__", "_call", "x"])
def test_what_a_pickle_names_it_cannot_change(name: str, attribute: str) -> None:
    # BUILD with a pair as state sets attributes of whatever lies on the stack.
    before = load_plain_pickle(pickle.dumps(np.arange(3)), "file")
    module, _, member = name.rpartition(".")
    stolen = b"c" + module.encode() + b"\n" + member.encode() + b"\n"
    data = stolen + b"(N}V" + attribute.encode() + b"\nK\x01stb."
    with pytest.raises(UserError, match=r"refused: the pickle asks for a change of|corrupt"):
        load_plain_pickle(data, "file")
    plain = stolen + b"}V" + attribute.encode() + b"\nK\x01sb."
    with pytest.raises(UserError, match=r"refused|corrupt"):
        load_plain_pickle(plain, "file")
    assert np.array_equal(load_plain_pickle(pickle.dumps(np.arange(3)), "file"), before)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"Pmodule\n.", "persistent object"),
        (b"cbuiltins\nexec\n.", "builtins.exec"),
    ],
)
def test_every_way_to_name_something_is_closed(data: bytes, name: str) -> None:
    with pytest.raises(UserError, match=rf"refused: the pickle asks for .*{name}"):
        load_plain_pickle(data, "file")
