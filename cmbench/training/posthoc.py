"""Power-function averages chosen after training, from snapshots of others.

Karras et al. 2023, EDM2 (arXiv:2312.02696), Sec. 3.2 and Algorithm 3: an average with exponent
``gamma`` at time ``t`` is the integral of the weights' path with the profile
``p(s) = (gamma + 1) s^gamma / t^(gamma + 1)`` on ``[0, t]``. Any other profile is approximated by
the least-squares combination of the stored ones, divided by its sum as in the released code, and
the same combination of the stored averages approximates that average. Profiles are those of
continuous time, as in the paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmbench.errors import UserError, first_names
from cmbench.training.checkpoint import load_checkpoint, read_manifest, save_checkpoint
from cmbench.training.ema import power_exponent
from cmbench.training.state import TrainingState, under

#: A combination whose profile differs from the wanted one by more than this is not offered as it.
TOLERANCE = 0.1
#: Points per interval between snapshots at which profiles are compared.
_POINTS = 512
_LABEL = re.compile(r"power-(0?\.\d+)")


@dataclass(frozen=True)
class Profile:
    """What a power-function average gives each moment of the training: ``sigma_rel`` at ``nimg``.

    ``nimg`` is any measure of time since training began, one for all profiles.
    """

    sigma_rel: float
    nimg: float


def inner_products(one: Sequence[Profile], other: Sequence[Profile]) -> npt.NDArray[np.float64]:
    """Return the integrals of products of profiles, ``[len(one), len(other)]`` (closed form)."""
    a, s = _columns(one)
    b, t = _columns(other)
    a, s = a[:, None], s[:, None]
    earlier, later = np.minimum(s, t), np.maximum(s, t)
    exponent = np.where(s <= t, b, a)  # of the profile that goes on after the other has ended
    ratio: npt.NDArray[np.float64] = (earlier / later) ** exponent
    return (a + 1) * (b + 1) / ((a + b + 1) * later) * ratio


def _columns(
    profiles: Sequence[Profile],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    exponents = [power_exponent(profile.sigma_rel) for profile in profiles]
    return np.array(exponents), np.array([float(profile.nimg) for profile in profiles])


def coefficients(
    stored: Sequence[Profile], wanted: Profile
) -> tuple[npt.NDArray[np.float64], float]:
    """Return one factor for each stored profile, and a bound on the error of the combination.

    The factors sum to one, so that what all averages share (weights that never moved) is kept
    exactly. The bound is :func:`profile_distance`: the combined weights are at most this times the
    largest distance of the weights from any fixed point, over the training, away from the average.

    Raises:
        ValueError: nothing is stored.
    """
    if not stored:
        raise ValueError("no stored profiles")
    products = inner_products(stored, stored)
    norms = np.sqrt(np.diag(products))
    right = inner_products(stored, [wanted])[:, 0]
    # In units of each profile's norm: neighbours are nearly parallel, and so is their matrix.
    factors = np.linalg.lstsq(products / np.outer(norms, norms), right / norms, rcond=1e-12)[0]
    found: npt.NDArray[np.float64] = factors / norms
    found /= found.sum()
    return found, profile_distance(stored, found, wanted)


def profile_distance(
    stored: Sequence[Profile], factors: npt.NDArray[np.float64], wanted: Profile
) -> float:
    """Return the integral of ``|sum of factors times profiles - wanted profile|``, from 0 to 2.

    By the midpoint rule between the times at which profiles end.
    """
    terms = [*zip(stored, factors.tolist(), strict=True), (wanted, -1.0)]
    ends = np.unique([0.0, *(float(profile.nimg) for profile, _ in terms)])
    cells = np.linspace(ends[:-1], ends[1:], _POINTS + 1)
    middles, widths = (cells[1:] + cells[:-1]) / 2, cells[1:] - cells[:-1]
    difference = np.zeros_like(middles)
    for profile, factor in terms:
        gamma = power_exponent(profile.sigma_rel)
        here = middles < profile.nimg
        value = (gamma + 1) / profile.nimg * (middles[here] / profile.nimg) ** gamma
        difference[here] += factor * value
    return float((np.abs(difference) * widths).sum())


def combine(
    averages: Iterable[Mapping[str, Tensor]], factors: Iterable[float]
) -> dict[str, Tensor]:
    """Return the sum of averages times factors, in their own dtype, added up in float64.

    Averages are taken one by one: those of an iterator need not be in memory together.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for factor, average in zip(factors, averages, strict=True):
        for name, value in average.items():
            dtypes.setdefault(name, value.dtype)
            before = total.get(name)
            start = torch.zeros(value.shape, dtype=torch.float64) if before is None else before
            total[name] = start.add_(factor * value.double())
    return {name: value.to(dtypes[name]) for name, value in total.items()}


def asked_width(label: str) -> float | None:
    """Return sigma_rel of a label such as ``power-0.08``, or None if it is not such a label."""
    found = _LABEL.fullmatch(label)
    width = float(found.group(1)) if found else 0.0
    return width if 0 < width < 0.28 else None


# ---- files ---------------------------------------------------------------------------------------


def save_snapshot(folder: Path, state: TrainingState, run: str = "") -> None:
    """Write the power-function averages of the last phase to ``folder``; nothing if it has none.

    ``run`` is the id of the run.
    """
    configs = [average.config for average in state.averages]
    kept = [index for index, config in enumerate(configs) if config.sigma_rel is not None]
    if not kept or state.phase_index != len(state.phases) - 1 or state.nimg == 0:
        return
    tensors = {f"{configs[i].label}/{k}": v for i in kept for k, v in state.averaged(i).items()}
    meta = {
        "run": run,
        "nimg": state.nimg,
        "seen_nimg": state.seen_nimg,
        "sigma_rel": {configs[i].label: configs[i].sigma_rel for i in kept},
    }
    save_checkpoint(folder / f"{state.nimg:014d}.safetensors", tensors, meta)


def reconstruct(
    folder: Path, sigma_rel: float, seen_nimg: int | None = None, run: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the averaged parameters of width ``sigma_rel`` at the newest snapshot in ``folder``.

    Beside them stands what they were made from: SHA-256 by file name of a snapshot.

    Args:
        folder: snapshots of a run.
        sigma_rel: the width wanted.
        seen_nimg: images over all phases that the newest snapshot must have seen.
        run: the id of the run that the snapshots must be of; empty if that is not known.

    Raises:
        UserError: the snapshots are missing, damaged or of another run, the newest is of another
            moment, or they do not determine this width to within :data:`TOLERANCE`.
    """
    who = f"average power-{sigma_rel:g} of {folder.parent}"
    files = sorted(folder.glob("*.safetensors"))
    remedy = "choose an average that the recipe keeps"
    if not files:
        raise UserError(who, "no snapshots to reconstruct it from", remedy=remedy)
    metas, hashes = zip(*(read_manifest(file, remedy) for file in files), strict=True)
    others = first_names(sorted({m["run"] for m in metas if m.get("run") and run} - {run}), 3)
    if others:
        back = f"put the run's own snapshots back, or {remedy}"
        raise UserError(who, f"snapshots of another run: {others}", allowed=run, remedy=back)
    newest = metas[-1].get("seen_nimg", seen_nimg)
    if seen_nimg is not None and newest != seen_nimg:
        raise UserError(
            who,
            f"its newest snapshot has seen {newest} images, the weights {seen_nimg}",
            allowed="the snapshot of the end of training",
            remedy=f"restore it, or {remedy}",
        )
    stored = [
        Profile(float(width), float(meta["nimg"]))
        for meta in metas
        for width in meta["sigma_rel"].values()
    ]
    wanted = Profile(sigma_rel, max(profile.nimg for profile in stored))
    factors, error = coefficients(stored, wanted)
    if error > TOLERANCE:
        raise UserError(
            who,
            f"{len(stored)} stored averages determine it to {error:.0%} only",
            allowed=f"errors up to {TOLERANCE:.0%}: widths near the stored ones",
            remedy="keep two widths around it, and more checkpoints (checkpoint_kimg)",
        )
    made = combine(_averages(files, metas, remedy), [float(f) for f in factors])
    return made, {f.name: h for f, h in zip(files, hashes, strict=True)}


def _averages(
    files: Sequence[Path], metas: Sequence[Mapping[str, Any]], remedy: str
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the averages of one snapshot after another, in the order of their profiles."""
    for file, meta in zip(files, metas, strict=True):
        snapshot = load_checkpoint(file, remedy)
        for label in meta["sigma_rel"]:
            yield under(snapshot.tensors, f"{label}/")
