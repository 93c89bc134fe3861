"""Submissions: records, recipes, environments and hashes in one archive that `verify` accepts.

The archive is a zip whose bytes depend on its content only. Reading one trusts nothing: names must
stay inside, sizes are bounded, every file must be in the manifest with its hash.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cmbench import __version__
from cmbench.errors import UserError
from cmbench.files import parse_json, reading, write_atomically
from cmbench.records.artifacts import ArtifactError, read_artifact
from cmbench.records.record import Record, read_record
from cmbench.zips import UNREADABLE_ZIP, GuardedZip

MANIFEST = "manifest.json"
_AGAIN = "ask for the archive again; `cmbench submit` makes it"
MAX_FILES = 100_000
MAX_BYTES = 2 * 1024**3
#: Bytes of a manifest, a record, a recipe or an environment.
MAX_TEXT = 64 * 1024**2
_BLOCK = 1 << 20
#: What a zip can represent first: the same content gives the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SubmittedRecord(BaseModel):
    """One record of a submission."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: str
    recipe: str
    environment: str
    checkpoint_sha256: str


class SubmissionManifest(BaseModel):
    """What the archive holds; ``files`` maps every other file to its sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    cmbench: str
    entries: tuple[SubmittedRecord, ...]
    files: dict[str, Sha256]


def pack(records: Sequence[Path], target: Path) -> SubmissionManifest:
    """Write the finished ``records`` and what belongs to them into the zip ``target``.

    Raises:
        UserError: no or an unreadable or unfinished record, a missing or changed artifact, two
            records or artifacts of one name, or a target that exists.
    """
    if not records:
        raise UserError("submit", "no records given", remedy="give at least one finished cell")
    if target.exists():
        raise UserError("submit", f"{target} already exists", remedy="choose another name")
    files: dict[str, bytes] = {}
    entries = [_add(path, files) for path in records]
    manifest = SubmissionManifest(
        cmbench=__version__,
        entries=tuple(sorted(entries, key=lambda entry: entry.record)),
        files={name: _sha256(data) for name, data in sorted(files.items())},
    )
    for entry in manifest.entries:
        record = Record.model_validate_json(files[entry.record])
        _check_entry(entry, record, files, "submit")
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    _write_zip(target, {MANIFEST: text.encode(), **files})
    return manifest


def _add(path: Path, files: dict[str, bytes]) -> SubmittedRecord:
    record = read_record(path)
    if record.status != "finished":
        raise UserError(
            "submit",
            f"record {path} is {record.status}: {record.reason}",
            allowed="finished records",
            remedy="leave it out or measure the cell again",
        )
    folder = f"records/{record.dataset.name}"
    name = f"{folder}/{record.cell}.json"
    if name in files:
        raise UserError("submit", f"two records are named {name}", remedy="give each record once")
    files[name] = record.to_json().encode()
    for artifact in record.artifacts.values():
        try:
            data = read_artifact(path, artifact)
        except ArtifactError as error:
            raise UserError(
                "submit",
                f"artifact of {path.name}: {error}",
                remedy="restore the file from the machine that made the record",
            ) from error
        _add_artifact(f"{folder}/{artifact.file}", data, files)
    training = record.training
    recipe = _json(_recipe(record))
    # By content: records of one run may be of several methods (an evaluation under a label).
    recipe_name = f"recipes/{_sha256(recipe)[:16]}.json"
    files[recipe_name] = recipe
    environment = _json(record.environment.model_dump(mode="json"))
    environment_name = f"environments/{_sha256(environment)[:16]}.json"
    files[environment_name] = environment
    return SubmittedRecord(
        record=name,
        recipe=recipe_name,
        environment=environment_name,
        checkpoint_sha256=training.checkpoint_sha256,
    )


def _recipe(record: Record) -> dict[str, Any]:
    training = record.training
    return {"method": record.method, "recipe": training.recipe, "config": training.config}


def _add_artifact(name: str, data: bytes, files: dict[str, bytes]) -> None:
    _inside(name, "submit")
    if name.lower().endswith(".json"):
        raise UserError(
            "submit",
            f"artifact {name} has the name of a record",
            allowed="pictures and curves",
            remedy="leave the record out",
        )
    if files.setdefault(name, data) != data:
        raise UserError(
            "submit",
            f"two records have different artifacts named {name}",
            remedy="submit the records of each machine in a separate archive",
        )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_zip(target: Path, files: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name])
    write_atomically(target, buffer.getvalue())


# ---- reading ------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Check an archive and extract it into ``folder``; return its record files.

    Nothing is written unless names, sizes and hashes are correct.

    Raises:
        UserError: naming what is wrong: not a zip, a name that leaves the folder, too large, a file
            without or with another hash, a recipe or environment that is not its record's, no
            entry at all, a record that no entry lists.
    """
    who = f"submission {archive}"
    with _opened(archive, who) as (opened, members):
        if MANIFEST not in members:
            raise _bad(who, f"has no {MANIFEST}")
        manifest = _manifest(opened.read_member(members[MANIFEST], MAX_TEXT), who)
        _check_files(opened, members, manifest.files, who)
        _check_complete(manifest, who)
        texts = {
            name: opened.read_member(members[name], MAX_TEXT)
            for entry in manifest.entries
            for name in (entry.record, entry.recipe, entry.environment)
        }
        for name, info in members.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open_member(info) as file, path.open("wb") as out:
                shutil.copyfileobj(file, out, _BLOCK)
    for entry in manifest.entries:
        _check_entry(entry, read_record(folder / entry.record), texts, who)
    return [folder / entry.record for entry in manifest.entries]


@contextmanager
def _opened(archive: Path, who: str) -> Iterator[tuple[GuardedZip, dict[str, zipfile.ZipInfo]]]:
    """Give the archive and its members, whose names and sizes are allowed."""
    try:
        with GuardedZip(archive) as opened:
            infos = opened.infolist()
            if len(infos) > MAX_FILES or sum(i.file_size for i in infos) > MAX_BYTES:
                raise _bad(who, f"holds more than {MAX_FILES:,} files or {MAX_BYTES:,} bytes")
            members: dict[str, zipfile.ZipInfo] = {}
            for info in infos:
                _inside(info.filename, who)
                if info.filename in members:
                    raise _bad(who, f"{info.filename!r} occurs twice")
                members[info.filename] = info
            yield opened, members
    except UNREADABLE_ZIP as error:
        what = "is not a readable zip: damaged or truncated"
        if isinstance(error, OSError) and error.errno is not None:
            what = "cannot be extracted"  # a full disk, or a name that is a file and a folder
        raise _bad(who, f"{what} ({error})") from error


def _check_files(
    opened: GuardedZip, members: dict[str, zipfile.ZipInfo], listed: dict[str, str], who: str
) -> None:
    """Compare each member with its hash; no more than a block is in memory at a time."""
    for name in sorted(members.keys() - {MANIFEST}):
        if name not in listed:
            raise _bad(who, f"{name!r} is not in its manifest")
        digest = hashlib.sha256()
        with opened.open_member(members[name]) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != listed[name]:
            raise _bad(who, f"{name!r} has another hash than its manifest says")
    if missing := sorted(listed.keys() - members.keys()):
        raise _bad(who, f"{missing[0]!r} of its manifest is missing")


def _bad(who: str, problem: str) -> UserError:
    return UserError(who, problem, remedy=_AGAIN)


def _inside(name: str, who: str) -> None:
    path = PurePosixPath(name)
    bad = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if bad or not name or name.endswith("/") or any(not c.isprintable() for c in name):
        raise _bad(who, f"the name {name!r} is not allowed")


def _manifest(data: bytes, who: str) -> SubmissionManifest:
    with reading(f"{who}, {MANIFEST}", _AGAIN):
        return SubmissionManifest.model_validate(parse_json(data))


def _check_complete(manifest: SubmissionManifest, who: str) -> None:
    """Every record of the archive is an entry, once, and there is one: all will be checked."""
    entries = [entry.record for entry in manifest.entries]
    if not entries:
        raise _bad(who, "has no records")
    for name in (n for e in manifest.entries for n in (e.record, e.recipe, e.environment)):
        if name not in manifest.files:
            raise _bad(who, f"{name!r} of its manifest is missing")
    count = Counter(entries)
    for name in sorted(manifest.files):
        is_record = name.lower().startswith("records/") and name.lower().endswith(".json")
        if is_record and count[name] != 1:
            found = "twice" if count[name] else "not"
            raise _bad(who, f"the record {name!r} is {found} among its entries")


def _check_entry(entry: SubmittedRecord, record: Record, files: dict[str, bytes], who: str) -> None:
    if record.training.checkpoint_sha256 != entry.checkpoint_sha256:
        raise _bad(who, f"the checkpoint hash of {entry.record} is not the record's")
    if files[entry.environment] != _json(record.environment.model_dump(mode="json")):
        raise _bad(who, f"{entry.environment} is not the environment of {entry.record}")
    if files[entry.recipe] != _json(_recipe(record)):
        raise _bad(who, f"{entry.recipe} is not the recipe of {entry.record}")
