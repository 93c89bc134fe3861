"""The work of ``cmbench sample``: everything that needs torch."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmbench.api.models import OpenedRun, opened
from cmbench.cli.common import make_context, stop_asker
from cmbench.cli.output import echo
from cmbench.cli.sample import SampleOptions
from cmbench.errors import UserError
from cmbench.files import write_atomically
from cmbench.measure.gallery import grid_png, save_pngs
from cmbench.metrics.quantize import quantize


def carry_out(options: SampleOptions) -> None:
    """Make the images of every NFE and write them."""
    with stop_asker(None) as should_stop:
        context = make_context(options, should_stop=should_stop)
        require_new(options)
        model = opened(context, options.run, options.dataset, None, options.seed, {})
        for nfe in options.nfes or (None,):
            write(options, model, nfe, several=len(options.nfes or ()) > 1)


def outputs(options: SampleOptions, nfe: int | None) -> list[Path]:
    """Return the grid and the folder or archive of one of several NFE (None: of the only one)."""
    suffix = "" if nfe is None else f"-nfe{nfe}"
    return [named(path, suffix) for path in (options.grid, options.out) if path is not None]


def require_new(options: SampleOptions) -> None:
    """Raise ``UserError`` if an output exists: images of two samplings must never mix."""
    nfes = options.nfes or ()
    for path in [p for nfe in (nfes if len(nfes) > 1 else (None,)) for p in outputs(options, nfe)]:
        if not path.exists() or options.force or (path.is_dir() and not any(path.iterdir())):
            continue
        raise UserError(
            "cmbench sample",
            f"{path} exists",
            allowed="a new path",
            remedy="name another one, or add --force",
        )


def write(options: SampleOptions, model: OpenedRun, nfe: int | None, *, several: bool) -> None:
    """Make the images of one NFE, write them, and say where they are and what they cost."""
    sigmas = options.sigmas
    assert not isinstance(sigmas, str), "refused before torch was imported"
    made = model.samples(
        options.count,
        nfe,
        options.seed,
        labels=repeated(options.labels, options.count),
        sigmas=sigmas,
        sampler=options.sampler,
        ema=options.ema,
        precision=options.precision,
    )
    batches = list(made.source.batches(options.batch_size))
    images = torch.cat([batch.images.cpu() for batch in batches])
    found = [batch.labels.cpu() for batch in batches if batch.labels is not None]
    labels = torch.cat(found) if found else None
    written = outputs(options, made.cell.nfe if several else None)
    for path in written:
        if path.suffix == ".png":
            write_atomically(path, grid_png(images), "name another file with --grid")
        elif path.suffix == ".npz":
            write_atomically(path, npz(images, labels), "name another file with --out")
        else:
            for old in path.glob("[0-9]*.png"):
                old.unlink()
            save_pngs(images, 0, path, remedy="name another folder with --out")
    where = ", ".join(map(str, written))
    echo(
        f"NFE {made.cell.nfe} (counted {made.sampler.nfe_measured:g}): "
        f"{len(images)} images of {model.run_id}, seed {options.seed}: {where}"
    )


def repeated(labels: tuple[int, ...] | None, count: int) -> Tensor | None:
    """Return classes in turn, int64 ``[count]``."""
    if labels is None:
        return None
    return torch.tensor(labels).repeat(-(-count // len(labels)))[:count]


def named(path: Path, suffix: str) -> Path:
    """Return ``path`` with ``suffix`` before its extension."""
    return path.with_name(f"{path.stem}{suffix}{path.suffix}")


def npz(images: Tensor, labels: Tensor | None) -> bytes:
    """Return images as OpenAI's sample batch; data that are not pictures as floats."""
    pictures = images.shape[1] in (1, 3)
    pixels = quantize(images.clamp(-1, 1), "round") if pictures else images
    arrays = [pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    if labels is not None:
        arrays.append(labels.numpy())
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    return buffer.getvalue()
