"""The loader: strict with names, gentle with failures."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmbench.errors import PluginError, UserError, unknown_name
from cmbench.plugin import hookimpl, hookspecs
from cmbench.plugin.discovery import PluginInfo, installed_plugins
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.plugin.specs import DatasetSpec, MethodSpec, MetricSpec, spec_problem

GOOD = MethodSpec("good", "somewhere:Good", "Good")
SET = DatasetSpec("set", "somewhere:build", "Set", (1, 8, 8), 10, "pixels", ("fd",), (1, 2), 100)


def entry(name: str, module: str, distribution: str = "dist") -> PluginInfo:
    return PluginInfo(name, module, distribution, "1.0")


@pytest.fixture
def module() -> Iterator[Callable[..., str]]:
    """Make importable modules out of functions; they are gone afterwards."""
    made: list[str] = []

    def make(**hooks: Any) -> str:
        name = f"_test_plugin_{len(made)}"
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(hooks)
        made.append(name)
        return name

    yield make
    for name in made:
        del sys.modules[name]


def methods(*specs: Any) -> Callable[[], Any]:
    @hookimpl
    def cmbench_register_methods() -> Any:
        return list(specs)

    return cmbench_register_methods


def loaded(*entries: PluginInfo) -> PluginManager:
    manager = PluginManager()
    manager.load(entries)
    return manager


def error_of(manager: PluginManager, index: int = -1) -> str:
    info = manager.plugins[index]
    assert info.status == "failed"
    assert "\n" not in info.error
    return info.error


# ---- the installed ones -------------------------------------------------------------------------


def test_the_builtin_plugin_comes_through_the_public_group(plugins: PluginManager) -> None:
    first = installed_plugins()[0]
    assert (first.distribution, first.module) == ("cmbench", "cmbench_plugins")
    assert plugins.plugins[0].status == "ok"
    assert plugins.plugins[0].error == ""
    assert {o.distribution for o in plugins.methods.owners.values()} == {"cmbench"}


def test_every_builtin_spec_can_be_loaded(plugins: PluginManager) -> None:
    assert "local" in plugins.executors.specs
    for registry in (plugins.methods, plugins.networks, plugins.executors):
        for name in registry.specs:
            assert callable(registry.load(name)), name


def test_every_builtin_name_is_used_once_and_exists(plugins: PluginManager) -> None:
    for spec in plugins.datasets.specs.values():
        if spec.embedded:
            assert spec.extractor in plugins.extractors.specs
            assert set(spec.metrics) <= plugins.metrics.specs.keys()


def test_the_default_method_is_the_one_that_is_marked(plugins: PluginManager) -> None:
    marked = [name for name, spec in plugins.methods.specs.items() if spec.default]
    assert marked == [plugins.default_method]


# ---- failures stay where they are ---------------------------------------------------------------


def test_a_failure_leaves_the_others(module: Callable[..., str]) -> None:
    broken = module(cmbench_register_methods=methods(GOOD, 3))
    good = module(cmbench_register_methods=methods(GOOD))
    manager = loaded(
        entry("gone", "no_such_module"),
        entry("attribute", f"{good}:missing"),
        entry("broken", broken),
        entry("fine", good),
    )
    assert [p.status for p in manager.plugins] == ["failed", "failed", "failed", "ok"]
    assert error_of(manager, 0) == (
        "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert error_of(manager, 1).startswith("cannot be imported: AttributeError: module ")
    assert error_of(manager, 2) == (
        "plugin 'broken': cmbench_register_methods returned int; allowed: a list of MethodSpec"
    )
    assert list(manager.methods.specs) == ["good"], "nothing of the broken one is left"
    assert manager.methods.owners["good"].name == "fine"
    assert not manager.pluggy.has_plugin("broken")


@pytest.mark.parametrize(
    ("raises", "line"),
    [
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
        (SystemExit("left"), "SystemExit: left"),
        (KeyError(), "KeyError: "),
    ],
)
def test_a_hook_that_raises(module: Callable[..., str], raises: BaseException, line: str) -> None:
    @hookimpl
    def cmbench_register_methods() -> Any:
        raise raises

    name = module(cmbench_register_methods=cmbench_register_methods)
    assert error_of(loaded(entry("p", name))) == line.strip()


def test_a_user_who_interrupts_the_import_is_obeyed(module: Callable[..., str]) -> None:
    @hookimpl
    def cmbench_register_methods() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loaded(entry("p", module(cmbench_register_methods=cmbench_register_methods)))


@pytest.mark.parametrize("decorate", [hookimpl, lambda f: f])
def test_a_misspelt_hook_is_named_with_the_right_one(
    module: Callable[..., str], decorate: Any
) -> None:
    def cmbench_register_method() -> Any:
        return [GOOD]

    name = module(cmbench_register_method=decorate(cmbench_register_method))
    error = error_of(loaded(entry("p", name)))
    assert error.startswith("hook check: unknown hook 'cmbench_register_method'; allowed: cmbench_")
    assert error.endswith("did you mean 'cmbench_register_methods'?")


def test_a_hook_like_no_other_says_where_to_look(module: Callable[..., str]) -> None:
    name = module(cmbench_zzz=lambda: None)
    assert error_of(loaded(entry("p", name))).endswith("see cmbench.plugin.hookspecs")


def test_an_argument_that_a_hook_does_not_have(module: Callable[..., str]) -> None:
    @hookimpl
    def cmbench_cell_finished(record: Any, colour: str) -> None: ...

    error = error_of(loaded(entry("p", module(cmbench_cell_finished=cmbench_cell_finished))))
    assert "cmbench_cell_finished" in error
    assert "colour" in error


def test_two_plugins_that_claim_one_name_are_both_named(module: Callable[..., str]) -> None:
    first = module(cmbench_register_methods=methods(GOOD))
    second = module(cmbench_register_methods=methods(GOOD._replace(name="mine"), GOOD))
    manager = loaded(entry("a", first, "dist-a"), entry("b", second, "dist-b"))
    assert error_of(manager) == (
        "plugin 'b' (dist-b 1.0): method name 'good' is already taken by plugin 'a' (dist-a 1.0); "
        "uninstall one of the two or ask its author for another name"
    )
    assert error_of(manager, 0).startswith(
        "plugin 'a' (dist-a 1.0): method name 'good' is already taken by plugin 'b' (dist-b 1.0); "
    )
    assert list(manager.methods.specs) == []
    assert not manager.pluggy.get_plugins(), "nor do they observe anything"


def test_a_third_claimant_is_refused_like_the_two_before(module: Callable[..., str]) -> None:
    modules = [module(cmbench_register_methods=methods(GOOD)) for _ in range(3)]
    manager = loaded(*(entry(f"p{i}", m, f"dist-{i}") for i, m in enumerate(modules)))
    assert [info.status for info in manager.plugins] == ["failed"] * 3
    assert "method name 'good' is already taken by plugin 'p0'" in error_of(manager)
    assert list(manager.methods.specs) == []


def test_a_built_in_plugin_keeps_its_names(module: Callable[..., str]) -> None:
    ours = module(cmbench_register_methods=methods(GOOD))
    theirs = module(cmbench_register_methods=methods(GOOD._replace(title="Other")))
    manager = loaded(entry("a", ours, "cmbench"), entry("b", theirs, "dist-b"))
    assert [info.status for info in manager.plugins] == ["ok", "failed"]
    assert manager.methods.specs["good"].title == "Good"


def test_a_name_twice_in_one_plugin(module: Callable[..., str]) -> None:
    manager = loaded(entry("a", module(cmbench_register_methods=methods(GOOD, GOOD))))
    assert "method name 'good' is already taken by plugin 'a'" in error_of(manager)
    assert list(manager.methods.specs) == []


def test_importing_torch_at_registration_is_said_with_what_it_costs(
    module: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @hookimpl
    def cmbench_register_methods() -> Any:
        sys.modules["torch"] = torch
        return [GOOD]

    torch = sys.modules["torch"]
    heavy = module(cmbench_register_methods=cmbench_register_methods)
    lean = module(cmbench_register_methods=methods(GOOD._replace(name="lean")))
    monkeypatch.delitem(sys.modules, "torch")
    manager = loaded(entry("lean", lean), entry("heavy", heavy))
    first, second = manager.plugins
    assert (first.warning, first.status, second.status) == ("", "ok", "ok")
    assert re.fullmatch(
        r"imports torch when it is registered, in \d+\.\d s at every start of cmbench; import it "
        "in the modules that factories name",
        second.warning,
    )


def test_two_entry_points_of_one_name(module: Callable[..., str]) -> None:
    first = module(cmbench_register_methods=methods(GOOD))
    manager = loaded(entry("a", first, "dist-a"), entry("a", module(), "dist-b"))
    for index, (one, other) in enumerate([("dist-a", "dist-b"), ("dist-b", "dist-a")]):
        assert error_of(manager, index).startswith(
            f"plugin 'a' ({one} 1.0): entry point name 'a' is already taken by plugin 'a' ({other} "
        )
    assert list(manager.methods.specs) == []


def test_strict_mode_is_fatal_and_names_all(
    module: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [entry("gone", "no_such_module"), entry("empty", module(cmbench_zzz=len))]
    for off in ("", "0"):
        monkeypatch.setenv("CMBENCH_STRICT_PLUGINS", off)
        assert len(loaded(*sources).plugins) == 2
    monkeypatch.setenv("CMBENCH_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError) as raised:
        loaded(*sources)
    text = str(raised.value)
    assert text.startswith(
        "CMBENCH_STRICT_PLUGINS=1: 2 plugin(s) failed: plugin 'gone' (dist 1.0): "
    )
    assert "; plugin 'empty' (dist 1.0): hook check: unknown hook 'cmbench_zzz'" in text


# ---- specs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (GOOD._replace(name="../up"), "name '../up' (allowed: up to 60 letters"),
        (GOOD._replace(name="a,b"), "name 'a,b'"),
        (GOOD._replace(name=""), "name ''"),
        (GOOD._replace(name="x" * 61), "name 'xxx"),
        (GOOD._replace(name=3), "name 3"),
        (GOOD._replace(title=None), "'good': title None"),
        (GOOD._replace(cost=3), "'good': cost 3 (allowed: a TrainingCost or None)"),
        (GOOD._replace(factory="nowhere"), "'good': factory 'nowhere' (allowed: 'package.module:"),
        (GOOD._replace(factory=dict), "'good': factory <class 'dict'>"),
        (GOOD._replace(recipes="good.toml"), "'good': recipes 'good.toml' (allowed: a pathlib"),
        (SET._replace(name="base"), "'base': the name is reserved"),
        (SET._replace(data_shape=(8, 8)), "'set': data_shape (8, 8)"),
        (SET._replace(data_shape=(1, 8, 0)), "'set': data_shape (1, 8, 0)"),
        (SET._replace(nfe=()), "'set': nfe ()"),
        (SET._replace(nfe=(0, 1)), "'set': nfe (0, 1)"),
        (SET._replace(metrics=()), "'set': metrics ()"),
        (SET._replace(metrics="fd"), "'set': metrics 'fd'"),
        (SET._replace(num_samples=0), "'set': num_samples and num_classes must be counts"),
        (SET._replace(num_classes=-1), "'set': num_samples and num_classes must be counts"),
        (SET._replace(sigma_data=0.0), "'set': sigma_data 0.0 (allowed: above 0)"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec: Any, found: str) -> None:
    assert spec_problem(spec).startswith(found)


def test_right_specs_are_right(plugins: PluginManager) -> None:
    for registry in (plugins.methods, plugins.datasets, plugins.networks, plugins.metrics):
        for spec in registry.specs.values():
            assert spec_problem(spec) == ""
    assert spec_problem(GOOD._replace(recipes=Path("good.toml"))) == ""


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ([GOOD._replace(name="no/pe")], "cmbench_register_methods returned MethodSpec with a bad "),
        ([SET], "cmbench_register_methods returned DatasetSpec; allowed: a list of MethodSpec"),
        (None, "cmbench_register_methods returned NoneType; allowed: a list of MethodSpec"),
        ({"good": GOOD}, "cmbench_register_methods returned dict; allowed: a list of MethodSpec"),
        ([SET._replace(data_shape=None)], "cmbench_register_methods returned DatasetSpec"),
    ],
)
def test_what_a_hook_returns_is_checked(
    module: Callable[..., str], result: Any, found: str
) -> None:
    @hookimpl
    def cmbench_register_methods() -> Any:
        return result

    name = module(cmbench_register_methods=cmbench_register_methods)
    assert found in error_of(loaded(entry("p", name)))


def test_a_spec_whose_shape_is_no_shape_is_listed(module: Callable[..., str]) -> None:
    @hookimpl
    def cmbench_register_datasets() -> Any:
        return [SET._replace(data_shape=None)]

    name = module(cmbench_register_datasets=cmbench_register_datasets)
    assert "TypeError" in error_of(loaded(entry("p", name)))


def test_a_single_spec_counts_as_a_list(module: Callable[..., str]) -> None:
    @hookimpl
    def cmbench_register_methods() -> Any:
        return GOOD

    manager = loaded(entry("p", module(cmbench_register_methods=cmbench_register_methods)))
    assert list(manager.methods.specs) == ["good"]


def test_names_that_do_not_exist_say_which_do(module: Callable[..., str]) -> None:
    manager = loaded(entry("p", module(cmbench_register_methods=methods(GOOD))))
    with pytest.raises(UserError) as raised:
        manager.methods.get("goood", "who")
    assert str(raised.value) == "who: unknown method 'goood'; allowed: good; did you mean 'good'?"
    with pytest.raises(UserError, match="unknown method 'x'; allowed: good; see `cmbench list"):
        manager.methods.get("x")
    with pytest.raises(UserError, match="unknown dataset 'd'; allowed: none; see `cmbench list"):
        manager.datasets.get("d")


@pytest.mark.parametrize(
    ("factory", "found"),
    [
        ("no_such_module:X", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:nothing", "AttributeError: module 'json' has no attribute 'nothing'"),
    ],
)
def test_a_factory_that_cannot_be_imported_names_plugin_and_distribution(
    module: Callable[..., str], factory: str, found: str
) -> None:
    spec = GOOD._replace(factory=factory)
    manager = loaded(entry("p", module(cmbench_register_methods=methods(spec))))
    with pytest.raises(PluginError) as raised:
        manager.methods.load("good")
    assert str(raised.value) == (
        f"plugin 'p' (dist 1.0): cannot import {factory!r} for method 'good': {found}; "
        "fix or reinstall that distribution"
    )


def test_without_a_default_method_one_must_be_named(module: Callable[..., str]) -> None:
    manager = loaded(entry("p", module(cmbench_register_methods=methods(GOOD))))
    with pytest.raises(UserError, match="no installed plugin has a default method; allowed: "):
        _ = manager.default_method


def test_of_two_defaults_the_first_counts(module: Callable[..., str]) -> None:
    names = [GOOD._replace(name=n, default=True) for n in ("one", "two")]
    manager = loaded(*(entry(n.name, module(cmbench_register_methods=methods(n))) for n in names))
    assert manager.default_method == "one"


# ---- observers and collectors -------------------------------------------------------------------


class Watcher:
    def __init__(self) -> None:
        self.seen: list[int] = []

    @hookimpl
    def cmbench_step_finished(self, nimg: int) -> None:
        self.seen.append(nimg)


class Failing:
    @hookimpl
    def cmbench_step_finished(self, run_id: str) -> None:
        raise ValueError("no\ndisk")

    @hookimpl
    def cmbench_report_columns(self) -> Any:
        raise ValueError("no columns")


def test_observers_take_what_they_name_and_are_reported_once() -> None:
    manager, watcher = PluginManager(), Watcher()
    manager.register(Failing(), PluginInfo("failing", "f", "f-dist", "1"))
    manager.register(watcher, PluginInfo("watcher", "w", "w-dist", "1"))
    said = [manager.notify("cmbench_step_finished", run_id="r", nimg=n, scalars={}) for n in (1, 2)]
    assert said == [
        [
            "plugin 'failing': cmbench_step_finished raised ValueError: no disk "
            "(reported once; the run continues)"
        ],
        [],
    ]
    assert watcher.seen == [1, 2]


def test_a_collector_that_raises_is_listed_and_the_others_are_kept() -> None:
    class Columns:
        @hookimpl
        def cmbench_report_columns(self) -> Any:
            return {"A": "metrics.a"}

    manager = PluginManager()
    info = manager.register(Failing(), PluginInfo("failing", "f", "f-dist", "1"))
    manager.register(Columns(), PluginInfo("columns", "c", "c-dist", "1"))
    assert manager.gather("cmbench_report_columns") == [{"A": "metrics.a"}]
    assert info.status == "failed"
    assert info.error == "cmbench_report_columns raised ValueError: no columns"


def test_a_collector_with_a_wrong_result_is_listed_too() -> None:
    class Charts:
        @hookimpl
        def cmbench_report_columns(self) -> Any:
            return 3

    manager = PluginManager()
    info = manager.register(Charts(), PluginInfo("charts", "c", "c-dist", "1"))
    assert manager.gather("cmbench_report_columns", lambda found: f"returned {found}") == []
    assert (info.status, info.error) == ("failed", "cmbench_report_columns returned 3")


# ---- hook specs ---------------------------------------------------------------------------------


def test_every_hook_documents_its_parameters_and_result() -> None:
    for name, hook in vars(hookspecs.CmbenchHooks).items():
        if not name.startswith("cmbench_"):
            continue
        text = hook.__doc__ or ""
        code = hook.__code__
        for argument in code.co_varnames[1 : code.co_argcount]:
            assert re.search(rf"^\s+{argument}: \S", text, re.MULTILINE), (name, argument)
        if not name.endswith(("_started", "_finished")):
            assert "Returns:" in text, name


def test_loading_twice_gives_two_managers() -> None:
    first, second = load_plugins(), load_plugins()
    first.metrics.add(
        MetricSpec("new", "New", True, ("features",), "new:compute"), first.plugins[0]
    )
    assert "new" not in second.metrics.specs


def test_an_unknown_name_tells_of_plugins_that_failed() -> None:
    manager = loaded(entry("mine", "no_such_module_of_mine"))
    with pytest.raises(UserError) as caught:
        manager.methods.get("my-method")
    assert "plugin 'mine' (dist 1.0) failed: cannot be imported" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("study", "see `cmbench list studies`"),
        ("method", "see `cmbench list methods`"),
        ("quantization rule", "choose one of them"),
    ],
)
def test_only_listings_that_exist_are_named(kind: str, remedy: str) -> None:
    assert str(unknown_name("x", kind, "zzz", ["a"])).endswith(remedy)


def test_listing_plugins_fails_if_one_failed(
    cmbench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cmbench("plugins").code == 0
    bad = [entry("mine", "no_such_module_of_mine")]
    monkeypatch.setattr("cmbench.plugin.manager.installed_plugins", lambda: bad)
    failed = cmbench("plugins")
    assert failed.code == 1
    assert "failed  cannot be imported" in failed.out
