"""The kit for authors of plugins: what a method must satisfy, as checks that name what to change.

An author's test file::

    from cmbench.testing import method_tests

    test_my_method = method_tests("my-method")

``cmbench check my-method`` makes the same checks. They are listed in ``docs/plugins.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmbench.plugin.manager import PluginManager

__all__ = ["method_tests"]


def method_tests(
    *methods: str, dataset: str | None = None, plugins: PluginManager | None = None
) -> Callable[..., None]:
    """Return a pytest test that makes every check of each method, one test per check.

    Args:
        methods: names of installed methods; all of them by default.
        dataset: name of the dataset whose recipe is checked; by default the smallest one for which
            the method has a recipe, and the smallest one with pictures.
        plugins: where the methods are registered; by default the installed plugins.

    Raises:
        UserError: a method is unknown.
    """
    import pytest

    from cmbench.plugin.manager import load_plugins
    from cmbench.testing.suite import CHECKS, ContractCheck, Subject, make_check

    manager = plugins or load_plugins()
    names = methods or tuple(sorted(manager.methods.specs))
    subjects = [s for name in names for s in Subject.all_of(manager, name, dataset)]

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name.replace(" ", "-"))
    @pytest.mark.parametrize("subject", subjects, ids=lambda s: f"{s.name}-{s.dataset}")
    def test_method(subject: Subject, check: ContractCheck) -> None:
        found = make_check(subject, check)
        if found.problem:
            pytest.fail(str(found), pytrace=False)
        if found.skipped:
            pytest.skip(found.skipped)

    return test_method
