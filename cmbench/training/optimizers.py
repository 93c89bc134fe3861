"""Optimizers and learning-rate schedules from their configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.plugin.config import OptimizerConfig


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the optimizer; fused where torch has it, one multi-tensor call otherwise."""
    parameters = list(parameters)
    # The fused CPU kernel of Adam is also faster than the multi-tensor one for small networks.
    kernel: dict[str, Any] = {"foreach": True} if config.name == "radam" else {"fused": True}
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **common, **kernel)
    if config.name == "adam":
        return torch.optim.Adam(parameters, **common, **kernel)
    return torch.optim.RAdam(parameters, **common, **kernel)


def learning_rate(config: OptimizerConfig, *, nimg: int, total_nimg: int, batch_size: int) -> float:
    """Return the learning rate of the step that starts at ``nimg`` images of the phase.

    The warm-up starts from zero, as in the loops of EDM and EDM2: their first step moves nothing.
    Inverse-square-root decay is EDM2's: lr / sqrt(max(step / t_ref, 1)).
    """
    lr = config.lr
    if config.warmup_kimg > 0:
        lr *= min(nimg / (config.warmup_kimg * 1000), 1.0)
    share = min(nimg / max(total_nimg, 1), 1.0)
    if config.decay == "linear":
        lr *= 1 - share
    elif config.decay == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * share))
    elif config.decay == "inverse-sqrt":
        lr /= math.sqrt(max(nimg / batch_size / config.decay_ref_steps, 1.0))
    return lr


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer's state as ``"<parameter index>.<name>", tensor``."""
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in sorted(optimizer.state.get(parameter, {}).items()):
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            yield f"{index}.{name}", tensor


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what :func:`state_tensors` gave."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        # Adam keeps its step count on the CPU unless fused; moments live with the parameter.
        fused = bool(optimizer.defaults.get("fused"))
        device = parameter.device if name != "step" or fused else torch.device("cpu")
        restored = tensor.to(device)
        if name != "step" and restored.shape == parameter.shape:
            # Moments keep their parameter's layout: fused and multi-tensor kernels ask for it.
            restored = torch.empty_like(parameter, dtype=restored.dtype).copy_(restored)
        optimizer.state[parameter][name] = restored.detach().clone()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
