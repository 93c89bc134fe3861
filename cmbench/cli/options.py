"""Options as fields: a verb takes one frozen dataclass, whose fields are its options.

@dataclass(frozen=True, kw_only=True)
class ShowOptions(WorkspaceOptions):
    cell: str = argument()
    as_json: bool = flag("--json", help="Print the whole record.")

@click.command()
@takes(ShowOptions)
def show(options: ShowOptions) -> None: ...
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cmbench.errors import UserError
from cmbench.plugin.specs import MAX_BATCH
from cmbench.sweep.asked import MAX_THREADS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
R = TypeVar("R")
_CLICK = "click"


def option(*names: str, default: Any = None, **settings: Any) -> Any:
    """Return a dataclass field that is a click option of these names and settings."""

    def add(name: str) -> Any:
        return click.option(*names, name, default=default, **settings)

    return field(default=default, metadata={_CLICK: add})


def flag(*names: str, help: str) -> Any:
    """Return a dataclass field that is an option without a value, by default off."""
    return option(*names, default=False, is_flag=True, help=help)


def argument(**settings: Any) -> Any:
    """Return a dataclass field that is a click argument."""
    return field(default=None, metadata={_CLICK: lambda name: click.argument(name, **settings)})


def takes(kind: type[T]) -> Callable[[Callable[[T], R]], Callable[..., R]]:
    """Give a verb the options that are fields of ``kind``, and call it with one ``kind``."""

    def decorate(verb: Callable[[T], R]) -> Callable[..., R]:
        @wraps(verb)
        def call(**values: Any) -> R:
            return verb(kind(**values))

        # Help shows a verb's own options first, then those it shares, so classes from the last.
        order = [name for one in kind.__mro__ for name in get_annotations(one)]
        items = sorted(fields(kind), key=lambda item: order.index(item.name))
        command: Callable[..., R] = call
        for item in reversed(items):
            command = item.metadata[_CLICK](item.name)(command)
        return command

    return decorate


@contextmanager
def told_once() -> Iterator[None]:
    """Let only the first of several processes print an error that all of them meet."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            raise click.exceptions.Exit(error.exit_code) from error
        raise


class WholeNumber(click.IntRange):
    """A whole number in a range; errors call it so."""

    name = "whole number"


class Number(click.FloatRange):
    """A finite number in a range; of NaN, click says that it is in any range."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; fail for NaN and infinity, too."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A text that ``parse(text, option)`` turns into a value; its ``UserError`` is passed on."""

    name = "text"

    def __init__(self, parse: Callable[[str, str], Any]) -> None:
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value."""
        with told_once():
            return self.parse(str(value), param.opts[0] if param is not None else "")


# ---- what verbs share ---------------------------------------------------------------------------

_WORKSPACE: Any = {
    "metavar": "DIR",
    "help": "Folder of runs, records and reports.  [env: CMBENCH_WORKSPACE; default: cmbench-out]",
}
workspace_option = click.option("--workspace", "-w", "workspace_dir", **_WORKSPACE)
overrides_option = click.option(
    "--option", "-o", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a value."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dataclass(frozen=True, kw_only=True)
class WorkspaceOptions:
    """Which workspace."""

    workspace_dir: str | None = option("--workspace", "-w", **_WORKSPACE)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(WorkspaceOptions):
    """Which workspace and device."""

    device: str = option("--device", metavar="DEVICE", default="auto", help="cpu, cuda, cuda:1 …")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions):
    """Where to compute, and whether to print progress."""

    threads: int | None = option(
        "--threads",
        metavar="N",
        type=WholeNumber(min=1, max=MAX_THREADS),
        help="CPU threads.  [default: the number of free cores]",
    )
    quiet: bool = flag("--quiet", "-q", help="Show no progress.")


@dataclass(frozen=True, kw_only=True)
class LongOptions(ComputeOptions):
    """Work that can be stopped and continued."""

    time_limit_s: float | None = option(
        "--time-limit",
        metavar="SECONDS",
        type=Number(min=1),
        help="Stop after this time with exit code 75; a training saves a checkpoint first.",
    )


@dataclass(frozen=True, kw_only=True)
class SweepOptions(LongOptions):
    """What is trained and how it is sampled."""

    recipe: str | None = option(
        "--recipe",
        "-r",
        metavar="R",
        help="Recipe, or FILE.toml:NAME.  [default: demo, else paper]",
    )
    checkpoint: str | None = option(
        "--checkpoint",
        metavar="NAME",
        help="Take this imported checkpoint instead of training, see `cmbench import`.",
    )
    overrides: tuple[str, ...] = option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        multiple=True,
        default=(),
        help="Override a hyper-parameter, for example -o optimizer.lr=1e-4 (in `run`, several: "
        "1e-3,3e-3).",
    )
    samples: int | None = option(
        "--samples",
        metavar="N",
        type=WholeNumber(min=2),
        help="Images per cell or schedule.  [default: the dataset's protocol]",
    )
    batch_size: int = option(
        "--batch-size",
        metavar="N",
        type=WholeNumber(min=1, max=MAX_BATCH),
        default=500,
        help="Images per sampling batch; results do not depend on it.",
    )
    ema: str | None = option(
        "--ema", metavar="LABEL", help="Which average of the weights to sample."
    )
