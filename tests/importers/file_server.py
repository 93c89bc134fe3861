"""A server of one file on 127.0.0.1 that fails on demand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FileServer:
    """What the server answers; each fault is used up by one request.

    Faults: ``break N`` closes the connection after N bytes, ``short N`` ends an answer of unstated
    length after N bytes, a number is a status, ``whole`` ignores a range, ``page`` answers with
    HTML, ``to URL`` redirects.
    """

    content: bytes
    version: str = '"1"'
    faults: list[str] = field(default_factory=list)
    #: the range that each request asked for
    asked: list[str] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        files: FileServer = self.server.files
        wanted = self.headers.get("Range", "")
        files.asked.append(wanted)
        fault, _, detail = (files.faults.pop(0) if files.faults else "").partition(" ")
        self.close_connection = True
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        if fault == "to":
            self.send_response(302)
            self.send_header("Location", detail)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, start = files.content, 0
        same = self.headers.get("If-Range", files.version) == files.version
        if wanted and same and fault != "whole":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if files.version:
            self.send_header("ETag", files.version)
        kind = "text/html" if fault == "page" else "application/octet-stream"
        self.send_header("Content-Type", kind)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if fault != "short":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + int(detail)] if detail else body[start:])


@contextmanager
def serving(content: bytes, *faults: str, version: str = '"1"') -> Iterator[FileServer]:
    files = FileServer(content, version, list(faults))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files = files  # type: ignore[attr-defined]
    files.url = f"http://127.0.0.1:{server.server_port}/folder/model.pkl"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def local(url: str) -> bool:
    """The allowance that only tests give: this machine, without https."""
    return url.startswith("http://127.0.0.1:")
