"""Kill a sweep at many moments, start it again each time, and compare with one left alone.

Run as ``python killing.py FOLDER SEED KILLS``; prints JSON. torch is imported once; each attempt is
a fork of this process, so that hundreds of attempts are cheap. Moments are of two kinds: before the
n-th event that touches the file system (every boundary between two writes can be hit), and after a
random time (inside a write or a step).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from toy import add_toys

from cmbench.plugin.manager import load_plugins
from cmbench.records.folders import read_records
from cmbench.records.record import Record
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep

FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"})
#: Two phases, dropout, checkpoints every three steps: all that a resume must restore.
REQUEST = SweepRequest(("toy",), "toys", recipe="staged", overrides=("network.dropout=0.2",))


class Counter:
    """Counts events that touch the workspace and ends this process before number ``fatal``."""

    def __init__(self, folder: Path, fatal: int | None) -> None:
        self.folder, self.fatal, self.seen = str(folder), fatal, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(self.folder):
            self.seen += 1
            if self.seen == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def sweep(folder: Path) -> None:
    """Do what ``cmbench run`` does."""
    plugins = load_plugins()
    add_toys(plugins)
    context = Context(plugins, Workspace(folder), device=torch.device("cpu"), threads=1)
    execute(context, plan_sweep(context, REQUEST), Local())


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that must not depend on kills: hashes of weights, metrics, no debris."""
    found = [f for _, f in read_records(folder / "records" / "toys")]
    records = [f for f in found if isinstance(f, Record)]
    weights = sorted(folder.glob("runs/toys/*/weights-*.safetensors"))
    return {
        "weights": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in weights},
        "cells": {
            r.cell: [
                r.status,
                r.training.checkpoint_sha256,
                r.training.images_seen,
                r.training.network_evaluations,
                {n: [m.value, m.detail] for n, m in r.metrics.items()},
                r.artifacts["grid"].sha256,
            ]
            for r in records
        },
        "unreadable": len(found) - len(records),
        "results": len(list(folder.glob("runs/toys/*/result.json"))),
    }


@dataclass(frozen=True)
class Attempt:
    """How one process ended."""

    signal: int
    code: int
    seconds: float


def fork(work: Callable[[], None], kill_after_s: float | None = None) -> Attempt:
    """Run ``work`` in a child, killing it after a while if asked to."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Attempt(ended, os.WEXITSTATUS(status) if not ended else 0, time.monotonic() - began)


def killed_and_finished(folder: Path, moments: Iterator[tuple[str, float]]) -> int:
    """Start the sweep, killed at each moment in turn, then once more; return how many kills hit."""
    hits = 0
    for kind, moment in moments:
        if kind == "event":
            attempt = fork(lambda m=moment: (Counter(folder, int(m)), sweep(folder)))
        else:
            attempt = fork(lambda: sweep(folder), moment)
        if attempt.signal == 0:
            assert attempt.code == 0, "a resumed sweep failed"
        hits += attempt.signal == signal.SIGKILL
    last = fork(lambda: sweep(folder))
    assert last.signal == last.code == 0, "the last sweep failed"
    return hits


def main(folder: Path, seed: int, kills: int) -> None:
    """Print the outcome left alone, and of each killed sweep that differs."""
    torch.set_num_threads(1)
    sweep(folder / "warm-up")
    pipe_in, pipe_out = os.pipe()

    def counted() -> None:
        counter = Counter(folder / "alone", None)
        sweep(folder / "alone")
        os.write(pipe_out, str(counter.seen).encode())

    alone = fork(counted)
    events = int(os.read(pipe_in, 20))
    expected = outcome(folder / "alone")
    source = random.Random(seed)
    hits, different = 0, []
    for case in range(kills):
        moments = [
            ("time", source.uniform(0, alone.seconds))
            if source.random() < 0.3
            else ("event", float(source.randint(1, events)))
            for _ in range(source.randint(1, 3))
        ]
        hits += killed_and_finished(folder / str(case), iter(moments))
        found = outcome(folder / str(case))
        if found != expected:
            different.append([moments, found])
    print(
        json.dumps({"events": events, "hits": hits, "expected": expected, "different": different})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
