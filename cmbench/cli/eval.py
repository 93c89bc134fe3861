"""``cmbench eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cmbench.cli.common import ContextOptions, WholeNumber, context_options, json_option, takes


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
    from cmbench.cli.eval_work import carry_out  # imports torch

    carry_out(options)
