"""``cmbench eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmbench.cli.common import (
    ContextOptions,
    WholeNumber,
    context_options,
    echo_table,
    json_option,
    make_context,
    split_names,
    takes,
)

if TYPE_CHECKING:
    from cmbench.records.record import Record
    from cmbench.sweep.scored_record import ScoreRequest


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ContextOptions):
    """What the user asked of `cmbench eval`."""

    samples: str
    dataset: str | None
    reference: str | None
    metrics: str | None
    extractor: str | None
    weights: Path | None
    library: bool
    trust_weights: bool
    bf16_extractor: bool
    channels_last_extractor: bool
    compile_extractor: bool
    label: str | None
    nfe: int | None
    seed: int
    limit: int | None
    steps: int | None
    value_range: str | None
    quantize: str | None
    held_out: str | None
    batch_size: int
    as_json: bool
    no_record: bool

    @property
    def approximations(self) -> tuple[str, ...]:
        """Names of the approximations of the extractor that were asked for."""
        asked = {
            "bfloat16": self.bf16_extractor,
            "channels-last": self.channels_last_extractor,
            "compiled": self.compile_extractor,
        }
        return tuple(name for name, wanted in asked.items() if wanted)


@click.command("eval")
@click.argument("samples")
@click.option(
    "--dataset",
    "-d",
    metavar="NAME",
    default=None,
    help="Compare with this dataset under its protocol.",
)
@click.option(
    "--reference",
    metavar="REF",
    default=None,
    help="Compare with this instead: images, a statistics file, or a saved reference.",
)
@click.option(
    "--metrics",
    metavar="M[,M…]",
    default=None,
    help="For example fid,is,pr,kid,fid-clean.  [default: the protocol's]",
)
@click.option(
    "--extractor",
    metavar="NAME",
    default=None,
    help="Extractor of metrics that name none.  [default: the dataset's]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=None,
    help="File of the extractor's weights.  [default: where `cmbench prepare` put it]",
)
@click.option("--library", is_flag=True, help="Run the library's own network and resizer.")
@click.option(
    "--trust-weights", is_flag=True, help="Run a TorchScript file whose hash is not the pinned one."
)
@click.option(
    "--bf16-extractor",
    is_flag=True,
    help="Extract in bfloat16: faster; the metric key changes and the row is not ranked.",
)
@click.option(
    "--channels-last-extractor",
    is_flag=True,
    help="Extract in that memory layout; the metric key changes and the row is not ranked.",
)
@click.option(
    "--compile-extractor",
    is_flag=True,
    help="Compile the extractor; the metric key changes and the row is not ranked.",
)
@click.option("--label", metavar="NAME", default=None, help="Name of the row.")
@click.option(
    "--nfe",
    type=WholeNumber(min=1),
    metavar="N",
    default=None,
    help="Network evaluations per sample: recorded in the row; of a run, how many to use.",
)
@click.option(
    "--seed",
    type=WholeNumber(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of the generator, recorded in the row.",
)
@click.option(
    "--limit", type=WholeNumber(min=2), metavar="N", default=None, help="Score at most N samples."
)
@click.option(
    "--steps",
    type=WholeNumber(min=1),
    metavar="N",
    default=None,
    help="Inference steps of a diffusers pipeline.",
)
@click.option(
    "--range",
    "value_range",
    metavar="LOW,HIGH",
    default=None,
    help="Range of float samples: -1,1 or 0,1 or 0,255.",
)
@click.option(
    "--quantize",
    metavar="RULE",
    default=None,
    help="Float samples to bytes: round, truncate, none.  [default: the dataset's]",
)
@click.option(
    "--held-out",
    metavar="REF",
    default=None,
    help="Real images not used in training: check whether samples copy the reference.",
)
@click.option(
    "--batch-size",
    metavar="N",
    type=WholeNumber(min=1),
    default=250,
    show_default=True,
    help="Images per batch; results do not depend on it.",
)
@json_option
@click.option("--no-record", is_flag=True, help="Print only; write no record.")
@context_options
@takes(EvalOptions)
def eval_(options: EvalOptions) -> None:
    """Score SAMPLES of any generator.

    SAMPLES is a folder of images, a .zip, .npz or .npy, a run of this harness (its id, folder or a
    checkpoint), a diffusers pipeline, or a Python generator as module:function: called with sample
    numbers [N] and a seed, it returns images [N, C, H, W], a tensor or a NumPy array, uint8 or
    float in [-1, 1].

    \b
    cmbench eval samples/ --dataset cifar10
    cmbench eval batch.npz --reference VIRTUAL_imagenet64_labeled.npz --metrics fid,sfid
    cmbench eval mymodel:generate --dataset digits --limit 2000 --label mymodel --nfe 1
    cmbench eval cmbench-out/runs/digits/RUN --nfe 2 --reference other-samples/
    """
    from cmbench.records.record import write_record
    from cmbench.sweep.scored import score

    context = make_context(options)
    record = score(context, make_request(options, str(context.device)))
    for warning in record.warnings:  # printed even when quiet: they decide what a number is worth
        click.echo(f"warning: {warning}", err=True)
    if options.as_json:
        click.echo(record.to_json(), nl=False)
    else:
        print_scores(record)
    if not options.no_record:
        folder = context.workspace.records(record.dataset.name)
        path = folder / f"{record.cell}.json"
        if not path.exists():  # the same samples scored again give the same record
            write_record(record, folder)
        click.echo(f"record: {path}", err=options.as_json)


def make_request(options: EvalOptions, device: str) -> ScoreRequest:
    """Return the evaluation that the options ask for."""
    from cmbench.samples.source import ReadOptions
    from cmbench.sweep.scored_record import ScoreRequest

    return ScoreRequest(
        samples=options.samples,
        dataset=options.dataset,
        reference=options.reference,
        metrics=split_names(options.metrics or ""),
        extractor=options.extractor,
        weights=options.weights,
        library=options.library,
        trust=options.trust_weights,
        approximations=options.approximations,
        label=options.label,
        nfe=options.nfe or 0,
        seed=options.seed,
        quantize=options.quantize,
        read=ReadOptions(
            value_range=options.value_range,
            limit=options.limit,
            seed=options.seed,
            steps=options.steps,
            device=device,
        ),
        batch_size=options.batch_size,
        held_out=options.held_out,
    )


def print_scores(record: Record) -> None:
    """Print one line per metric: value, uncertainty, extrapolation, floor."""
    from cmbench.leaderboard.details import extrapolation_of, floor_of, interval_of

    rows = []
    for name, metric in record.metrics.items():
        floor, infinity = floor_of(metric), extrapolation_of(metric)
        own = interval_of(metric)
        rows.append(
            [
                name,
                "-" if metric.value is None else f"{metric.value:.6g}",
                "-" if metric.standard_error is None else f"{metric.standard_error:.2g}",
                " … ".join(f"{x:.5g}" for x in own) if own else "-",
                f"{infinity.value:.5g} ({infinity.low:.5g} … {infinity.high:.5g})"
                if infinity
                else "-",
                floor.number if floor else "-",
            ]
        )
    copied = record.metrics[record.rank_metric].detail.get("memorisation")
    if copied is not None:
        click.echo(
            f"nearest real image: a reference image for {copied['train_share']:.1%} of the samples"
            f" (50 % expected), distance ratio {copied['distance_ratio']:.3f} (1 expected)"
        )
    header = ["metric", "value", "standard error", "95 % interval", "N → ∞", "floor or ceiling"]
    title = f"{record.method}: {record.sampling.num_samples:,} samples on {record.dataset.name}"
    echo_table(header, rows, title=title)
