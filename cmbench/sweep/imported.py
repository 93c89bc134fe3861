"""Imported checkpoints of a workspace: found by name, described, built, loaded.

``cmbench import`` leaves ``imported/<name>.safetensors`` with a manifest beside it. Elsewhere such
a model is written ``import:NAME``, ``import:FILE.safetensors``, or, where a recipe is resolved,
``import:NAME@HASH``: what a run starts from is decided by content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from cmbench.diffusion.models import EDMModel
from cmbench.errors import MissingError, UserError
from cmbench.importers.imported import Preconditioning
from cmbench.networks.base import num_parameters
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Teacher
from cmbench.plugin.specs import DatasetSpec
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.recipes import Table, merge
from cmbench.sweep.validation import validate
from cmbench.training.checkpoint import Checkpoint, load_checkpoint

PREFIX = "import:"
#: A model's name is part of file names and of run ids, as a recipe's is.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")
_SUFFIX = ".safetensors"
#: Hexadecimal digits of the content hash in a resolved recipe.
_DIGITS = 16


class Facts(BaseModel):
    """What a manifest says of an imported model (see ``ImportedNetwork.facts``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    network: dict[str, Any]
    data_shape: tuple[int, int, int]
    num_classes: int = Field(ge=0)
    format: str
    assumed: dict[str, Any]
    preconditioning: Preconditioning
    sigma_data: float | None = Field(gt=0)
    sigma_min: float | None = Field(ge=0)
    description: dict[str, Any]
    source: dict[str, str]


@dataclass(frozen=True)
class ImportedModel:
    """An imported checkpoint: where it lies, its content's hash, and what it is."""

    name: str
    path: Path
    sha256: str
    facts: Facts

    @property
    def title(self) -> str:
        """The reference that names this content and no other."""
        return f"{PREFIX}{self.name}@{self.sha256[:_DIGITS]}"

    @property
    def table(self) -> dict[str, Any]:
        """What a run's configuration keeps of it."""
        facts = self.facts.model_dump(mode="json", exclude={"description"})
        return {"name": self.name, "sha256": self.sha256, **facts}

    def require_data(self, data: DatasetSpec) -> None:
        """Raise ``UserError`` unless the model makes what the dataset holds."""
        ours, theirs = self.facts.data_shape, data.data_shape
        if ours != theirs:
            raise UserError(
                f"imported checkpoint {self.name}",
                f"makes images of {_size(ours)}, dataset {data.name!r} has {_size(theirs)}",
                allowed=f"a dataset of {_size(ours)}",
                remedy="choose another dataset or checkpoint",
            )
        if self.facts.num_classes not in (0, data.num_classes):
            raise UserError(
                f"imported checkpoint {self.name}",
                f"knows {self.facts.num_classes} classes, dataset {data.name!r} has "
                f"{data.num_classes}",
                allowed="the same classes, or an unconditional checkpoint",
                remedy="choose another dataset or checkpoint",
            )
        if self.facts.num_classes and data.class_order:
            raise UserError(
                f"imported checkpoint {self.name}",
                f"knows classes in sorted order, dataset {data.name!r} numbers them as "
                f"{data.class_order} does",
                allowed="classes in the same order, or an unconditional checkpoint",
                remedy="choose another dataset of these images",
            )

    def require_meaning(self, who: str, allowed: Mapping[str, str]) -> Preconditioning:
        """Return what the raw output means; raise unless it is one of ``allowed``: name, words."""
        meaning = self.facts.preconditioning
        if meaning in allowed:
            return meaning
        told = (
            f"has the preconditioning {meaning!r}"
            if meaning
            else ("does not say what its network's output means")
        )
        raise UserError(
            who,
            f"imported checkpoint {self.name} {told}",
            allowed=", ".join(f"{k} ({v})" for k, v in allowed.items()),
            remedy="choose another checkpoint"
            if meaning
            else "import it again with --preconditioning edm or boundary",
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

    def teacher(self, context: Context, sigma_data: float, precision: str) -> Teacher:
        """Return the model as a frozen teacher; planning has checked that it is a denoiser."""
        network = self.build(context).requires_grad_(False).to(context.device)
        prepared = CountedNetwork(network, precision, context.compile)
        return Teacher(self.title, EDMModel(prepared, sigma_data), network)

    def result(self, context: Context, name: str) -> dict[str, Any]:
        """Return what a finished training would have left, its weights being export ``name``."""
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
        remedy = "import the original file again, with --force"
        found = load_checkpoint(self.path, remedy=remedy)
        if found.sha256 != self.sha256:
            raise UserError(f"checkpoint {self.path}", "was replaced meanwhile", remedy=remedy)
        return found


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def path_of(workspace: Workspace, text: str) -> Path:
    """Return the file that ``NAME`` or a path ending in ``.safetensors`` means."""
    if text.endswith(_SUFFIX):
        return Path(text).expanduser()
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
    text = text.removeprefix(PREFIX)
    wanted = ""
    if not text.endswith(_SUFFIX):
        text, _, wanted = text.partition("@")
    path = path_of(workspace, text)
    manifest = path.with_suffix(".json")
    if not manifest.is_file() or not path.is_file():
        raise _missing(workspace, text, path)
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
        facts = Facts.model_validate(data["meta"]["imported"])
        sha256 = str(data["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise UserError(
            f"imported checkpoint {manifest}",
            f"its manifest cannot be read ({type(error).__name__}: {str(error)[:120]})",
            remedy="import the original file again, with --force",
        ) from error
    if not sha256.startswith(wanted):
        raise UserError(
            f"imported checkpoint {text!r}",
            f"has the hash {sha256[:_DIGITS]}",
            allowed=wanted,
            remedy="import the original file under another name",
        )
    return ImportedModel(path.stem, path, sha256, facts)


def _missing(workspace: Workspace, text: str, path: Path) -> MissingError:
    """Return the error for a checkpoint that is not there, or is no import of ours."""
    inside = path.parent == workspace.imported
    if path.is_file() and not inside:
        problem = f"has no manifest {path.with_suffix('.json').name} beside it: was not imported"
        remedy = f"run `cmbench import {text} --to NAME` first, then name NAME"
    else:
        problem = f"is not in {workspace.imported}" if inside else "is not there"
        target = path.stem if NAME.fullmatch(path.stem) else "NAME"
        remedy = f"run `cmbench import FILE --to {target}` first"
    known = sorted(p.stem for p in workspace.imported.glob("*.json"))
    return MissingError(
        f"imported checkpoint {text!r}",
        problem,
        allowed=", ".join(known) or "none yet",
        remedy=remedy,
    )


def require_students_reading(context: Context, config: BaseModel) -> None:
    """Raise ``UserError`` if a student would read its imported teacher's weights as another model.

    A method says how its networks are read by an option ``parameterization``, if it has the choice.
    """
    named, reading = getattr(config, "teacher", None), getattr(config, "parameterization", None)
    if reading is None or not (isinstance(named, str) and named.startswith(PREFIX)):
        return
    model = open_imported(context.workspace, named)
    meaning = model.facts.preconditioning
    choices = get_args(type(config).model_fields["parameterization"].annotation)
    if meaning in choices and reading != meaning:
        raise UserError(
            f"teacher {model.title}",
            f"its parameterization is {meaning!r}",
            allowed=f"{reading!r} for this student",
            remedy=f"add -o parameterization={meaning}, or name another teacher",
        )


def with_imported_teacher(
    context: Context, table: Table, extra: Mapping[str, Any], data: DatasetSpec
) -> Table:
    """Return a recipe whose teacher is an imported model with what follows from it.

    The student takes the teacher's architecture and conditioning (it starts from its weights),
    keeps its own dropout, and may change what an override names. Other recipes stay as they are.
    """
    named = table.get("teacher")
    if not (isinstance(named, str) and named.startswith(PREFIX)):
        return table
    model = open_imported(context.workspace, named)
    model.require_meaning("teacher", {"edm": "a diffusion model"})
    model.require_data(data)
    network = dict(model.facts.network)
    own = table.get("network")
    if isinstance(own, Mapping) and "dropout" in own:
        network["dropout"] = own["dropout"]
    network = merge(network, extra.get("network", {}))
    conditional = model.facts.num_classes > 0
    if extra.get("conditional", conditional) is not conditional:
        raise UserError(
            "-o conditional",
            f"{extra['conditional']!r}: the teacher {model.name} "
            f"{'knows classes' if conditional else 'knows no classes'}",
            allowed=str(conditional).lower(),
            remedy="leave it out",
        )
    found = {**table, "teacher": model.title, "network": network, "conditional": conditional}
    told = model.facts.sigma_data
    if told is not None and extra.get("sigma_data", told) != told:
        raise UserError(
            f"-o sigma_data={extra['sigma_data']}",
            f"the teacher {model.name} has {told:g}",
            allowed=f"{told:g}",
            remedy="leave it out",
        )
    if told is not None and table.get("sigma_data") is None:
        found["sigma_data"] = told
    return found
