"""``cmbench tune-times``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import click

from cmbench.cli.common import DEFAULT_DATASET, parse_numbers, parse_seeds
from cmbench.cli.known import require_known
from cmbench.cli.options import Number, Parsed, SweepOptions, WholeNumber, option, takes
from cmbench.plugin.manager import load_plugins
from cmbench.seeds import HELD_OUT_FROM


def parse_held_out(text: str, option: str) -> tuple[int, ...]:
    """Return held-out seeds; a single number is a seed, not a count."""
    return parse_seeds(f"{text}," if text.isdecimal() else text, option, held_out=True)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(SweepOptions):
    """What the user asked of `cmbench tune-times`."""

    method: str | None = option(
        "--method",
        "-m",
        metavar="M",
        help="Method, see `cmbench list methods`.  [default: the one marked there]",
    )
    dataset: str = option(
        "--dataset",
        "-d",
        metavar="D",
        default=DEFAULT_DATASET,
        help="Dataset, see `cmbench list datasets`.",
    )
    nfes: tuple[int, ...] = option(
        "--nfe",
        metavar="N[,N…]",
        default="2",
        type=Parsed(parse_numbers),
        help="Network evaluations per image, from 2.",
    )
    seed: int = option(
        "--seed",
        metavar="N",
        type=WholeNumber(min=0, max=HELD_OUT_FROM - 1),
        default=0,
        help="Training seed of the run to tune on.",
    )
    held_out_seeds: tuple[int, ...] = option(
        "--held-out-seeds",
        metavar="LIST",
        default=str(HELD_OUT_FROM),
        type=Parsed(parse_held_out),
        help="Sampling seeds to search on (4,7 or 3-5); records never use them.",
    )
    sampler: str | None = option(
        "--sampler", metavar="NAME", help="Solver, for methods that have more than one."
    )
    metric: str | None = option(
        "--metric",
        metavar="NAME",
        help="Metric to tune by.  [default: the protocol's first that scores samples]",
    )
    sigma_min: float = option(
        "--sigma-min",
        metavar="SIGMA",
        default=0.02,
        type=Number(min=0, min_open=True),
        help="Smallest noise level to consider.",
    )
    evaluations: int = option(
        "--evaluations",
        metavar="N",
        type=WholeNumber(min=2, max=60),
        default=10,
        help="Schedules to measure per level and round.",
    )
    rounds: int = option(
        "--rounds",
        metavar="N",
        type=WholeNumber(min=1, max=20),
        default=2,
        help="Rounds through the levels, if there are several.",
    )
    search: Literal["golden-section", "trajectories"] = option(
        "--search",
        metavar="NAME",
        type=click.Choice(("golden-section", "trajectories")),
        default="golden-section",
        help="By the metric, or by how the trajectories of a diffusion model bend (GITS).",
    )


@click.command("tune-times")
@takes(TuneOptions)
def tune_times(options: TuneOptions) -> int:
    """Choose the noise levels of multistep sampling on held-out seeds.

    The run must be trained. Golden-section search over ln sigma, one level at a time, by a metric
    of samples whose seeds no record uses; or, for a diffusion model, one pass over its trajectories
    (--search trajectories). `cmbench run --sigmas tuned` samples at the levels found and marks its
    records as tuned.

    \b
    cmbench run --method M --nfe 1
    cmbench tune-times --method M --nfe 2,4
    cmbench run --method M --nfe 1,2,4 --sigmas tuned
    cmbench tune-times --method M --sampler NAME --nfe 4 --search trajectories
    """
    plugins = load_plugins()
    if options.checkpoint is None:
        require_known(
            plugins,
            "cmbench tune-times",
            methods=[options.method or plugins.default_method],
            dataset=options.dataset,
            recipe=options.recipe,
            overrides=options.overrides,
        )
    from cmbench.cli.tune_times_work import carry_out  # imports torch

    return carry_out(options, plugins)
