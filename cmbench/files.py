"""Files that are whole or absent, read with errors in one line; file names as text."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmbench.errors import UserError, described

#: What a file that cannot be read, or that holds something else, raises while it is taken apart.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


#: Levels of lists and tables in a JSON file; ours have fewer than twenty.
DEEPEST = 100


class FormatError(ValueError):
    """A file is not of its format; the text continues a message: ``is not JSON (…)``."""


@contextmanager
def reading(who: str, remedy: str, failure: type[UserError] = UserError) -> Iterator[None]:
    """Turn what a file raises while it is read and taken apart into ``failure``, one line."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise failure(who, _problem(error), remedy=remedy) from error


def _problem(error: BaseException) -> str:
    if isinstance(error, FormatError):
        return str(error)
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    if errors := getattr(error, "errors", None):  # pydantic's, which takes long to import
        first = errors()[0]
        return f"field {'.'.join(map(str, first['loc']))!r}: {first['msg']}"
    return f"cannot be read ({described(error)})"


def regular(path: Path) -> Path:
    """Return the path of a file before it is opened to be read.

    Opening a named pipe waits until somebody writes to it, and some devices never end.

    Raises:
        OSError: there is no such file, or it is a pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises by itself
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def read_json(path: Path, largest: float | None = None) -> Any:
    """Return what a JSON file holds; see :func:`parse_json`."""
    return parse_json(regular(path).read_text(encoding="utf-8"), largest)


def parse_json(text: str | bytes, largest: float | None = None) -> Any:
    """Return what a JSON text holds; its integers fit 64 bits, since readers make floats of them.

    ``largest`` refuses NaN, infinities and numbers of a larger magnitude.

    Raises:
        FormatError: it is not such JSON, or nested too deeply.
    """

    def integer(digits: str) -> int:
        if len(digits) > 18 and not (len(digits) <= 20 and -(2**63) <= int(digits) < 2**64):
            raise ValueError(f"{digits[:40]} is too large: at most 64 bits")
        return int(digits)

    def number(digits: str) -> float:
        if largest is not None and not abs(float(digits)) <= largest:
            raise ValueError(f"{digits[:40]} is too large: at most {largest:g}")
        return float(digits)

    def constant(name: str) -> float:
        if largest is not None:
            raise ValueError(f"{name} is not allowed")
        return float(name)

    try:
        data = json.loads(text, parse_int=integer, parse_float=number, parse_constant=constant)
        if _depth(data) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if isinstance(text, str) and "\\ud" in text.lower():
            json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed
        return data
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON ({error})") from error


def _depth(data: Any) -> int:
    """Return how deep lists and tables are nested; what walks them later may recurse."""
    depth, level = 0, [data]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return depth


#: Key of the hash that a file holds of everything else in it.
SEAL = "seal"


def seal_of(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data, without its seal, as it is read back from JSON."""
    kept = json.loads(json.dumps({key: data[key] for key in data if key != SEAL}))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with its seal, which :func:`unsealed` checks.

    Facts beside tensors hold the hash of their tensors too, so the seal ties the two together. It
    finds damage and edits by hand, not a forger, who can compute it again.
    """
    return {**data, SEAL: seal_of(data)}


def unsealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return sealed data without its seal.

    Raises:
        FormatError: the data have no seal, or are not those that were sealed.
    """
    if SEAL not in data:
        raise FormatError(f"has no hash of its contents (key {SEAL!r})")
    if data[SEAL] != seal_of(data):
        raise FormatError("was changed after it was written: its contents do not match their hash")
    return {key: value for key, value in data.items() if key != SEAL}


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what a JSON file of :func:`write_sealed` holds; see :func:`unsealed`."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise FormatError("is not a JSON object")
    return unsealed(data)


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data as JSON with its seal, atomically."""
    write_json(path, sealed(data))


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds.

    Raises:
        OSError: it cannot be read.
        FormatError: it is not TOML, or nested too deeply.
    """
    try:
        return tomllib.loads(regular(path).read_bytes().decode())
    except (ValueError, RecursionError) as error:  # of TOML, or of UTF-8
        raise FormatError(f"is not valid TOML: {error}") from error


def corrupt(who: str, what: str, error: BaseException) -> UserError:
    """Return the error for a file of the format ``what`` that is cut short or damaged."""
    return UserError(
        who,
        f"truncated or corrupt {what} ({described(error, 120)})",
        remedy="download it again and compare its size and hash with the original's",
    )


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable(name: str) -> str:
    """Return a file name as text that can be written; bytes outside UTF-8 become ``\\xNN``."""
    if name.isascii():
        return name
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def expanded(path: str) -> Path:
    """Return a path with ``~`` replaced where there is such a home; else it stays."""
    return Path(os.path.expanduser(path))


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON with sorted keys, atomically."""
    write_atomically(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


def write_atomically(
    path: Path, data: bytes, remedy: str = "free space or choose a writable folder with --workspace"
) -> None:
    """Write ``data`` to a temporary name next to ``path``, flush it to disk, rename it.

    Raises:
        UserError: the file cannot be written; ``remedy`` ends the message.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path}", error.strerror or str(error), remedy=remedy
        ) from error
