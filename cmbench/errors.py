"""What cmbench tells a user when something cannot be done.

Every error that a user's input can cause is a :class:`UserError`: one line that names who failed,
the value received, what was allowed, and the next action. The CLI prints that line and exits with
the class's exit code; a traceback appears only under ``--debug``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

EXIT_OK = 0
#: Some cells failed, and their records say why; everything else is done.
EXIT_CELLS_FAILED = 1
#: The command could not be understood or its input is bad (click's own code for usage errors too).
EXIT_USAGE = 2
#: Training or sampling broke down (non-finite loss, out of memory).
EXIT_BROKEN_RUN = 3
#: Something needed is missing: a file or folder to read, data, weights, a GPU.
EXIT_MISSING = 4
#: Another process holds the run.
EXIT_BUSY = 5
#: Stopped by a signal or a time limit after saving a checkpoint: start the same command again.
EXIT_REQUEUE = 75


#: What `cmbench list` lists.
LISTED = frozenset(
    {"methods", "datasets", "metrics", "networks", "recipes", "extractors", "executors", "studies"}
)


class UserError(Exception):
    """A failure that the user can fix: ``who: what (allowed); remedy`` in one line."""

    exit_code = EXIT_USAGE

    def __init__(self, who: str, problem: str, *, allowed: str = "", remedy: str = "") -> None:
        self.who, self.problem, self.allowed, self.remedy = who, problem, allowed, remedy
        parts = [f"{who}: {problem}"]
        if allowed:
            parts.append(f"allowed: {allowed}")
        if remedy:
            parts.append(remedy)
        super().__init__("; ".join(" ".join(part.split()) for part in parts))

    def __reduce__(self) -> tuple[Callable[[], UserError], tuple[()]]:
        """Pickle by the arguments, so that a worker process can raise it."""
        build = partial(
            type(self), self.who, self.problem, allowed=self.allowed, remedy=self.remedy
        )
        return build, ()


class MissingError(UserError):
    """Data, weights or hardware that a run needs is not here."""

    exit_code = EXIT_MISSING


class BrokenRunError(UserError):
    """Training or sampling broke down; the last good checkpoint is kept."""

    exit_code = EXIT_BROKEN_RUN


class NonFiniteError(BrokenRunError):
    """A loss, gradient or image is NaN or infinite."""


class BusyError(UserError):
    """Another process works on the same thing."""

    exit_code = EXIT_BUSY


class InterruptedRunError(UserError):
    """A signal or a time limit stopped the run after a checkpoint was written."""

    exit_code = EXIT_REQUEUE


class PluginError(UserError):
    """A plugin broke its contract."""


class Declined(Exception):
    """A method declines a case (an NFE, a dataset) and says why; the reason becomes the record."""


def one_line(text: str, limit: int = 500) -> str:
    """Return ``text`` without line breaks, cut at ``limit`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def described(error: BaseException, limit: int = 300) -> str:
    """Return an error's class, and its text in one line of at most ``limit`` characters."""
    return f"{type(error).__name__}: {one_line(str(error), limit)}"


@contextmanager
def blaming(
    who: str,
    what: str,
    *,
    allowed: str = "",
    remedy: str = "",
    passing: type[Exception] = UserError,
) -> Iterator[None]:
    """Turn what a plugin's code raises in the block into a :class:`PluginError`.

    ``what`` begins the problem (``raised``); a :class:`UserError` and ``passing`` pass through.
    """
    try:
        yield
    except (UserError, passing):
        raise
    except Exception as error:
        problem = f"{what} {described(error)}"
        raise PluginError(who, problem, allowed=allowed, remedy=remedy) from error


def first_names(names: Sequence[str], most: int) -> str:
    """Return the first ``most`` names in one line, with ``…`` where there are more."""
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])


def unknown_name(
    who: str, kind: str, name: str, known: Iterable[str], *, see: str = ""
) -> UserError:
    """Return the error for a name that does not exist, with the nearest one that does.

    ``see`` says where to look if nothing is near; by default the listing of that kind, if it
    has one.
    """
    import difflib  # only on this path: keeps start-up lean

    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    kinds = {"study": "studies"}.get(kind, f"{kind}s")
    other = see or (f"see `cmbench list {kinds}`" if kinds in LISTED else "choose one of them")
    remedy = f"did you mean {close[0]!r}?" if close else other
    return UserError(
        who, f"unknown {kind} {name!r}", allowed=", ".join(names) or "none", remedy=remedy
    )
