"""``cmbench eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.main import WholeNumber, workspace_option

if TYPE_CHECKING:
    from cmbench.records.record import Record

_APPROXIMATIONS = {
    "bfloat16": "bf16_extractor",
    "channels-last": "channels_last_extractor",
    "compiled": "compile_extractor",
}


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
    help="Compare with these instead: images, a statistics file, or a saved reference.",
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
    help="For metrics that name none.  [default: the dataset's]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=None,
    help="The extractor's weights, if they lie elsewhere.",
)
@click.option("--library", is_flag=True, help="Run the library's own network and resizer.")
@click.option(
    "--trust-weights", is_flag=True, help="Run a TorchScript file whose hash is not the pinned one."
)
@click.option(
    "--bf16-extractor",
    is_flag=True,
    help="Extract in bfloat16: quicker, another metric key, never ranked.",
)
@click.option(
    "--channels-last-extractor",
    is_flag=True,
    help="Extract in that memory layout: another metric key, never ranked.",
)
@click.option(
    "--compile-extractor",
    is_flag=True,
    help="Compile the extractor: another metric key, never ranked.",
)
@click.option("--label", metavar="NAME", default=None, help="Name of the row.")
@click.option(
    "--nfe",
    type=WholeNumber(min=1),
    metavar="N",
    default=None,
    help="Network evaluations a sample took, for the row; of a run, those to spend.",
)
@click.option(
    "--seed",
    type=WholeNumber(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of a generator, and of the row.",
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
    help="Real images never trained on: check whether samples copy the reference.",
)
@click.option(
    "--batch-size",
    metavar="N",
    type=WholeNumber(min=1),
    default=250,
    show_default=True,
    help="Images at a time; no effect on results.",
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
@click.option("--json", "as_json", is_flag=True, help="Print the record.")
@click.option("--no-record", is_flag=True, help="Print only; keep no record.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@workspace_option
def eval_(samples: str, **options: Any) -> None:
    """Score SAMPLES that any generator made.

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
    from cmbench.cli.run import make_context
    from cmbench.records.record import write_record
    from cmbench.samples.source import ReadOptions
    from cmbench.sweep.scored import score
    from cmbench.sweep.scored_record import ScoreRequest

    context = make_context(options)
    metrics = tuple(m.strip() for m in (options["metrics"] or "").split(",") if m.strip())
    record = score(
        context,
        ScoreRequest(
            samples=samples,
            dataset=options["dataset"],
            reference=options["reference"],
            metrics=metrics,
            extractor=options["extractor"],
            weights=options["weights"],
            library=options["library"],
            trust=options["trust_weights"],
            approximations=tuple(n for n, option in _APPROXIMATIONS.items() if options[option]),
            label=options["label"],
            nfe=options["nfe"] or 0,
            seed=options["seed"],
            quantize=options["quantize"],
            read=ReadOptions(
                value_range=options["value_range"],
                limit=options["limit"],
                seed=options["seed"],
                steps=options["steps"],
                device=str(context.device),
            ),
            batch_size=options["batch_size"],
            held_out=options["held_out"],
        ),
    )
    for warning in record.warnings:  # said even when quiet: they decide what a number is worth
        click.echo(f"warning: {warning}", err=True)
    if options["as_json"]:
        click.echo(record.to_json(), nl=False)
    else:
        print_scores(record)
    if not options["no_record"]:
        folder = context.workspace.records(record.dataset.name)
        path = folder / f"{record.cell}.json"
        if not path.exists():  # the same samples scored again give the same record
            write_record(record, folder)
        click.echo(f"record: {path}", err=options["as_json"])


def print_scores(record: Record) -> None:
    """Print one line a metric: value, what it is uncertain by, what real halves score."""
    from cmbench.cli.results import echo_table

    rows = []
    for name, metric in record.metrics.items():
        halves = metric.detail.get("real_halves")
        infinity = metric.detail.get("infinity", {}).get("value")
        rows.append(
            [
                name,
                "-" if metric.value is None else f"{metric.value:.6g}",
                "-" if metric.standard_error is None else f"{metric.standard_error:.2g}",
                "-" if infinity is None else f"{infinity:.6g}",
                " … ".join(f"{x:.5g}" for x in metric.interval) if metric.interval else "-",
                "-" if halves is None else f"{halves:.5g}",
            ]
        )
    copied = record.metrics[record.rank_metric].detail.get("memorisation")
    if copied is not None:
        click.echo(
            f"nearest real image: a reference image for {copied['train_share']:.1%} of the samples"
            f" (50 % expected), distance ratio {copied['distance_ratio']:.3f} (1 expected)"
        )
    header = ["metric", "value", "standard error", "N → ∞", "95 % interval", "real halves"]
    title = f"{record.method}: {record.sampling.num_samples:,} samples on {record.dataset.name}"
    echo_table(header, rows, title=title)
