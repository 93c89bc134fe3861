"""What a check is: a rule of the contract, and a function that looks whether a method keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cmbench.testing.case import Subject

#: The section of ``docs/plugins.md`` that lists the checks by name.
SECTION = 'docs/plugins.md, "What is checked"'


class CheckFailure(Exception):
    """A method breaks the rule: what was found, and what to change."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")


@dataclass(frozen=True)
class ContractCheck:
    """A rule by name. ``body`` raises what is wrong; it returns why it does not apply, or None."""

    name: str
    body: Callable[[Subject], str | None]


@dataclass(frozen=True)
class CheckResult:
    """What a check found: ``problem`` or ``skipped`` say why it did not pass."""

    method: str
    check: str
    dataset: str = ""
    problem: str = ""
    skipped: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line with the method, the check and the line of the contract."""
        on = f" on {self.dataset}" if self.dataset else ""
        who = f"method {self.method!r}{on}, {self.check}" if self.method else self.check
        return f"{who}: {self.problem} ({SECTION}, {self.check!r})"
