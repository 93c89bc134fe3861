"""The work of ``cmbench eval``: everything that needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmbench.cli.common import echo_table, make_context
from cmbench.cli.eval import EvalOptions
from cmbench.cli.output import echo
from cmbench.errors import UserError
from cmbench.leaderboard.details import extrapolation_of, floor_of, interval_of
from cmbench.records.keeping import keep_record
from cmbench.records.record import Record
from cmbench.samples.source import ReadOptions
from cmbench.sweep.context import Context
from cmbench.sweep.scored import score
from cmbench.sweep.scored_record import ScoreRequest


def carry_out(options: EvalOptions) -> None:
    """Score the samples, write the record, print the values."""
    context = make_context(options)
    record = score(context, make_request(options, str(context.device)))
    kept = Kept() if options.no_record else keep_first(context, record, "cmbench eval")
    print_warnings(record)
    if options.as_json:
        echo(record.to_json(), nl=False)
    else:
        print_scores(record)
    kept.tell(err=options.as_json)


@dataclass(frozen=True)
class Kept:
    """Where a record was written, or why it was not; neither if it was not to be."""

    path: Path | None = None
    refusal: UserError | None = None

    def tell(self, *, err: bool = False) -> None:
        """Print the path, or raise the refusal: the last thing that a verb says."""
        if self.refusal is not None:
            raise self.refusal
        if self.path is not None:
            echo(f"record: {self.path}", err=err)


def keep_first(context: Context, record: Record, who: str) -> Kept:
    """Write a record before anything is printed: whoever reads may stop reading.

    What was measured is printed even where the record is refused.
    """
    folder = context.workspace.records(record.dataset.name)
    new = not (folder / f"{record.cell}.json").exists()
    try:
        path = keep_record(record, folder, who)
    except UserError as error:
        return Kept(refusal=error)
    if new:
        context.notify("cmbench_cell_finished", record=record)
    return Kept(path)


def print_warnings(record: Record) -> None:
    """Print a record's warnings, even when quiet: they decide what a number is worth."""
    for warning in record.warnings:
        echo(f"warning: {warning}", err=True)


def make_request(options: EvalOptions, device: str) -> ScoreRequest:
    """Return the evaluation that the options ask for."""
    return ScoreRequest(
        samples=options.samples,
        dataset=options.dataset,
        reference=options.reference,
        metrics=options.metrics or (),
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
            run_pipeline=options.run_pipeline,
        ),
        batch_size=options.batch_size,
        held_out=options.held_out,
    )


def print_scores(record: Record) -> None:
    """Print one line per metric: value, uncertainty, extrapolation, floor."""
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
                + ("" if infinity.reliable else " unreliable")
                if infinity
                else "-",
                floor.number if floor else "-",
            ]
        )
    copied = record.metrics[record.rank_metric].detail.get("memorisation")
    if copied is not None:
        echo(
            f"nearest real image: a reference image for {copied['train_share']:.1%} of the samples"
            f" (50 % expected), distance ratio {copied['distance_ratio']:.3f} (1 expected)"
        )
    header = ["metric", "value", "standard error", "95 % interval", "N → ∞", "floor or ceiling"]
    name = record.label or record.method
    title = f"{name}: {record.sampling.num_samples:,} samples on {record.dataset.name}"
    echo_table(header, rows, title=title)
