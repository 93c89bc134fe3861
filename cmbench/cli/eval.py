"""``cmbench eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.common import parse_names
from cmbench.cli.options import ComputeOptions, Parsed, WholeNumber, argument, flag, option, takes
from cmbench.plugin.specs import MAX_BATCH


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ComputeOptions):
    """What the user asked of `cmbench eval`."""

    samples: str = argument()
    dataset: str | None = option(
        "--dataset", "-d", metavar="NAME", help="Compare with this dataset under its protocol."
    )
    reference: str | None = option(
        "--reference",
        metavar="REF",
        help="Compare with this instead: images, a statistics file, or a saved reference.",
    )
    metrics: tuple[str, ...] | None = option(
        "--metrics",
        metavar="M[,M…]",
        type=Parsed(parse_names),
        help="For example fid,is,pr,kid,fid-clean.  [default: the protocol's]",
    )
    extractor: str | None = option(
        "--extractor",
        metavar="NAME",
        help="Extractor of metrics that name none.  [default: the dataset's]",
    )
    weights: Path | None = option(
        "--weights",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="File of the extractor's weights.  [default: where `cmbench prepare` put it]",
    )
    library: bool = flag("--library", help="Run the library's own network and resizer.")
    trust_weights: bool = flag(
        "--trust-weights", help="Run a TorchScript file whose hash is not the pinned one."
    )
    bf16_extractor: bool = flag(
        "--bf16-extractor",
        help="Extract in bfloat16: faster; the metric key changes and the row is not ranked.",
    )
    channels_last_extractor: bool = flag(
        "--channels-last-extractor",
        help="Extract in that memory layout; the metric key changes and the row is not ranked.",
    )
    compile_extractor: bool = flag(
        "--compile-extractor",
        help="Compile the extractor; the metric key changes and the row is not ranked.",
    )
    label: str | None = option("--label", metavar="NAME", help="Name of the row.")
    nfe: int | None = option(
        "--nfe",
        type=WholeNumber(min=1),
        metavar="N",
        help="Network evaluations per sample: recorded in the row; of a run, how many to use.",
    )
    seed: int = option(
        "--seed",
        type=WholeNumber(min=0),
        metavar="N",
        default=0,
        help="Seed of the generator, recorded in the row.",
    )
    limit: int | None = option(
        "--limit", type=WholeNumber(min=2), metavar="N", help="Score at most N samples."
    )
    steps: int | None = option(
        "--steps",
        type=WholeNumber(min=1),
        metavar="N",
        help="Inference steps of a diffusers pipeline.",
    )
    run_pipeline: bool = flag(
        "--run-pipeline",
        help="Run a diffusers pipeline that you trust; custom code in its folder never runs.",
    )
    value_range: str | None = option(
        "--range", metavar="LOW,HIGH", help="Range of float samples: -1,1 or 0,1 or 0,255."
    )
    quantize: str | None = option(
        "--quantize",
        metavar="RULE",
        help="Float samples to bytes: round, truncate, none.  [default: the dataset's]",
    )
    held_out: str | None = option(
        "--held-out",
        metavar="REF",
        help="Real images not used in training: check whether samples copy the reference.",
    )
    batch_size: int = option(
        "--batch-size",
        metavar="N",
        type=WholeNumber(min=1, max=MAX_BATCH),
        default=250,
        help="Images per batch; results do not depend on it.",
    )
    as_json: bool = flag("--json", help="Print the record.")
    no_record: bool = flag("--no-record", help="Print only; write no record.")

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
@takes(EvalOptions)
def eval_(options: EvalOptions) -> None:
    """Score SAMPLES of any generator.

    SAMPLES is a folder of images, a .zip, .npz or .npy, a run of this harness (its id, folder or a
    checkpoint), a diffusers pipeline (with --run-pipeline), or a Python generator as
    module:function: called with sample numbers [N] and a seed, it returns images [N, C, H, W], a
    tensor or a NumPy array, uint8 or float in [-1, 1].

    \b
    cmbench eval samples/ --dataset cifar10
    cmbench eval batch.npz --reference VIRTUAL_imagenet64_labeled.npz --metrics fid,sfid
    cmbench eval mymodel:generate --dataset digits --limit 2000 --label mymodel --nfe 1
    cmbench eval cmbench-out/runs/digits/RUN --nfe 2 --reference other-samples/
    """
    from cmbench.cli.eval_work import carry_out  # imports torch

    carry_out(options)
