"""Imported checkpoints of a workspace: found by name, described, built, loaded.

``cmbench import`` leaves ``imported/<name>.safetensors`` with a manifest beside it. Such
a model is referred to as ``import:NAME``, ``import:FILE.safetensors``, or, in a resolved recipe, as
``import:NAME@HASH``: the content is part of the identity of runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmbench.errors import MissingError, UserError
from cmbench.files import expanded, reading
from cmbench.importers.imported import Facts, Parameterization
from cmbench.networks.base import num_parameters
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.validation import validate
from cmbench.training.checkpoint import Checkpoint, load_checkpoint, read_manifest

_PREFIX = "import:"
#: A model's name is part of file names and of run ids, as a recipe's is.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")
_SUFFIX = ".safetensors"
#: Hexadecimal digits of the content hash in a resolved recipe.
_DIGITS = 16
_REMEDY = "import the original file again, with --force"


@dataclass(frozen=True)
class ImportedModel:
    """An imported checkpoint: its file, the hash of its content, and its manifest."""

    name: str
    path: Path
    sha256: str
    facts: Facts

    @property
    def title(self) -> str:
        """The reference to this content: ``import:NAME@HASH``."""
        return f"{_PREFIX}{self.name}@{self.sha256[:_DIGITS]}"

    @property
    def table(self) -> dict[str, Any]:
        """What the configuration of a run contains of it."""
        facts = self.facts.model_dump(mode="json", by_alias=True, exclude={"description"})
        return {"name": self.name, "sha256": self.sha256, **facts}

    def require_data(self, data: DatasetSpec) -> None:
        """Raise ``UserError`` unless the model makes images and classes of the dataset."""
        facts = self.facts
        who = f"imported checkpoint {self.name}"
        require_same_data(who, facts.data_shape, facts.num_classes, data)

    def require_parameterization(self, who: str, allowed: Mapping[str, str]) -> Parameterization:
        """Return the parameterization; raise unless it is a key of ``allowed`` (name: description).

        ``who`` begins the message.
        """
        known = self.facts.parameterization
        if known in allowed:
            return known
        raise UserError(
            who,
            f"imported checkpoint {self.name} has "
            + (f"the parameterization {known!r}" if known else "no known parameterization"),
            allowed=", ".join(f"{k} ({v})" for k, v in allowed.items()),
            remedy="choose another checkpoint"
            if known
            else "import it again with --parameterization edm or boundary",
        )

    def network(self, context: Context) -> nn.Module:
        """Return the network without its weights."""
        table = dict(self.facts.network)
        network_class: Any = context.plugins.networks.load(str(table.pop("name")))
        config = validate(network_class.Config, table, f"imported checkpoint {self.name}")
        network: nn.Module = network_class(config, self.facts.data_shape, self.facts.num_classes)
        return network

    def build(self, context: Context) -> nn.Module:
        """Return the network with its weights, in evaluation mode, on the CPU."""
        network = self.network(context)
        network.load_state_dict(self.load().tensors)
        return network.eval()

    def result(self, context: Context, name: str) -> dict[str, Any]:
        """Return the result of a finished run whose export ``name`` is these weights."""
        with torch.device("meta"):
            parameters = num_parameters(self.network(context))
        return {
            "exports": {name: {"sha256": self.sha256, "images_seen": 0}},
            "parameters": parameters,
            "images_seen": 0,
            "threads": context.threads,
            "teacher": None,
        }

    def export(self) -> Checkpoint:
        """Return the weights under the names of a run's export."""
        found = self.load()
        return replace(found, tensors={f"raw/model.{k}": v for k, v in found.tensors.items()})

    def load(self) -> Checkpoint:
        """Return the weights, verified."""
        found = load_checkpoint(self.path, _REMEDY)
        if found.sha256 != self.sha256:
            raise UserError(
                f"checkpoint {self.path}", "was replaced after planning", remedy=_REMEDY
            )
        return found


def require_same_data(
    who: str,
    shape: tuple[int, int, int],
    num_classes: int,
    data: DatasetSpec,
    class_order: str = "",
) -> None:
    """Raise ``UserError`` unless a trained network makes images and classes of a dataset.

    Args:
        who: the network's name in messages.
        shape: ``(C, H, W)`` of the network's images.
        num_classes: the network's classes, 0 when unconditional.
        data: the dataset.
        class_order: how the network numbers them (see :class:`DatasetSpec`).
    """
    if shape != data.data_shape:
        ours, theirs = ("x".join(map(str, s)) for s in (shape, data.data_shape))
        raise UserError(
            who,
            f"makes images of {ours}, dataset {data.name!r} has {theirs}",
            allowed=f"a dataset of {ours}",
            remedy="choose another dataset or checkpoint",
        )
    if num_classes not in (0, data.num_classes):
        raise UserError(
            who,
            f"has {num_classes} classes, dataset {data.name!r} has {data.num_classes}",
            allowed="the same classes, or an unconditional checkpoint",
            remedy="choose another dataset or checkpoint",
        )
    if num_classes and class_order != data.class_order:
        ours, theirs = (order or "sorted order" for order in (class_order, data.class_order))
        raise UserError(
            who,
            f"numbers the classes as in {ours}, dataset {data.name!r} as in {theirs}",
            allowed="classes in the same order, or an unconditional checkpoint",
            remedy="choose another dataset of these images",
        )


def is_import(text: str) -> bool:
    """Return whether ``text`` refers to an imported checkpoint."""
    return text.startswith(_PREFIX)


def path_of(workspace: Workspace, text: str) -> Path:
    """Return the file that ``NAME`` or a path ending in ``.safetensors`` means."""
    if text.endswith(_SUFFIX):
        return expanded(text)
    if not NAME.fullmatch(text):
        raise UserError(
            "imported checkpoint",
            f"name {text!r}",
            allowed=f"up to 40 letters, digits and . _ + -, or a path ending in {_SUFFIX}",
        )
    return workspace.imported / f"{text}{_SUFFIX}"


def open_imported(workspace: Workspace, text: str) -> ImportedModel:
    """Return the model that ``[import:]NAME[@HASH]`` or a path means, without its weights.

    Raises:
        MissingError: there is none of that name.
        UserError: its manifest is damaged, or it is not the one with that hash.
    """
    text = text.removeprefix(_PREFIX)
    wanted = ""
    if not text.endswith(_SUFFIX):
        text, _, wanted = text.partition("@")
    path = path_of(workspace, text)
    manifest = path.with_suffix(".json")
    if not manifest.is_file() or not path.is_file():
        raise _missing(workspace, text, path)
    meta, sha256 = read_manifest(path, _REMEDY)
    with reading(f"imported checkpoint {manifest}", _REMEDY):
        facts = Facts.model_validate(meta["imported"])
    if not sha256.startswith(wanted):
        raise UserError(
            f"imported checkpoint {text!r}",
            f"has the hash {sha256[:_DIGITS]}",
            allowed=wanted,
            remedy="import the original file under another name",
        )
    return ImportedModel(path.stem, path, sha256, facts)


def _missing(workspace: Workspace, text: str, path: Path) -> MissingError:
    """Return the error for a checkpoint that does not exist, or was not imported."""
    inside = path.parent == workspace.imported
    if path.is_file() and not inside:
        problem = f"has no manifest {path.with_suffix('.json').name} beside it: it was not imported"
        remedy = f"run `cmbench import {text} --to NAME` first, then name NAME"
    else:
        problem = f"is not in {workspace.imported}" if inside else "does not exist"
        target = path.stem if NAME.fullmatch(path.stem) else "NAME"
        remedy = f"run `cmbench import FILE --to {target}` first"
    known = sorted(p.stem for p in workspace.imported.glob("*.json"))
    return MissingError(
        f"imported checkpoint {text!r}",
        problem,
        allowed=", ".join(known) or "none yet",
        remedy=remedy,
    )
