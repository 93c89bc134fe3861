"""What a failure of somebody else's code looks like in a record: one line that names the failer."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from cmbench.errors import described, one_line

#: How the lines of torch's compiler begin, whatever it was that went wrong inside.
_OF_THE_COMPILER = ("InductorError", "BackendCompilerFailed", "InternalTorchDynamoError")


def method_failure(method: str, stage: str, error: BaseException) -> str:
    """Return the line for an exception that escaped from a method while it did ``stage``."""
    where = where_raised(error)
    line = f"method {method!r} failed while {stage}: {described(error, 500)}"
    return line + (f" ({where})" if where else "")


def compiler_failure(method: str, stage: str, what: str) -> str | None:
    """Return the line for a failure of ``torch.compile``, which is not the method's; else None.

    ``what`` is the error's line, beginning with the name of its class.
    """
    if not what.startswith(_OF_THE_COMPILER):
        return None
    first = one_line(what.partition("Set TORCHDYNAMO_VERBOSE")[0])
    return (
        f"torch.compile failed while {stage} {method!r} ({first}); add --no-compile, which changes "
        "speed and rounding only, or install what it lacks, usually a C++ compiler"
    )


def where_raised(error: BaseException) -> str:
    """Return ``file.py:line`` where somebody else's code last was, by the file's name only.

    Frames of the harness and of torch tell a plugin's author nothing.
    """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(Path(frame.filename).resolve(), frame.lineno) for frame in frames]
    loaded = [sys.modules[name].__file__ for name in ("cmbench", "torch") if name in sys.modules]
    ours = [Path(file).resolve().parent for file in loaded if file]
    theirs = [p for p in lines if not any(p[0].is_relative_to(own) for own in ours)]
    return f"{theirs[-1][0].name}:{theirs[-1][1]}" if theirs else ""
