"""Files that are read: what is wrong with one is one line, whatever it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmbench.errors import MissingError, UserError
from cmbench.files import read_json, read_toml, reading


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON (Expecting property name"),
        ("[" * 100_000, "is not JSON ("),
        (f"[{10**20}]", f"is not JSON ({10**20} is too large: at most 64 bits)"),
        ("9" * 5000, f"is not JSON ({'9' * 40} is too large: at most 64 bits)"),
        (r'["\ud800"]', "is not JSON ('utf-8' codec can't encode"),
        (b"\xff", "cannot be read (UnicodeDecodeError: "),
        ("[1]", "cannot be read (TypeError: list indices"),
        ("{}", "cannot be read (KeyError: 'a')"),
    ],
)
def test_what_is_wrong_with_a_json_file(tmp_path: Path, text: str | bytes, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised, reading("manifest", "make it again"):
        read_json(path)["a"]
    assert raised.value.problem.startswith(problem)
    assert str(raised.value).endswith("; make it again")


def test_numbers_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(f"[{2**64 - 1}, {-(2**63)}, 1e60, -Infinity]")
    assert read_json(path) == [2**64 - 1, -(2**63), 1e60, float("-inf")]
    for text in ("1e60", "NaN", "-Infinity", "1e999"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"too large: at most 1e[+]50|is not allowed"):
            read_json(path, largest=1e50)


@pytest.mark.parametrize("text", ["x = [" * 5000, "[digits", b"x = '\xff'"])
def test_what_is_wrong_with_a_toml_file(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="recipe: is not valid TOML: "), reading("recipe", ""):
        read_toml(path)


def test_errors_of_the_system_and_of_the_user(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    with pytest.raises(MissingError) as raised, reading("run", "train it", MissingError):
        read_json(missing)
    assert str(raised.value) == "run: cannot be read (No such file or directory); train it"
    with pytest.raises(UserError, match=r"^inner: said"), reading("outer", ""):
        raise UserError("inner", "said")
