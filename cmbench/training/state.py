"""Everything that a training run is at one moment, and how it becomes tensors and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.plugin.method import Method, Objective, Phase
from cmbench.training.ema import WeightAverage
from cmbench.training.optimizers import load_state_tensors, make_optimizer, state_tensors
from cmbench.training.prepared import PreparedNetwork
from cmbench.training.scaling import LossScaler, scaler_states


class OtherNetworkError(ValueError):
    """A checkpoint holds other tensors than the modules that were built."""


class TrainingState:
    """Modules, optimizers, averages and counters of a run.

    ``phase_index`` and ``nimg`` (images seen in the phase) say where it is; ``seen_nimg`` counts
    images over all phases, and every random draw of a step is derived from it.
    """

    def __init__(self, method: Method, modules: dict[str, nn.Module]) -> None:
        self.method = method
        self.modules = modules
        #: prepared networks outside ``modules`` whose evaluations count (a teacher's)
        self.observed: list[PreparedNetwork] = []
        self.phases: Sequence[Phase] = method.phases(modules)
        self._parameters: dict[tuple[str, ...], list[nn.Parameter]] = {}
        self.phase_index = -1
        self.nimg = 0
        self.seen_nimg = 0
        self.network_evaluations = 0
        self.seconds: dict[str, float] = {}
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
        """Where the model's parameters are."""
        return next(self.modules["model"].parameters()).device

    def enter(self, index: int, *, resumed: bool = False) -> None:
        """Begin phase ``index``: fresh optimizers and averages, and the phase's own start."""
        self.phase_index = index
        phase = self.phase
        if not resumed:
            self.nimg = 0
            if phase.start is not None:
                with torch.no_grad():
                    phase.start(self.modules)
        trained = {name for objective in phase.objectives for name in objective.trains}
        for name, module in self.modules.items():
            module.requires_grad_(name in trained).train(name in trained or name == "target")
        self.optimizers = [
            make_optimizer(objective.optimizer, self.parameters(objective))
            for objective in phase.objectives
        ]
        self.averages = [WeightAverage(config, self.modules["model"]) for config in phase.ema]
        self._scalers, self._scaler_states = [], []

    def scaler(self, index: int) -> LossScaler:
        """Return the loss scaler of optimizer ``index``, made at its first use."""
        if not self._scalers:
            saved = self._scaler_states or [{}] * len(self.optimizers)
            self._scalers = [LossScaler(self.device, self.scales_loss, s) for s in saved]
        return self._scalers[index]

    def parameters(self, objective: Objective) -> list[nn.Parameter]:
        """Return the parameters that an objective moves, in a fixed order."""
        # Walking the modules takes longer than a small network's optimizer: once is enough.
        if objective.trains not in self._parameters:
            self._parameters[objective.trains] = [
                p for name in objective.trains for p in self.modules[name].parameters()
            ]
        return self._parameters[objective.trains]

    # ---- to tensors and back -------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.modules.items():
            for key, value in module.state_dict().items():
                yield f"nets.{name}.{key}", value
        for index, optimizer in enumerate(self.optimizers):
            for key, value in state_tensors(optimizer):
                yield f"optimizer.{index}.{key}", value
        for index, average in enumerate(self.averages):
            for key, value in average.state_dict().items():
                yield f"ema.{index}.{key}", value

    def meta(self) -> dict[str, Any]:
        """Return the counters."""
        scales = scaler_states(self._scalers) or self._scaler_states
        return ({"loss_scalers": scales} if scales else {}) | {
            "phase": self.phase.name,
            "phase_index": self.phase_index,
            "nimg": self.nimg,
            "seen_nimg": self.seen_nimg,
            "network_evaluations": self.network_evaluations,
            "seconds": self.seconds,
        }

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Restore a state saved by :meth:`tensors` and :meth:`meta`.

        Raises:
            OtherNetworkError: the tensors are another network's; nothing has been restored.
        """
        for name, module in self.modules.items():
            _require_same(name, module, _under(tensors, f"nets.{name}."))
        for name, module in self.modules.items():
            module.load_state_dict(_under(tensors, f"nets.{name}."))
        self.nimg, self.seen_nimg = int(meta["nimg"]), int(meta["seen_nimg"])
        self.network_evaluations = int(meta["network_evaluations"])
        self.seconds = {k: float(v) for k, v in meta["seconds"].items()}
        self.enter(int(meta["phase_index"]), resumed=True)
        for index, optimizer in enumerate(self.optimizers):
            load_state_tensors(optimizer, _under(tensors, f"optimizer.{index}."))
        for index, average in enumerate(self.averages):
            average.load(_under(tensors, f"ema.{index}."))
        self._scaler_states = list(meta.get("loss_scalers", []))

    def export(self) -> dict[str, Tensor]:
        """Return what sampling needs: each average of the model, and the other modules.

        Keys are ``<average>/<module>.<parameter>``; ``raw`` is the model without averaging.
        """
        out = {f"raw/model.{k}": v for k, v in self.modules["model"].state_dict().items()}
        for average in self.averages:
            label = average.config.label
            out |= {f"{label}/model.{k}": v for k, v in average.state_dict().items()}
        return out


def _require_same(name: str, module: nn.Module, found: dict[str, Tensor]) -> None:
    theirs = {key: tuple(value.shape) for key, value in found.items()}
    ours = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    differing = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    if differing:
        first = differing[0]
        raise OtherNetworkError(
            f"holds another network as {name!r}: {len(differing)} tensors differ, the first is "
            f"{first}, {theirs.get(first, 'missing')} there and {ours.get(first, 'missing')} here"
        )


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
