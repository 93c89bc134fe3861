"""Several processes as one: how a batch is split and how gradients are summed.

A batch is cut into shards by position alone; each process takes a contiguous run of shards. One
process that accumulates the same shards therefore sees the same images with the same randomness.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmbench.errors import BrokenRunError, MissingError, UserError, described
from cmbench.training.launch import Launch

#: How long the others wait for rank 0, which samples and measures alone.
PATIENCE = timedelta(days=7)
#: How long a failed process waits for others that wait for its slices to fail too.
SHORT_PATIENCE = timedelta(seconds=60)
#: Networks with at least this many parameters are split over GPUs by default (EDM2-XL is).
SPLIT_FROM = 1_000_000_000
#: The most flags of one agreement; all messages have the same length.
_MOST_FLAGS = 3
#: The note on an error that the leader has raised and prints.
RELAYED = "raised by rank 0"


class LostProcessError(BrokenRunError):
    """Another process does not answer."""


class SharedFailureError(BrokenRunError):
    """The failure of one process, raised in all of them.

    Attributes:
        where: ``rank R of N``.
        what: the error's line, with its class's name unless it is a :class:`UserError`.
        foreseen: whether it is a :class:`UserError`, which names who failed.
    """

    def __init__(self, where: str, what: str, foreseen: bool) -> None:
        self.where, self.what, self.foreseen = where, what, foreseen
        super().__init__(where, what)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.what, self.foreseen)


@dataclass(frozen=True)
class World:
    """This process among all processes of a run."""

    rank: int = 0
    size: int = 1
    #: the gloo group of agreements; None where there is one process
    control: Any = field(default=None, compare=False, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process writes files, records and logs, and holds locks."""
        return self.rank == 0

    def agree(
        self, *flags: bool, failure: BaseException | None = None, patience: timedelta | None = None
    ) -> tuple[bool, ...]:
        """Return for each flag whether any process has set it; all processes wait for each other.

        Args:
            flags: at most three.
            failure: the failure of this process, if it has failed. All processes then raise it
                here, in whichever agreement they are.
            patience: how long to wait for the others; None waits for :data:`PATIENCE`.

        Raises:
            SharedFailureError: a process has failed.
            LostProcessError: another process is gone, or did not answer in time.
        """
        if self.size == 1:
            return flags
        padded = [failure is not None, *flags, *[False] * (_MOST_FLAGS - len(flags))]
        message = torch.tensor([int(flag) for flag in padded])
        with self._contact():
            work = dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.control, async_op=True)
            work.wait(patience or PATIENCE)
        failed, *agreed = (bool(flag) for flag in message.tolist())
        if failed:
            self._raise_first(failure)
        return tuple(agreed[: len(flags)])

    def _raise_first(self, failure: BaseException | None) -> None:
        """Raise, in every process, the failure of the first that has one."""
        mine = None
        if failure is not None:
            foreseen = isinstance(failure, UserError)
            what = str(failure) if foreseen else f"{type(failure).__name__}: {failure}"
            mine = what, foreseen, "".join(traceback.format_exception(failure))
        failures: list[Any] = [None] * self.size
        with self._contact():
            dist.all_gather_object(failures, mine, group=self.control)
        rank, (what, foreseen, trace) = next(
            (i, m) for i, m in enumerate(failures) if m is not None
        )
        shared = SharedFailureError(f"rank {rank} of {self.size}", what, foreseen)
        shared.add_note(trace)
        raise shared from failure

    def share(self, failure: BaseException) -> None:
        """Raise ``failure`` in all processes, or only here if the others do not answer.

        If weights are split, a step waits for slices of the other processes: a process that fails
        within a step cannot know whether the others will reach an agreement.

        Raises:
            SharedFailureError: all processes have answered.
            BrokenRunError: they have not; the launcher ends them when this process exits.
        """
        try:
            self.agree(failure=failure, patience=SHORT_PATIENCE)
        except LostProcessError:
            line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
            raise BrokenRunError(
                f"rank {self.rank} of {self.size}",
                f"{type(failure).__name__}: {line[:300]}; the others wait for its slices of the "
                "weights, or are gone",
                remedy="see the errors of the other processes, fix them, and start the same "
                "command again: training resumes from the last good checkpoint",
            ) from failure

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block in every process; an error in one of them is raised in all at its end.

        The block must not wait for other processes.

        Raises:
            SharedFailureError: if there are several processes and one fails.
        """
        failure: BaseException | None = None
        try:
            yield
        except (Exception, SystemExit) as error:
            if self.size == 1:
                raise
            failure = error
        self.agree(failure=failure)

    def lead(self, work: Callable[[], Any]) -> Any:
        """Call ``work`` on rank 0 and return its result, plain data, on every process.

        An error is raised on every process, so that all continue or stop together.
        """
        if self.size == 1:
            return work()
        message: list[Any] = [None]
        failure: BaseException | None = None
        if self.leads:
            try:
                message = [(None, work())]
            except BaseException as error:  # sent to the others, then raised
                failure = error
                known = isinstance(error, UserError)
                message = [(error if known else BrokenRunError("rank 0", described(error)), None)]
        with self._contact():
            dist.broadcast_object_list(message, src=0, group=self.control)
        if failure is not None:
            raise failure
        relayed, result = message[0]
        if relayed is not None:
            relayed.add_note(RELAYED)
            raise relayed
        return result

    @contextmanager
    def _contact(self) -> Iterator[None]:
        """Turn an error of communication into one line: another process is gone."""
        try:
            yield
        except RuntimeError as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LostProcessError(
                f"rank {self.rank} of {self.size}",
                f"lost another process ({first[:160]})",
                remedy="see the error of that process, then start the same command again: training "
                "resumes from the last good checkpoint",
            ) from error

    def shards(self, batch_size: int, microbatch_size: int | None) -> Iterator[tuple[int, int]]:
        """Yield ``(first, count)`` for each of this process's shards of a batch.

        Raises:
            UserError: if the batch does not divide evenly.
        """
        share, rest = divmod(batch_size, self.size)
        shard = min(microbatch_size or share, share) or 1
        if rest or share % shard:
            fits = next((n for n in range(shard, 0, -1) if share % n == 0), 0)
            raise UserError(
                "batch_size",
                f"{batch_size} images do not split evenly over {self.size} process(es) "
                f"in shards of {microbatch_size or share}",
                allowed="a multiple of processes x microbatch_size",
                remedy=f"choose a batch_size that is a multiple of {self.size}"
                if rest
                else f"set microbatch_size={fits}, or another batch_size",
            )
        for first in range(self.rank * share, (self.rank + 1) * share, shard):
            yield first, shard

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over all processes."""
        if self.size > 1:
            with self._contact():
                dist.all_reduce(value)
        return value

    def flat_gradients(self, parameters: Iterable[nn.Parameter]) -> Tensor | None:
        """Return all gradients in one message for :meth:`sum_gradients`; None in one process.

        A parameter that this process's shards did not use sends zeros. After the gradients comes,
        for each parameter, the number of processes in which it has one.
        """
        parameters = list(parameters)
        if self.size == 1 or not parameters:
            return None
        here = parameters[0].new_ones(len(parameters))
        for index, parameter in enumerate(parameters):
            if parameter.grad is None:
                here[index] = 0.0
        return torch.cat(
            [
                *(
                    (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
                    for p in parameters
                ),
                here,
            ]
        )

    def sum_gradients(self, parameters: Iterable[nn.Parameter], flat: Tensor | None) -> None:
        """Sum gradients over all processes, in one flat message.

        As in one process, a parameter that no shard used has no gradient afterwards.
        """
        if flat is None:
            return
        parameters = list(parameters)
        with self._contact():
            dist.all_reduce(flat)
        # The host waits for the device only if this process lacks a gradient.
        lacks = any(p.grad is None for p in parameters)
        counts = flat[-len(parameters) :].tolist() if lacks else [1.0] * len(parameters)
        offset = 0
        for parameter, count in zip(parameters, counts, strict=True):
            summed = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            if parameter.grad is not None:
                parameter.grad.copy_(summed)
            elif count:
                parameter.grad = torch.empty_like(parameter).copy_(summed)


@contextmanager
def joined(launch: Launch, device: torch.device) -> Iterator[World]:
    """Join the other processes for the block (gloo on the CPU, NCCL on CUDA).

    If the block raises, pending communication is aborted: NCCL would wait for processes that may be
    gone or waiting too.

    Raises:
        MissingError: the other processes cannot be reached.
    """
    if launch.size == 1:
        yield World()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, rank=launch.rank, world_size=launch.size, timeout=timedelta(hours=1)
        )
    except (RuntimeError, ValueError) as error:
        raise MissingError(
            f"rank {launch.rank} of {launch.size}",
            f"cannot join the others ({(str(error).splitlines() or [''])[0][:160]})",
            allowed="MASTER_ADDR and MASTER_PORT of a machine that all processes can reach",
            remedy="start with torchrun",
        ) from error
    try:
        yield World(launch.rank, launch.size, dist.new_group(backend="gloo", timeout=PATIENCE))
    except BaseException:
        group = dist.group.WORLD
        with suppress(RuntimeError):  # the block's error is the one to raise
            if group is not None:
                group.abort()
        raise
    finally:
        dist.destroy_process_group()
