"""Checkpoints in the formats of others, built from official weights without their code."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden" / "networks"


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("the importer called EDM's own function")


class EasyDict(dict):  # type: ignore[type-arg]
    """As dnnlib's: items are attributes."""


class Persistent:
    """Pickles as an object of EDM's ``@persistence.persistent_class`` does."""

    def __init__(self, class_name: str, state: Mapping[str, Any], source: str = "") -> None:
        self.class_name, self.state, self.source = class_name, dict(state), source

    def __reduce__(self) -> tuple[Any, ...]:
        meta = EasyDict(
            type="class",
            version=6,
            module_src=self.source,
            class_name=self.class_name,
            state=self.state,
        )
        return (_reconstruct_persistent_obj, (meta,), None)


@contextmanager
def official_names(persistence: str = "torch_utils.persistence") -> Iterator[None]:
    """Let pickle find EDM's names while a file is written; they are gone afterwards."""
    homes: dict[str, dict[str, Any]] = {
        persistence: {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    added: list[str] = []
    for home, members in homes.items():
        module = types.ModuleType(home)
        for name, member in members.items():
            member.__module__ = home
            setattr(module, name, member)
        parts = home.split(".")
        added += [".".join(parts[: i + 1]) for i in range(len(parts))]
        for name in added:
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules[home] = module
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def inert_tree(weights: Mapping[str, Tensor], class_name: str, **attributes: Any) -> Persistent:
    """Return nested pickled modules with these weights under their dotted names.

    ``enc`` and ``dec`` are torch's own ModuleDict, as in the originals; ``resample_filter`` and
    ``freqs`` are buffers; blocks with ``qkv`` say their number of heads.
    """
    heads = attributes.pop("heads", {})
    return _node("", weights, class_name, attributes, heads)


def _node(
    prefix: str,
    weights: Mapping[str, Tensor],
    class_name: str,
    attributes: Mapping[str, Any],
    heads: Mapping[str, int],
) -> Any:
    parameters: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    children: dict[str, dict[str, Tensor]] = OrderedDict()
    for name, value in weights.items():
        child, dot, rest = name.partition(".")
        if dot:
            children.setdefault(child, {})[rest] = value
        elif name in ("resample_filter", "freqs", "phases"):
            buffers[name] = value
        else:
            parameters[name] = nn.Parameter(value, requires_grad=False)
    modules = {
        child: _node(f"{prefix}{child}.", inner, _class_of(child), {}, heads)
        for child, inner in children.items()
    }
    if prefix.endswith((".enc.", ".dec.")):
        container = nn.ModuleDict()
        container.__dict__["_modules"] = modules
        return container
    state = {
        "training": False,
        "_parameters": parameters,
        "_buffers": buffers,
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_modules": modules,
        "_init_args": (),
        "_init_kwargs": EasyDict(dropout=0.13),
        **attributes,
    }
    if prefix in heads:
        state |= {"num_heads": heads[prefix], "out_channels": 16 * heads[prefix]}
    return Persistent(class_name, state, "raise AssertionError('source code was executed')")


def _class_of(name: str) -> str:
    if "block" in name or name.endswith(("_in0", "_in1", "_up", "_down")):
        return "UNetBlock"
    return {"model": "SongUNet", "unet": "UNet"}.get(name, "Conv2d")


def write_pickle(path: Path, data: Any, protocol: int = 4, **names: str) -> Path:
    """Pickle ``data`` under the names of the official code."""
    with official_names(**names):
        path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


def write_edm(
    path: Path, weights: Mapping[str, Tensor], class_name: str = "EDMPrecond", **attributes: Any
) -> Path:
    """A network snapshot as EDM's training loop writes it."""
    protocol = attributes.pop("protocol", 4)
    loss = attributes.pop("loss", Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2}))
    network = inert_tree(weights, class_name, **({"sigma_data": 0.5} | attributes))
    data = {
        "ema": network,
        "loss_fn": loss,
        "augment_pipe": Persistent("AugmentPipe", {"p": 0.12, "noise": torch.ones(2)}),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset"),
    }
    return write_pickle(path, data, protocol)
