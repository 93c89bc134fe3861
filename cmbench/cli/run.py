"""``cmbench run``."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.main import WholeNumber, workspace_option
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.seeds import HELD_OUT_FROM

if TYPE_CHECKING:
    from cmbench.plugin.manager import PluginManager
    from cmbench.records.record import Record
    from cmbench.sweep.context import Context
    from cmbench.sweep.sweep import SweepPlan, SweepRequest
    from cmbench.training.distributed import Launch

DEFAULT_DATASET = "digits"
#: What networks can be sampled in.
PRECISIONS = ("fp32", "bf16", "fp16")
#: More seeds in one command are a typing error.
MAX_SEEDS = 1000
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


_LOCAL_FLAGS = frozenset({"-q", "--quiet", "--debug", "--no-report"})


def parse_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Return ``1,2,4`` as numbers; raise ``UserError`` for anything else."""
    if text is None:
        return None
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(option, f"{text!r}", allowed="positive whole numbers, for example 1,2,4")
    return numbers


def parse_seeds(text: str, option: str = "--seeds", *, held_out: bool = False) -> tuple[int, ...]:
    """Return ``3`` as seeds 0, 1, 2 and ``4,7`` or ``3-5`` as they are listed.

    Seeds that are ``held_out`` for `cmbench tune-times` are refused unless they are asked for.
    """
    try:
        if text.isdecimal():
            seeds: tuple[int, ...] | range = range(int(text))
        elif "-" in text:
            first, last = (int(part) for part in text.split("-"))
            seeds = range(first, last + 1)
        else:
            seeds = tuple(dict.fromkeys(int(part) for part in text.split(",") if part))
    except ValueError:
        seeds = ()
    if not 0 < len(seeds) <= MAX_SEEDS or min(seeds) < 0:
        raise UserError(
            option,
            f"{text!r}",
            allowed=f"a count (3), a list (0,2) or a range (3-5), of at most {MAX_SEEDS}",
        )
    if max(seeds) >= HELD_OUT_FROM and not held_out:
        raise UserError(
            option,
            f"{max(seeds)} is held out for `cmbench tune-times`",
            allowed=f"below {HELD_OUT_FROM:,}",
            remedy="choose smaller seeds",
        )
    return tuple(seeds)


def parse_sigmas(text: str | None) -> tuple[float, ...] | None:
    """Return ``80,0.8`` as descending noise levels."""
    if text is None:
        return None
    try:
        sigmas = tuple(float(part) for part in text.split(","))
    except ValueError:
        sigmas = ()
    descending = all(a > b for a, b in pairwise(sigmas))
    if not sigmas or not descending or not all(math.isfinite(s) and s > 0 for s in sigmas):
        raise UserError(
            "--sigmas",
            f"{text!r}",
            allowed="descending positive noise levels, for example 80,0.8; or tuned",
        )
    return sigmas


def parse_precision(text: str) -> str:
    """Return the precision of sampling; raise ``UserError`` for one that does not exist."""
    if text not in PRECISIONS:
        raise UserError("--precision", f"{text!r}", allowed=", ".join(PRECISIONS))
    return text


@contextmanager
def stop_asker(
    time_limit_s: float | None, *, patient: bool = False
) -> Iterator[Callable[[], str | None]]:
    """Give a function that says why to stop: a signal arrived, or the time limit is over.

    A second signal interrupts at once; if ``patient`` it must be SIGINT, because launchers pass on
    the SIGTERM that a cluster also sends to every process itself.
    """
    reasons: list[str] = []

    def on_signal(number: int, frame: Any) -> None:
        if reasons and (number == signal.SIGINT or not patient):
            raise KeyboardInterrupt
        if reasons:
            return
        reasons.append(f"stopped by {signal.Signals(number).name}")

    began = time.monotonic()

    def ask() -> str | None:
        if not reasons and time_limit_s and time.monotonic() - began > time_limit_s:
            reasons.append(f"stopped by the time limit of {time_limit_s:g} s")
        return reasons[0] if reasons else None

    here = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS if here}
    try:
        yield ask
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command()
@click.option(
    "--method",
    "-m",
    "methods",
    metavar="M[,M…]",
    default=None,
    help="Methods, see `cmbench list methods`.  [default: the one marked there]",
)
@click.option(
    "--dataset",
    "-d",
    metavar="D",
    default=DEFAULT_DATASET,
    show_default=True,
    help="Dataset, see `cmbench list datasets`, or folder:PATH or zip:PATH.",
)
@click.option(
    "--recipe",
    "-r",
    metavar="R",
    default=None,
    help="Recipe, or FILE.toml:NAME.  [default: demo, else paper]",
)
@click.option(
    "--checkpoint",
    metavar="NAME",
    default=None,
    help="Sample this imported checkpoint instead of training, see `cmbench import`.",
)
@click.option(
    "--nfe",
    metavar="N[,N…]",
    default=None,
    help="Network evaluations an image.  [default: the dataset's sweep]",
)
@click.option(
    "--seeds",
    metavar="COUNT|LIST",
    default="1",
    show_default=True,
    help="3 means seeds 0, 1, 2; 4,7 and 3-5 are taken as they stand.",
)
@click.option(
    "--option",
    "-o",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a hyper-parameter, for example -o optimizer.lr=1e-4.",
)
@click.option(
    "--samples",
    metavar="N",
    type=WholeNumber(min=2),
    default=None,
    help="Images a cell.  [default: the dataset's protocol]",
)
@click.option(
    "--batch-size",
    metavar="N",
    type=WholeNumber(min=1),
    default=500,
    show_default=True,
    help="Images sampled at a time; no effect on results.",
)
@click.option("--sampler", metavar="NAME", default=None, help="Solver, where a method has several.")
@click.option(
    "--sigmas",
    metavar="S[,S…]",
    default=None,
    help="Noise levels to evaluate at, descending; or `tuned`: those of tune-times.",
)
@click.option(
    "--ema", metavar="LABEL", default=None, help="Which average of the weights to sample."
)
@click.option(
    "--precision",
    metavar="P",
    default="fp32",
    show_default=True,
    help="Sample in fp32, or by autocast in bf16 or fp16: cells of their own.",
)
@click.option("--save-samples", is_flag=True, help="Keep the images as PNG files.")
@click.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"
)
@click.option(
    "--threads",
    metavar="N",
    type=WholeNumber(min=1),
    default=None,
    help="CPU threads.  [default: the cores that are free]",
)
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Compile networks.  [default: on CUDA]"
)
@click.option(
    "--split/--no-split",
    default=None,
    help="Split networks over processes (FSDP2).  "
    "[default: from 1,000,000,000 parameters, on GPUs]",
)
@click.option(
    "--time-limit",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=None,
    help="Save a checkpoint and exit 75 after this long.",
)
@click.option(
    "--executor",
    metavar="NAME",
    default="local",
    show_default=True,
    help="See `cmbench list executors`.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-report", is_flag=True, help="Do not render the report at the end.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@workspace_option
@click.pass_context
def run(ctx: click.Context, /, **options: Any) -> int:
    """Train (or resume, or reuse), sample and measure every cell of a sweep.

    \b
    cmbench run
    cmbench run --method M1,M2 --dataset gmm --nfe 1,2 --seeds 3
    cmbench run --method M1 --recipe demo -o optimizer.lr=1e-4 --dry-run
    """
    from cmbench.plugin.manager import load_plugins

    options["debug"] = bool((ctx.obj or {}).get("debug"))
    plugins = load_plugins()
    try:
        request = make_request(options, plugins)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            return error.exit_code  # every process meets it, rank 0 says it
        raise
    from cmbench.training.distributed import Launch, joined

    launch = Launch.from_environment()
    if options["split"] and launch.size == 1:
        raise UserError(
            "--split",
            "there is one process",
            allowed="several processes",
            remedy="start with torchrun, see docs/clusters.md, or leave it out",
        )
    with stop_asker(options["time_limit"], patient=launch.size > 1) as should_stop:
        context = make_context(options, plugins, should_stop, launch)
        if options["dry_run"] or launch.size == 1:
            return sweep(options, request, context) if launch.rank == 0 else EXIT_OK
        with joined(launch, context.device) as world:
            context.world = world
            context.threads = world.lead(lambda: context.threads)
            return together(options, request, context)


def together(options: dict[str, Any], request: SweepRequest, context: Context) -> int:
    """Run a sweep in one of several processes; what all of them meet is said by the leader only."""
    if context.world.leads:
        return sweep(options, request, context)
    from cmbench.errors import InterruptedRunError
    from cmbench.training.distributed import RELAYED

    try:
        return sweep(options, request, context)
    except UserError as error:
        relayed = RELAYED in getattr(error, "__notes__", ())
        if relayed or isinstance(error, InterruptedRunError):
            return error.exit_code
        raise


def sweep(options: dict[str, Any], request: SweepRequest, context: Context) -> int:
    """Plan, carry out, print; return the exit code."""
    from cmbench.cli.results import print_plan, print_table
    from cmbench.sweep.sweep import execute, plan_sweep

    if context.world.size > 1:
        context.world.lead(lambda: bool(plan_sweep(context, request)))  # bad input: said once
    plan = plan_sweep(context, request)
    for line in plan.refused if context.world.leads else ():
        click.echo(f"error: {line}", err=True)
    warn_of_few(context, request)
    if options["dry_run"]:
        print_plan(context, plan)
        return EXIT_CELLS_FAILED if plan.refused else EXIT_OK
    warn_of_unsaved(context, request, plan)
    executor: Any = context.plugins.executors.load(options["executor"])()
    records = execute(context, request, plan, executor)
    if not context.world.leads:
        return EXIT_OK
    print_table(records, context.dataset_spec(request.dataset).metrics)
    if not options["no_report"]:
        click.echo(f"report: {render_page(context, request)}")
    for (method, reason), count in skipped(records).items():
        click.echo(f"skipped: {count} cell(s) of {method}: {reason}", err=True)
    reasons = Counter(r.reason for r in records if r.status == "failed")
    if any(" failed while " in reason for reason in reasons) and not context.debug:
        click.echo("for the tracebacks of what failed, run again with --debug", err=True)
    for reason, count in reasons.items():
        click.echo(f"error: {count} cell(s) failed: {reason}", err=True)
    return EXIT_CELLS_FAILED if reasons or plan.refused else EXIT_OK


def skipped(records: Sequence[Record]) -> Counter[tuple[str, str]]:
    """Return how many cells each method declined, for each of its reasons."""
    return Counter((r.method, r.reason) for r in records if r.status == "skipped")


def warn_of_few(context: Context, request: SweepRequest) -> None:
    """Say that a sweep of fewer samples than the protocol's is never ranked with full ones."""
    asked = request.sampling.num_samples
    protocol = context.dataset_spec(request.dataset).num_samples
    if asked is not None and asked < protocol:
        context.reporter.warn(
            f"{asked:,} samples instead of the protocol's {protocol:,}: never ranked with full ones"
        )


def warn_of_unsaved(context: Context, request: SweepRequest, plan: SweepPlan) -> None:
    """Say that images are saved while they are sampled, and finished cells are not sampled."""
    samples = context.workspace.samples
    bare = sum(not samples(cell).is_dir() for cell in plan.done) if request.save_samples else 0
    if bare:
        context.reporter.warn(
            f"--save-samples: {bare} cell(s) are finished and are not sampled again; their images "
            "were not kept: choose another --workspace, or delete their records"
        )


def make_request(options: dict[str, Any], plugins: PluginManager) -> SweepRequest:
    """Turn the options into a request; bad ones raise before anything heavy is imported."""
    nfes = parse_numbers(options["nfe"], "--nfe")
    seeds = parse_seeds(options["seeds"])
    tuned = options["sigmas"] == "tuned"
    sigmas = None if tuned else parse_sigmas(options["sigmas"])
    checkpoint = options["checkpoint"]
    default = plugins.default_method if checkpoint is None else ""
    named = options["methods"] if options["methods"] is not None else default
    methods = [part.strip() for part in named.split(",") if part.strip()]
    if not methods and not (checkpoint and options["methods"] is None):
        raise UserError("--method", "names no method", remedy="see `cmbench list methods`")
    from cmbench.sweep.plans import SampleSettings
    from cmbench.sweep.recipes import require_once
    from cmbench.sweep.sweep import SweepRequest

    require_once(options["overrides"])
    settings = SampleSettings(
        options["samples"],
        options["batch_size"],
        sigmas,
        options["sampler"],
        options["ema"],
        precision=parse_precision(options["precision"]),
    )
    if sigmas is not None and nfes is None and options["sampler"] is None:
        nfes = (len(sigmas),)
    return SweepRequest(
        tuple(dict.fromkeys(methods)),
        options["dataset"],
        options["recipe"],
        nfes,
        seeds,
        options["overrides"],
        settings,
        options["save_samples"],
        checkpoint,
        tuned,
    )


def make_context(
    options: Mapping[str, Any],
    plugins: PluginManager | None = None,
    should_stop: Callable[[], str | None] = lambda: None,
    launch: Launch | None = None,
) -> Context:
    """Choose device, threads and reporter; warn of plugins that failed.

    Of ``options`` only ``workspace`` must be there.
    """
    import torch

    from cmbench.cli.console import make_reporter
    from cmbench.plugin.manager import load_plugins
    from cmbench.records.workspace import Workspace
    from cmbench.sweep.context import Context, choose_device
    from cmbench.sweep.reporter import Reporter
    from cmbench.sweep.threads import choose_threads, use_threads

    plugins = plugins or load_plugins()
    several = launch is not None and launch.size > 1
    leads = launch is None or launch.rank == 0
    reporter = make_reporter(options.get("quiet", False)) if leads else Reporter()
    for info in plugins.plugins:
        if info.status != "ok":
            who = f"plugin {info.name!r} ({info.distribution} {info.version})"
            reporter.warn(f"{who}: {info.error}")
    local_rank = launch.local_rank if launch is not None and several else None
    device = choose_device(options.get("device", "auto"), local_rank)
    if device.type == "cuda" and several:
        torch.cuda.set_device(device)
    local_size = launch.local_size if launch is not None else 1
    threads = options.get("threads") or max(choose_threads() // local_size, 1)
    use_threads(threads)
    compiled = options.get("compiled")
    return Context(
        plugins,
        Workspace.choose(options["workspace"]),
        reporter,
        device,
        threads=threads,
        command=command_line(),
        compile=device.type == "cuda" if compiled is None else compiled,
        split=options.get("split"),
        should_stop=should_stop,
        debug=options.get("debug", False),
        device_found=options.get("device", "auto") == "auto",
    )


def command_line() -> str:
    """Return the command that reproduces the records anywhere.

    That is what the user typed, with the program's plain name and without what concerns this
    machine only: the workspace, talk and debugging.
    """
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in ("-w", "--workspace"):
            next(words, None)
        elif not word.startswith("--workspace=") and word not in _LOCAL_FLAGS:
            kept.append(word)
    return shlex.join(["cmbench", *kept])


def render_page(context: Context, request: SweepRequest) -> str:
    """Render the dataset's pages and return the path of the HTML one."""
    from cmbench.cli.report import render_workspace

    name = context.dataset_spec(request.dataset).name
    return str(render_workspace(context.workspace, [name], context.plugins)[0])
