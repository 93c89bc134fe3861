"""A method as the checks see it: built from its recipe on a tiny network, as the harness does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from cmbench.errors import PluginError, UserError
from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.method import (
    Batch,
    DataInfo,
    Draws,
    GeneratedData,
    Method,
    Objective,
    Progress,
    Teacher,
)
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_cells, plan_run
from cmbench.sweep.plans import RAW, CellPlan, RunPlan, SampleSettings
from cmbench.sweep.recipes import default_recipe, recipe_names
from cmbench.sweep.run_files import MAIN
from cmbench.sweep.runs import build_modules, stand_in
from cmbench.training.distributed import World
from cmbench.training.loop import Trainer
from cmbench.training.randomness import seed_global
from cmbench.training.settings import Settings, Watchers
from cmbench.training.state import TrainingState, under

#: Images of a step and of a shard (more where an objective has larger groups); steps of a phase.
BATCH, SHARD, STEPS = 8, 4, 4
#: More steps than this are not trained, however long the method's phases are.
MAX_STEPS = 8 * STEPS
#: Options that make a network of the harness small; one by any other plugin stays as it is.
TINY: dict[str, dict[str, Any]] = {
    "unet-tiny": {"channels": 8, "blocks": 1, "dropout": 0.0},
    "mlp": {"width": 16, "blocks": 1, "embedding_dim": 8, "dropout": 0.0},
}
#: What replaces a large network of the harness.
_SMALL_UNET = "unet-tiny"


def nowhere(plugins: PluginManager) -> Context:
    """Return a context on the CPU that reports nothing and whose workspace does not exist."""
    workspace = Workspace(Path("nowhere"))
    return Context(plugins, workspace, device=torch.device("cpu"), threads=1)


def stir(modules: Mapping[str, nn.Module], seed: int = 0, size: float = 0.05) -> None:
    """Give every parameter a random part: zero-initialised layers hide errors and gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(modules):
            for parameter in modules[name].parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter))


def stirred(
    context: Context, plan: RunPlan, teacher: Teacher | None
) -> tuple[Method, dict[str, nn.Module]]:
    """Build a teacher's modules with weights that are nowhere zero."""
    method, modules = build_modules(context, plan, teacher)
    stir(modules, 1)
    return method, modules


def rows(batch: Batch, kept: slice) -> Batch:
    """Return some images of a batch, with everything that it has per image."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{k: v[kept] for k, v in tensors.items() if isinstance(v, Tensor)})


def progress(step: int = 3, total_steps: int = 10) -> Progress:
    """Return a place in the middle of training."""
    return Progress(step * BATCH, total_steps * BATCH, step, total_steps)


def as_target(images: Tensor, states: int) -> Tensor:
    """Return images ``[N, C, H, W]`` as targets of generated data: halved from state to state."""
    if states == 1:
        return images
    return torch.stack([images / 2**i for i in reversed(range(states))], 1)


@dataclass
class RandomFeed:
    """Random images and labels by their position in the stream (see ``training.settings.Feed``).

    With ``states``, they are pairs with so many images each.
    """

    data: DataInfo
    states: int | None = None

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return images ``start … start + count - 1``, each from a generator of its own."""
        indices = torch.arange(start, start + count)
        generators = [torch.Generator().manual_seed(int(i)) for i in indices]
        images = [torch.randn(self.data.data_shape, generator=g) / 2 for g in generators]
        classes = self.data.num_classes
        labels = (7 * indices + 1) % classes if classes else None
        batch = Batch(torch.stack(images).clamp(-1, 1), labels, indices=indices)
        if self.states is None:
            return batch
        noise = torch.stack([torch.randn(self.data.data_shape, generator=g) for g in generators])
        return replace(batch, noise=noise, target=as_target(batch.images, self.states))


@dataclass
class Case:
    """A method with its modules."""

    plan: RunPlan
    method: Method
    modules: dict[str, nn.Module]
    teacher: Teacher | None
    data: DataInfo = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.method.data

    @property
    def nets(self) -> dict[str, CountedNetwork]:
        """The modules as a loss receives them."""
        return {name: CountedNetwork(module) for name, module in self.modules.items()}

    @cached_property
    def shard(self) -> int:
        """Images of a shard: whole groups of every objective."""
        groups = [o.group for phase in self.state().phases for o in phase.objectives]
        group = math.lcm(*groups)
        return group * math.ceil(SHARD / group)

    @property
    def batch_size(self) -> int:
        """Images of a step, in two shards."""
        return 2 * self.shard

    def state(self) -> TrainingState:
        """Return the training state, in no phase yet."""
        return TrainingState(self.method, self.modules)

    def batch(self, count: int | None = None) -> Batch:
        """Return training images, by default those of a step."""
        return self.feed.batch(0, count or self.batch_size, 0)

    @property
    def generated(self) -> list[GeneratedData]:
        """What the phases ask a model to generate."""
        return [p.generated for p in self.state().phases if p.generated is not None]

    @property
    def feed(self) -> RandomFeed:
        """Random images, and pairs if a phase trains on generated data."""
        return RandomFeed(self.data, max((g.states for g in self.generated), default=None))

    def objectives(self) -> Iterator[tuple[TrainingState, Objective]]:
        """Enter every phase in turn and yield its objectives; nothing is trained."""
        ready = trainer(self)
        state = ready.state
        for index in range(len(state.phases)):
            state.enter(index, start=ready.phase_start(index))
            for objective in state.phase.objectives:
                state.freeze_others(objective)
                yield state, objective
            ready.watchers.phase_done(state)

    def loss(self, objective: Objective, batch: Batch, draws: Draws, seed: int = 0) -> Tensor:
        """Return an objective's loss ``[N]``; ``seed`` is that of torch's global generator."""
        seed_global("check", seed)
        return objective.loss(self.nets, batch, draws, progress())


class Exports:
    """The weights that finished phases have exported, kept in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[str], dict[str, Tensor]]] = {}

    def keep(self, state: TrainingState) -> None:
        """Keep what a phase exports at its end."""
        labels = [average.config.label for average in state.averages] or [RAW]
        exported = {name: tensor.detach().clone() for name, tensor in state.export().items()}
        self._kept[state.phase.export or MAIN] = labels, exported

    def state_dict(self, export: str, module: str = "model", index: int = 0) -> dict[str, Tensor]:
        """Return a module's weights (see :class:`cmbench.plugin.method.PhaseStart`)."""
        if export not in self._kept:
            raise PluginError(
                "the start of a phase",
                f"asks for the export {export!r}, which no finished phase has",
                allowed=", ".join(self._kept) or "none",
                remedy="fix the method's phases",
            )
        labels, exported = self._kept[export]
        return under(exported, f"{labels[index]}/{module}.")


def trainer(
    case: Case,
    *,
    world: World | None = None,
    precision: str = "fp32",
    feed: RandomFeed | None = None,
    save: Callable[[TrainingState], None] = lambda state: None,
    most: int = MAX_STEPS,
) -> Trainer:
    """Return a trainer of at most ``most`` steps that saves after each."""
    state, exports, batch_size = case.state(), Exports(), case.batch_size
    settings = Settings(
        seed=0,
        batch_size=batch_size,
        microbatch_size=case.shard,
        precision=precision,
        checkpoint_nimg=batch_size,
        world=world or World(),
    )

    def should_stop() -> str | None:
        return "that is enough" if state.seen_nimg >= most * batch_size else None

    watchers = Watchers(
        checkpoint=save,
        phase_done=exports.keep,
        should_stop=should_stop,
        exported=exports.state_dict,
    )
    return Trainer(state, feed or case.feed, settings, watchers)


@dataclass
class Subject:
    """A method and the recipe that it is checked with. Every :meth:`case` is built anew."""

    context: Context
    name: str
    dataset: str
    recipe: str

    @classmethod
    def all_of(cls, plugins: PluginManager, name: str, dataset: str | None = None) -> list[Subject]:
        """Choose recipes: of the smallest dataset, and of the smallest one with pictures.

        A recipe ``smoke`` is preferred. ``dataset`` chooses another dataset, alone.

        Raises:
            UserError: the method is unknown, or has no recipe for the dataset.
        """
        spec = plugins.methods.get(name, "cmbench check")
        registered, context = plugins.datasets.specs, nowhere(plugins)
        sizes = {
            owner: (not registered[owner].embedded, math.prod(registered[owner].data_shape))
            for owner, _ in recipe_names(spec)
            if owner in registered
        }
        if not sizes and dataset is None:
            raise PluginError(
                f"method {name!r}",
                "has no recipe for a registered dataset",
                allowed=", ".join(sorted(registered)),
                remedy="add a table such as [gmm.smoke] to its recipe file",
            )
        ordered = sorted(sizes, key=lambda owner: sizes[owner])
        pictures = [owner for owner in ordered if registered[owner].data_shape[1] > 1]
        chosen = dict.fromkeys([dataset] if dataset else [*ordered[:1], *pictures[:1]])
        found = []
        for owner in chosen:
            names = [recipe for _, recipe in recipe_names(spec, owner)]
            recipe = "smoke" if "smoke" in names else default_recipe(spec, owner)
            found.append(cls(context, name, owner, recipe))
        return found

    @cached_property
    def conditional(self) -> bool:
        """Whether the method is checked with labels: where the data have them and it takes them."""
        if not self.context.dataset_spec(self.dataset).num_classes:
            return False
        try:
            self.case(conditional=True)
        except PluginError:
            raise
        except UserError:
            return False
        return True

    def unconditional(self) -> Case | None:
        """Return the method without labels; None if it refuses that."""
        try:
            return self.case(conditional=False)
        except PluginError:
            raise
        except UserError:
            return None

    def plan(self, **overrides: Any) -> RunPlan:
        """Return the recipe's plan with a tiny network and phases of :data:`STEPS` steps."""
        network = overrides.pop("network", {})
        table = {
            "duration_kimg": STEPS * BATCH / 1000,
            "batch_size": BATCH,
            "precision": "fp32",
            "augment": 0.0,
            "network": {**self._tiny_network(), **network},
            **overrides,
        }
        return plan_run(self.context, self.name, self.dataset, self.recipe, 0, table)

    def _tiny_network(self) -> dict[str, Any]:
        asked = plan_run(self.context, self.name, self.dataset, self.recipe, 0).config.network
        if asked["name"] in TINY:
            return TINY[asked["name"]]
        ours = self.context.plugins.networks.owners[_SMALL_UNET]
        if self.context.plugins.networks.owners.get(asked["name"]) is not ours:
            return {}
        return {"name": _SMALL_UNET, **TINY[_SMALL_UNET]}

    def case(self, *, conditional: bool | None = None, **overrides: Any) -> Case:
        """Build the method with random weights, and those of a teacher that would be trained."""
        given = self.conditional if conditional is None else conditional
        plan = self.plan(conditional=given, **overrides)
        teacher = stand_in(self.context, plan, stirred)
        method, modules = build_modules(self.context, plan, teacher)
        stir(modules, 2)
        for part in chain.from_iterable(module.modules() for module in modules.values()):
            if isinstance(part, _DropoutNd):  # its masks are the harness's to seed
                part.p = 0.0
        return Case(plan, method, modules, teacher)

    def cells(self) -> list[CellPlan]:
        """Return the plans of NFE 1 to 8, as ``cmbench run`` makes and checks them."""
        plan = self.plan(conditional=self.conditional)
        return plan_cells(self.context, plan, range(1, 9), 0, SampleSettings())
