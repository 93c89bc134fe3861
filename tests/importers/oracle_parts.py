"""What the oracles share: pickling as EDM's persistence does, and plain, slow layers.

Oracles are networks of EDM's, EDM2's and OpenAI's layouts, written here once more from the
architectures' descriptions (Song et al. 2021, App. H; Dhariwal & Nichol 2021; Karras et al. 2022,
App. F.2; Karras et al. 2024, App. B) and the names in their files. Nothing of cmbench's networks is
used: filters are matrices, norms and attention are written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoint_builders
import torch
from torch import Tensor, nn

Random = Callable[..., Tensor]


# ---- pickling ------------------------------------------------------------------------------------


class Part(nn.Module):
    """A module as EDM's persistence pickles it: the name of a class, and its whole state."""

    def __init__(self, kind: str, arguments: Mapping[str, Any], **members: Any) -> None:
        super().__init__()
        self.kind = kind
        self._init_args, self._init_kwargs = (), dict(arguments)
        for name, value in members.items():
            if name.startswith("buffer_"):
                self.register_buffer(name.removeprefix("buffer_"), value)
            elif isinstance(value, Tensor):
                setattr(self, name, nn.Parameter(value, requires_grad=False))
            else:
                setattr(self, name, value)

    def __reduce__(self) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != "kind"}
        return persistent(self.kind, state)


def persistent(kind: str, state: dict[str, Any]) -> Any:
    """What ``__reduce__`` of EDM's persistent classes returns; the state is no copy."""
    source = "raise AssertionError('source code was executed')"
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": kind, "state": state}
    return checkpoint_builders._reconstruct_persistent_obj, (meta,), None


class ECMLoss:
    """Keeps bound methods of its own, as ECT's does: they pickle as ``getattr(self, name)``."""

    def __init__(self, **more: Any) -> None:
        self.q, self.c, self.stage = 256, 0.0, 3
        self.t_to_r = self.t_to_r_sigmoid
        self.wt_fn = self.snrplusk_wt
        self.__dict__.update(more)

    def t_to_r_sigmoid(self, t: Tensor) -> Tensor:
        raise AssertionError("the importer called the loss")

    snrplusk_wt = t_to_r_sigmoid

    def __reduce__(self) -> Any:
        return persistent("ECMLoss", self.__dict__)


def write_snapshot(path: Path, network: Any, **more: Any) -> Path:
    """Pickle a snapshot as a training loop does, in float32."""
    network.root.float()
    kept = {"ema": network.root, "augment_pipe": None, "dataset_kwargs": {"path": "x"}, **more}
    checkpoint_builders.write_pickle(path, kept)
    network.root.double()
    return path


def modules(items: Mapping[str, nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict(dict(items))


# ---- what all share ------------------------------------------------------------------------------


def randomness(seed: int) -> Random:
    """Return what draws weights whose products keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float | None = None) -> Tensor:
        fan = math.prod(shape[1:]) or 1
        scale = 1.2 / math.sqrt(fan) if size is None else size
        # Exactly float32, as files hold them.
        return (scale * torch.randn(shape, generator=generator)).double()

    return draw


def along(x: Tensor, matrix: Tensor) -> Tensor:
    """Apply a matrix to both axes of an image."""
    return torch.einsum("ab,ncbd,ed->ncae", matrix, x, matrix)


def halve(x: Tensor, taps: Sequence[float], padding: int | None = None) -> Tensor:
    """``y[n] = sum_k f[k] x[2 n + k - p]``, f being the taps over their sum."""
    pad = (len(taps) - 1) // 2 if padding is None else padding
    side, total = x.shape[-1], sum(taps)
    matrix = torch.zeros((side + 2 * pad - len(taps)) // 2 + 1, side, dtype=x.dtype)
    for n in range(len(matrix)):
        for k, tap in enumerate(taps):
            if 0 <= 2 * n + k - pad < side:
                matrix[n, 2 * n + k - pad] += tap / total
    return along(x, matrix)


def double(x: Tensor, taps: Sequence[float]) -> Tensor:
    """``y[m] = 2 sum_i f[m + p - 2 i] x[i]``."""
    pad, side, total = (len(taps) - 1) // 2, x.shape[-1], sum(taps)
    matrix = torch.zeros(2 * side, side, dtype=x.dtype)
    for m in range(2 * side):
        for i in range(side):
            if 0 <= m + pad - 2 * i < len(taps):
                matrix[m, i] += 2 * taps[m + pad - 2 * i] / total
    return along(x, matrix)


def resampled(x: Tensor, taps: Sequence[float], mode: str) -> Tensor:
    return {"up": double, "down": halve, "keep": lambda x, taps: x}[mode](x, taps)


def group_norm(x: Tensor, part: Any, groups: int, eps: float) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, groups, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + eps).sqrt()
    return y.reshape(n, c, h, w) * part.weight[:, None, None] + part.bias[:, None, None]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over ``[N, heads, channels, pixels]``."""
    weight = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(q.shape[2]), 3)
    return torch.einsum("nhqk,nhck->nhcq", weight, v)


def cosines(c: Tensor, count: int, *, endpoint: bool) -> Tensor:
    """Cosines, then sines, at frequencies from 1 down to 1/10000; ``count`` is of both.

    Frequencies are float32, as in the sources.
    """
    half = count // 2
    steps = torch.arange(half, dtype=torch.float32) / (half - (1 if endpoint else 0))
    angle = c[:, None] * ((1 / 10000) ** steps).double()
    return torch.cat([angle.cos(), angle.sin()], 1)


def swapped(e: Tensor) -> Tensor:
    first, second = e.chunk(2, 1)
    return torch.cat([second, first], 1)
