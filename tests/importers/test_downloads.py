"""Published checkpoints by name: downloads that break off and go on, and what is said offline."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builders import GOLDEN, write_edm
from file_server import FileServer, local, serving
from filelock import FileLock
from oracle_edm import EDMNetwork
from oracle_parts import write_snapshot
from safetensors.torch import load_file

from cmbench.cli import importing
from cmbench.downloads import DownloadError, download
from cmbench.errors import EXIT_MISSING, EXIT_USAGE, MissingError, UserError
from cmbench.importers import public
from cmbench.importers.public import (
    PublicCheckpoint,
    find_public,
    obtain,
    public_checkpoints,
    published_teacher,
)
from cmbench.records.workspace import Workspace

Command = Callable[..., Any]
#: Three blocks and a bit of the downloader.
CONTENT = hashlib.sha256(b"seed").digest() * (3 * 2**20 // 32) + b"end"


def fetch(files: FileServer, target: Path, **options: Any) -> list[tuple[int, int | None]]:
    seen: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        seen.append((done, total))

    download(files.url, target, allowed=local, pause_s=0, progress=progress, **options)
    return seen


def only(target: Path) -> bool:
    """Whether nothing else is left beside a file but its lock."""
    return {p.name for p in target.parent.iterdir()} <= {target.name, f"{target.name}.lock"}


def test_a_download(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model.pkl"
    with serving(CONTENT) as files:
        seen = fetch(files, target, sha256=hashlib.sha256(CONTENT).hexdigest())
        assert target.read_bytes() == CONTENT
        assert only(target)
        assert seen[0] == (0, len(CONTENT))
        assert seen[-1] == (len(CONTENT), len(CONTENT))
        assert fetch(files, target) == [], "what is here is not fetched again"
        assert files.asked == [""]


def test_a_broken_connection_goes_on_where_it_broke(tmp_path: Path) -> None:
    target, first, second = tmp_path / "model.pkl", 2**20 + 17, 2**20 // 2
    with serving(CONTENT, f"break {first}", f"break {second}") as files:
        fetch(files, target)
        assert files.asked == ["", f"bytes={first}-", f"bytes={first + second}-"]
    assert target.read_bytes() == CONTENT
    assert only(target)


def test_a_command_that_stopped_goes_on_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model.pkl"
    with serving(CONTENT, "break 1000", "500", "503", "429", "500") as files:
        with pytest.raises(DownloadError, match=r"the connection fails: "):
            fetch(files, target)
        assert not target.exists()
        assert (tmp_path / "model.pkl.part").read_bytes() == CONTENT[:1000]
        files.faults.clear()
        fetch(files, target)
        assert files.asked[-1] == "bytes=1000-"
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("version", ['"2"', ""])
def test_another_file_than_before_starts_anew(tmp_path: Path, version: str) -> None:
    target, other = tmp_path / "model.pkl", bytes(2**20) + b"longer than what was here"
    with serving(CONTENT, "break 5000", *["500"] * 4) as files:
        with pytest.raises(DownloadError):
            fetch(files, target)
        files.content, files.version = other, version
        files.faults.clear()
        fetch(files, target)
    assert target.read_bytes() == other
    assert only(target)


def test_the_first_bytes_of_another_address_are_not_used(tmp_path: Path) -> None:
    target = tmp_path / "model.pkl"
    (tmp_path / "model.pkl.part").write_bytes(b"x" * 100)
    (tmp_path / "model.pkl.part.json").write_text(
        '{"url": "https://a/b", "size": 9, "version": ""}'
    )
    with serving(CONTENT) as files:
        fetch(files, target)
        assert files.asked == [""]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("facts", ["", "[]", "{", '{"url": 3}', '{"size": "a"}'])
def test_damaged_notes_start_anew(tmp_path: Path, facts: str) -> None:
    target = tmp_path / "model.pkl"
    (tmp_path / "model.pkl.part").write_bytes(b"x" * 100)
    (tmp_path / "model.pkl.part.json").write_text(facts)
    with serving(CONTENT) as files:
        fetch(files, target)
    assert target.read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(tmp_path: Path) -> None:
    target = tmp_path / "model.pkl"
    with serving(CONTENT, "break 5000", "whole") as files:
        fetch(files, target)
    assert target.read_bytes() == CONTENT


def test_a_wrong_hash_is_deleted(tmp_path: Path) -> None:
    target = tmp_path / "model.pkl"
    wrong = hashlib.sha256(b"other").hexdigest()
    with serving(CONTENT) as files, pytest.raises(DownloadError) as caught:
        fetch(files, target, sha256=wrong)
    found = hashlib.sha256(CONTENT).hexdigest()
    assert str(caught.value) == f"has sha256 {found}, not {wrong}: it was deleted"
    assert not target.exists()
    assert only(target)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "the server answers 404 Not Found"),
        ("403", "the server answers 403 Forbidden"),
        ("page", "the server answers with a web page"),
        ("to http://example.org/x", "redirects to an address that is not https"),
        ("to ftp://127.0.0.1/x", "redirects to an address that is not https"),
        ("to file:///etc/passwd", "the server answers 302 .* is not allowed"),
    ],
)
def test_what_cannot_be_fetched_is_not_tried_again(
    tmp_path: Path, fault: str, message: str
) -> None:
    with serving(CONTENT, fault) as files:
        with pytest.raises(DownloadError, match=message):
            fetch(files, tmp_path / "model.pkl")
        assert len(files.asked) == 1
    assert not (tmp_path / "model.pkl").exists()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "ftp://a/b", "file:///etc/passwd", "data:,x", "HTTPS:x"]
)
def test_only_https_is_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="its address is not https"):
        download(url, tmp_path / "x")


def test_redirects_to_allowed_addresses_are_followed(tmp_path: Path) -> None:
    target = tmp_path / "model.pkl"
    with serving(CONTENT) as there, serving(b"", f"to {there.url}") as files:
        fetch(files, target)
    assert target.read_bytes() == CONTENT


def test_one_process_downloads_a_file(tmp_path: Path) -> None:
    with (
        serving(CONTENT) as files,
        FileLock(tmp_path / "model.pkl.lock"),
        pytest.raises(DownloadError, match="another process is downloading it"),
    ):
        fetch(files, tmp_path / "model.pkl")


# ---- the list ------------------------------------------------------------------------------------


def test_the_list_is_sound() -> None:
    rows = public_checkpoints()
    assert len({row.name for row in rows}) == len(rows) > 80
    paths = {row.path(Path("d")) for row in rows}
    assert len(paths) == len({row.url for row in rows}), "one file, one place"
    for row in rows:
        assert row.url.startswith("https://"), row.name
        assert row.conditioning in ("conditional", "unconditional", "")
        assert row.sha256 == "" or len(row.sha256) == 64
        assert len(row.name) <= 40, "a name of the workspace's"


def entry(url: str, **changes: Any) -> PublicCheckpoint:
    known = find_public("edm-cifar10-uncond-vp")
    assert known is not None
    return replace(known, name="tiny", url=url, **changes)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("edm-cifar10-cond-vp", {}),
        ("openai-edm-imagenet64-ema", {"parameterization": "edm", "sigma_data": 0.5}),
        (
            "openai-cd-imagenet64-l2",
            {"parameterization": "boundary", "sigma_data": 0.5, "sigma_min": 0.002},
        ),
        (
            "jcm-cifar10-cct-l2",
            {"parameterization": "boundary", "sigma_data": 0.5, "sigma_min": 0.002},
        ),
    ],
)
def test_what_files_do_not_say_is_known_of_published_ones(name: str, given: Any) -> None:
    found = find_public(name)
    assert found is not None
    assert found.given == given


def test_a_published_teacher() -> None:
    found = published_teacher("edm", "cifar10", conditional=False)
    assert found is not None
    assert found.name == "edm-cifar10-uncond-vp"
    large = published_teacher("edm", "imagenet64", conditional=True)
    assert large is not None
    assert large.name == "edm2-img64-s-fid"
    assert published_teacher("edm", "digits", conditional=False) is None
    assert published_teacher("sid", "cifar10", conditional=True) is not None
    assert published_teacher("tcm", "cifar10", conditional=False) is None, "fetched by hand"


def test_offline_one_line_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(b"") as files:
        gone = files.url  # nobody listens there any more
    monkeypatch.setattr(public, "download", partial(download, pause_s=0))
    with pytest.raises(MissingError) as caught:
        obtain(entry(gone), tmp_path, allowed=local)
    path = tmp_path / "127.0.0.1" / "folder" / "model.pkl"
    assert f"fetch {gone} and put it at {path}, then run `cmbench import tiny` again" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    path.write_bytes(b"by hand")
    assert obtain(entry(gone), tmp_path, allowed=local) == path
    with pytest.raises(UserError, match=r"has sha256 \w{64}; allowed: 0{64}; delete it, and fetch"):
        obtain(entry(gone, sha256="0" * 64), tmp_path, allowed=local)


@pytest.mark.parametrize("name", ["tcm-cifar10", "tcm-imagenet64-xl"])
def test_pages_are_not_fetched(tmp_path: Path, name: str) -> None:
    row = find_public(name)
    assert row is not None
    with pytest.raises(MissingError, match=r"cannot be downloaded directly; fetch https://") as e:
        obtain(row, tmp_path, allowed=lambda url: pytest.fail("was fetched"))
    assert str(tmp_path / f"{name}.pkl") in str(e.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dit-xl-2-256", r"is of the format 'dit \.pt'; allowed: edm pickle, .*are not here"),
        ("ref-edm-cifar10", r"run `cmbench refs import FILE`"),
        ("imf-b-2", "is of the format 'jax zip'"),
    ],
)
def test_what_no_reader_reads_is_not_downloaded(tmp_path: Path, name: str, message: str) -> None:
    row = find_public(name)
    assert row is not None
    with pytest.raises(UserError, match=message):
        obtain(row, tmp_path, allowed=lambda url: pytest.fail("was fetched"))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "127.0.0.1").write_text("a file in the folder's place")
    with (
        serving(CONTENT) as files,
        pytest.raises(UserError, match=r"cannot be written to .*choose another workspace"),
    ):
        obtain(entry(files.url), tmp_path, allowed=local)


# ---- the verb ------------------------------------------------------------------------------------


def test_the_list_is_printed(cmbench: Command, workspace: Workspace) -> None:
    done = cmbench("import", "--list")
    assert done.code == 0, done.err
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert {row.name for row in public_checkpoints()} <= lines.keys()
    assert "fid 1.58" in lines["edm2-img64-s-fid"]
    assert "CC BY-NC-SA 4.0" in lines["edm2-img64-s-fid"]
    assert lines["dit-xl-2-256"].rstrip().endswith("not read here (dit .pt)")
    assert lines["tcm-cifar10"].rstrip().endswith("fetch by hand")


def test_a_checkpoint_by_name(
    cmbench: Command, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloaded over a connection that breaks, verified, imported with address and hash."""
    weights = load_file(GOLDEN / "edm-ddpmpp-uncond.weights.safetensors")
    content = write_edm(tmp_path / "net.pkl", weights).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    with serving(content, "break 100000") as files:
        row = entry(files.url, sha256=sha256, published="fid 1.97", licence="CC")
        monkeypatch.setattr(importing, "find_public", {"tiny": row}.get)
        monkeypatch.setattr(importing, "obtain", partial(obtain, allowed=local))
        monkeypatch.setattr(public, "download", partial(download, pause_s=0))
        done = cmbench("import", "tiny")
        assert done.code == 0, done.err
        assert files.asked == ["", "bytes=100000-"]
    assert f"downloading tiny: 0.0 of {len(content) / 1e6:,.1f} MB (0%)" in done.err
    assert "MB (100%)" in done.err
    for line in (
        "published        fid 1.97",
        "licence          CC",
        f"address          {row.url}",
        "sample it with   cmbench run --checkpoint tiny --dataset cifar10",
        "start from it    cmbench run --method METHOD -o teacher=import:tiny",
    ):
        assert f"\n{line}" in done.out
    manifest = (workspace.imported / "tiny.json").read_text()
    assert sha256 in manifest
    assert row.url in manifest
    again = cmbench("import", "tiny")
    assert again.code == 0, again.err
    assert "downloading" not in again.err


def test_options_of_the_user_come_first(cmbench: Command) -> None:
    row = find_public("openai-cd-imagenet64-l2")
    assert row is not None
    empty = dict.fromkeys(("parameterization", "sigma_min", "channels_per_head", "resolution"))
    options = importing.ImportOptions(**empty, part="ema", ignored=(), to=None, force=False)
    known = importing.with_what_is_known(options, row)
    assert (known.to, known.parameterization) == ("openai-cd-imagenet64-l2", "boundary")
    assert (known.sigma_min, known.sigma_data) == (0.002, 0.5)
    own = importing.with_what_is_known(replace(options, to="x", sigma_min=0.003), row)
    assert (own.to, own.sigma_min) == ("x", 0.003)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ((), EXIT_USAGE, ("no checkpoint is named", "--list")),
        (("edm-cifar10-uncond",), EXIT_MISSING, ("does not exist", "`cmbench import --list`")),
        (("tcm-cifar10",), EXIT_MISSING, ("fetch https://drive.google.com/", "tcm-cifar10.pkl")),
    ],
)
def test_bad_input_is_one_line(
    cmbench: Command, arguments: tuple[str, ...], code: int, parts: tuple[str, ...]
) -> None:
    done = cmbench("import", *arguments)
    assert (done.code, done.out) == (code, "")
    (line,) = done.err.splitlines()
    for part in parts:
        assert part in line


@pytest.mark.parametrize("method", ["ect", "sct", "pd"])
def test_a_plan_that_would_train_a_published_teacher_says_so(
    cmbench: Command, tmp_path: Path, method: str
) -> None:
    """And what it says to run works: with a tiny network in the published one's place."""
    plan = ("run", "--method", method, "--dataset", "cifar10", "--dry-run")
    done = cmbench(*plan)
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "is published" in line]
    assert re.search(r"edm on cifar10 would be trained on \d{3},\d00,000 images, and is", line)
    first, added = re.findall(r"`([^`]+)`", line)
    assert first == "cmbench import edm-cifar10-uncond-vp"
    network = EDMNetwork(0, "SongUNet", img_resolution=32)
    file = write_snapshot(tmp_path / "net.pkl", network)
    assert cmbench("import", str(file), "--to", "edm-cifar10-uncond-vp").code == 0
    again = cmbench(*plan, *added.split())
    assert again.code == 0, again.err
    assert "is published" not in again.err
    assert not [line for line in again.out.splitlines() if line.startswith("cifar10/edm-")]


def test_students_and_teachers_without_a_published_one_say_nothing(cmbench: Command) -> None:
    for arguments in (("-m", "edm", "-d", "cifar10"), ("-m", "ect", "-d", "digits")):
        done = cmbench("run", *arguments, "--dry-run")
        assert done.code == 0, done.err
        assert "is published" not in done.err
