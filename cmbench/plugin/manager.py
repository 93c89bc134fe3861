"""The loader of plugins: strict with names, tolerant of failures.

pluggy's own ``load_setuptools_entrypoints`` gives up at the first plugin that cannot be imported,
drops a second entry point of the same name silently, leaves half-registered hooks behind, and loses
every plugin's results when one of them raises. So entry points are iterated here, each plugin is
validated before it is registered, and registration hooks are called plugin by plugin. A plugin that
fails is listed with its error and its distribution; everything else works.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import pluggy

from cmbench.errors import PluginError, UserError, blaming, described, unknown_name
from cmbench.plugin import hookspecs
from cmbench.plugin.discovery import PluginInfo, installed_plugins
from cmbench.plugin.specs import (
    DatasetSpec,
    ExecutorSpec,
    ExtractorSpec,
    MethodSpec,
    MetricSpec,
    NetworkSpec,
    Spec,
    StudySpec,
    load_object,
    spec_problem,
)

STRICT_VARIABLE = "CMBENCH_STRICT_PLUGINS"

S = TypeVar("S", bound=Spec)


class NameTakenError(PluginError):
    """Two plugins claim one name; ``other`` is the one that did so first."""

    def __init__(self, name: str, owner: PluginInfo, other: PluginInfo) -> None:
        self.name, self.owner, self.other = name, owner, other
        super().__init__(
            str(owner),
            f"{name} is already taken by {other}",
            remedy="uninstall one of the two or ask its author for another name",
        )


@dataclass
class Registry(Generic[S]):
    """The specs of one kind, by name, each with the plugin that registered it."""

    kind: str
    specs: dict[str, S] = field(default_factory=dict)
    owners: dict[str, PluginInfo] = field(default_factory=dict)
    #: all plugins: a name may be unknown because its plugin failed
    plugins: list[PluginInfo] = field(default_factory=list)
    #: the first plugin that claimed each name, also of plugins that were refused since
    claims: dict[str, PluginInfo] = field(default_factory=dict)

    def add(self, spec: S, owner: PluginInfo) -> None:
        """Add a spec.

        Raises:
            NameTakenError: another plugin claimed the name before, or this one did.
        """
        other = self.claims.setdefault(spec.name, owner)
        if other is not owner or spec.name in self.specs:
            raise NameTakenError(f"{self.kind} name {spec.name!r}", owner, other)
        self.specs[spec.name] = spec
        self.owners[spec.name] = owner

    def get(self, name: str, who: str = "cmbench") -> S:
        """Return the spec of that name; raise ``UserError`` with the known names otherwise."""
        if name not in self.specs:
            raise self._unknown(name, who)
        return self.specs[name]

    def _unknown(self, name: str, who: str) -> UserError:
        error = unknown_name(who, self.kind, name, self.specs)
        failed = [f"{i} failed: {i.error}" for i in self.plugins if i.status != "ok"]
        if not failed:
            return error
        remedy = f"{error.remedy}, or fix its plugin if it is one of these: {'; '.join(failed)}"
        return UserError(who, error.problem, allowed=error.allowed, remedy=remedy)

    def load(self, name: str) -> Callable[..., Any]:
        """Import and return what the spec's factory points at."""
        spec = self.get(name)
        owner = self.owners[name]
        factory: str = getattr(spec, "factory", "")
        what = f"cannot import {factory!r} for {self.kind} {name!r}:"
        with blaming(str(owner), what, remedy="fix or reinstall that distribution"):
            return load_object(factory)


_REGISTRATION: dict[str, tuple[str, type[Any]]] = {
    "cmbench_register_methods": ("methods", MethodSpec),
    "cmbench_register_datasets": ("datasets", DatasetSpec),
    "cmbench_register_networks": ("networks", NetworkSpec),
    "cmbench_register_extractors": ("extractors", ExtractorSpec),
    "cmbench_register_metrics": ("metrics", MetricSpec),
    "cmbench_register_executors": ("executors", ExecutorSpec),
    "cmbench_register_studies": ("studies", StudySpec),
}


class PluginManager:
    """Everything that plugins register, in one object that is passed around (no global state)."""

    def __init__(self) -> None:
        self.pluggy = pluggy.PluginManager("cmbench")
        self.pluggy.add_hookspecs(hookspecs.CmbenchHooks)
        self.plugins: list[PluginInfo] = []
        self.methods: Registry[MethodSpec] = Registry("method", plugins=self.plugins)
        self.datasets: Registry[DatasetSpec] = Registry("dataset", plugins=self.plugins)
        self.networks: Registry[NetworkSpec] = Registry("network", plugins=self.plugins)
        self.extractors: Registry[ExtractorSpec] = Registry("extractor", plugins=self.plugins)
        self.metrics: Registry[MetricSpec] = Registry("metric", plugins=self.plugins)
        self.executors: Registry[ExecutorSpec] = Registry("executor", plugins=self.plugins)
        self.studies: Registry[StudySpec] = Registry("study", plugins=self.plugins)
        self._warned_observers: set[str] = set()

    # ---- loading -------------------------------------------------------------------------------

    def load(self, found: Iterable[PluginInfo]) -> None:
        """Load every entry point; failures are kept in :attr:`plugins` (fatal in strict mode)."""
        for info in found:
            self.load_one(replace(info))
        failures = self.failed
        if failures and os.environ.get(STRICT_VARIABLE, "") not in ("", "0"):
            lines = "; ".join(f"{i}: {i.error}" for i in failures)
            raise PluginError(
                f"{STRICT_VARIABLE}=1",
                f"{len(failures)} plugin(s) failed: {lines}",
                remedy="fix or uninstall them, or unset the variable to run without them",
            )

    def load_one(self, info: PluginInfo) -> PluginInfo:
        """Import, validate and register one entry point."""
        self.plugins.append(info)
        clash = [i for i in self.plugins[:-1] if i.name == info.name]
        if clash:
            taken = NameTakenError(f"entry point name {info.name!r}", info, clash[0])
            return self._refuse_both(taken)
        began, lean = time.perf_counter(), "torch" not in sys.modules
        try:
            plugin = info.load()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return self._fail(info, f"cannot be imported: {described(error)}")
        self.register(plugin, info)
        if lean and "torch" in sys.modules:
            info.warning = (
                f"imports torch when it is registered, in {time.perf_counter() - began:.1f} s at"
                " every start of cmbench; import it in the modules that factories name"
            )
        return info

    def register(self, plugin: object, info: PluginInfo) -> PluginInfo:
        """Validate ``plugin`` in a scratch manager, then register it and collect its specs."""
        if info not in self.plugins:
            self.plugins.append(info)
        try:
            info.hooks = _validated_hooks(plugin)
            collected = _collect(plugin, info)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            known = isinstance(error, UserError | pluggy.PluginValidationError)
            return self._fail(info, str(error) if known else described(error))
        self.pluggy.register(plugin, name=info.name)
        try:
            for kind, specs in collected.items():
                registry: Registry[Any] = getattr(self, kind)
                for spec in specs:
                    registry.add(spec, info)
        except NameTakenError as error:
            self._forget(info)
            self._refuse_both(error)
        self._share_recipes()
        return info

    def _share_recipes(self) -> None:
        """Tell every method which datasets bring recipe files."""
        specs = self.datasets.specs.values()
        files = tuple((spec.name, spec.recipes) for spec in specs if spec.recipes is not None)
        for name, method in self.methods.specs.items():
            self.methods.specs[name] = method._replace(dataset_recipes=files)

    def _refuse_both(self, taken: NameTakenError) -> PluginInfo:
        """Refuse both plugins that claim one name; a built-in one keeps it."""
        owner, other = taken.owner, taken.other
        if other.status == "ok" and other is not owner and other.distribution != "cmbench":
            self._forget(other)
            self._fail(other, str(NameTakenError(taken.name, other, owner)))
        return self._fail(owner, str(taken))

    def _forget(self, info: PluginInfo) -> None:
        self.pluggy.unregister(name=info.name)
        for kind, _ in _REGISTRATION.values():
            registry: Registry[Any] = getattr(self, kind)
            for name in [n for n, owner in registry.owners.items() if owner is info]:
                del registry.specs[name], registry.owners[name]

    def _fail(self, info: PluginInfo, error: str) -> PluginInfo:
        info.status, info.error = "failed", " ".join(error.split())
        return info

    @property
    def failed(self) -> list[PluginInfo]:
        """The plugins that failed."""
        return [info for info in self.plugins if info.status != "ok"]

    @property
    def default_method(self) -> str:
        """Name of the method that is run when none is named.

        Raises:
            UserError: if no plugin marks one.
        """
        for name, spec in self.methods.specs.items():
            if spec.default:
                return name
        raise UserError(
            "--method",
            "no installed plugin has a default method",
            allowed=", ".join(sorted(self.methods.specs)) or "none",
            remedy="give a method; see `cmbench plugins` for plugins that failed",
        )

    # ---- observing -----------------------------------------------------------------------------

    def notify(self, hook: str, **arguments: Any) -> list[str]:
        """Call an observer hook plugin by plugin; return one line for each that raised."""
        problems = []
        for implementation in getattr(self.pluggy.hook, hook).get_hookimpls():
            taken = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(**taken)
            except Exception as error:
                key = f"{implementation.plugin_name}:{hook}"
                if key not in self._warned_observers:
                    self._warned_observers.add(key)
                    problems.append(
                        f"plugin {implementation.plugin_name!r}: {hook} raised {described(error)} "
                        "(reported once; the run continues)"
                    )
        return problems

    def gather(
        self, hook: str, problem: Callable[[Any], str] = lambda found: "", **arguments: Any
    ) -> list[Any]:
        """Call a collecting hook plugin by plugin; plugins that raise are left out and listed.

        ``problem`` returns what is wrong with a result, or an empty string; a plugin with a wrong
        result is left out and listed too.
        """
        results = []
        for implementation in getattr(self.pluggy.hook, hook).get_hookimpls():
            taken = {name: arguments[name] for name in implementation.argnames}
            try:
                found = implementation.function(**taken)
                wrong = problem(found)
            except Exception as error:
                wrong = f"raised {described(error)}"
            if not wrong:
                results.append(found)
                continue
            for info in self.plugins:
                if info.name == implementation.plugin_name:
                    self._fail(info, f"{hook} {wrong}")
        return results


def _validated_hooks(plugin: object) -> tuple[str, ...]:
    """Return the hooks that ``plugin`` implements; raise on misspelt names or arguments."""
    scratch = pluggy.PluginManager("cmbench")
    scratch.add_hookspecs(hookspecs.CmbenchHooks)
    scratch.register(plugin)
    known = {n for n in vars(hookspecs.CmbenchHooks) if n.startswith("cmbench_")}
    for name in dir(plugin):
        if name.startswith("cmbench_") and name not in known and callable(getattr(plugin, name)):
            see = "see cmbench.plugin.hookspecs"
            raise unknown_name("hook check", "hook", name, known, see=see)
    scratch.check_pending()
    callers = scratch.get_hookcallers(plugin) or []
    return tuple(sorted(caller.name for caller in callers))


def _collect(plugin: object, info: PluginInfo) -> Mapping[str, list[Spec]]:
    """Call the plugin's registration hooks and check what they return."""
    collected: dict[str, list[Spec]] = {}
    for hook in info.hooks:
        if hook not in _REGISTRATION:
            continue
        kind, spec_type = _REGISTRATION[hook]
        result = getattr(plugin, hook)()
        specs = (
            list(result)
            if isinstance(result, (list, tuple)) and not hasattr(result, "_fields")
            else [result]
        )
        for spec in specs:
            if not isinstance(spec, spec_type):
                raise PluginError(
                    f"plugin {info.name!r}",
                    f"{hook} returned {type(spec).__name__}",
                    allowed=f"a list of {spec_type.__name__}",
                )
            if problem := spec_problem(spec, info.distribution):
                raise PluginError(
                    f"plugin {info.name!r}",
                    f"{hook} returned {spec_type.__name__} with a bad field: {problem}",
                )
        collected[kind] = specs
    return collected


def load_plugins() -> PluginManager:
    """Return a manager with every installed plugin loaded."""
    manager = PluginManager()
    manager.load(installed_plugins())
    return manager
