"""Does an imported network compute what the original does? Seeded inputs, and the comparison.

The official code writes its outputs for the inputs made here into a safetensors file (``docs/
parity.md`` has the lines to run there); this side computes the same and reports the largest
relative error. Tensors of that file:

- ``in.x`` ``[N, C, H, W]`` noisy images, ``in.sigma`` ``[N]`` noise levels, ``in.labels`` int64
  ``[N]`` classes (or one-hot ``[N, K]``), ``in.augment_labels`` ``[N, A]``; the last two where the
  network takes them;
- one or more of ``out.denoised`` (EDM's ``D(x, sigma)``), ``out.consistency`` (the same network
  under the boundary scalings) and ``out.raw`` (the network itself at EDM's scaled input).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cmbench.diffusion.models import EDMConsistency, EDMModel
from cmbench.diffusion.preconditioning import edm_scalings
from cmbench.errors import UserError, first_names
from cmbench.files import write_atomically
from cmbench.importers.diffusers_folder import load_safetensors
from cmbench.importers.imported import ImportedNetwork
from cmbench.networks.base import Network
from cmbench.seeds import derive_seed

#: What agreement means in float32.
TOLERANCE = 1e-4
_SIGMA_DATA, _SIGMA_RANGE = 0.5, (0.01, 80.0)
_OUTPUTS = ("out.denoised", "out.consistency", "out.raw")


class Agreement(NamedTuple):
    """An output's name, how many images were compared, and the largest relative error.

    The error of an image is the largest deviation over the largest magnitude of the reference.
    """

    output: str
    images: int
    error: float


def seeded_inputs(found: ImportedNetwork, count: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return ``count`` inputs, float32, from noise levels 0.01 to 80, spread evenly in ln sigma."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "parity"))
    low, high = (torch.tensor(s, dtype=torch.float64).log() for s in _SIGMA_RANGE)
    sigma = (low + (high - low) * torch.linspace(0, 1, count, dtype=torch.float64)).exp().float()
    shape = (count, *found.data_shape)
    data = (found.sigma_data or _SIGMA_DATA) * torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    inputs = {"in.x": data + sigma[:, None, None, None] * noise, "in.sigma": sigma}
    if found.num_classes:
        inputs["in.labels"] = torch.randint(found.num_classes, (count,), generator=generator)
    width = int(found.options.get("augment_dim", 0))
    if width:
        inputs["in.augment_labels"] = torch.rand((count, width), generator=generator)
    return inputs


def write_inputs(found: ImportedNetwork, path: Path, count: int = 8, seed: int = 0) -> None:
    """Write the seeded inputs as safetensors."""
    from safetensors.torch import save

    write_atomically(path, save(seeded_inputs(found, count, seed)))


def read_reference(path: Path, found: ImportedNetwork) -> dict[str, Tensor]:
    """Read inputs and official outputs; raise ``UserError`` unless they fit the network."""
    who = f"reference {path}"
    tensors = load_safetensors(path, "reference")
    missing = {"in.x", "in.sigma"} - tensors.keys()
    if missing or not any(name in tensors for name in _OUTPUTS):
        raise UserError(
            who,
            f"holds {first_names(sorted(tensors), 8) or 'nothing'}",
            allowed=f"in.x, in.sigma and one of {', '.join(_OUTPUTS)}",
            remedy="make it as docs/parity.md says",
        )
    count = tensors["in.sigma"].numel()
    if count == 0:
        raise UserError(
            who, "holds no images", allowed="at least one", remedy="make it as docs/parity.md says"
        )
    shapes: dict[str, list[tuple[int, ...]]] = {
        name: [(count, *found.data_shape)] for name in ("in.x", *_OUTPUTS)
    }
    shapes["in.sigma"] = [(count,)]
    shapes["in.labels"] = [(count,), (count, found.num_classes)] if found.num_classes else []
    width = int(found.options.get("augment_dim", 0))
    shapes["in.augment_labels"] = [(count, width)] if width else []
    for name, allowed in shapes.items():
        if name in tensors and tuple(tensors[name].shape) not in allowed:
            raise UserError(
                who,
                f"{name} has shape {tuple(tensors[name].shape)}",
                allowed=" or ".join(map(str, allowed)) or "no such tensor: the network takes none",
                remedy="make it for this checkpoint",
            )
    _check_labels(tensors.get("in.labels"), found.num_classes, who)
    return tensors


def _check_labels(labels: Tensor | None, num_classes: int, who: str) -> None:
    """Raise ``UserError`` for a class that the network does not have, or for no class."""
    if labels is None and num_classes:
        raise UserError(
            who,
            f"holds no in.labels, and the network knows {num_classes} classes",
            allowed=f"classes from 0 to {num_classes - 1}",
            remedy="make it for this checkpoint",
        )
    if labels is None or labels.ndim != 1:
        return
    wrong = labels[(labels < 0) | (labels >= num_classes) | (labels != labels.long())]
    if len(wrong):
        raise UserError(
            who,
            f"in.labels has {wrong[0].item():g}",
            allowed=f"classes from 0 to {num_classes - 1}",
            remedy="make it for this checkpoint",
        )


def compare(
    found: ImportedNetwork, reference: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> list[Agreement]:
    """Return the agreement of each output that the reference holds, computed in ``dtype``.

    Raises:
        UserError: ``out.consistency`` is there and the boundary is not known.
    """
    network = found.build().to(dtype)
    outputs = {name: reference[name] for name in _OUTPUTS if name in reference}
    errors = dict.fromkeys(outputs, 0.0)
    count = len(reference["in.x"])
    for i in range(count):  # one at a time: the published networks are large
        row = {name: value[i : i + 1] for name, value in reference.items()}
        for name in outputs:
            with torch.no_grad():
                ours = _output(name, found, network, row, dtype).double()
            theirs = row[name].double()
            scale = theirs.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            error = float((ours - theirs).abs().max() / scale)
            errors[name] = max(errors[name], error if error == error else torch.inf)
    return [Agreement(name, count, error) for name, error in errors.items()]


def _output(
    name: str,
    found: ImportedNetwork,
    network: Network,
    row: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    x, sigma = row["in.x"].to(dtype), row["in.sigma"].to(dtype)
    labels = row.get("in.labels")
    if labels is not None:
        labels = labels.argmax(1) if labels.ndim == 2 else labels.long()
    augment = row.get("in.augment_labels")
    extra = {} if augment is None else {"augment_labels": augment.to(dtype)}
    sigma_data = found.sigma_data or _SIGMA_DATA
    if name == "out.consistency":
        if found.sigma_min is None:
            raise UserError(
                "cmbench parity",
                "the checkpoint does not say its boundary's noise level",
                allowed="for example 0.002",
                remedy="add --sigma-min",
            )
        return EDMConsistency(network, sigma_data, found.sigma_min)(x, sigma, labels, **extra)
    if name == "out.raw":
        scalings = edm_scalings(sigma, sigma_data)
        made: Tensor = network(
            scalings.c_in[:, None, None, None] * x, scalings.c_noise, labels, **extra
        )
        return made
    return EDMModel(network, sigma_data).denoise(x, sigma, labels, **extra)
