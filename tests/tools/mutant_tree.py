"""A temporary copy of the checkout in which modules are changed and tests run."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


class Tree:
    """Copies the files of ``root`` that git does not ignore to ``folder``."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder / "tree"
        command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (root / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.folder / name)
        if (self.folder / "plugins").is_dir():  # installed under this name
            (self.folder / "cmbench_plugins").symlink_to("plugins")
        self.log = folder / "pytest.log"
        self.temporary = folder / "tmp"

    def source(self, module: str) -> bytes:
        """Return a module's clean source."""
        return (self.folder / module).read_bytes()

    def write(self, module: str, source: bytes) -> None:
        """Change a module; its compiled file could look as new as the source, so it goes."""
        path = self.folder / module
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        path.write_bytes(source)

    def pytest(self, arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
        """Run pytest in this process, which must be a child made for it; return its exit code."""
        import pytest

        os.chdir(self.folder)
        sys.path[0] = str(self.folder)
        os.environ["PYTHONPATH"] = str(self.folder)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False  # else each mutant would compile the whole package
        # The names of tests that fail are read from the log: FORCE_COLOR must not colour them.
        common = ["-q", "--color=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
        common += [f"--basetemp={self.temporary}"]
        return int(pytest.main([*common, *arguments], list(plugins)))

    def run(self, work: Callable[[], int], limit: float) -> int | None:
        """Do ``work`` in a forked process; return its exit code, or None if it took too long.

        ``limit`` is in seconds of the processor. Who waits for ever is stopped after five times as
        many by the clock, so that a busy machine makes no mutant look slow.
        """
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setsid()
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
                code = work()
            finally:
                sys.stdout.flush()  # os._exit loses what is not written yet
                sys.stderr.flush()
                os._exit(code)
        ended = time.monotonic() + 5 * limit
        found = (0, 0)
        while not found[0] and time.monotonic() < ended:
            time.sleep(0.02)
            found = os.waitpid(child, os.WNOHANG)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # the child, or what it has left behind
        if not found[0]:
            os.waitpid(child, 0)
            return None
        code = os.waitstatus_to_exitcode(found[1])
        return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
