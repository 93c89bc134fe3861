"""Imported checkpoints: a network of cmbench with the weights of another project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError
from torch import Tensor

from cmbench.errors import UserError
from cmbench.files import sha256_file
from cmbench.networks.base import Network
from cmbench.networks.catalog import NETWORKS
from cmbench.networks.official_names import from_official
from cmbench.networks.recognize import Recognized, with_filters
from cmbench.plugin.specs import load_object
from cmbench.training.checkpoint import save_checkpoint

#: How the output F of a network is read. ``edm``: as a denoiser's, ``D = c_skip x + c_out F`` with
#: EDM's scalings. ``boundary``: as a consistency function's, with f(x, sigma_min) = x.
#: Empty: the file does not say.
Parameterization = Literal["edm", "boundary", ""]
#: How many times its file a checkpoint may be in memory, as it is stored.
MOST_TIMES = 4


@dataclass(frozen=True)
class Found:
    """A network under the names of its own project, before conversion."""

    format: str
    state: Mapping[str, Tensor]
    recognized: Recognized
    parameterization: Parameterization = ""
    sigma_data: float | None = None
    sigma_min: float | None = None
    description: Mapping[str, Any] = field(default_factory=dict)


class Facts(BaseModel):
    """What is known of an imported network beside its weights: its manifest."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        arbitrary_types_allowed=True,
    )

    network: dict[str, Any] = Field(description="name in the catalogue, and options of its config")
    data_shape: tuple[int, int, int] = Field(description="(C, H, W) of an image")
    num_classes: int = Field(ge=0, description="0 when unconditional")
    format: str = Field(description="which reader read it")
    assumed: dict[str, Any] = Field(description="options that the file does not contain")
    #: how the output is read, if the file says so; identities depend on the alias
    parameterization: Parameterization = Field(alias="preconditioning")
    sigma_data: float | None = Field(gt=0, description="standard deviation of the training data")
    sigma_min: float | None = Field(ge=0, description="boundary of a consistency function")
    description: dict[str, Any] = Field(description="other metadata of the file, as plain data")
    source: dict[str, str] = Field(description="name and hash of the file, its address if public")


class ImportedNetwork(Facts):
    """A network of ours with imported weights: ``state`` is our state dict, float32."""

    state: SkipValidation[Mapping[str, Tensor]] = Field(exclude=True, repr=False)

    @property
    def architecture(self) -> str:
        """Name of the network in the catalogue."""
        return str(self.network["name"])

    @property
    def options(self) -> dict[str, Any]:
        """Options of the network's own config."""
        return {k: v for k, v in self.network.items() if k != "name"}

    def build(self) -> Network:
        """Return the network with its weights, in evaluation mode."""
        module = build_network(self.network, self.data_shape, self.num_classes)
        module.load_state_dict(dict(self.state))
        return module.eval()

    def facts(self) -> dict[str, Any]:
        """Return everything but the weights, as plain data."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: Path) -> str:
        """Write ``path`` (``.safetensors``) and its manifest; return the hash."""
        return save_checkpoint(path, dict(self.state), {"imported": self.facts()})


def build_network(
    table: Mapping[str, Any], shape: tuple[int, int, int], num_classes: int
) -> Network:
    """Build one of our networks from its name in the catalogue and its options."""
    options = dict(table)
    cls: Any = load_object({entry.name: entry.factory for entry in NETWORKS}[options.pop("name")])
    network: Network = cls(cls.Config(**options), shape, num_classes)
    return network


def _require_proportion(state: Mapping[str, Tensor], path: Path, weights: Path) -> None:
    """Raise ``UserError`` for tensors that together are far larger than their file.

    Many may be views of one storage; each is about to become a float32 tensor of its own.
    """
    size = weights.stat().st_size
    taken = sum(t.numel() * t.element_size() for t in state.values())
    if taken > MOST_TIMES * size + 2**20:
        raise UserError(
            f"checkpoint {path}",
            f"holds tensors of {taken:,} bytes in a file of {size:,}",
            allowed=f"up to {MOST_TIMES} times its size",
            remedy="get the file from its original source",
        )


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in options.items()) or "the options of its shapes"


def _converted(known: Recognized, theirs: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return our state dict in float32; raise ``UserError`` unless names and shapes agree."""
    state = {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in theirs.items()
    }
    try:
        with torch.device("meta"):
            table = {"name": known.network, **known.options}
            network = build_network(table, known.data_shape, known.num_classes)
        return from_official(network, state, known.family)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise UserError(
            f"checkpoint {path}",
            f"{option} is {str(first['input'])[:60]} in a {known.network}: {first['msg']}",
            allowed="the published networks' settings",
            remedy="this variant of the architecture cannot be imported",
        ) from None
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:120]
        raise UserError(
            f"checkpoint {path}",
            f"its tensors do not fit a {known.network} with {_words(known.assumed)} ({detail})",
            allowed="the published networks' settings",
            remedy="give what shapes do not determine: --channels-per-head, --resolution",
        ) from None


def to_ours(found: Found, path: Path, weights: Path) -> ImportedNetwork:
    """Rename and convert the weights; names and shapes must agree to the last one.

    ``path`` names the source in messages, ``weights`` is the file that is hashed.
    """
    _require_proportion(found.state, path, weights)
    known = with_filters(found.recognized, found.state)
    ours = _converted(known, found.state, path)
    bad = [name for name, tensor in ours.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"checkpoint {path}",
            f"{len(bad)} tensors are not finite, the first being {bad[0]!r}",
            allowed="finite numbers",
            remedy="the training that made it diverged, or the file is damaged: get another one",
        )
    return ImportedNetwork(
        network={"name": known.network, **known.options},
        data_shape=known.data_shape,
        num_classes=known.num_classes,
        state={name: tensor.contiguous() for name, tensor in ours.items()},
        format=found.format,
        assumed=dict(known.assumed),
        parameterization=found.parameterization,
        sigma_data=found.sigma_data,
        sigma_min=found.sigma_min,
        description=dict(found.description),
        source={"name": path.name, "sha256": sha256_file(weights)},
    )
