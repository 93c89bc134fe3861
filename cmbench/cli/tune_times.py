"""``cmbench tune-times``."""

from __future__ import annotations

from dataclasses import dataclass

import click

from cmbench.cli.common import (
    DEFAULT_DATASET,
    ContextOptions,
    WholeNumber,
    batch_size_option,
    context_options,
    ema_option,
    parse_numbers,
    parse_seeds,
    recipe_option,
    sampler_option,
    takes,
    time_limit_option,
)
from cmbench.plugin.manager import load_plugins
from cmbench.seeds import HELD_OUT_FROM
from cmbench.sweep.recipes import require_once


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
    from cmbench.cli.tune_times_work import carry_out  # imports torch

    return carry_out(options, nfes, seeds, plugins)
