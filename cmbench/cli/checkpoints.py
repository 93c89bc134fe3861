"""What ``cmbench import`` and ``cmbench parity`` share: a checkpoint of another project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from cmbench.importers.imported import Parameterization

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """A file, and what the user says about the network in it."""

    checkpoint: Path
    part: str
    parameterization: Parameterization | None
    sigma_min: float | None
    channels_per_head: int | None
    resolution: int | None
    sigma_data: float | None = None


_OPTIONS = (
    click.argument("checkpoint", type=click.Path(path_type=Path), metavar="FILE"),
    click.option(
        "--part",
        metavar="NAME",
        default="ema",
        show_default=True,
        help="Which network, if the file holds several.",
    ),
    click.option(
        "--parameterization",
        type=click.Choice(["edm", "boundary"]),
        default=None,
        help="How the output is read, if the file does not say: as a denoiser's (edm) or a "
        "consistency function's (boundary).",
    ),
    click.option(
        "--sigma-min",
        type=click.FloatRange(0),
        metavar="X",
        default=None,
        help="Noise level of the boundary, if the file does not say.",
    ),
    click.option(
        "--channels-per-head",
        type=click.IntRange(1),
        metavar="N",
        default=None,
        help="Width of an attention head, if the shapes do not determine it.  [default: 64]",
    ),
    click.option(
        "--resolution",
        type=click.IntRange(1),
        metavar="PIXELS",
        default=None,
        help="Side of the images, if the shapes do not determine it.",
    ),
)


def checkpoint_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the options of :class:`CheckpointOptions` to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
