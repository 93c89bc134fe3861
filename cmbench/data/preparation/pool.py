"""Blocks in worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from cmbench.data.preparation.decode import (
    BlockDone,
    BlockWork,
    BlockWriter,
    DecodingJob,
    run_block,
    start_worker,
    warm_up,
)
from cmbench.errors import UserError

#: Blocks that wait, per worker.
_QUEUED = 3


class Workers:
    """``count`` worker processes (the free cores by default); one or less means none.

    :meth:`start` may be called before the work is known: starting takes as long as reading a large
    table of contents.
    """

    def __init__(self, count: int | None) -> None:
        self.count = count if count is not None else len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self) -> ProcessPoolExecutor:
        """Start the processes (spawned: a fork would copy torch's threads)."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count, mp_context=get_context("spawn"), initializer=start_worker
            )
            for _ in range(self.count):  # a process is started for each, while none is idle
                self._pool.submit(warm_up)
        return self._pool

    def run(self, job: DecodingJob, works: Iterator[BlockWork]) -> Iterator[BlockDone]:
        """Yield the blocks as they get done, in no order."""
        if self.count <= 1:
            yield from run_serially(job, works)
            return
        pool = self.start()
        waiting: set[Future[BlockDone]] = set()
        try:
            while True:
                while len(waiting) < _QUEUED * self.count:
                    work = next(works, None)
                    if work is None:
                        break
                    waiting.add(pool.submit(run_block, job, work))
                if not waiting:
                    return
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "cmbench prepare",
                "a worker process was killed (out of memory?)",
                remedy="run the same command again to resume, with fewer --workers",
            ) from None


def run_serially(job: DecodingJob, works: Iterator[BlockWork]) -> Iterator[BlockDone]:
    """Do the blocks in this process."""
    writer = BlockWriter(job)
    try:
        for work in works:
            yield writer.run(work)
    finally:
        writer.close()
