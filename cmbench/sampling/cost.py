"""Measure what one image costs: latency, throughput, FLOPs and peak memory.

Everything is measured after a cell is finished, with images that are thrown away: image ``i``
depends on its index and the seed alone, so nothing here changes a sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cmbench.networks.flops import flop_counter
from cmbench.records.cost import DecoderCost, SamplingCost
from cmbench.sampling.memory import peak_memory_bytes, reset_peak_memory
from cmbench.sampling.stream import Sampler, synchronize

#: Repetitions of one image: the fewest for a spread, and the most.
_FEWEST, _MOST = 3, 20
#: Time to spend: this share of the cell's sampling, up to a second; or this one, if that is more.
_SHARE, _MOST_SECONDS, _SHARE_OF_SLOW = 0.2, 1.0, 0.02
#: Time that is always spent on measuring memory.
_BRIEF = 0.1
#: A batch size that is tried is this fraction of the one before.
_SMALLER = 4


@dataclass(frozen=True)
class Decoder:
    """What makes pictures of latents: ``decode [N, C, H, W] -> [N, 3, H', W']``."""

    decode: Callable[[Tensor], Tensor]
    parameters: int


def measure_cost(
    sampler: Sampler, batch_size: int, hardware: str, decoder: Decoder | None = None
) -> SamplingCost:
    """Return what an image of ``sampler``, which has made its images, costs.

    Args:
        sampler: has made a cell's images in batches of ``batch_size``.
        batch_size: the largest to try.
        hardware: names the device; see :class:`cmbench.records.cost.SamplingCost`.
        decoder: measured apart from the network evaluations.
    """
    budget = _budget(sampler.seconds)
    eager = sampler.uncompiled()  # a compiled network would be compiled again for a batch of one
    flops = _flops(partial(eager.make, 0, 1))
    latencies = list(_repeated(partial(eager.make, 0, 1), eager.device, budget / 2))
    latency = statistics.median(latencies)
    speeds = _speeds(eager, batch_size, sampler.images_per_s, latency, budget / 2)
    best = max(speeds, key=lambda size: speeds[size])
    return SamplingCost(
        hardware=hardware,
        latency_s=latency,
        latency_range_s=(min(latencies), max(latencies)),
        latency_repetitions=len(latencies),
        throughput_images_per_s=speeds[best],
        throughput_batch_size=best,
        flops_per_image=flops,
        peak_memory_bytes=_peak_memory(eager, best, best / speeds[best], budget),
        decoder=_decoder_cost(decoder, eager, budget) if decoder else None,
    )


def _budget(seconds: float) -> float:
    return max(min(_SHARE * seconds, _MOST_SECONDS), _SHARE_OF_SLOW * seconds)


def _flops(work: Callable[[], object]) -> float | None:
    """Return the FLOPs of ``work``, which also warms up; None if torch's counter cannot follow."""
    try:
        with flop_counter() as counter:
            work()
    except (NotImplementedError, RuntimeError):
        work()
        return None
    return float(counter.get_total_flops())


def _repeated(work: Callable[[], object], device: torch.device, budget_s: float) -> Iterator[float]:
    """Yield the seconds of each repetition, at most 20, and at least 3, until time is up."""
    spent = 0.0
    for repetition in range(_MOST):
        if repetition >= _FEWEST and spent > budget_s:
            return
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - began
        spent += seconds
        yield max(seconds, 1e-9)


def _speeds(
    eager: Sampler, batch_size: int, known: float | None, latency_s: float, budget_s: float
) -> dict[int, float]:
    """Return images per second by batch size: of one image, of the cell, and of sizes between."""
    speeds = {1: 1 / latency_s}
    if known is not None and batch_size > 1:
        speeds[batch_size] = known
    size, left = batch_size, budget_s
    while size > 1:
        expected = 2 * size / max(speeds.values())
        if size not in speeds and expected <= left:
            eager.make(0, size)
            seconds, *_ = _repeated(partial(eager.make, 0, size), eager.device, 0.0)
            speeds[size] = size / seconds
            left -= expected
        size //= _SMALLER
    return speeds


def _peak_memory(eager: Sampler, batch_size: int, seconds: float, budget_s: float) -> int | None:
    """Return the peak of one batch; None on the CPU if a batch takes long, or if it is unknown."""
    if eager.device.type == "cpu" and batch_size > 1 and seconds > max(budget_s, _BRIEF):
        return None
    if not reset_peak_memory(eager.device):
        return None
    eager.make(0, batch_size)
    return peak_memory_bytes(eager.device)


def _decoder_cost(decoder: Decoder, eager: Sampler, budget_s: float) -> DecoderCost:
    latent = eager.make(0, 1).images
    flops = _flops(partial(decoder.decode, latent))
    times = _repeated(partial(decoder.decode, latent), eager.device, budget_s / 2)
    return DecoderCost(
        parameters=decoder.parameters, flops_per_image=flops, latency_s=statistics.median(times)
    )
