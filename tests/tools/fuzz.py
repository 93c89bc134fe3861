"""Fuzz campaign: read damaged files of every kind and see that each costs one line.

    python tests/tools/fuzz.py --inputs 10000 --seed 1 [--only BEGINNING] [--keep FOLDER]

Every input is a sound file (``fuzz_seeds.py``) that is damaged blindly or within its format
(``fuzz_mutations.py``), read by a command of cmbench in a child process. Offences are: a traceback
or an "unexpected" line, more than --seconds of processor time, a signal, memory of more than
--memory MiB above the largest file, a file written or a program started outside the child's own
folder. The same seed gives the same inputs. ``--keep`` writes the inputs that offend.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from fuzz_mutations import PIPE, Files, damage
from fuzz_seeds import Seed, seeds

from cmbench.cli.main import main

#: A child ends after so many inputs, so that what one leaves behind does not add up.
_PER_CHILD = 400
#: Address space that a child may take beyond what it has: what allocates more than that at once is
#: an offence too, by its MemoryError or by what it takes.
_SPARE_BYTES = 6 << 30
_UNHANDLED = re.compile(r"error: unexpected|Traceback \(most recent call last\)")


@dataclass
class Outcome:
    """What became of one input."""

    index: int
    name: str
    code: int | None = None
    seconds: float = 0.0
    offences: list[str] = field(default_factory=list)


# ---- in the child --------------------------------------------------------------------------------


class Guard:
    """Notes what a reader writes, starts or connects to outside ``root``."""

    def __init__(self, root: Path) -> None:
        self.root, self.found = f"{root}/", list[str]()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or isinstance(path, int):
                return
        elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
            path = arguments[1] if event != "os.mkdir" else arguments[0]
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.found.append(f"started a program ({event})")
            return
        elif event == "socket.connect":
            self.found.append("opened a connection")
            return
        else:
            return
        whole = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, Path)) else ""
        if whole and not whole.startswith((self.root, "/dev/null", "/proc/self")):
            self.found.append(f"wrote {whole}")


def read(seed: Seed, files: Files, root: Path) -> tuple[int, str]:
    """Run the command that reads the files; return its exit code and what it printed."""
    for name in ("in", "out"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    for name, data in files.items():
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        if data == PIPE:
            os.mkfifo(root / "in" / name)
        else:
            (root / "in" / name).write_bytes(data)
    places = {"{in}": str(root / "in"), "{out}": str(root / "out")}
    arguments = [re.sub(r"\{(in|out)\}", lambda m: places[m[0]], a) for a in seed.arguments]
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="surrogateescape")
    code: Any = None
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc(file=printed)
    printed.flush()
    return code or 0, printed.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def _judge(outcome: Outcome, printed: str, taken: int, limits: Any) -> None:
    if found := _UNHANDLED.search(printed):
        line = printed[found.start() :].splitlines()
        outcome.offences.append(f"unhandled: {' '.join(line[:1] + line[-1:])[:300]}")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", printed):
        outcome.offences.append("control characters were printed")
    if taken > limits.memory << 20:
        outcome.offences.append(f"memory: {taken >> 20} MiB")
    if outcome.seconds > limits.seconds:
        outcome.offences.append(f"time: {outcome.seconds:.1f} s")


def child(work: list[tuple[int, Seed]], root: Path, limits: Any, pipe: int) -> None:
    """Read one input after the other; report each start and end on the pipe."""
    os.chdir(root / "here")
    faulthandler.disable()  # a signal is reported by the parent
    guard = Guard(root)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there by itself
    with os.fdopen(pipe, "w") as report:
        for index, seed in work:
            files = input_of(index, seed, limits.seed)
            print(json.dumps({"start": index}), file=report, flush=True)
            outcome = Outcome(index, seed.name)
            Path("/proc/self/clear_refs").write_text("5")
            guard.found.clear()
            before, began = _peak_bytes(), time.process_time()
            outcome.code, printed = read(seed, files, root)
            largest = max(map(len, files.values()))
            outcome.seconds = time.process_time() - began
            _judge(outcome, printed, _peak_bytes() - before - largest, limits)
            outcome.offences += dict.fromkeys(guard.found)
            print(json.dumps(vars(outcome)), file=report, flush=True)
    os._exit(0)


def input_of(index: int, seed: Seed, campaign: int) -> Files:
    """Return the files of an input, which depend on nothing else."""
    return damage(seed.files, random.Random(f"{campaign} {seed.name} {index}"))


# ---- in the parent -------------------------------------------------------------------------------


def _processor_seconds(process: int) -> float:
    """Return how long a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _lines(pipe: int, process: int, seconds: float) -> Iterable[dict[str, Any] | None]:
    """Yield what a child reports; None when it takes too long, which ends it."""
    waiting, began, spent = b"", time.monotonic(), 0.0
    ready = select.poll()  # select() knows only the first 1,024 files
    ready.register(pipe, select.POLLIN | select.POLLHUP)
    while True:
        if ready.poll(1000):
            data = os.read(pipe, 1 << 16)
            if not data:
                return
            *whole, waiting = (waiting + data).split(b"\n")
            began, spent = time.monotonic(), _processor_seconds(process)
            yield from map(json.loads, whole)
        elif (
            _processor_seconds(process) - spent > 1.5 * seconds
            or time.monotonic() - began > 20 * seconds  # it sleeps; a busy machine may too
        ):
            os.kill(process, signal.SIGKILL)
            yield None
            return


def _fork() -> int:
    """Fork; on a busy machine wait until there is room for another process."""
    for _ in range(60):
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(2)
    return os.fork()


def _tell(outcome: Outcome, count: int) -> None:
    """Print an offence as it is found, and now and then how far it is."""
    if outcome.offences:
        print(f"{outcome.index} {outcome.name}: {'; '.join(outcome.offences)}", flush=True)
    if count % 500 == 0:
        print(f"{count} inputs", flush=True)


def campaign(chosen: list[tuple[int, Seed]], root: Path, limits: Any) -> list[Outcome]:
    """Read all inputs, in one child at a time."""
    outcomes: list[Outcome] = []
    left = list(chosen)
    while left:
        part = left[:_PER_CHILD]
        reading, writing = os.pipe()
        process = _fork()
        if process == 0:
            os.close(reading)
            child(part, root, limits, writing)
        os.close(writing)
        done, started, hung = 0, None, False
        for line in _lines(reading, process, limits.seconds):
            if line is None:
                hung = True
            elif "start" in line:
                started = line["start"]
            else:
                outcomes.append(Outcome(**line))
                done, started = done + 1, None
                _tell(outcomes[-1], len(outcomes))
        os.close(reading)
        _, status = os.waitpid(process, 0)
        if started is not None:
            index, seed = part[done]
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            what = "time: it never ended" if hung else f"signal {number}"
            outcomes.append(Outcome(index, seed.name, offences=[what]))
            _tell(outcomes[-1], len(outcomes))
            done += 1
        elif done < len(part):
            raise RuntimeError(f"a child ended with status {status} before its work")
        left = left[done:]
    return outcomes


def fuzz(limits: Any) -> list[Outcome]:
    """Run the campaign that the options ask for."""
    with tempfile.TemporaryDirectory(prefix="cmbench-fuzz-") as folder:
        root = Path(folder).resolve()
        for name in ("here", "home", "tmp", "seeds", "cache"):
            (root / name).mkdir()
        os.environ.update(
            HOME=str(root / "home"),
            TMPDIR=str(root / "tmp"),
            CMBENCH_WORKSPACE=str(root / "workspace"),
            XDG_CACHE_HOME=str(root / "cache"),
        )
        tempfile.tempdir = None
        quiet = io.StringIO()
        with redirect_stdout(quiet), redirect_stderr(quiet):
            known = [s for s in seeds(root / "seeds") if s.name.startswith(limits.only)]
            for seed in known:  # warms what is imported on first use, and shows that each is sound
                code, printed = read(seed, seed.files, root)
                if code and seed.name not in ("record-verify", "records-compare", "submission"):
                    sys.__stderr__.write(f"{seed.name} exits {code}: {printed[-300:]}\n")
        chosen = [(i, known[i % len(known)]) for i in range(limits.inputs)]
        if limits.first:
            chosen = chosen[limits.first :]
        outcomes = campaign(chosen, root, limits)
        if limits.keep:
            by_index = dict(chosen)
            for outcome in (o for o in outcomes if o.offences):
                seed = by_index[outcome.index]
                place = Path(limits.keep) / f"{outcome.index}-{outcome.name}"
                for name, data in input_of(outcome.index, seed, limits.seed).items():
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(data)
    return outcomes


def parser() -> argparse.ArgumentParser:
    """Return the options of the campaign."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--inputs", type=int, default=1000, help="how many inputs")
    options.add_argument("--first", type=int, default=0, help="leave out those before")
    options.add_argument("--seed", type=int, default=1, help="of the campaign")
    options.add_argument("--only", default="", help="how names of seeds begin")
    options.add_argument("--seconds", type=float, default=10.0, help="of processor time per input")
    options.add_argument("--memory", type=int, default=1024, help="MiB above an input's size")
    options.add_argument("--keep", default="", help="folder for inputs that offend")
    return options


def run(arguments: list[str] | None = None) -> int:
    """Run a campaign and print what it found; return the exit code."""
    limits = parser().parse_args(arguments)
    outcomes = fuzz(limits)
    bad = [o for o in outcomes if o.offences]
    codes = Counter("signal" if o.code is None else str(o.code) for o in outcomes)
    spent: dict[str, float] = {}
    for outcome in outcomes:
        spent[outcome.name] = spent.get(outcome.name, 0.0) + outcome.seconds
    slowest = sorted(spent, key=lambda name: -spent[name])[:8]
    print(f"{sum(spent.values()):.0f} s of work;", *(f"{n} {spent[n]:.0f} s," for n in slowest))
    print(f"{len(outcomes)} inputs, exit codes {dict(sorted(codes.items()))}, {len(bad)} offences")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run())
