"""The work of ``cmbench import`` and ``cmbench parity`` on a checkpoint: what needs torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from cmbench.cli.checkpoints import CheckpointOptions
from cmbench.errors import UserError
from cmbench.importers.imported import ImportedNetwork, build_network
from cmbench.importers.read import read_checkpoint
from cmbench.importers.wrappers import WRAPPERS
from cmbench.networks.base import num_parameters
from cmbench.training.checkpoint import load_checkpoint


def read(
    path: Path, options: CheckpointOptions, sigma_data: float | None = None
) -> ImportedNetwork:
    """Read a checkpoint; constants that the file leaves open come from the options.

    Raises:
        UserError: the file cannot be read, or an option contradicts it.
    """
    found = read_checkpoint(
        path,
        part=options.part,
        parameterization=options.parameterization or "",
        channels_per_head=options.channels_per_head,
        resolution=options.resolution,
        ignored=options.ignored,
    )
    constants = {
        "sigma_data": constant("--sigma-data", sigma_data, found.sigma_data),
        "sigma_min": constant("--sigma-min", options.sigma_min, found.sigma_min),
    }
    return found.model_copy(update=constants)


def constant(option: str, value: float | None, in_file: float | None) -> float | None:
    """Return the option's value, or the file's; raise ``UserError`` if the two disagree."""
    if value is None:
        return in_file
    if not math.isfinite(value):
        raise UserError(
            option,
            f"{value:g}",
            allowed="a finite number",
            remedy="give the constant that the network was trained with",
        )
    if in_file not in (None, value):
        raise UserError(option, f"{value:g}: the file says {in_file:g}", remedy="leave it out")
    return value


def keep(found: ImportedNetwork, target: Path, *, force: bool, ours: bool) -> str:
    """Write weights and manifest and return the hash; never replace another checkpoint.

    ``ours``: the target is in the workspace, where weights without a manifest are left by an import
    that was stopped. Elsewhere they are a file of the user, perhaps the checkpoint itself.
    """
    manifest = target.with_suffix(".json")
    if target.exists() and not (manifest.exists() or force or ours):
        raise UserError(
            "cmbench import",
            f"{target} already exists and was not imported",
            allowed="a new file",
            remedy="choose one with --to, or replace it with --force",
        )
    if manifest.exists() and not force:
        there = load_checkpoint(target, remedy="import it again with --force")
        if there.meta == json.loads(json.dumps({"imported": found.facts()})):
            return there.sha256
        raise UserError(
            "cmbench import",
            f"{target} is another checkpoint or has other facts about it",
            allowed="a new name",
            remedy="choose one with --to, or replace it with --force",
        )
    manifest.unlink(missing_ok=True)  # without it the old file does not count, if this stops now
    return found.save(target)


def describe(found: ImportedNetwork) -> list[str]:
    """Return what was recognised, as lines of text."""
    with torch.device("meta"):
        network = build_network(found.network, found.data_shape, found.num_classes)
    said = [str(found.description[key]) for key in ("class", "part") if key in found.description]
    options = ", ".join(f"{k} {_plain(v)}" for k, v in found.options.items())
    words = {"edm": "edm (a denoiser)", "boundary": "boundary (a consistency function)"}.get(
        found.parameterization, "unknown: give it with --parameterization before using the network"
    )
    constants = [
        f"{name} {value:g}"
        for name, value in (("sigma_data", found.sigma_data), ("sigma_min", found.sigma_min))
        if value is not None
    ]
    lines = [
        f"format           {found.format}" + (f" ({', '.join(said)})" if said else ""),
        f"network          {found.architecture}: {options}",
        f"parameters       {num_parameters(network):,}",
        f"images           {'x'.join(map(str, found.data_shape))}",
        f"classes          {found.num_classes or 'none (unconditional)'}",
        f"parameterization {', '.join([words, *constants])}",
    ]
    if found.description.get("stripped"):
        known = ", ".join(f"{n}. ({WRAPPERS[n]})" for n in found.description["stripped"])
        lines.append(f"stripped         {known}, from the names of tensors")
    if found.description.get("ignored"):
        lines.append(f"ignored          {', '.join(found.description['ignored'])}")
    if found.assumed:
        assumed = ", ".join(f"{k} {_plain(v)}" for k, v in found.assumed.items())
        lines.append(f"assumed          {assumed} (not determined by the shapes)")
    return lines


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
