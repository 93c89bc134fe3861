"""What ``cmbench import`` and ``cmbench parity`` share: a checkpoint of another project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cmbench.cli.options import Number, option

if TYPE_CHECKING:
    from cmbench.importers.imported import Parameterization


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What the user says about the network in a checkpoint."""

    part: str = option(
        "--part", metavar="NAME", default="ema", help="Which network, if the file holds several."
    )
    parameterization: Parameterization | None = option(
        "--parameterization",
        type=click.Choice(["edm", "boundary"]),
        help="What the output means, if the file does not say: a denoiser (edm) or a "
        "consistency function (boundary).",
    )
    sigma_min: float | None = option(
        "--sigma-min",
        type=Number(0),
        metavar="X",
        help="Noise level of the boundary, if the file does not say.",
    )
    channels_per_head: int | None = option(
        "--channels-per-head",
        type=click.IntRange(1),
        metavar="N",
        help="Width of an attention head, if the shapes do not determine it.  [default: 64]",
    )
    resolution: int | None = option(
        "--resolution",
        type=click.IntRange(1),
        metavar="PIXELS",
        help="Side of the images, if the shapes do not determine it.",
    )
    ignored: tuple[str, ...] = option(
        "--ignore",
        metavar="NAME",
        multiple=True,
        help="A setting of a pickle that is refused as unknown, and that changes no output.",
    )
