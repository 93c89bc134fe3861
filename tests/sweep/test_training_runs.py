"""Runs on disk: reused, resumed, guarded against each other, and repaired as the messages say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn
from toy import Toy

from cmbench.errors import BusyError, InterruptedRunError, MissingError, PluginError, UserError
from cmbench.files import read_sealed, write_sealed
from cmbench.plugin.method import Objective, Phase
from cmbench.sweep import runs, threads, training_run
from cmbench.sweep.context import Context, choose_device
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.run_files import read_log
from cmbench.sweep.run_writer import RunWriter
from cmbench.sweep.runs import TrainedRun, read_result
from cmbench.sweep.training_run import obtain_run
from cmbench.training.checkpoint import load_checkpoint
from cmbench.training.distributed import World
from cmbench.training.state import TrainingState


def planned(context: Context, *overrides: str, recipe: str = "demo") -> RunPlan:
    return plan_run(context, "toy", "toys", recipe, 0, overrides)


def weights(trained: TrainedRun) -> bytes:
    return (trained.folder / "weights-final.safetensors").read_bytes()


def interrupt(context: Context, plan: RunPlan, steps: int) -> Path:
    asked = iter([None] * (steps - 1))
    context.should_stop = lambda: next(asked, "stopped")
    with pytest.raises(InterruptedRunError):
        obtain_run(context, plan)
    context.should_stop = lambda: None
    return context.workspace.run(plan.run_id)


@pytest.fixture
def reference(toys: Context, tmp_path: Path) -> bytes:
    """The weights of an uninterrupted run of the same plan, made elsewhere."""
    elsewhere = Context(
        toys.plugins, type(toys.workspace)(tmp_path / "elsewhere"), threads=1, device=toys.device
    )
    return weights(obtain_run(elsewhere, planned(toys)))


def test_a_finished_run_is_reused(toys: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    first = obtain_run(toys, planned(toys))
    monkeypatch.setattr(training_run, "Trainer", None)
    assert obtain_run(toys, planned(toys)).result == first.result
    assert json.loads((first.folder / "run.json").read_text())["config"] == first.plan.table


def test_a_finished_run_needs_no_lock(toys: Context) -> None:
    """Whoever holds it, for example a process that samples it too."""
    trained = obtain_run(toys, planned(toys))
    with FileLock(trained.folder / ".lock"):
        assert obtain_run(toys, planned(toys)).result == trained.result


@pytest.mark.parametrize("steps", [1, 3, 7, 9])
def test_resuming_equals_never_stopping(toys: Context, reference: bytes, steps: int) -> None:
    interrupt(toys, planned(toys), steps)
    trained = obtain_run(toys, planned(toys))
    assert weights(trained) == reference
    log = [row["nimg"] for row in read_log(trained.folder)]
    assert log == sorted(set(log)), "no line twice"


def test_a_corrupt_newest_checkpoint_is_passed_over(
    toys: Context, listener: Any, reference: bytes
) -> None:
    folder = interrupt(toys, planned(toys), 8)
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(b"torn")
    assert weights(obtain_run(toys, planned(toys))) == reference
    (line,) = listener.warnings
    assert line.startswith(f"checkpoint {newest}: is corrupt: ")
    assert line.endswith("; using the checkpoint before it")


def test_corrupt_checkpoints_are_one_error_whose_remedy_works(
    toys: Context, reference: bytes
) -> None:
    folder = interrupt(toys, planned(toys), 8)
    for path in (folder / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(UserError) as raised:
        obtain_run(toys, planned(toys))
    assert str(raised.value).endswith(f"delete {folder / 'checkpoints'} to train from the start")
    shutil.rmtree(folder / "checkpoints")
    assert weights(obtain_run(toys, planned(toys))) == reference


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"exports": 3}', "[" * 100_000])
def test_a_corrupt_result_is_one_error_whose_remedy_works(
    toys: Context, reference: bytes, text: str
) -> None:
    trained = obtain_run(toys, planned(toys))
    path = trained.folder / "result.json"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        obtain_run(toys, planned(toys))
    assert re.match(rf"run file {path}: (is not (a )?JSON|has no hash)", str(raised.value))
    assert str(raised.value).endswith("delete it to finish the run again from its last checkpoint")
    path.unlink()
    again = obtain_run(toys, planned(toys))
    assert (weights(again), again.result) == (reference, trained.result)


def test_weights_that_are_missing_come_back_from_the_checkpoint(
    toys: Context, reference: bytes
) -> None:
    trained = obtain_run(toys, planned(toys))
    (trained.folder / "weights-final.safetensors").unlink()
    assert read_result(trained.plan, trained.folder) is None
    assert weights(obtain_run(toys, planned(toys))) == reference


def test_corrupt_weights_are_one_error_whose_remedy_works(toys: Context, reference: bytes) -> None:
    trained = obtain_run(toys, planned(toys))
    (trained.folder / "weights-final.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="is corrupt") as raised:
        trained.weights()
    assert str(raised.value).endswith(
        f"restore the file, or delete {trained.folder} to train the run again"
    )
    shutil.rmtree(trained.folder)
    assert weights(obtain_run(toys, planned(toys))) == reference


def test_a_checkpoint_of_another_network_is_one_line(toys: Context) -> None:
    folder = interrupt(toys, planned(toys), 8)
    other = interrupt(toys, planned(toys, "network.width=24"), 8)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    with pytest.raises(UserError, match=r"is of run toys/toy-.*; allowed: toys/toy-"):
        obtain_run(toys, planned(toys))
    for manifest in (folder / "checkpoints").glob("*.json"):  # as if the plugin had changed
        saved = read_sealed(manifest)
        saved["meta"]["run"] = planned(toys).run_id
        write_sealed(manifest, saved)
    with pytest.raises(UserError) as raised:
        obtain_run(toys, planned(toys))
    text = str(raised.value)
    assert "has another network as 'model': " in text
    assert "the first is " in text
    assert text.endswith(f"delete {folder} to train the run from the start")
    assert "\n" not in text


def test_weights_of_another_network_are_one_line(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys))
    other = obtain_run(toys, planned(toys, "network.width=24"))
    _, modules = runs.build_modules(toys, other.plan, None)
    with pytest.raises(UserError, match=r"holds another network: .* expected; allowed: "):
        runs.load_weights(trained.weights(), nn.ModuleDict(modules), "raw")
    with pytest.raises(UserError, match="0 tensors under"):
        runs.load_weights(other.weights(), nn.ModuleDict(modules), "no-such-average")


def test_an_unknown_variant_is_one_line(toys: Context) -> None:
    trained = obtain_run(toys, planned(toys, recipe="staged"))
    assert trained.weights("part-0").meta["seen_nimg"] == 320
    with pytest.raises(UserError, match="has no variant 'part-9'; allowed: final, part-0"):
        trained.weights("part-9")


def test_the_log_survives_a_torn_line(toys: Context) -> None:
    folder = interrupt(toys, planned(toys), 8)
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'{"nimg": 1, "loss": \xff\n[3]\n{"nimg": 99999}\n{"nimg"')
    trained = obtain_run(toys, planned(toys))
    assert [row["nimg"] for row in read_log(trained.folder)][-1] == 320
    for line in (trained.folder / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["nimg"] <= 320


def test_a_log_that_cannot_be_written_is_one_line(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.open

    def full(self: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "a":
            raise OSError(28, "No space left on device")
        return whole(self, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(
        UserError, match=r"log.jsonl: No space left on device; free space, then start"
    ):
        obtain_run(toys, planned(toys))


def test_a_folder_that_processes_do_not_share_is_one_line(toys: Context) -> None:
    class Apart(World):
        """A process that sees none of the checkpoints that the leader sees."""

        def lead(self, work: Callable[[], Any]) -> Any:
            found = work()
            return 96 if found == 0 and not isinstance(found, bool) else found

    toys.world = Apart()
    with pytest.raises(
        UserError, match=r"run folder .*: differs between two processes; allowed: a "
    ):
        obtain_run(toys, planned(toys))


def test_on_the_cpu_no_network_is_split_unless_asked(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "SPLIT_FROM", 1)
    toys.world = World(0, 2)
    assert training_run._sharding(toys, nn.Linear(2, 2)) is None


@pytest.mark.parametrize(("asked", "size"), [(True, 1), (False, 2), (True, 2)])
def test_networks_are_split_where_that_is_asked_of_several_processes(
    toys: Context, monkeypatch: pytest.MonkeyPatch, asked: bool, size: int
) -> None:
    from cmbench.training.sharding import Sharding

    monkeypatch.setattr(Sharding, "over", lambda world, device: f"over {world.size}")
    toys.world, toys.split = World(0, size), asked
    found: Any = training_run._sharding(toys, nn.Linear(2, 2))
    assert found == ("over 2" if asked and size == 2 else None)


def test_only_students_are_rehearsed(toys: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("there is no teacher whose training it could save")

    monkeypatch.setattr(training_run, "rehearse", forbidden)
    obtain_run(toys, planned(toys))


def test_threads_of_the_first_attempt_are_kept(toys: Context) -> None:
    folder = interrupt(toys, planned(toys), 8)
    toys.threads = 3
    trained = obtain_run(toys, planned(toys))
    assert trained.result["threads"] == 1
    assert torch.get_num_threads() == 1
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    assert load_checkpoint(newest).meta["threads"] == 1


def test_more_threads_than_there_are_cores_are_not_kept(
    toys: Context, listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(toys, planned(toys), 4)
    manifest = max(toys.workspace.root.glob("runs/toys/*/checkpoints/*.json"))
    saved = read_sealed(manifest)
    saved["meta"]["threads"] = 64
    write_sealed(manifest, saved)
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    assert obtain_run(toys, planned(toys)).result["threads"] == 1
    (said,) = [w for w in listener.warnings if "threads" in w]
    assert said.endswith(
        "had 64 threads, more than there are cores here, and continues with 1: "
        "the result is the same up to rounding, not bit for bit"
    )


def test_a_checkpoint_interval_below_one_image_is_every_step(toys: Context) -> None:
    folder = interrupt(toys, planned(toys, "checkpoint_kimg=1e-9"), 2)
    assert len(list((folder / "checkpoints").glob("*.json"))) == 2


def test_checkpoints_are_a_tenth_of_the_longest_phase_apart(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def phases(self: Toy, nets: Any) -> list[Phase]:
        learn = (Objective(self.loss, ("model",), self.config.optimizer),)
        return [Phase("short", 64, learn, ()), Phase("long", 960, learn, ())]

    monkeypatch.setattr(Toy, "phases", phases)
    saved: list[int] = []
    write = RunWriter.checkpoint

    def noted(self: RunWriter, state: TrainingState) -> None:
        saved.append(state.seen_nimg)
        write(self, state)

    monkeypatch.setattr(RunWriter, "checkpoint", noted)
    obtain_run(toys, planned(toys, "checkpoint_kimg=none"))
    assert sorted(set(saved)) == [64, *range(64 + 96, 64 + 960 + 1, 96)]


# ---- teachers -----------------------------------------------------------------------------------


def test_a_teacher_that_is_none_is_one_line(toys: Context) -> None:
    with pytest.raises(UserError, match="teacher: method 'toy' does not train a diffusion model"):
        planned(toys, "teacher=toy:demo")
    with pytest.raises(UserError, match="teacher: unknown method 'tyo'"):
        planned(toys, "teacher=tyo")
    with pytest.raises(UserError, match="dataset 'toys' has no closed form; allowed: analytic"):
        obtain_run(toys, planned(toys, "teacher=analytic"))
    with pytest.raises(
        MissingError, match=r"teacher run:/nowhere: there is no run\.json in /nowhere; "
    ):
        obtain_run(toys, planned(toys, "teacher=run:/nowhere"))


class FailedTogetherError(Exception):
    """What the processes of a training raise when one of them fails."""


@pytest.mark.parametrize(
    ("broken", "method"),
    [
        (TrainingState, "__init__"),  # the state is built, or loaded
        (RunWriter, "begin"),  # the run's files are begun
    ],
)
def test_a_failure_of_one_process_is_a_failure_of_all(
    toys: Context, monkeypatch: pytest.MonkeyPatch, broken: type, method: str
) -> None:
    all_of_them(monkeypatch)
    fail(monkeypatch, broken, method)
    with pytest.raises(FailedTogetherError, match="only here"):
        obtain_run(toys, planned(toys))


def test_a_teacher_that_one_process_cannot_open_fails_in_all(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(toys, "teacher=analytic")
    assert plan.teacher is not None
    all_of_them(monkeypatch)
    fail(monkeypatch, type(plan.teacher), "open")
    with pytest.raises(FailedTogetherError, match="only here"):
        training_run.obtain_teacher(toys, plan)


def all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark what is raised within :meth:`World.together`."""

    @contextmanager
    def together(self: World) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise FailedTogetherError(str(error)) from error

    monkeypatch.setattr(World, "together", together)


def fail(monkeypatch: pytest.MonkeyPatch, broken: type, method: str) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("only here")

    monkeypatch.setattr(broken, method, failing)


# ---- two processes ------------------------------------------------------------------------------

HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_on_the_same_run_is_told_so(toys: Context, reference: bytes) -> None:
    folder = toys.workspace.run(planned(toys).run_id)
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / ".lock")],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError) as raised:
            obtain_run(toys, planned(toys))
        holder.kill()
    assert raised.value.exit_code == 5
    assert str(raised.value) == (
        f"run {planned(toys).run_id}: another process is training it (lock {folder / '.lock'}); "
        "wait for it, or choose another --workspace"
    )
    assert weights(obtain_run(toys, planned(toys))) == reference, "a dead process holds no lock"


# ---- planning -----------------------------------------------------------------------------------


def test_method_classes_are_checked(toys: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy

    monkeypatch.setattr(toy, "Toy", dict)
    with pytest.raises(PluginError, match="factory 'toy:Toy' is not a Method class; allowed: "):
        planned(toys)
    monkeypatch.undo()
    monkeypatch.setattr(toy.Toy, "Config", {})
    with pytest.raises(PluginError, match=r"its Config is \{\}; allowed: a subclass"):
        planned(toys)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("network.name=5", "recipe, network: has no name; allowed: adm, ddpmpp, "),
        ("network.name=mpl", "unknown network 'mpl'; allowed: adm, .*; did you mean 'mlp'?"),
        ("network.widht=3", "network 'mlp': widht: unknown key; .*; did you mean 'width'?"),
        ("network.width=wide", "network 'mlp': width: Input should be a valid integer"),
    ],
)
def test_network_options_are_validated_by_the_network(
    toys: Context, override: str, found: str
) -> None:
    with pytest.raises(UserError, match=found):
        planned(toys, override)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("gpu", "--device: 'gpu'; allowed: auto, cpu, cuda"),
        ("cuda:x", "--device: 'cuda:x'; allowed"),
        ("cuda:", "--device: 'cuda:'; allowed"),
        ("", "--device: ''; allowed"),
        ("cuda:99", r"--device: 'cuda:99': torch sees .* here; allowed: auto, cpu"),
    ],
)
def test_devices_that_are_not_there(asked: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        choose_device(asked)


def test_devices_that_are_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_shards_that_do_not_divide_the_batch_are_refused_before_a_teacher_is_trained(
    context: Context,
) -> None:
    with pytest.raises(
        UserError,
        match=r"batch_size: 128 images do not split evenly over 1 proc"
        r".* in shards of 7; .*; set microbatch_size=4, or another",
    ):
        plan_run(context, "ect", "digits", "smoke", 0, ("microbatch_size=7",))
