"""Counting FLOPs with torch's own counter, attention on the CPU included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def fake_tensors() -> FakeTensorMode:
    """Return torch's mode in which tensors have shapes and no numbers; real ones may be used too.

    The first backward pass of a process starts autograd's threads, one per device that is known
    then. Fake tensors make a device known that has none, and a process with such threads cannot be
    forked any more. So the first pass is made here, by a real number.
    """
    torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    return FakeTensorMode(allow_non_fake_inputs=True)


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Return the FLOPs of ``softmax(q k^T) v`` from shapes ``[N, heads, tokens, channels]``."""
    batch, heads, queries, channels = query
    return 2 * batch * heads * queries * key[2] * (channels + value[3])


def flop_counter() -> FlopCounterMode:
    """Return a context manager that counts matrix products, convolutions and attention.

    A multiply-add counts as two. torch knows the attention kernels of GPUs only: without the entry
    here the kernel of the CPU counts as nothing.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})
