"""A network as losses and samplers call it: under autocast, compiled, counted.

The raw module keeps its parameters and its names in checkpoints. Methods receive this thin wrapper,
so they need not know about precision and compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.errors import PluginError
from cmbench.networks.tangent_modes import tangent_of

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Graphs kept per piece of code: student, target and teacher, with gradients and without, training
#: and sampling. Beyond the limit torch falls back to eager mode without a warning.
_GRAPHS = 64


def to_device(module: nn.Module, device: torch.device, *, channels_last: bool = False) -> nn.Module:
    """Move a module to ``device``, with its convolutions' weights channels-last or contiguous.

    Tensor cores use channels-last images; if the weights have the same layout, nothing is
    transposed between layers.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # torch has no overload with both a device and a memory_format
    return module.to(device).to(memory_format=layout)


def memory_layout(module: nn.Module) -> torch.memory_format:
    """Return the memory layout of a module's convolutions."""
    for parameter in module.parameters():
        if parameter.ndim == 4 and parameter.shape[1] > 1 and parameter.shape[2] > 1:
            last = parameter.is_contiguous(memory_format=torch.channels_last)
            return torch.channels_last if last else torch.contiguous_format
    return torch.contiguous_format


def allow_recompiles(graphs: int = _GRAPHS) -> None:
    """Raise the compiler's limit of graphs for one piece of code (never lower it)."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * graphs)


class CountedNetwork:
    """Calls ``module`` under the run's precision and counts images that pass through it.

    Attributes of the module (``parameters``, ``train``, …) are reachable as on the module itself.
    ``layout`` is the memory layout of its input images, by default that of its weights.
    """

    def __init__(
        self,
        module: nn.Module,
        precision: str = "fp32",
        compiled: bool = False,
        layout: torch.memory_format | None = None,
    ) -> None:
        self.module = module
        self.precision = precision
        self._layout = memory_layout(module) if layout is None else layout
        #: images that have passed through the network
        self.evaluations = 0
        #: the same in units of a forward pass: a tangent costs one more, a backward pass two more,
        #: or one if its weights are frozen and only its input has a gradient
        self.forward_equivalents = 0
        self._forward: Callable[..., Tensor] = module
        self._with_tangent: Callable[..., tuple[Tensor, Tensor]] = self._uncompiled_tangent
        if compiled:
            allow_recompiles()
            self._forward = torch.compile(module, dynamic=False)
            self._with_tangent = torch.compile(self._uncompiled_tangent, dynamic=False)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate the module; the result has the dtype of ``x``.

        Only passes over images count and run under autocast: a head over times ``[N]`` is not a
        network evaluation and stays in float32.
        """
        if x.ndim < 2:
            return self._forward(x, *args, **kwargs)
        self._count(x, 1)
        with self._autocast(x):
            out = self._forward(self._laid_out(x), *args, **kwargs)
        return out.to(x.dtype)

    def forward_with_tangent(
        self, x: Tensor, c_noise: Tensor, dx: Tensor, dc_noise: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return ``(F, dF)`` ``[N, C, H, W]``: graded output, detached directional derivative.

        Keyword arguments are those of :func:`cmbench.networks.tangent_modes.tangent_of`.
        """
        self._count(x, 2)
        with self._autocast(x):
            out, tangent = self._with_tangent(
                self._laid_out(x), c_noise, self._laid_out(dx), dc_noise, *args, **kwargs
            )
        return out.to(x.dtype), tangent.to(x.dtype)

    def _laid_out(self, x: Tensor) -> Tensor:
        # One layout for every call: a compiled graph is specific to its strides.
        return x.contiguous(memory_format=self._layout) if x.ndim == 4 else x.contiguous()

    def _count(self, x: Tensor, forwards: int) -> None:
        self.evaluations += len(x)
        backwards = 0
        if torch.is_grad_enabled():
            backwards = 2 if self._trained else int(x.requires_grad)
        self.forward_equivalents += len(x) * (forwards + backwards)

    @property
    def _trained(self) -> bool:
        return any(p.requires_grad for p in self.module.parameters())

    def _uncompiled_tangent(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return tangent_of(self.module, *args, **kwargs)

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(x.device.type, dtype=_AUTOCAST[self.precision])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class SampledNetworks(dict[str, CountedNetwork]):
    """The networks of a method that sampling may use, by name.

    Any other module was built again and is at its initial values. Looking one up, or calling one
    that the method has kept for itself, raises ``PluginError``.

    Args:
        who: the method, for messages.
        modules: all that the method built.
        sampled: the names of those whose weights were restored.
        precision: as for :class:`CountedNetwork`.
        compiled: as for :class:`CountedNetwork`.
    """

    def __init__(
        self,
        who: str,
        modules: Mapping[str, nn.Module],
        sampled: Iterable[str],
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self.who = who
        super().__init__({n: CountedNetwork(modules[n], precision, compiled) for n in sampled})
        restored = {net.module for net in self.values()}
        for name, module in modules.items():
            module.eval().requires_grad_(False)
            if module not in restored:
                module.register_forward_pre_hook(partial(self._refuse, name))

    def __missing__(self, name: str) -> CountedNetwork:
        raise self._not_restored(name)

    def _refuse(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        raise self._not_restored(name)

    def _not_restored(self, name: str) -> PluginError:
        return PluginError(
            self.who,
            f"sampling uses the module {name!r}, which was not restored and is untrained",
            allowed=", ".join(self),
            remedy="return its name from sampled_modules, which modules are saved by",
        )
