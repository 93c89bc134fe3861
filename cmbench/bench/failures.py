"""What a failure of somebody else's code looks like in a record: one line that names the failer."""

from __future__ import annotations


def one_line(text: str, limit: int = 500) -> str:
    """Return ``text`` without line breaks, cut at ``limit`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def method_failure(method: str, stage: str, error: BaseException) -> str:
    """Return the line for an exception that escaped from a method while it did ``stage``."""
    return f"method {method!r} failed while {stage}: {type(error).__name__}: {one_line(str(error))}"
