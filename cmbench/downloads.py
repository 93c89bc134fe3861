"""Downloads over https: to a temporary name, resumed where they broke off, whole or absent."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from filelock import FileLock, Timeout

from cmbench.files import read_json, sha256_file, write_json

_BLOCK = 2**20
_TIMEOUT_S = 60.0
#: Breaks in a row, without a byte in between, after which a download gives up.
_ATTEMPTS = 4
#: What a later attempt may fix.
_BROKEN = (OSError, HTTPException)
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

#: Bytes that are here, and bytes in all if the server says.
Progress = Callable[[int, int | None], None]


class DownloadError(Exception):
    """A file cannot be had from its address; the text continues a message."""


def secure(url: str) -> bool:
    """Whether an address may be fetched from: https only."""
    return url.startswith("https://")


def download(
    url: str,
    target: Path,
    *,
    sha256: str = "",
    progress: Progress = lambda done, total: None,
    allowed: Callable[[str], bool] = secure,
    pause_s: float = 1.0,
) -> None:
    """Fetch ``url`` to ``target``, going on where an earlier attempt stopped.

    Args:
        url: its address, and where it redirects to, must be ``allowed``.
        target: the file; until it is complete, and has the hash, it is ``target``.part.
        sha256: its hash, if that is known.
        progress: called for every megabyte.
        allowed: which addresses may be fetched from; https unless a test says otherwise.
        pause_s: seconds before the second attempt; doubled with each further one.

    Raises:
        DownloadError: it cannot be fetched now; what has arrived is kept. Or another file was
            fetched than the one with this hash; that is deleted.
        OSError: it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(target.with_name(f"{target.name}.lock"), timeout=0):
            if not target.exists():
                _Download(url, target, progress, allowed).finish(sha256, pause_s)
    except Timeout:
        raise DownloadError("another process is downloading it") from None


@dataclass
class _Download:
    """One file on its way: ``.part`` has its first bytes, ``.part.json`` says which file's."""

    url: str
    target: Path
    progress: Progress
    allowed: Callable[[str], bool]

    def __post_init__(self) -> None:
        self.part = self.target.with_name(f"{self.target.name}.part")
        self.facts = self.part.with_name(f"{self.part.name}.json")

    def finish(self, sha256: str, pause_s: float) -> None:
        """Fetch what is missing, verify it and give the file its name."""
        failed = 0
        while True:
            before = self._here()
            try:
                self._receive()
                break
            except HTTPError as error:
                if error.code not in (408, 416, 429) and error.code < 500:
                    raise DownloadError(f"the server answers {error.code} {error.reason}") from None
                reason: Exception = error
            except _BROKEN as error:
                if _of_disk(error):
                    raise
                reason = error
            if isinstance(getattr(reason, "reason", reason), socket.gaierror):
                raise DownloadError("its server is not found from here (offline?)") from None
            failed = 1 if self._here() > before else failed + 1
            if failed >= _ATTEMPTS:
                raise DownloadError(f"the connection fails: {_words(reason)}") from None
            time.sleep(pause_s * 2 ** (failed - 1))
        self._verify(sha256)
        os.replace(self.part, self.target)
        self.facts.unlink(missing_ok=True)

    def _here(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self) -> None:
        """Append what the server still has, or start again if it has another file."""
        known, here = self._known(), self._here()
        request = Request(
            self.url, headers={"User-Agent": "cmbench", "Accept-Encoding": "identity"}
        )
        if here and known is not None:
            request.add_header("Range", f"bytes={here}-")
            if known["version"]:
                request.add_header("If-Range", known["version"])
        with _open(request, self.allowed) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise DownloadError("the server answers with a web page")
            start, total = _extent(answer.status, answer.headers)
            if start and (known is None or start != here or total != known["size"]):
                self.part.unlink()  # of another file: from the start, with the next attempt
                raise HTTPException("the server has another file than before")
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            about = {"url": self.url, "size": total, "version": version.removeprefix("W/")}
            write_json(self.facts, about)
            with self.part.open("ab" if start else "wb") as file:
                self._append(answer, file, start, total)

    def _append(self, answer: Any, file: IO[bytes], done: int, total: int | None) -> None:
        self.progress(done, total)
        while block := answer.read(_BLOCK):
            file.write(block)
            done += len(block)
            self.progress(done, total)
        if total is not None and done != total:
            raise HTTPException(f"{done:,} of {total:,} bytes arrived")

    def _known(self) -> dict[str, Any] | None:
        """Return what is known of the file whose first bytes are here, if it is this one."""
        try:
            known = read_json(self.facts)
            same = known["url"] == self.url and isinstance(known["size"], int)
            return {"size": known["size"], "version": str(known["version"])} if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _verify(self, sha256: str) -> None:
        if sha256 and (found := sha256_file(self.part)) != sha256:
            self.part.unlink()
            self.facts.unlink(missing_ok=True)
            raise DownloadError(f"has sha256 {found}, not {sha256}: it was deleted")


def _extent(status: int, headers: HTTPMessage) -> tuple[int, int | None]:
    """Return where the answer starts within the file, and the size of the whole file."""
    if status == 206:
        found = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if found is None:
            raise HTTPException("the server does not say which part it sends")
        return int(found[1]), int(found[2])
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _of_disk(error: BaseException) -> bool:
    """Whether it is a file that fails, not the connection."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or getattr(error, "filename", None) is not None


def _words(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    return " ".join(str(reason).split())[:120] or type(error).__name__


class _Redirects(HTTPRedirectHandler):
    """Follow redirects to allowed addresses only."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self.allowed = allowed

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Refuse other addresses than https."""
        if not self.allowed(newurl):
            raise DownloadError("the server redirects to an address that is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: Request, allowed: Callable[[str], bool]) -> Any:
    """Open an allowed address; nothing but http and https is known to this opener."""
    if not allowed(request.full_url):
        raise DownloadError("its address is not https")
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPHandler(),
        HTTPSHandler(),
        HTTPDefaultErrorHandler(),
        _Redirects(allowed),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener.open(request, timeout=_TIMEOUT_S)
