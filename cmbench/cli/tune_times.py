"""``cmbench tune-times``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.main import WholeNumber, workspace_option
from cmbench.cli.results import echo_table
from cmbench.cli.run import DEFAULT_DATASET, make_context, parse_numbers, parse_seeds, stop_asker
from cmbench.errors import EXIT_OK
from cmbench.plugin.manager import load_plugins
from cmbench.seeds import HELD_OUT_FROM

if TYPE_CHECKING:
    from cmbench.sweep.context import Context
    from cmbench.sweep.plans import RunPlan


@click.command("tune-times")
@click.option(
    "--method",
    "-m",
    metavar="M",
    default=None,
    help="Method, see `cmbench list methods`.  [default: the one marked there]",
)
@click.option(
    "--dataset",
    "-d",
    metavar="D",
    default=DEFAULT_DATASET,
    show_default=True,
    help="Dataset, see `cmbench list datasets`.",
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
    help="Tune for this imported checkpoint instead of a run, see `cmbench import`.",
)
@click.option(
    "--nfe",
    metavar="N[,N…]",
    default="2",
    show_default=True,
    help="Network evaluations an image, from 2.",
)
@click.option(
    "--seed",
    metavar="N",
    type=WholeNumber(min=0, max=HELD_OUT_FROM - 1),
    default=0,
    show_default=True,
    help="Training seed of the run to tune on.",
)
@click.option(
    "--option",
    "-o",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a hyper-parameter, as in `cmbench run`.",
)
@click.option(
    "--held-out-seeds",
    metavar="LIST",
    default=str(HELD_OUT_FROM),
    show_default=True,
    help="Sampling seeds to search on (4,7 or 3-5); none that a record may use.",
)
@click.option(
    "--samples",
    metavar="N",
    type=WholeNumber(min=2),
    default=None,
    help="Images a schedule and seed.  [default: the dataset's protocol]",
)
@click.option(
    "--batch-size",
    metavar="N",
    type=WholeNumber(min=1),
    default=500,
    show_default=True,
    help="Images sampled at a time; no effect on results.",
)
@click.option(
    "--metric",
    metavar="NAME",
    default=None,
    help="What to tune by.  [default: the protocol's first that scores samples]",
)
@click.option("--sampler", metavar="NAME", default=None, help="Solver, where a method has several.")
@click.option(
    "--ema", metavar="LABEL", default=None, help="Which average of the weights to sample."
)
@click.option(
    "--floor",
    "floor_sigma",
    metavar="SIGMA",
    default=0.02,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Smallest noise level to consider.",
)
@click.option(
    "--evaluations",
    metavar="N",
    type=WholeNumber(min=2, max=60),
    default=10,
    show_default=True,
    help="Schedules to measure, a level and round.",
)
@click.option(
    "--rounds",
    metavar="N",
    type=WholeNumber(min=1, max=20),
    default=2,
    show_default=True,
    help="Rounds through the levels, where there are several.",
)
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
    "--time-limit",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=None,
    help="Stop and exit 75 after this long.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@workspace_option
@click.pass_context
def tune_times(ctx: click.Context, /, **options: Any) -> int:
    """Choose the noise levels of multistep sampling on held-out seeds.

    The run must be trained. Golden sections over ln sigma, one level at a time, by a metric of
    samples whose seeds no record uses. `cmbench run --sigmas tuned` samples at the levels found;
    its records say so.

    \b
    cmbench run --method M --nfe 1
    cmbench tune-times --method M --nfe 2,4
    cmbench run --method M --nfe 1,2,4 --sigmas tuned
    """
    plugins = load_plugins()
    nfes = parse_numbers(options["nfe"], "--nfe") or ()
    listed = options["held_out_seeds"]
    if listed.isdecimal():  # one seed, not a count of them
        listed += ","
    seeds = parse_seeds(listed, "--held-out-seeds", held_out=True)
    from cmbench.sweep.tuned_times import describe
    from cmbench.sweep.tuning import TuneSettings, check, tune

    names = (
        "num_samples",
        "batch_size",
        "metric",
        "sampler",
        "ema",
        "floor_sigma",
        "evaluations",
        "rounds",
    )
    options["num_samples"] = options.pop("samples")
    settings = TuneSettings(seeds, **{name: options[name] for name in names})
    options["debug"] = bool((ctx.obj or {}).get("debug"))
    with stop_asker(options["time_limit"]) as should_stop:
        context = make_context(options, plugins, should_stop)
        context.workspace.require_writable()
        run = planned(context, options)
        for nfe in nfes:  # all of the input before any of the work
            check(context, run, nfe, settings)
        found = []
        for nfe in nfes:
            context.reporter.note(f"tuning {run.run_id} at NFE {nfe}")
            found.append(describe(tune(context, run, nfe, settings)))
    echo_table(list(found[0]), [list(row.values()) for row in found])
    return EXIT_OK


def planned(context: Context, options: dict[str, Any]) -> RunPlan:
    """Return the run to tune on: a training, or an imported checkpoint."""
    from cmbench.sweep.planning import plan_imported_run, plan_run
    from cmbench.sweep.recipes import require_once

    require_once(options["overrides"])
    asked = (options["dataset"], options["recipe"], options["seed"], options["overrides"])
    if options["checkpoint"] is not None:
        return plan_imported_run(context, options["checkpoint"], options["method"], *asked)
    return plan_run(context, options["method"] or context.plugins.default_method, *asked)
