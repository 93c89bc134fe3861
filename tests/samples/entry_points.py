"""Generators for the tests of ``module:function`` sources."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmbench.seeds import derive_seed


def good(indices: Tensor, seed: int) -> Tensor:
    rows = []
    for index in indices.tolist():
        generator = torch.Generator().manual_seed(derive_seed(seed, index))
        rows.append(torch.rand(1, 8, 8, generator=generator) * 2 - 1)
    return torch.stack(rows)


def labelled(indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return ((good(indices, seed) + 1) * 127.5).to(torch.uint8), indices % 10


def unseeded(indices: Tensor, seed: int) -> Tensor:
    return torch.rand(len(indices), 1, 8, 8) * 2 - 1


def one_stream(indices: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed + 17 * len(indices) if len(indices) == 1 else seed)
    full = torch.rand(64, 1, 8, 8)[: len(indices)] * 2 - 1
    return full


def unit_range(indices: Tensor, seed: int) -> Tensor:
    return (good(indices, seed) + 1) / 2


def byte_range(indices: Tensor, seed: int) -> Tensor:
    return (good(indices, seed) + 1) * 127.5


def diverged(indices: Tensor, seed: int) -> Tensor:
    return good(indices, seed) * torch.nan


def integers(indices: Tensor, seed: int) -> Tensor:
    return good(indices, seed).to(torch.int32)


def too_few(indices: Tensor, seed: int) -> Tensor:
    return good(indices[:1], seed)


def nothing(indices: Tensor, seed: int) -> None:
    return None


number = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, indices: Tensor, seed: int) -> Tensor:
        return self.norm(good(indices, seed)).clamp(-1, 1)


training = Net()
evaluated = Net().eval()


def raises(indices: Tensor, seed: int) -> Tensor:
    raise RuntimeError("out of\nluck")
