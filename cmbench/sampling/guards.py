"""What a sample hook may not do, checked cheaply in every evaluation.

An image depends on its own noise, its label and the weights, and on nothing else: not on the batch
that it is made in, not on torch's global generator. Sampling changes no weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: Sizes of the batches that the first images are made again in: other neighbours for each of them.
AGAIN = (5, 3)
#: By precision of the network's passes: the difference of images that rounding may cause when they
#: are made in another batch, root mean square relative to the spread of their values.
ROUNDING = {"fp32": 0.02, "bf16": 0.2, "fp16": 0.05}


def weights_sha256(modules: Iterable[nn.Module]) -> str:
    """Return the hash of all parameters and buffers, in order."""
    digest = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            flat = value.detach().contiguous().flatten().cpu()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def batch_dependence(first: Tensor, again: Tensor, precision: str) -> str:
    """Return a warning if images ``[N, C, H, W]`` differ from the same ones of another batch."""
    first, again = first.double(), again.double()
    spread = float(first.std(correction=0))
    difference = float((again - first).square().mean().sqrt())
    if difference <= ROUNDING[precision] * max(spread, 1e-12):
        return ""
    share = difference / spread if spread else float("inf")
    return (
        f"the first {len(first)} samples differ by {share:.0%} of their spread when they are made"
        " again in a smaller batch: the method's sample hook depends on the batch, or on random"
        " numbers that are not from `draws`"
    )
