"""``cmbench run`` as a launcher starts it: two processes over gloo, one workspace."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from command_outcome import Outcome
from safetensors.torch import load_file
from toy import Toy

from cmbench.cli.main import main
from cmbench.errors import EXIT_BROKEN_RUN, EXIT_CELLS_FAILED, EXIT_REQUEUE, EXIT_USAGE
from cmbench.sweep import run_writer
from cmbench.training import loop

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
#: Adam turns the rounding of a tiny gradient into a whole step, unless eps is large.
RUN = (
    "run",
    "-m",
    "toy",
    "-d",
    "toys",
    "--nfe",
    "1",
    "--samples",
    "16",
    "--device",
    "cpu",
    "--no-report",
    "-o",
    "optimizer.eps=1.0",
    "-o",
    "optimizer.lr=0.1",
)
Trouble = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """How one process ended; code -9 is SIGKILL."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def child(
    rank: int, size: int, port: int, folder: Path, words: tuple[str, ...], trouble: Trouble | None
) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    if trouble is not None:
        trouble(rank)
    code = 70
    try:
        main(words)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def together(
    folder: Path, *options: str, trouble: Trouble | None = None, size: int = 2
) -> list[Ended]:
    """Run ``cmbench run`` in ``size`` processes; ``trouble`` may change each one first."""
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    fork, port, words = get_context("fork"), free_port(), (*RUN, *options)
    started: list[BaseProcess] = []
    for rank in range(size):
        arguments = (rank, size, port, folder, words, trouble)
        started.append(fork.Process(target=child, args=arguments))
        started[-1].start()
    try:
        for process in started:
            process.join(60)
    finally:
        for process in started:
            process.kill()
            process.join()
    return [
        Ended(
            p.exitcode if p.exitcode is not None else -1,
            (folder / f"out-{rank}").read_text(),
            (folder / f"err-{rank}").read_text(),
        )
        for rank, p in enumerate(started)
    ]


def at_step(number: int, act: Callable[[], None]) -> None:
    """Do something in this process before its step ``number``."""
    step, calls = loop.Trainer.train_step, iter(range(10**6))

    def stepping(trainer: loop.Trainer) -> None:
        if next(calls) == number:
            act()
        step(trainer)

    loop.Trainer.train_step = stepping


def weights(workspace: Path, method: str = "toy") -> Mapping[str, torch.Tensor]:
    (path,) = workspace.glob(f"runs/*/{method}-*/weights-final.safetensors")
    return load_file(path)


def assert_same_weights(one: Path, other: Path, *, atol: float = 1e-6, method: str = "toy") -> None:
    expected, found = weights(one, method), weights(other, method)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


@pytest.fixture(autouse=True)
def _toys_in_children(cmbench_with_toys: object) -> None:
    """What is patched before a fork is patched in the child."""


@pytest.fixture
def alone(cmbench_with_toys: Callable[..., Outcome], tmp_path: Path) -> Path:
    """The workspace of one process that accumulates two shards."""
    folder = tmp_path / "alone"
    assert cmbench_with_toys(*RUN, "-o", "microbatch_size=16", "-w", str(folder)).code == 0
    return folder


def test_two_processes_make_what_one_makes(alone: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "two"
    first, second = together(tmp_path / "talk", "-o", "microbatch_size=16", "-w", str(workspace))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert_same_weights(alone, workspace)
    assert "finished" in first.out
    assert (second.out, second.err) == ("", ""), "only the leader talks"
    (path,) = workspace.glob("records/toys/*.json")
    record = json.loads(path.read_text())
    assert record["environment"]["world_size"] == 2
    (expected,) = alone.glob("records/toys/*.json")
    assert record["metrics"]["fd-pixels"]["value"] == pytest.approx(
        json.loads(expected.read_text())["metrics"]["fd-pixels"]["value"], rel=1e-4
    )
    assert list(workspace.rglob("*.tmp")) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["toy", "sct"])
def test_compiled_networks_in_two_processes_make_what_one_makes(
    method: str,
    tmp_path: Path,
    cmbench_with_toys: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without and with a carried tangent; a teacher is compiled too."""
    compiler: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compiler, backend="aot_eager"))
    options = ["--compile", "-o", "microbatch_size=16"]
    if method == "sct":
        options += [
            "-m",
            "sct",
            "-d",
            "gmm",
            "-r",
            "smoke",
            "-o",
            "duration_kimg=0.128",
            "-o",
            "teacher=analytic",
            "-o",
            "batch_size=32",
            "-o",
            "network.width=8",
            "-o",
            "warmup_steps=2",
        ]
    one, two = tmp_path / "one", tmp_path / "two"
    done = cmbench_with_toys(*RUN, *options, "-w", str(one))
    assert done.code == 0, done.err
    ended = together(tmp_path / "talk", *options, "-w", str(two))
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    assert_same_weights(one, two, method=method)


def stop_second(rank: int) -> None:
    if rank == 1:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_sigterm_to_one_process_saves_and_asks_for_requeue_then_one_process_goes_on(
    alone: Path, tmp_path: Path, cmbench_with_toys: Callable[..., Outcome]
) -> None:
    workspace = tmp_path / "two"
    options = ("-o", "microbatch_size=16", "-w", str(workspace))
    first, second = together(tmp_path / "talk", *options, trouble=stop_second)
    assert (first.code, second.code) == (EXIT_REQUEUE, EXIT_REQUEUE), first.err + second.err
    assert first.err.splitlines()[-1].endswith(
        "stopped by another process after 128 images; checkpoint saved; "
        "start the same command again to continue"
    )
    assert second.err == ""
    resumed = cmbench_with_toys(*RUN, *options)
    assert resumed.code == 0, resumed.err
    assert "was trained by 2 process(es) and continues with 1, still in shards of 16" in resumed.err
    assert_same_weights(alone, workspace)


def test_a_split_run_that_was_stopped_goes_on_whole_and_is_what_one_process_makes(
    alone: Path, tmp_path: Path, cmbench_with_toys: Callable[..., Outcome]
) -> None:
    options = ("-o", "microbatch_size=16", "-w")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    ended = together(tmp_path / "first", *options, str(straight), "--split")
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    assert "networks are split over 2 processes" in ended[0].err + ended[0].out
    assert_same_weights(alone, straight)
    ended = together(tmp_path / "second", *options, str(stopped), "--split", trouble=stop_second)
    assert [e.code for e in ended] == [EXIT_REQUEUE] * 2, ended[0].err + ended[1].err
    assert cmbench_with_toys(*RUN, *options, str(stopped)).code == 0
    assert_same_weights(alone, stopped)


def test_one_process_has_nobody_to_split_with(cmbench_with_toys: Callable[..., Outcome]) -> None:
    refused = cmbench_with_toys(*RUN, "--split")
    assert refused.code == EXIT_USAGE
    assert refused.err.splitlines()[-1] == (
        "error: --split: there is only one process; allowed: several processes; start with "
        "torchrun, see docs/clusters.md, or leave it out"
    )


def test_threads_are_kept_by_as_many_processes_and_chosen_again_by_others(
    tmp_path: Path, cmbench_with_toys: Callable[..., Outcome]
) -> None:
    workspace = tmp_path / "two"
    options = ("-w", str(workspace))

    def threads() -> int:
        newest = max(workspace.glob("runs/toys/*/checkpoints/*.json"))
        return int(json.loads(newest.read_text())["meta"]["threads"])

    together(tmp_path / "first", *options, "--threads", "2", trouble=stop_second)
    assert threads() == 2
    together(tmp_path / "second", *options, "--threads", "1", trouble=stop_second)
    assert threads() == 2, "the same bits as without a stop"
    assert cmbench_with_toys(*RUN, *options, "--threads", "1").code == 0
    assert threads() == 1, "one process of two had too many for itself, or too few"
    (path,) = workspace.glob("records/toys/*.json")
    assert json.loads(path.read_text())["environment"]["threads"] == 1


def test_the_shards_of_two_processes_are_kept_by_one(
    alone: Path, tmp_path: Path, cmbench_with_toys: Callable[..., Outcome]
) -> None:
    workspace = tmp_path / "two"
    options = ("-w", str(workspace))  # no microbatch_size: each process takes half a batch at once
    ended = together(tmp_path / "talk", *options, trouble=stop_second)
    assert [e.code for e in ended] == [EXIT_REQUEUE] * 2
    assert cmbench_with_toys(*RUN, *options).code == 0
    assert_same_weights(alone, workspace)


def test_kept_shards_are_still_kept_when_that_process_is_stopped_too(
    alone: Path, tmp_path: Path, cmbench_with_toys: Callable[..., Outcome]
) -> None:
    workspace = tmp_path / "two"
    options = ("-w", str(workspace))

    def stop(rank: int) -> None:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))

    ended = together(tmp_path / "first", *options, trouble=stop_second)
    ended += together(tmp_path / "second", *options, trouble=stop, size=1)
    assert [e.code for e in ended] == [EXIT_REQUEUE] * 3, ended
    assert "still in shards of 16" in ended[2].err
    again = cmbench_with_toys(*RUN, *options)
    assert again.code == 0, again.err
    assert "was trained by" not in again.err, "the same number of processes as the last time"
    assert_same_weights(alone, workspace)


def test_shards_that_two_processes_cannot_keep_are_said(
    tmp_path: Path, cmbench_with_toys: Callable[..., Outcome]
) -> None:
    workspace = tmp_path / "grown"
    options = ("-w", str(workspace))

    def stop(rank: int) -> None:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))

    (one,) = together(tmp_path / "first", *options, trouble=stop, size=1)
    assert one.code == EXIT_REQUEUE, one.err
    first, second = together(tmp_path / "second", *options)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "shards of 32 images do not divide a share of 16" in first.err
    assert second.err == ""


def test_the_time_limit_stops_both(tmp_path: Path) -> None:
    def slow(rank: int) -> None:
        if rank == 1:
            at_step(2, lambda: time.sleep(1.2))

    ended = together(
        tmp_path / "talk", "-w", str(tmp_path / "w"), "--time-limit", "1", trouble=slow
    )
    assert [e.code for e in ended] == [EXIT_REQUEUE] * 2, ended
    assert "checkpoint saved" in ended[0].err


def test_a_lost_process_is_one_clear_line(tmp_path: Path) -> None:
    def die(rank: int) -> None:
        if rank == 1:
            at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))

    workspace = tmp_path / "two"
    first, second = together(tmp_path / "talk", "-w", str(workspace), trouble=die)
    assert second.code == -signal.SIGKILL
    assert first.code == EXIT_BROKEN_RUN, first.err
    line = first.err.splitlines()[-1]
    assert line.startswith("error: rank 0 of 2: lost another process (")
    assert line.endswith("training resumes from the last good checkpoint")
    assert "Traceback" not in first.err
    assert len(list(workspace.glob("runs/toys/*/checkpoints/*.json"))) >= 1
    assert list(workspace.glob("records/toys/*.json")) == []


def test_nan_in_one_process_stops_both_and_is_recorded_once(tmp_path: Path) -> None:
    def poison(rank: int) -> None:
        if rank == 1:
            Toy.misbehave = lambda self, loss: loss * math.nan  # type: ignore[method-assign]

    workspace = tmp_path / "two"
    first, second = together(tmp_path / "talk", "-w", str(workspace), trouble=poison)
    assert first.code == EXIT_CELLS_FAILED, first.err
    assert second.code == 0, second.err
    assert second.err == ""
    (path,) = workspace.glob("records/toys/*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "failed"
    assert "loss is not finite at 0 images seen" in record["reason"]


def fail_once(number: int, error: BaseException) -> Callable[..., Any]:
    """Return a function that raises at its call ``number``, and does nothing at the others."""
    calls = iter(range(10**6))

    def act(*_: Any) -> None:
        if next(calls) == number:
            raise error

    return act


def before(owner: Any, name: str, act: Callable[..., Any]) -> None:
    """Do ``act`` before every call of ``owner.name``."""
    original = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        act()
        return original(*arguments, **options)

    setattr(owner, name, called)


BROKEN = RuntimeError("it\nbroke")
#: Where it fails: the process, what is called there, the call that fails, how, and what is said.
FAILURES: dict[str, tuple[int, Any, str, int, BaseException, str]] = {
    "in a loss": (1, Toy, "misbehave", 3, BROKEN, "rank 1 of 2: RuntimeError: it broke"),
    "of the leader": (0, Toy, "misbehave", 3, BROKEN, "rank 0 of 2: RuntimeError: it broke"),
    "leaving": (1, Toy, "misbehave", 3, SystemExit("bye"), "rank 1 of 2: SystemExit: bye"),
    "after the gradients": (1, loop, "project_weights", 3, BROKEN, "rank 1 of 2: RuntimeError: it"),
    "building": (1, Toy, "build", 0, BROKEN, "rank 1 of 2: RuntimeError: it broke"),
    "checkpoint": (
        0,
        run_writer,
        "save_checkpoint",
        0,
        OSError(28, "No space left"),
        "rank 0 of 2: OSError: [Errno 28] No space left",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_of_one_process_is_recorded_and_the_next_run_is_trained(
    case: str, tmp_path: Path
) -> None:
    where, owner, name, number, error, line = FAILURES[case]

    def trouble(rank: int) -> None:
        if rank == where:
            before(owner, name, fail_once(number, error))

    workspace = tmp_path / "two"
    first, second = together(
        tmp_path / "talk", "-w", str(workspace), "--seeds", "2", trouble=trouble
    )
    assert (first.code, second.code) == (EXIT_CELLS_FAILED, 0), first.err + second.err
    assert second.err == ""
    reason = f"method 'toy' failed while training in {line}"
    said = first.err.splitlines()[-1]
    assert said.startswith(f"error: 1 cell(s) failed: {reason}")
    assert "Traceback" not in first.err
    records = [json.loads(p.read_text()) for p in workspace.glob("records/toys/*.json")]
    by_seed = {record["training"]["seed"]: record for record in records}
    assert (by_seed[0]["status"], by_seed[1]["status"]) == ("failed", "finished")
    assert by_seed[0]["reason"].startswith(reason)


def test_out_of_memory_of_one_process_names_the_next_batch(tmp_path: Path) -> None:
    def trouble(rank: int) -> None:
        if rank == 1:
            before(Toy, "misbehave", fail_once(2, torch.OutOfMemoryError("tried 2 GiB")))

    workspace = tmp_path / "two"
    first, second = together(tmp_path / "talk", "-w", str(workspace), trouble=trouble)
    assert (first.code, second.code) == (EXIT_CELLS_FAILED, 0), first.err + second.err
    assert (
        "rank 1 of 2: training on cpu: out of memory with 16 images per pass after 64 images seen; "
        "set microbatch_size=8" in first.err.splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("-o", "batch_size=33"), "batch_size: 33 images do not split evenly over 2 process(es)"),
        (("-o", "batch_sise=32"), "batch_sise"),
        (("--nfe", "none"), "--nfe: 'none'; allowed: whole numbers from 1 to 100,000"),
    ],
)
def test_bad_input_is_said_by_the_leader_only(
    tmp_path: Path, options: tuple[str, ...], line: str
) -> None:
    first, second = together(tmp_path / "talk", "-w", str(tmp_path / "two"), *options)
    assert (first.code, second.code) == (EXIT_USAGE, EXIT_USAGE), first.err + second.err
    assert line in first.err
    assert second.err == ""


def test_damaged_checkpoints_are_said_once(tmp_path: Path) -> None:
    workspace = tmp_path / "two"
    ended = together(tmp_path / "first", "-w", str(workspace), trouble=stop_second)
    assert [e.code for e in ended] == [EXIT_REQUEUE] * 2
    for path in workspace.glob("runs/toys/*/checkpoints/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    first, second = together(tmp_path / "second", "-w", str(workspace))
    assert (first.code, second.code) == (EXIT_CELLS_FAILED, 0), first.err + second.err
    errors = [line for line in first.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, first.err
    assert "has no good checkpoint" in errors[0]
    assert second.err == ""
