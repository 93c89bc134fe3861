"""``cmbench tune-times``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cmbench.cli.common import (
    DEFAULT_DATASET,
    ContextOptions,
    WholeNumber,
    batch_size_option,
    context_options,
    echo_table,
    ema_option,
    make_context,
    parse_numbers,
    parse_seeds,
    recipe_option,
    sampler_option,
    stop_asker,
    takes,
    time_limit_option,
)
from cmbench.errors import EXIT_OK
from cmbench.plugin.manager import load_plugins
from cmbench.seeds import HELD_OUT_FROM
from cmbench.sweep.recipes import require_once

if TYPE_CHECKING:
    from cmbench.sweep.context import Context
    from cmbench.sweep.plans import RunPlan


@dataclass(frozen=True, kw_only=True)
class TuneOptions(ContextOptions):
    """What the user asked of `cmbench tune-times`."""

    method: str | None
    dataset: str
    recipe: str | None
    checkpoint: str | None
    nfe: str
    seed: int
    overrides: tuple[str, ...]
    held_out_seeds: str
    samples: int | None
    batch_size: int
    metric: str | None
    sampler: str | None
    ema: str | None
    floor_sigma: float
    evaluations: int
    rounds: int
    time_limit_s: float | None


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
@recipe_option
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
    help="Network evaluations per image, from 2.",
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
    help="Sampling seeds to search on (4,7 or 3-5); records never use them.",
)
@click.option(
    "--samples",
    metavar="N",
    type=WholeNumber(min=2),
    default=None,
    help="Images per schedule and seed.  [default: the dataset's protocol]",
)
@batch_size_option
@click.option(
    "--metric",
    metavar="NAME",
    default=None,
    help="Metric to tune by.  [default: the protocol's first that scores samples]",
)
@sampler_option
@ema_option
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
    help="Schedules to measure per level and round.",
)
@click.option(
    "--rounds",
    metavar="N",
    type=WholeNumber(min=1, max=20),
    default=2,
    show_default=True,
    help="Rounds through the levels, if there are several.",
)
@time_limit_option
@context_options
@takes(TuneOptions)
def tune_times(options: TuneOptions) -> int:
    """Choose the noise levels of multistep sampling on held-out seeds.

    The run must be trained. Golden-section search over ln sigma, one level at a time, by a metric
    of samples whose seeds no record uses. `cmbench run --sigmas tuned` samples at the levels found
    and marks its records as tuned.

    \b
    cmbench run --method M --nfe 1
    cmbench tune-times --method M --nfe 2,4
    cmbench run --method M --nfe 1,2,4 --sigmas tuned
    """
    plugins = load_plugins()
    nfes = parse_numbers(options.nfe, "--nfe") or ()
    listed = options.held_out_seeds
    if listed.isdecimal():  # one seed, not a count of them
        listed += ","
    seeds = parse_seeds(listed, "--held-out-seeds", held_out=True)
    require_once(options.overrides)
    from cmbench.sweep.tuned_sigmas import describe
    from cmbench.sweep.tuning import TuneSettings, check, tune

    settings = TuneSettings(
        seeds,
        options.samples,
        options.batch_size,
        options.metric,
        options.sampler,
        options.ema,
        options.floor_sigma,
        options.evaluations,
        options.rounds,
    )
    with stop_asker(options.time_limit_s) as should_stop:
        context = make_context(options, plugins, should_stop)
        context.workspace.require_writable()
        run = planned(context, options)
        for nfe in nfes:  # check all of the input before any of the work
            check(context, run, nfe, settings)
        found = []
        for nfe in nfes:
            context.reporter.note(f"tuning {run.run_id} at NFE {nfe}")
            found.append(describe(tune(context, run, nfe, settings)))
    echo_table(list(found[0]), [list(row.values()) for row in found])
    return EXIT_OK


def planned(context: Context, options: TuneOptions) -> RunPlan:
    """Return the run to tune on: a training, or an imported checkpoint."""
    from cmbench.sweep.planning import plan_imported_run, plan_run

    asked = (options.dataset, options.recipe, options.seed, options.overrides)
    if options.checkpoint is not None:
        return plan_imported_run(context, options.checkpoint, options.method, *asked)
    return plan_run(context, options.method or context.plugins.default_method, *asked)
