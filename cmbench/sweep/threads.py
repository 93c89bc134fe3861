"""How many CPU threads torch uses.

Two torch processes with two OpenMP threads each on two cores run 50 to 100 times slower than with
one thread each (measured), because spinning threads wait for cores that are in use. So
there are as many threads as free cores. Their number is recorded with every run and kept when it
resumes: sums over another number of threads round differently.
"""

from __future__ import annotations

import os
from pathlib import Path


def available_cores() -> int:
    """Return the cores this process may use (affinity and cgroup quota)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def choose_threads() -> int:
    """Return the threads for a new run: ``OMP_NUM_THREADS``, or the number of free cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = available_cores()
    try:
        busy = int(os.getloadavg()[0] + 0.25)
    except OSError:
        busy = 0
    return max(1, cores - busy)


def resumed_threads(before: int, now: int, *, same_processes: bool) -> int:
    """Return the threads of a resumed run: as many as before, for a result equal bit for bit.

    With another number of processes the result differs in rounding anyway, and the old number may
    be too large or too small for each of them. No more threads are kept than there are cores.
    """
    return before if same_processes and before <= max(available_cores(), now) else now


def use_threads(count: int) -> None:
    """Make torch use ``count`` threads."""
    import torch  # heavy: only where tensors are needed

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
