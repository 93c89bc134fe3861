"""``cmbench run``."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.main import workspace_option
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError

if TYPE_CHECKING:
    from cmbench.bench.context import Context
    from cmbench.bench.record import Record
    from cmbench.bench.sweep import SweepPlan, SweepRequest

DEFAULT_METHOD, DEFAULT_DATASET = "sct", "digits"


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


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return ``3`` as seeds 0, 1, 2 and ``4,7`` or ``3-5`` as they are listed."""
    try:
        if text.isdigit():
            seeds = tuple(range(int(text)))
        elif "-" in text:
            first, last = (int(part) for part in text.split("-"))
            seeds = tuple(range(first, last + 1))
        else:
            seeds = tuple(dict.fromkeys(int(part) for part in text.split(",") if part))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise UserError(
            "--seeds", f"{text!r}", allowed="a count (3), a list (0,2) or a range (3-5)"
        )
    return seeds


def parse_sigmas(text: str | None) -> tuple[float, ...] | None:
    """Return ``80,0.8`` as descending noise levels."""
    if text is None:
        return None
    try:
        sigmas = tuple(float(part) for part in text.split(","))
    except ValueError:
        sigmas = ()
    descending = all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False))
    if not sigmas or not descending or sigmas[-1] <= 0 or sigmas[0] == float("inf"):
        raise UserError("--sigmas", f"{text!r}",
                        allowed="descending positive noise levels, for example 80,0.8")
    return sigmas


def stop_asker(time_limit_s: float | None) -> Callable[[], str | None]:
    """Return a function that says why to stop: a signal arrived, or the time limit is near."""
    reasons: list[str] = []

    def on_signal(number: int, frame: Any) -> None:
        if reasons:
            raise KeyboardInterrupt
        reasons.append(f"stopped by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        try:
            signal.signal(number, on_signal)
        except ValueError:
            break  # not the main thread (tests)
    began = time.monotonic()

    def ask() -> str | None:
        if not reasons and time_limit_s and time.monotonic() - began > time_limit_s:
            reasons.append(f"stopped by the time limit of {time_limit_s:g} s")
        return reasons[0] if reasons else None

    return ask


@click.command()
@click.option("--method", "-m", "methods", metavar="M[,M…]", default=DEFAULT_METHOD,
              show_default=True, help="Methods, see `cmbench list methods`.")
@click.option("--dataset", "-d", metavar="D", default=DEFAULT_DATASET, show_default=True,
              help="Dataset, see `cmbench list datasets`.")
@click.option("--recipe", "-r", metavar="R", default=None,
              help="Recipe, or FILE.toml:NAME.  [default: demo, else paper]")
@click.option("--nfe", metavar="N[,N…]", default=None,
              help="Network evaluations an image.  [default: the dataset's sweep]")
@click.option("--seeds", metavar="COUNT|LIST", default="1", show_default=True,
              help="3 means seeds 0, 1, 2; 4,7 and 3-5 are taken as they stand.")
@click.option("--option", "-o", "overrides", metavar="KEY=VALUE", multiple=True,
              help="Override a hyper-parameter, for example -o optimizer.lr=1e-4.")
@click.option("--samples", metavar="N", type=click.IntRange(min=2), default=None,
              help="Images a cell.  [default: the dataset's protocol]")
@click.option("--batch-size", metavar="N", type=click.IntRange(min=1), default=500,
              show_default=True, help="Images sampled at a time; no effect on results.")
@click.option("--sampler", metavar="NAME", default=None, help="Solver, where a method has several.")
@click.option("--sigmas", metavar="S[,S…]", default=None,
              help="Noise levels to evaluate at, descending; one an evaluation.")
@click.option("--ema", metavar="LABEL", default=None, help="Which average of the weights to sample.")
@click.option("--save-samples", is_flag=True, help="Keep the images as PNG files.")
@click.option("--device", metavar="DEVICE", default="auto", show_default=True,
              help="cpu, cuda, cuda:1 …")
@click.option("--threads", metavar="N", type=click.IntRange(min=1), default=None,
              help="CPU threads.  [default: the cores that are free]")
@click.option("--compile/--no-compile", "compiled", default=None,
              help="Compile networks.  [default: on CUDA]")
@click.option("--time-limit", metavar="SECONDS", type=click.FloatRange(min=1), default=None,
              help="Save a checkpoint and exit 75 after this long.")
@click.option("--executor", metavar="NAME", default="local", show_default=True,
              help="See `cmbench list executors`.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-report", is_flag=True, help="Do not render the report at the end.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@workspace_option
def run(**options: Any) -> int:
    """Train (or resume, or reuse), sample and measure every cell of a sweep.

    \b
    cmbench run
    cmbench run --method cd,ict --dataset gmm --nfe 1,2 --seeds 3
    cmbench run --method edm --nfe 35 -o sampler=heun
    """
    request = make_request(options)
    context = make_context(options)

    from cmbench.bench.sweep import execute, plan_sweep
    from cmbench.cli.results import print_plan, print_table

    plan = plan_sweep(context, request)
    if options["dry_run"]:
        print_plan(context, plan)
        return EXIT_OK
    executor: Any = context.plugins.executors.load(options["executor"])()
    records = execute(context, request, plan, executor)
    print_table(records)
    if not options["no_report"]:
        click.echo(f"report: {render_page(context, request, records)}")
    reasons = Counter(r.reason for r in records if r.status == "failed")
    for reason, count in reasons.items():
        click.echo(f"{count} cell(s) failed: {reason}", err=True)
    return EXIT_CELLS_FAILED if reasons else EXIT_OK


def make_request(options: dict[str, Any]) -> SweepRequest:
    """Turn the options into a request; bad ones raise before anything heavy is imported."""
    nfes = parse_numbers(options["nfe"], "--nfe")
    seeds = parse_seeds(options["seeds"])
    sigmas = parse_sigmas(options["sigmas"])
    methods = [part.strip() for part in options["methods"].split(",") if part.strip()]
    if not methods:
        raise UserError("--method", "names no method", remedy="see `cmbench list methods`")
    from cmbench.bench.planning import SampleSettings
    from cmbench.bench.sweep import SweepRequest

    settings = SampleSettings(
        options["samples"], options["batch_size"], sigmas, options["sampler"], options["ema"]
    )
    if sigmas is not None and nfes is None and options["sampler"] is None:
        nfes = (len(sigmas),)
    return SweepRequest(
        tuple(dict.fromkeys(methods)), options["dataset"], options["recipe"], nfes, seeds,
        options["overrides"], settings, options["save_samples"],
    )


def make_context(options: dict[str, Any]) -> Context:
    """Load plugins and choose device, threads and reporter."""
    from cmbench.bench.context import Context, choose_device
    from cmbench.bench.threads import choose_threads, use_threads
    from cmbench.bench.workspace import Workspace
    from cmbench.cli.console import make_reporter
    from cmbench.plugin.manager import load_plugins

    plugins = load_plugins()
    reporter = make_reporter(options.get("quiet", False))
    for info in plugins.plugins:
        if info.status != "ok":
            reporter.warn(f"plugin {info.name!r} ({info.distribution} {info.version}): {info.error}")
    device = choose_device(options.get("device") or "auto")
    threads = options.get("threads") or choose_threads()
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
        should_stop=stop_asker(options.get("time_limit")),
    )


def command_line() -> str:
    """Return the command as the user typed it, with the program's plain name."""
    return shlex.join(["cmbench", *sys.argv[1:]])


def render_page(context: Context, request: SweepRequest, records: list[Record]) -> str:
    """Render the dataset's pages and return the path of the HTML one."""
    from cmbench.cli.report import render_workspace

    return str(render_workspace(context.workspace, [request.dataset], context.plugins)[0])
