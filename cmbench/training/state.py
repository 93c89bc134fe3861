"""The state of a training run, and its conversion to tensors and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.method import Method, Objective, Phase, PhaseStart
from cmbench.training.contract import checked_phases, sampled_modules
from cmbench.training.ema import WeightAverage
from cmbench.training.optimizers import load_state_tensors, make_optimizer, state_tensors
from cmbench.training.pairs import PairCost
from cmbench.training.scaling import LossScaler

if TYPE_CHECKING:
    from cmbench.training.sharding import Sharding


class OtherNetworkError(ValueError):
    """A checkpoint has other tensors than the modules that were built."""


class TrainingState:
    """Modules, optimizers, averages and counters of a run.

    ``phase_index`` and ``nimg`` (images seen in the phase) are its position; ``seen_nimg`` counts
    images over all phases, and every random draw of a step is derived from it.
    """

    def __init__(
        self, method: Method, modules: dict[str, nn.Module], sharding: Sharding | None = None
    ) -> None:
        self.method = method
        self.modules = modules
        #: how large networks are split over processes; None keeps them whole
        self.sharding = sharding
        self._split = False
        #: networks outside ``modules`` whose evaluations count (a teacher's)
        self.observed: list[CountedNetwork] = []
        #: what is averaged and exported, by the names of the modules
        self.sampled = sampled_modules(method, modules)
        self.phases: Sequence[Phase] = checked_phases(method, modules)
        self._parameters: dict[tuple[str, ...], list[nn.Parameter]] = {}
        self._moved: dict[tuple[str, ...], list[nn.Parameter]] = {}
        self._held: dict[str, Tensor] | None = None
        self.phase_index = -1
        self.nimg = 0
        self.seen_nimg = 0
        self.network_evaluations = 0
        self.seconds: dict[str, float] = {}
        #: what the generated data of each phase have cost
        self.generated: dict[str, PairCost] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.averages: list[WeightAverage] = []
        #: whether losses are scaled (fp16); the loop sets it before the first step
        self.scales_loss = False
        self._scalers: list[LossScaler] = []
        self._scaler_states: list[dict[str, Any]] = []

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.phase_index]

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.modules["model"].parameters()).device

    def split(self, *, compiled: bool = False) -> None:
        """Split large networks over the processes, once, if the run is to be split."""
        if self.sharding is not None and not self._split:
            self.sharding.split(self.modules, compiled=compiled)
            self._split = True

    def enter(self, index: int, *, resumed: bool = False, start: PhaseStart | None = None) -> None:
        """Begin phase ``index``: create optimizers and averages, call the phase's start.

        ``start`` is what that receives: by default the modules and their averages only.
        """
        self.phase_index = index
        phase = self.phase
        if not resumed:
            self.nimg = 0
            if phase.start is not None:
                start = start or PhaseStart(self.modules, averaged=self.averaged_module)
                with torch.no_grad(), self.mixed():
                    phase.start(start)
        trained = {name for objective in phase.objectives for name in objective.trains}
        for name, module in self.modules.items():
            module.requires_grad_(name in trained).train(name in trained or name == "target")
        self.optimizers = [
            make_optimizer(objective.optimizer, self.moved(objective))
            for objective in phase.objectives
        ]
        slices = self.sharding.slices if self.sharding is not None else list
        self.averages = [WeightAverage(config, self.sampled, slices) for config in phase.ema]
        self._scalers, self._scaler_states = [], []

    def freeze_others(self, objective: Objective) -> None:
        """Freeze what an objective does not train, in a phase that has several objectives."""
        if len(self.phase.objectives) > 1:
            train_only(self.modules, objective.trains)

    def averaged_module(self, name: str, index: int = 0) -> dict[str, Tensor]:
        """Return a module's state dict under average ``index``, or its own without averages."""
        state = dict(self.modules[name].state_dict())
        if self.averages and name in self.sampled:
            kept = under(self.averages[index].parameters(), f"{name}.")
            state |= {k: self._split_as(v, state[k]) for k, v in kept.items()}
        return state

    def placed(self, name: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors of a module split as the module is, if it is."""
        own = self.modules[name].state_dict()
        return {k: self._split_as(self._mine(v, own.get(k)), own.get(k)) for k, v in whole.items()}

    def _split_as(self, mine: Tensor, like: Tensor | None) -> Tensor:
        if self.sharding is None or like is None:
            return mine
        return self.sharding.split_as(mine.detach(), like)

    def scaler(self, index: int) -> LossScaler:
        """Return the loss scaler of optimizer ``index``, made at its first use."""
        if not self._scalers:
            saved = self._scaler_states or [{}] * len(self.optimizers)
            several = self.sharding is not None
            self._scalers = [
                LossScaler(self.device, self.scales_loss, s, several=several) for s in saved
            ]
        return self._scalers[index]

    def parameters(self, objective: Objective) -> list[nn.Parameter]:
        """Return the parameters that an objective moves, in a fixed order."""
        # Walking the modules takes longer than a small network's optimizer step, so only once.
        if objective.trains not in self._parameters:
            self._parameters[objective.trains] = [
                p for name in objective.trains for p in self.modules[name].parameters()
            ]
        return self._parameters[objective.trains]

    def moved(self, objective: Objective) -> list[nn.Parameter]:
        """Return the parameters that the optimizer receives: slices if they are split."""
        if self.sharding is None:
            return self.parameters(objective)
        if objective.trains not in self._moved:
            self._moved[objective.trains] = self.sharding.slices(self.parameters(objective))
        return self._moved[objective.trains]

    def whole_parameters(self, objective: Objective) -> list[nn.Parameter]:
        """Return the parameters whose gradients must be summed over processes here."""
        pairs = zip(self.parameters(objective), self.moved(objective), strict=True)
        return [parameter for parameter, moved in pairs if parameter is moved]

    def zero_gradients(self, index: int, objective: Objective) -> None:
        """Delete the gradients of an objective; no backward pass may be pending."""
        self.optimizers[index].zero_grad(set_to_none=True)
        if self.sharding is not None:
            self.sharding.forget_passes(self.modules.values())
            for parameter in self.parameters(objective):
                parameter.grad = None

    def slice_gradients(self, objective: Objective) -> None:
        """Give the optimizer its slices of the summed gradients."""
        if self.sharding is not None:
            self.sharding.slice_gradients(self.parameters(objective), self.moved(objective))

    def gradient_norm(self, objective: Objective) -> Tensor | None:
        """Return the L2 norm of the whole gradient; None if no parameter has one."""
        moved = self.moved(objective)
        gradients = [p.grad for p in moved if p.grad is not None]
        if not gradients:
            return None
        if self.sharding is not None:
            return self.sharding.total_norm(self.parameters(objective), moved)
        return torch.nn.utils.get_total_norm(gradients)

    def mixed(self) -> AbstractContextManager[None]:
        """Allow operations on the parameters of two networks at once, split or whole."""
        return nullcontext() if self.sharding is None else self.sharding.mixed()

    # ---- to tensors and back -------------------------------------------------------------------

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Make :meth:`tensors` and :meth:`export` available in the block if weights are split.

        Then all processes must enter it together, and only the leader has the tensors, on the CPU.
        """
        if self.sharding is not None:
            leads = self.sharding.world.leads
            self._held = {n: t.to("cpu", copy=True) for n, t in self._tensors() if leads}
        try:
            yield
        finally:
            self._held = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors."""
        if self.sharding is None:
            return dict(self._tensors())
        assert self._held is not None, "a split state's tensors exist in `gathered` only"
        return dict(self._held)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                yield f"nets.{name}.{key}", self._whole(value)
        for index, optimizer in enumerate(self.optimizers):
            parameters = self.parameters(self.phase.objectives[index])
            for key, value in state_tensors(optimizer):
                like = parameters[int(key.partition(".")[0])]
                yield f"optimizer.{index}.{key}", self._whole(value, like)
        named = dict(self.sampled.named_parameters(remove_duplicate=False))
        for index, average in enumerate(self.averages):
            for key, value in average.state_dict().items():
                yield f"ema.{index}.{key}", self._whole(value, named.get(key))

    def _whole(self, value: Tensor, like: Tensor | None = None) -> Tensor:
        if self.sharding is None:
            return value
        if like is None:
            return self.sharding.whole(value.detach())
        return self.sharding.whole_of(value.detach(), like)

    def averaged(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of average ``index``, whole, as ``<module>.<parameter>``."""
        names, tensors = self.averages[index].parameters(), self.tensors()
        return {name: tensors[f"ema.{index}.{name}"] for name in names}

    def meta(self) -> dict[str, Any]:
        """Return the counters."""
        states = [scaler.state_dict() for scaler in self._scalers]  # empty without scaling
        scales = states if any(states) else self._scaler_states
        return ({"loss_scalers": scales} if scales else {}) | {
            "phase": self.phase.name,
            "phase_index": self.phase_index,
            "nimg": self.nimg,
            "seen_nimg": self.seen_nimg,
            "network_evaluations": self.network_evaluations,
            "seconds": self.seconds,
            "generated": {phase: asdict(cost) for phase, cost in self.generated.items()},
        }

    def load(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], *, compiled: bool = False
    ) -> None:
        """Restore a state saved by :meth:`tensors` and :meth:`meta`, then :meth:`split` it.

        Raises:
            OtherNetworkError: the tensors are of another network; nothing has been restored.
        """
        for name, module in self.modules.items():
            _require_same(name, module, under(tensors, f"nets.{name}."))
        for name, module in self.modules.items():
            module.load_state_dict(under(tensors, f"nets.{name}."))
        self.split(compiled=compiled)
        self.nimg, self.seen_nimg = int(meta["nimg"]), int(meta["seen_nimg"])
        self.network_evaluations = int(meta["network_evaluations"])
        self.seconds = {k: float(v) for k, v in meta["seconds"].items()}
        self.generated = {k: PairCost(**v) for k, v in meta.get("generated", {}).items()}
        self.enter(int(meta["phase_index"]), resumed=True)
        for index, optimizer in enumerate(self.optimizers):
            found = under(tensors, f"optimizer.{index}.")
            likes = dict(enumerate(self.parameters(self.phase.objectives[index])))
            mine = {k: self._mine(v, likes[int(k.partition(".")[0])]) for k, v in found.items()}
            load_state_tensors(optimizer, mine)
        named = dict(self.sampled.named_parameters(remove_duplicate=False))
        for index, average in enumerate(self.averages):
            found = under(tensors, f"ema.{index}.")
            average.load({k: self._mine(v, named.get(k)) for k, v in found.items()})
        self._scaler_states = list(meta.get("loss_scalers", []))

    def _mine(self, whole: Tensor, like: Tensor | None) -> Tensor:
        if self.sharding is None or like is None:
            return whole
        return self.sharding.slice_of(whole, like)

    def export(self) -> dict[str, Tensor]:
        """Return what sampling needs: the sampled modules and each of their averages.

        Keys are ``<average>/<module>.<parameter>``; ``raw`` are the modules without averaging.
        """
        tensors = self.tensors()
        found = {n: under(tensors, f"nets.{n}.") for n in self.sampled}
        out = {f"raw/{n}.{k}": v for n, state in found.items() for k, v in state.items()}
        for index, average in enumerate(self.averages):
            averaged = under(tensors, f"ema.{index}.")
            out |= {f"{average.config.label}/{k}": v for k, v in averaged.items()}
        return out


def _require_same(name: str, module: nn.Module, found: dict[str, Tensor]) -> None:
    theirs = {key: tuple(value.shape) for key, value in found.items()}
    ours = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    differing = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    if differing:
        first = differing[0]
        raise OtherNetworkError(
            f"has another network as {name!r}: {len(differing)} tensors differ, the first is "
            f"{first}, {theirs.get(first, 'missing')} there and {ours.get(first, 'missing')} here"
        )


def train_only(modules: Mapping[str, nn.Module], trained: Collection[str]) -> None:
    """Let gradients reach the parameters of the named modules, and of no other."""
    for name, module in modules.items():
        module.requires_grad_(name in trained)


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
