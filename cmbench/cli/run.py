"""``cmbench run``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import click

from cmbench.cli.common import (
    DEFAULT_DATASET,
    TUNED,
    parse_names,
    parse_numbers,
    parse_seeds,
    parse_sigmas,
)
from cmbench.cli.known import require_known
from cmbench.cli.options import Parsed, SweepOptions, argument, flag, option, takes, told_once
from cmbench.cli.run_file import RunFile, use_run_file
from cmbench.errors import EXIT_OK, UserError
from cmbench.plugin.manager import PluginManager, load_plugins


def parse_precision(text: str, option: str) -> str:
    """Return the precision of sampling; raise ``UserError`` for one that does not exist."""
    from cmbench.records.record import DTYPES  # imports pydantic, which `run --help` does not need

    if text not in DTYPES:
        raise UserError(option, f"{text!r}", allowed=", ".join(DTYPES))
    return text


@dataclass(frozen=True, kw_only=True)
class RunOptions(SweepOptions):
    """What the user asked of `cmbench run`."""

    file: RunFile | None = argument(
        metavar="[FILE.toml]", required=False, is_eager=True, callback=use_run_file
    )
    methods: tuple[str, ...] | None = option(
        "--method",
        "-m",
        metavar="M[,M…]",
        type=Parsed(parse_names),
        help="Methods, see `cmbench list methods`.  [default: the one marked there]",
    )
    dataset: str = option(
        "--dataset",
        "-d",
        metavar="D",
        default=DEFAULT_DATASET,
        help="Dataset, see `cmbench list datasets`, or folder:PATH or zip:PATH.",
    )
    nfes: tuple[int, ...] | None = option(
        "--nfe",
        metavar="N[,N…]",
        type=Parsed(parse_numbers),
        help="Network evaluations per image.  [default: the dataset's sweep]",
    )
    seeds: Sequence[int] = option(
        "--seeds",
        metavar="COUNT|LIST",
        default="1",
        type=Parsed(parse_seeds),
        help="3 means seeds 0, 1, 2; 4,7 and 3-5 list the seeds themselves.",
    )
    sigmas: tuple[float, ...] | str | None = option(
        "--sigmas",
        metavar="S[,S…]",
        type=Parsed(parse_sigmas),
        help="Descending noise levels, or `tuned` for those that tune-times found.",
    )
    samplers: tuple[str, ...] | None = option(
        "--sampler",
        metavar="NAME[,NAME…]",
        type=Parsed(parse_names),
        help="Solver, for methods that have more than one; each of several has its own cells.",
    )
    precision: str = option(
        "--precision",
        metavar="P",
        default="fp32",
        type=Parsed(parse_precision),
        help="Sample in fp32, or by autocast in bf16 or fp16; each precision has its own cells.",
    )
    labels: str = option(
        "--labels",
        metavar="HOW",
        default="drawn",
        type=click.Choice(["drawn", "quota"]),
        help="Classes drawn by the dataset's frequencies, or their exact quota, in own cells.",
    )
    metrics: tuple[str, ...] | None = option(
        "--metrics",
        metavar="M[,M…]",
        type=Parsed(parse_names),
        help="Measure these beside the dataset's, in cells of their own.",
    )
    save_samples: bool = flag("--save-samples", help="Keep the images as PNG files.")
    compiled: bool | None = option(
        "--compile/--no-compile", help="Compile networks.  [default: on CUDA]"
    )
    split: bool | None = option(
        "--split/--no-split",
        help="Split networks over processes (FSDP2).  "
        "[default: from 1,000,000,000 parameters, on GPUs]",
    )
    executor: str = option(
        "--executor", metavar="NAME", default="local", help="See `cmbench list executors`."
    )
    dry_run: bool = flag("--dry-run", help="Print the plan and stop.")
    no_report: bool = flag("--no-report", help="Do not render the report at the end.")

    @property
    def tuned(self) -> bool:
        """Whether to sample at the noise levels that `cmbench tune-times` found."""
        return self.sigmas == TUNED

    def resolved(self, plugins: PluginManager) -> RunOptions:
        """Return the options with the default method, and the NFE that the noise levels imply.

        Raises:
            UserError: a name is unknown, an override is wrong, or no plugin marks a default method.
        """
        methods, nfes = self.methods, self.nfes
        if methods is None:
            methods = (plugins.default_method,) if self.checkpoint is None else ()
        if isinstance(self.sigmas, tuple) and nfes is None and self.samplers is None:
            nfes = (len(self.sigmas),)
        if self.checkpoint is None:
            require_known(
                plugins,
                "cmbench run",
                methods=methods,
                dataset=self.dataset,
                recipe=self.recipe,
                overrides=self.overrides,
                seeds=self.seeds,
            )
        plugins.executors.get(self.executor, "cmbench run")
        return replace(self, methods=methods, nfes=nfes)


@click.command()
@takes(RunOptions)
def run(options: RunOptions) -> int:
    """Train (or resume, or reuse), sample and measure every cell of a sweep.

    FILE.toml has values of the long options (method = ["M1", "M2"], nfe = [1, 2]) and a table
    [options] of hyper-parameters; options of the command line override it.

    \b
    cmbench run
    cmbench run --method M1,M2 --dataset gmm --nfe 1,2 --seeds 3
    cmbench run --method M1 --recipe demo -o optimizer.lr=1e-4 --dry-run
    cmbench run --method M1 -o optimizer.lr=1e-3,3e-3 --sampler S1,S2
    cmbench run sweep.toml --seeds 3
    """
    from cmbench.cli.run_finished import print_finished
    from cmbench.training.launch import Launch

    plugins = load_plugins()
    with told_once():
        options = options.resolved(plugins)
    launch = Launch.from_environment()
    if launch.size == 1 and print_finished(options, plugins):
        return EXIT_OK
    from cmbench.cli.run_work import carry_out  # imports torch: after the cheap checks

    return carry_out(options, plugins, launch)
