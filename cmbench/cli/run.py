"""``cmbench run``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    parse_sigmas,
    recipe_option,
    sampler_option,
    split_names,
    time_limit_option,
)
from cmbench.errors import EXIT_OK, UserError
from cmbench.plugin.manager import PluginManager, load_plugins
from cmbench.sweep.recipes import require_once


@dataclass(frozen=True, kw_only=True)
class RunOptions(ContextOptions):
    """What the user asked of `cmbench run`, parsed."""

    methods: tuple[str, ...]
    dataset: str
    recipe: str | None
    checkpoint: str | None
    #: None means the dataset's sweep
    nfes: tuple[int, ...] | None
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    samples: int | None
    batch_size: int
    sampler: str | None
    sigmas: tuple[float, ...] | None
    #: whether to sample at the noise levels that `cmbench tune-times` found
    tuned: bool
    ema: str | None
    precision: str
    save_samples: bool
    time_limit_s: float | None
    executor: str
    dry_run: bool
    no_report: bool

    @classmethod
    def parse(cls, values: Mapping[str, Any], plugins: PluginManager) -> RunOptions:
        """Parse click's values; raise ``UserError`` for an invalid one."""
        nfes = parse_numbers(values["nfes"], "--nfe")
        seeds = parse_seeds(values["seeds"])
        tuned = values["sigmas"] == "tuned"
        sigmas = None if tuned else parse_sigmas(values["sigmas"])
        require_once(values["overrides"])
        parse_precision(values["precision"])
        if sigmas is not None and nfes is None and values["sampler"] is None:
            nfes = (len(sigmas),)
        parsed = {
            "methods": parse_methods(values["methods"], values["checkpoint"], plugins),
            "nfes": nfes,
            "seeds": seeds,
            "sigmas": sigmas,
            "tuned": tuned,
        }
        return cls(**{**values, **parsed})


def parse_methods(
    text: str | None, checkpoint: str | None, plugins: PluginManager
) -> tuple[str, ...]:
    """Return the methods named, or the default one; none if a checkpoint is sampled."""
    if text is None:
        return (plugins.default_method,) if checkpoint is None else ()
    methods = split_names(text)
    if not methods:
        raise UserError("--method", "names no method", remedy="see `cmbench list methods`")
    return methods


def parse_precision(text: str) -> str:
    """Return the precision of sampling; raise ``UserError`` for one that does not exist."""
    from cmbench.records.record import DTYPES  # imports pydantic, which `run --help` does not need

    if text not in DTYPES:
        raise UserError("--precision", f"{text!r}", allowed=", ".join(DTYPES))
    return text


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
@recipe_option
@click.option(
    "--checkpoint",
    metavar="NAME",
    default=None,
    help="Sample this imported checkpoint instead of training, see `cmbench import`.",
)
@click.option(
    "--nfe",
    "nfes",
    metavar="N[,N…]",
    default=None,
    help="Network evaluations per image.  [default: the dataset's sweep]",
)
@click.option(
    "--seeds",
    metavar="COUNT|LIST",
    default="1",
    show_default=True,
    help="3 means seeds 0, 1, 2; 4,7 and 3-5 list the seeds themselves.",
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
    help="Images per cell.  [default: the dataset's protocol]",
)
@batch_size_option
@sampler_option
@click.option(
    "--sigmas",
    metavar="S[,S…]",
    default=None,
    help="Descending noise levels, or `tuned` for those that tune-times found.",
)
@ema_option
@click.option(
    "--precision",
    metavar="P",
    default="fp32",
    show_default=True,
    help="Sample in fp32, or by autocast in bf16 or fp16; each precision has its own cells.",
)
@click.option("--save-samples", is_flag=True, help="Keep the images as PNG files.")
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Compile networks.  [default: on CUDA]"
)
@click.option(
    "--split/--no-split",
    default=None,
    help="Split networks over processes (FSDP2).  "
    "[default: from 1,000,000,000 parameters, on GPUs]",
)
@time_limit_option
@click.option(
    "--executor",
    metavar="NAME",
    default="local",
    show_default=True,
    help="See `cmbench list executors`.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-report", is_flag=True, help="Do not render the report at the end.")
@context_options
def run(**values: Any) -> int:
    """Train (or resume, or reuse), sample and measure every cell of a sweep.

    \b
    cmbench run
    cmbench run --method M1,M2 --dataset gmm --nfe 1,2 --seeds 3
    cmbench run --method M1 --recipe demo -o optimizer.lr=1e-4 --dry-run
    """
    plugins = load_plugins()
    try:
        options = RunOptions.parse(values, plugins)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            return error.exit_code  # every process fails alike; rank 0 prints the error
        raise
    from cmbench.cli.run_finished import print_finished
    from cmbench.training.launch import Launch

    launch = Launch.from_environment()
    if launch.size == 1 and print_finished(options, plugins):
        return EXIT_OK
    from cmbench.cli.run_work import carry_out  # imports torch: after the cheap checks

    return carry_out(options, plugins, launch)
