"""The networks that every conformance test runs on, small and with random non-zero weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmbench.networks.base import Network
from cmbench.networks.catalog import NETWORKS
from cmbench.networks.official_names import OfficialFamily, _to_theirs, official_tensors
from cmbench.plugin.specs import load_object

_SMALL = {"channels": 16, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (8,)}
_IMAGE = (3, 16, 16)


class Case(NamedTuple):
    name: str
    network: str
    options: dict[str, Any]
    data_shape: tuple[int, int, int] = _IMAGE
    num_classes: int = 0


CASES = (
    Case("unet-tiny", "unet-tiny", {"dropout": 0.1}, (1, 8, 8), 10),
    Case(
        "unet-tiny-double",
        "unet-tiny",
        {
            "channel_mult": (1, 2),
            "patch_size": 1,
            "attention_resolutions": (4,),
            "conditioning": "double",
            "dropout": 0.1,
        },
        (1, 8, 8),
        10,
    ),
    Case("mlp", "mlp", {"dropout": 0.1, "width": 32, "blocks": 2}, (2, 1, 1)),
    Case("mlp-images", "mlp", {"width": 32, "augment_dim": 4}, (1, 4, 4), 3),
    Case("ddpmpp", "ddpmpp", {**_SMALL, "augment_dim": 9, "dropout": 0.1}),
    Case("ddpmpp-double", "ddpmpp", {**_SMALL, "conditioning": "double"}, num_classes=10),
    Case("ncsnpp", "ncsnpp", {**_SMALL, "fourier_scale": 1.0, "dropout": 0.1}, num_classes=10),
    Case("adm", "adm", {**_SMALL, "channels_per_head": 16, "dropout": 0.1}, num_classes=10),
    Case("edm2", "edm2", {**_SMALL, "channels_per_head": 16, "dropout": 0.1}, num_classes=10),
    Case(
        "edm2-double",
        "edm2",
        {**_SMALL, "channels_per_head": 16, "conditioning": "double", "embedding": "positional"},
    ),
    # Several states of a trajectory at once, an even and an odd number, with fewer modes and all.
    Case("unet-tiny-states", "unet-tiny", {"dropout": 0.1, "states": 4}, (1, 8, 8), 10),
    Case("mlp-states", "mlp", {"width": 32, "states": 4, "temporal_modes": 3}, (2, 1, 1)),
    Case("ddpmpp-states", "ddpmpp", {**_SMALL, "augment_dim": 9, "states": 3}),
    Case("adm-states", "adm", {**_SMALL, "channels_per_head": 16, "states": 2}, num_classes=10),
    Case("edm2-states", "edm2", {**_SMALL, "channels_per_head": 16, "states": 5}),
)
#: One case per class of network, for the costlier tests.
FEW = tuple(case for case in CASES if case.name in {"unet-tiny", "mlp", "ddpmpp", "adm", "edm2"})


def build(case: Case, *, seed: int = 0) -> Network:
    """Return the network with every weight moved off its (often zero) start."""
    torch.manual_seed(seed)
    cls: Any = load_object({entry.name: entry.factory for entry in NETWORKS}[case.network])
    network: Network = cls(cls.Config(**case.options), case.data_shape, case.num_classes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Less of what has a kink: its derivative jumps where a rounding crosses it.
            size = 0.01 if "temporal." in name else 0.1
            parameter.add_(size * torch.randn_like(parameter))
    return network


def official_state(network: Network, family: OfficialFamily) -> dict[str, Tensor]:
    """The official state dict of a network's weights: the inverse of ``from_official``."""
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    return {
        tensor.official: _to_theirs(own[tensor.ours].detach(), tensor)
        for tensor in official_tensors(network, family)
    }


def official_shapes(network: Network, family: OfficialFamily) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in official_state(network, family).items()}


class Inputs(NamedTuple):
    x: Tensor
    c_noise: Tensor
    dx: Tensor
    dc_noise: Tensor
    labels: Tensor | None
    augment_labels: Tensor | None

    def point(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The arguments of a plain forward."""
        return self.x, self.c_noise, self.labels, self.augment_labels

    def to(self, device: str) -> Inputs:
        return Inputs(*(None if t is None else t.to(device) for t in self))

    def double(self) -> Inputs:
        return Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in self))


def label_shape(network: Network, n: int) -> tuple[int, ...]:
    """The shape of the noise labels of n images: one label per state."""
    return (n,) if network.config.states == 1 else (n, network.config.states)


def inputs_for(network: Network, n: int = 2, *, seed: int = 1) -> Inputs:
    """Random inputs: c_noise in [0, 1.5] like TrigFlow's t, tangents of unit size."""
    g = torch.Generator().manual_seed(seed)
    shape = (n, *network.data_shape)
    classes, augment = network.num_classes, network.config.augment_dim
    labelled = label_shape(network, n)
    return Inputs(
        torch.randn(shape, generator=g),
        torch.rand(labelled, generator=g) * 1.5,
        torch.randn(shape, generator=g),
        torch.randn(labelled, generator=g),
        torch.randint(classes, (n,), generator=g) if classes else None,
        torch.randn(n, augment, generator=g) if augment else None,
    )


def relative(a: Tensor, b: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def central_difference(network: Network, inputs: Inputs) -> Tensor:
    """The directional derivative in float64 (the network is returned in its own dtype)."""
    # The mixing of states has a kink, which a large step crosses in places.
    step = 1e-5 if network.config.states == 1 else 1e-8
    dtype = next(network.parameters()).dtype
    network.double()
    x, c, dx, dc, labels, augment = inputs.double()
    with torch.no_grad():
        ahead = network(x + step * dx, c + step * dc, labels, augment)
        behind = network(x - step * dx, c - step * dc, labels, augment)
    network.to(dtype)
    return (ahead - behind) / (2.0 * step)
