"""Peak memory since a moment, instead of since the process began."""

from __future__ import annotations

from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def reset_peak_memory(device: torch.device) -> bool:
    """Forget the peak so far; return whether that is possible here (on the CPU: Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROCESS / "clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    except OSError:
        return False
    return True


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak: allocated on a GPU, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None
