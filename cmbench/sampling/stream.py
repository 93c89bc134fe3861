"""Streams of generated images, with network evaluations counted and outputs checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmbench.errors import NonFiniteError, PluginError
from cmbench.networks.counted import SampledNetworks
from cmbench.plugin.method import Method, SamplingPlan
from cmbench.sampling.draws import Drawing, DrawsAhead, ImageDraws

LabelSource = Callable[[int, int], Tensor | None]


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what was queued on it; before every reading of a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class SampleBatch:
    """Consecutive samples.

    Args:
        images: ``[N, C, H, W]``, float, or uint8 where they were stored as bytes.
        first: number of the first one.
        labels: int64 ``[N]``, None without classes.
        noise: unit noise ``[N, C, H, W]`` that they were made from, None where it is not known.
    """

    images: Tensor
    first: int
    labels: Tensor | None = None
    noise: Tensor | None = None


class Sampler:
    """Runs a method's sample hook over image indices and counts what it costs.

    ``nfe_measured`` is counted by wrapping every network: images through any network, an image.
    Networks that are not compiled are also watched from inside, so that a call around the wrapper
    counts too.

    A compiled network is given batches of one size, so that it is compiled once: the last batch is
    filled up with copies of its last image, which are dropped, and counted by nobody. For CUDA,
    noise is drawn a batch ahead.
    """

    def __init__(
        self,
        method: Method,
        modules: dict[str, nn.Module],
        plan: SamplingPlan,
        *,
        seed: int,
        labels: LabelSource,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self.method, self.plan, self.seed, self.labels = method, plan, seed, labels
        self._modules, self._precision = modules, precision
        names = method.sampled_modules(modules)
        who = f"method {type(method).__name__}"
        self.nets = SampledNetworks(who, modules, names, precision, compiled)
        self.device = next(modules["model"].parameters()).device
        self.fixed_batch = compiled
        self.draws_ahead = self.device.type == "cuda"
        self.images = 0
        self._rows = 0  # images with those that filled batches up
        self.seconds = 0.0
        self._timed_images, self._timed_seconds = 0, 0.0
        self._foreseen: dict[Drawing, None] = {}
        self._watched = 0
        if not compiled:  # the compiler would trace a hook and break its graph there
            for module in dict.fromkeys(net.module for net in self.nets.values()):
                module.register_forward_pre_hook(self._watch, with_kwargs=True)

    def uncompiled(self) -> Sampler:
        """Return this sampler, or one of the same images whose networks are not compiled."""
        if not self.fixed_batch:
            return self
        parts = self.method, self._modules, self.plan
        return Sampler(*parts, seed=self.seed, labels=self.labels, precision=self._precision)

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if tensors and tensors[0].ndim > 1:  # a head over times [N] is no network evaluation
            self._watched += len(tensors[0])

    @property
    def nfe_measured(self) -> float:
        """Network evaluations per image so far."""
        wrapped = sum(net.evaluations for net in self.nets.values())
        return max(wrapped, self._watched) / max(self._rows, 1)

    @property
    def images_per_s(self) -> float | None:
        """Speed of all batches after the first; None if there was no other.

        The first compiles, chooses algorithms and allocates. What a caller does between batches,
        such as extracting features, is not counted, though a GPU works on it asynchronously.
        """
        return self._timed_images / self._timed_seconds if self._timed_seconds else None

    def stream(self, count: int, batch_size: int, first: int = 0) -> Iterator[SampleBatch]:
        """Yield images ``first … first + count - 1`` in batches.

        Raises:
            NonFiniteError: if an image has NaN or infinite values.
            PluginError: if the images' shape differs from the noise's.
        """
        size = min(batch_size, count)
        batches = [(i, min(size, first + count - i)) for i in range(first, first + count, size)]
        if not self.draws_ahead:
            for start, kept in batches:
                yield self.make(start, kept, size)
            return
        with DrawsAhead(self.seed, pinned=self.device.type == "cuda") as ahead:
            for (start, kept), following in zip(batches, [*batches[1:], None], strict=True):
                yield self.make(start, kept, size, ahead, following)

    @torch.no_grad()
    def make(
        self,
        start: int,
        count: int,
        batch_size: int = 0,
        ahead: DrawsAhead | None = None,
        following: tuple[int, int] | None = None,
    ) -> SampleBatch:
        """Make ``count`` images from index ``start``.

        Args:
            start: index of the first.
            count: images to return.
            batch_size: the size that a fixed batch is filled up to.
            ahead: draws batches ahead.
            following: ``(start, count)`` of the batch to draw ahead.
        """
        synchronize(self.device)  # what was queued before is not this batch's
        began = time.perf_counter()
        indices = self._indices(start, count, batch_size)
        draws = ahead.draws(indices) if ahead else ImageDraws(self.seed, indices)
        filled = len(indices)
        shape = (filled, *self.method.data.data_shape)
        noise = draws.normal("noise", torch.empty(shape, device=self.device))
        labels = self.labels(start, count) if self.method.data.num_classes else None
        if labels is not None:
            if filled > count:
                labels = torch.cat([labels, labels[-1:].expand(filled - count)])
            labels = labels.to(self.device)
        if ahead and following:
            foreseen = self._foreseen or draws.asked
            ahead.expect(self._indices(*following, batch_size), foreseen)
        images = self.method.sample(self.nets, noise, labels, self.plan, draws)
        self._foreseen = draws.asked
        self._check(images, noise, start, count)
        synchronize(self.device)
        self._see_time(count, time.perf_counter() - began)
        self.images += count
        self._rows += filled
        kept = labels[:count] if labels is not None else None
        return SampleBatch(images[:count], start, kept, noise[:count])

    def _see_time(self, count: int, seconds: float) -> None:
        self.seconds += seconds
        if self.images:
            self._timed_images += count
            self._timed_seconds += seconds

    def _indices(self, start: int, count: int, batch_size: int) -> list[int]:
        """Return the images of a batch, a fixed one filled up with its last."""
        missing = max(batch_size - count, 0) if self.fixed_batch else 0
        return [*range(start, start + count), *[start + count - 1] * missing]

    def _check(self, images: object, noise: Tensor, start: int, count: int) -> None:
        who = f"method {type(self.method).__name__}, sample hook"
        if not isinstance(images, Tensor):
            raise PluginError(
                who, f"returned {type(images).__name__}", allowed="a tensor shaped as the noise"
            )
        if images.shape != noise.shape:
            raise PluginError(
                who,
                f"returned shape {tuple(images.shape)} for noise of shape {tuple(noise.shape)}",
                allowed="images shaped as the noise",
            )
        finite = torch.isfinite(images[:count]).flatten(1).all(1)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            index = start + int((~finite).nonzero()[0, 0])
            raise NonFiniteError(
                who,
                f"{bad} of {count} images have NaN or infinite values (first: image {index})",
                remedy="train again with a lower learning rate, or fix the sampler",
            )

    def check_nfe(self) -> None:
        """Raise :class:`PluginError` if the counted evaluations are not the declared ones.

        The declared ones of an adaptive plan are the most that are allowed.
        """
        excess = self.nfe_measured - self.plan.nfe
        if excess > 1e-9 or (excess < -1e-9 and not self.plan.adaptive):
            most = "at most " if self.plan.adaptive else ""
            raise PluginError(
                f"method {type(self.method).__name__}",
                f"declares {most}NFE {self.plan.nfe} but {self.nfe_measured:g} network evaluations "
                "per image were counted",
                remedy="correct the method's plan_sampling or sample hook",
            )
