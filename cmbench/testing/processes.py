"""Child processes of a check: forked, because a method may be known to this process only."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from cmbench.errors import described
from cmbench.testing.check import CheckFailure
from cmbench.training.distributed import World, joined
from cmbench.training.launch import Launch

#: How long a child may take, s.
PATIENCE_S = 120


def why_no_children() -> str | None:
    """Return why this process cannot fork, or None."""
    if not hasattr(os, "fork"):
        return "this system cannot fork a process"
    if torch.cuda.is_available():  # autograd has threads then, which do not survive a fork
        return (
            "a process that sees a GPU cannot be forked; set CUDA_VISIBLE_DEVICES= for this check"
        )
    return None


@contextmanager
def children(work: Callable[[int, Connection], None], count: int) -> Iterator[list[Connection]]:
    """Run ``work(rank, pipe)`` in ``count`` children for the block; they have ended after it."""
    fork, pipes, processes = get_context("fork"), [], []
    for rank in range(count):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=work, args=(rank, there)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        yield pipes
    finally:
        for process in processes:
            process.join(PATIENCE_S)
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def in_two_processes(work: Callable[[World], Any]) -> list[Any]:
    """Return what ``work`` returns in each of two processes that train together over gloo.

    Raises:
        CheckFailure: it raises in one of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int, pipe: Connection) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        try:
            with joined(Launch(rank, 2, rank, 2), torch.device("cpu")) as world:
                pipe.send((work(world), ""))
        except BaseException as error:
            pipe.send((None, described(error)))

    found = []
    with children(child, 2) as pipes:
        for pipe in pipes:
            result, problem = pipe.recv() if pipe.poll(PATIENCE_S) else (None, "no answer")
            if problem:
                raise CheckFailure(
                    f"fails in two processes: {problem}",
                    "leave communication between processes to the harness",
                )
            found.append(result)
    return found
