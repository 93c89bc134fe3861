"""Networks too large for one device: every weight in slices, one a process (FSDP2).

``torch.distributed.fsdp.fully_shard`` keeps a slice of each parameter and of its gradient in every
process; the whole weights of a block exist only while that block computes (casts and normalised
copies of them are activations, which autograd keeps until the backward pass). Optimizer, averages
and clipping see the slices as plain tensors that share memory with FSDP's parameters, so moments
and averages are sliced too, and multi-tensor kernels stay what they are. Checkpoints hold whole
tensors: a run goes on with any number of processes, split or not.

Scalars (EDM2's gains) cannot be sliced. They stay whole in every process, and their gradients are
summed as in runs that are not split. Weights are gathered and gradients summed in float32, so a
split run matches an unsplit one to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from cmbench.networks.counted import allow_recompiles
from cmbench.training.distributed import World

#: Modules with a smaller share of the model's parameters (heads) are kept whole.
_WORTH_SPLITTING = 0.1
#: Blocks are compiled one by one and share their code: graded or not, with a tangent or not, for
#: every shape.
_GRAPHS_OF_BLOCKS = 512


@dataclass(frozen=True)
class Sharding:
    """How one run's modules are split over all processes."""

    world: World
    mesh: DeviceMesh

    @classmethod
    def over(cls, world: World, device: torch.device) -> Sharding:
        """Return the sharding over all of ``world``'s processes (gloo on the CPU, else NCCL)."""
        return cls(world, init_device_mesh(device.type, (world.size,)))

    # ---- modules -------------------------------------------------------------------------------

    def split(self, modules: dict[str, nn.Module], *, compiled: bool) -> None:
        """Split the large ones of a run's modules in place, which must be whole and equal.

        ``compiled`` compiles each block by itself: FSDP's hooks run between blocks.
        """
        sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
        for name, module in modules.items():
            if sizes[name] >= _WORTH_SPLITTING * sizes["model"]:
                self._split(module, compiled=compiled)

    def _split(self, module: nn.Module, *, compiled: bool) -> None:
        module.to(memory_format=torch.contiguous_format)  # FSDP takes no other layout
        whole = {p for p in module.parameters() if p.ndim == 0}
        units: list[nn.Module] = getattr(module, "units", list)()
        if compiled:
            allow_recompiles(_GRAPHS_OF_BLOCKS)
        for unit in (*units, module):
            if compiled and unit is not module:
                unit.forward = torch.compile(unit.forward, dynamic=False)
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, ignored_params=whole)
            assert isinstance(unit, FSDPModule)
            # Sums, as everywhere in this engine: a loss is divided by the whole batch.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        for name in getattr(module, "weight_methods", ()):
            register_fsdp_forward_method(module, name)

    @property
    def hosts_wait(self) -> bool:
        """Whether a process that waits for slices waits itself (gloo), not a GPU's stream (NCCL).

        Then all have sent each other the same messages wherever they come to an agreement.
        """
        return self.mesh.device_type == "cpu"

    @staticmethod
    def forget_passes(modules: Iterable[nn.Module]) -> None:
        """Drop what FSDP notes of forward passes; no backward pass may be to come.

        It forgets at a backward pass only: of a network that never has one (a target), it would
        keep a note of every block in every step.
        """
        for module in modules:
            if isinstance(module, FSDPModule):
                for state in module._get_fsdp_state()._state_ctx.all_states:
                    state._comm_ctx.post_forward_order.clear()
                    if state._fsdp_param_group is not None:
                        state._fsdp_param_group._post_forward_indices.clear()

    @staticmethod
    def mixed() -> AbstractContextManager[None]:
        """Let sliced and whole parameters meet in one call, as in an average of two networks."""
        return implicit_replication()

    # ---- slices --------------------------------------------------------------------------------

    @staticmethod
    def slices(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return what this process has of each parameter; whole ones as they are."""
        return [
            nn.Parameter(p.to_local().detach()) if isinstance(p, DTensor) else p for p in parameters
        ]

    @staticmethod
    def slice_gradients(parameters: Sequence[nn.Parameter], slices: Sequence[Tensor]) -> None:
        """Give each slice its parameter's reduced gradient, or none where there is none."""
        for parameter, mine in zip(parameters, slices, strict=True):
            if isinstance(parameter, DTensor):
                gradient = parameter.grad
                assert gradient is None or isinstance(gradient, DTensor)
                mine.grad = None if gradient is None else gradient.to_local()

    def slice_of(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's part of a whole tensor that is split as ``parameter`` is."""
        if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
            return whole
        parts = torch.chunk(whole, self.world.size, dim=0)
        part = parts[self.world.rank] if self.world.rank < len(parts) else whole[:0]
        assert part.shape == parameter.to_local().shape
        return part

    def whole_of(self, mine: Tensor, parameter: Tensor) -> Tensor:
        """Return the whole tensor of which ``mine`` is this process's slice: all must call it."""
        return self.whole(self.split_as(mine, parameter))

    def split_as(self, mine: Tensor, parameter: Tensor) -> Tensor:
        """Return this process's slice as a tensor that is split as ``parameter`` is."""
        if not isinstance(parameter, DTensor) or mine.shape != parameter.to_local().shape:
            return mine
        return DTensor.from_local(
            mine,
            self.mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        """Return a parameter or buffer whole: all must call it."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @staticmethod
    def total_norm(parameters: Sequence[nn.Parameter], slices: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of the whole gradient, the same on every process."""
        squares = [torch.zeros((), dtype=torch.float64, device=slices[0].device) for _ in range(2)]
        for split, square in zip((True, False), squares):
            gradients = [
                mine.grad
                for p, mine in zip(parameters, slices, strict=True)
                if isinstance(p, DTensor) == split and mine.grad is not None
            ]
            if gradients:
                square += torch.nn.utils.get_total_norm(gradients).double().square()
        dist.all_reduce(squares[0])
        return (squares[0] + squares[1]).sqrt().float()
