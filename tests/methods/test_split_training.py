"""Networks split over processes (FSDP2, gloo) train, stop, resume and fail as whole ones do."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from method_kit import build, stir
from numpy import concatenate
from numpy.linalg import norm
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from cmbench.errors import BrokenRunError, UserError
from cmbench.plugin.config import OptimizerConfig
from cmbench.plugin.method import Batch
from cmbench.training import distributed
from cmbench.training.distributed import SharedFailureError, World, joined
from cmbench.training.launch import Launch
from cmbench.training.loop import Trainer, project_weights
from cmbench.training.optimizers import make_optimizer
from cmbench.training.scaling import LossScaler
from cmbench.training.settings import Settings, Watchers
from cmbench.training.sharding import Sharding
from cmbench.training.state import TrainingState, under

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore"),
]
BATCH, SHARD, STEPS = 12, 2, 3
#: Fused kernels, and one without.
OPTIMIZERS = ("adam", "adamw", "radam")
#: Adam turns the rounding of a tiny gradient into a whole step, unless eps is large.
SMOOTH = {"name": "adam", "lr": 0.02, "eps": 1.0, "warmup_kimg": 0, "decay": "constant"}
EDM2 = {"name": "edm2", "channels": 8, "channels_per_head": 8, "channel_mult": [1, 2], "blocks": 1}
DOUBLE = EDM2 | {"conditioning": "double", "embedding": "positional", "dropout": 0.2}


@dataclass(frozen=True)
class Scenario:
    method: str
    network: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    checkpointing: bool = False
    precision: str = "fp32"
    #: what phases start from: the weights as they are, an average of the phase before ("averaged"),
    #: or what an earlier phase has exported ("exported")
    starts: str = "raw"


SCENARIOS = {
    "loss with a log-variance": Scenario("edm", EDM2, {"logvar_channels": 8}),
    "tangent": Scenario("sct", DOUBLE),
    "distilled tangent, checkpointed": Scenario("scd", DOUBLE, checkpointing=True),
    "compiled tangent": Scenario("sct", DOUBLE | {"channel_mult": [1]}, compiled=True),
    "average as target": Scenario("cd", EDM2, {"target_ema": 0.9}),
    "clipped": Scenario("ect", EDM2, {"optimizer": SMOOTH | {"grad_clip": 0.01}}),
    "radam, one unit": Scenario("ict", {}, {"optimizer": SMOOTH | {"name": "radam"}}),
    "staged": Scenario("pd", EDM2, {"start_steps": 4, "optimizer": SMOOTH}),
    "staged, from averages": Scenario(
        "pd", EDM2, {"start_steps": 4, "optimizer": SMOOTH}, starts="averaged"
    ),
    "staged, from an export": Scenario(
        "pd", EDM2, {"start_steps": 4, "optimizer": SMOOTH}, starts="exported"
    ),
    "another network family": Scenario(
        "edm", {"name": "ddpmpp", "channels": 8, "channel_mult": [1, 2], "blocks": 1}
    ),
}

#: Sums of another order differ by float32's rounding, and moments then by half precision's.
HALF = Scenario("ect", EDM2, precision="fp16")
#: Those that three processes train too: no axis splits evenly, some slices are empty.
UNEVEN = ("loss with a log-variance", "tangent", "average as target", "another network family")


class Feed:
    """Images by their position, some of which are missing."""

    def __init__(self, shape: tuple[int, ...], missing: range = range(0)) -> None:
        self.shape, self.missing = shape, missing

    def batch(self, start: int, count: int, seed: int) -> Batch:
        if any(image in self.missing for image in range(start, start + count)):
            raise OSError("image cannot be read")
        generators = [torch.Generator().manual_seed(i) for i in range(start, start + count)]
        images = [torch.randn(self.shape, generator=g) / 2 for g in generators]
        return Batch(torch.stack(images).clamp(-1, 1), None)


class Exported:
    """Where the leader keeps what phases export, for all processes."""

    folder: Path


@pytest.fixture(scope="module", autouse=True)
def exported_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    Exported.folder = tmp_path_factory.mktemp("exported")


@dataclass
class Left:
    """What watchers saw; tensors are the leader's."""

    checkpoints: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    graphs: int = 0
    projecting: int = -1
    noted: float = 0.0


def numbers(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: t.detach().cpu().numpy().copy() for name, t in tensors.items()}


def new_state(scenario: Scenario, sharding: Sharding | None) -> TrainingState:
    case = build(
        scenario.method,
        "digits",
        batch_size=BATCH,
        network=scenario.network,
        duration_kimg=STEPS * BATCH / 1000,
        ema=[{"decay": 0.5}, {"sigma_rel": 0.1}],
        **({"optimizer": SMOOTH} | scenario.options),
    )
    stir({"model": case.modules["model"]}, 9, 0.3)
    model: Any = case.modules["model"]
    model.gradient_checkpointing = scenario.checkpointing
    method: Any = case.method
    if scenario.starts == "averaged":
        method.promote = lambda start: start["teacher"].load_state_dict(start.averaged("model"))
    if scenario.starts == "exported":
        phases = count()

        def promote(start: Any) -> None:
            if next(phases):  # there is nothing before the first
                start["teacher"].load_state_dict(start.exported("steps-2", index=1))

        method.promote = promote
    return TrainingState(case.method, case.modules, sharding)


def trained(
    scenario: Scenario,
    world: World,
    *,
    split: bool,
    missing: range = range(0),
    resume: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> Left:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sharding = Sharding.over(world, torch.device("cpu")) if split else None
    state = new_state(scenario, sharding)
    start = state.modules["model"].state_dict()
    left = Left(before=numbers({f"model.{k}": v for k, v in start.items()}))
    if resume is not None:
        tensors = {name: torch.as_tensor(value) for name, value in resume[0].items()}
        state.load(tensors, resume[1], compiled=scenario.compiled)

    def checkpoint(state: TrainingState) -> None:
        left.checkpoints.append((numbers(state.tensors()), state.meta()))

    settings = Settings(
        seed=0,
        batch_size=BATCH,
        microbatch_size=SHARD,
        world=world,
        compile=scenario.compiled,
        precision=scenario.precision,
        checkpoint_nimg=2 * BATCH,
    )
    shape = state.method.data.data_shape
    files = Exported.folder / str(world.size if split else 0)

    def phase_done(state: TrainingState) -> None:
        left.exports.append(numbers(state.export()))
        if world.leads:
            files.mkdir(exist_ok=True)
            save_file(left.exports[-1], files / str(state.phase.export))

    def exported(export: str, module: str = "model", index: int = 0) -> dict[str, Tensor]:
        label = ("decay-0.5", "power-0.1")[index]
        return under(load_file(files / export), f"{label}/{module}.")

    watchers = Watchers(checkpoint=checkpoint, phase_done=phase_done, exported=exported)
    Trainer(state, Feed(shape, missing), settings, watchers).train()
    parameters = list(state.modules["model"].parameters())
    mine = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    left.share = mine / sum(p.numel() for p in parameters)
    left.noted = max(noted_passes(module) for module in state.modules.values())
    with CommDebugMode() as talk:
        project_weights(state.modules["model"])
    left.projecting = talk.get_total_counts()
    left.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return left


def noted_passes(module: nn.Module) -> float:
    """Return how many forward passes FSDP still has notes of, on average over a network's units."""
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    if not units:
        return 0.0
    notes = [unit._get_fsdp_state()._fsdp_param_group._post_forward_indices for unit in units]
    order = units[0]._get_fsdp_state()._comm_ctx.post_forward_order
    return max(len(order), sum(map(len, notes))) / len(units)


def attempted(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except UserError as error:
        return type(error).__name__, str(error)
    return "nothing raised", ""


def skipped_step(name: Any, overflowing: bool) -> tuple[float, float]:
    """Step on this process's slice under fp16 scaling; return its value and the next scale."""
    mine = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(OptimizerConfig(name=name, lr=0.1), [mine])
    scaler = LossScaler(torch.device("cpu"), True, several=True)
    scaler.scale(mine.sum() * (float("inf") if overflowing else 1.0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scale = scaler.current()
    assert scale is not None
    return float(mine.detach()[0]), float(scale)


def child(rank: int, size: int, port: int, pipe: Connection, wholes: dict[str, Left]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    with joined(Launch(rank, size, rank, size), torch.device("cpu")) as world:
        names = SCENARIOS if size == 2 else UNEVEN
        found: dict[str, Any] = {n: trained(SCENARIOS[n], world, split=True) for n in names}
        middle = wholes["tangent"].checkpoints[0]
        found["half"] = trained(HALF, world, split=True)
        found["resumed"] = trained(SCENARIOS["tangent"], world, split=True, resume=middle)
        found["skipped"] = [skipped_step(name, rank == size - 1) for name in OPTIMIZERS]
        found["not skipped"] = [skipped_step(name, False) for name in OPTIMIZERS]
        pipe.send(found)


def failing(rank: int, size: int, port: int, pipe: Connection, wholes: dict[str, Left]) -> None:
    torch.set_num_threads(1)
    distributed.SHORT_PATIENCE = timedelta(seconds=3)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    with joined(Launch(rank, size, rank, size), torch.device("cpu")) as world:
        train = partial(trained, SCENARIOS["clipped"], world, split=True)
        in_all = attempted(lambda: train(missing=range(BATCH, 2 * BATCH)))
        Sharding.hosts_wait = False  # type: ignore  # as over NCCL: streams are left waiting
        on_gpus = attempted(lambda: train(missing=range(BATCH, 2 * BATCH)))
        Sharding.hosts_wait = True  # type: ignore
        in_one = attempted(lambda: train(missing=range(2 * BATCH - 1, 2 * BATCH)))
        pipe.send((in_all, on_gpus, in_one))
        pipe.close()
        os._exit(3)


def together(size: int, wholes: dict[str, Left], target: Any = child) -> list[dict[str, Any]]:
    """Return what each of several processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, pipes, processes = get_context("fork"), [], []
    for rank in range(size):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=target, args=(rank, size, port, there, wholes)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(30)
            process.kill()


@pytest.fixture(scope="module")
def whole(exported_folder: None) -> dict[str, Left]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        scenarios = SCENARIOS | {"half": HALF}
        return {name: trained(s, World(), split=False) for name, s in scenarios.items()}


@pytest.fixture(scope="module")
def two(whole: dict[str, Left]) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        return together(2, whole)


@pytest.fixture(scope="module")
def three(whole: dict[str, Left]) -> list[dict[str, Any]]:
    return together(3, whole)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights and averages to 1e-6; moments relatively, and squares have twice the rounding."""
    assert found.keys() == expected.keys()
    moments: dict[str, list[tuple[Any, Any]]] = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if name.startswith("optimizer."):
            kind = name.rpartition(".")[2]
            moments.setdefault(kind, []).append((found[name].ravel(), value.ravel()))
        elif value.size:
            assert abs(found[name] - value).max() < 1e-6, name
    for kind, pairs in moments.items():
        ours, theirs = (concatenate(side) for side in zip(*pairs))
        assert norm(ours - theirs) <= 2e-6 * norm(theirs), kind


@pytest.mark.parametrize("name", SCENARIOS)
def test_split_networks_train_as_whole_ones(
    name: str, whole: dict[str, Left], two: list[dict[str, Any]]
) -> None:
    assert_trained_as(whole[name], [found[name] for found in two])


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_slices_train_as_whole_networks(
    name: str, whole: dict[str, Left], three: list[dict[str, Any]]
) -> None:
    assert_trained_as(whole[name], [found[name] for found in three])


def assert_trained_as(expected: Left, split: list[Left]) -> None:
    found = split[0]
    assert len(found.checkpoints) == len(expected.checkpoints) > 0
    for (tensors, meta), (others, other) in zip(found.checkpoints, expected.checkpoints):
        assert_same(tensors, others)
        assert meta | {"seconds": 0} == other | {"seconds": 0}
    assert len(found.exports) == len(expected.exports) > 0
    for ours, theirs in zip(found.exports, expected.exports):
        assert_same(ours, theirs)
    moved = max(
        abs(value - expected.before[name.removeprefix("raw/")]).max()
        for name, value in expected.exports[-1].items()
        if name.startswith("raw/")
    )
    assert moved > 1e-3, "nothing was learned that could differ"
    for other in split[1:]:
        assert not other.checkpoints[0][0], "only the leader holds whole tensors"
    shares = [left.share for left in split]
    assert sum(shares) == pytest.approx(1.0, abs=0.02)
    assert max(shares) < 1.6 / len(split)


def test_scaled_losses_train_split_networks_too(
    whole: dict[str, Left], two: list[dict[str, Any]]
) -> None:
    found, expected = two[0]["half"], whole["half"]
    assert_same(found.exports[-1], expected.exports[-1])
    assert found.checkpoints[-1][1]["loss_scalers"] == expected.checkpoints[-1][1]["loss_scalers"]


@pytest.mark.parametrize("name", ["average as target", "staged"])
def test_networks_without_a_backward_pass_leave_no_notes(
    name: str, two: list[dict[str, Any]]
) -> None:
    in_a_step = BATCH // 2 // SHARD * 2  # shards of a process, in each two passes at most
    assert 0 < two[0][name].noted <= in_a_step


def test_projecting_weights_needs_no_other_process(two: list[dict[str, Any]]) -> None:
    """Rows lie whole in one process; asking a split weight for a row would gather all of it."""
    assert [found["loss with a log-variance"].projecting for found in two] == [0, 0]


def test_blocks_are_compiled(two: list[dict[str, Any]]) -> None:
    assert two[0]["compiled tangent"].graphs >= 3
    assert two[0]["tangent"].graphs == 0


def test_what_a_whole_run_left_goes_on_split(
    whole: dict[str, Left], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    for found in (two[0], three[0]):
        assert_same(found["resumed"].exports[-1], whole["tangent"].exports[-1])


def test_what_a_split_run_left_goes_on_whole(
    whole: dict[str, Left], three: list[dict[str, Any]]
) -> None:
    middle = three[0]["tangent"].checkpoints[0]
    resumed = trained(SCENARIOS["tangent"], World(), split=False, resume=middle)
    assert_same(resumed.exports[-1], whole["tangent"].exports[-1])


def test_an_overflow_in_one_slice_skips_the_step_everywhere(three: list[dict[str, Any]]) -> None:
    for found in three:
        assert found["skipped"] == [(1.0, 2.0**15)] * len(OPTIMIZERS)
        assert found["not skipped"] == [(pytest.approx(0.9), 2.0**16)] * len(OPTIMIZERS)


def test_failures_within_a_step_are_said_by_all() -> None:
    """One that fails alone cannot be heard by others, who wait for its slices: both end."""
    both = together(2, {}, failing)
    for rank, (in_all, on_gpus, in_one) in enumerate(both):
        assert in_all[0] == SharedFailureError.__name__
        assert "OSError: image cannot be read" in in_all[1]
        assert on_gpus[0] == BrokenRunError.__name__, "no run can follow in these processes"
        assert "rank 0 of 2: OSError: image cannot be read; all processes end, " in on_gpus[1]
        assert in_one[0] == BrokenRunError.__name__
        assert f"rank {rank} of 2: " in in_one[1]
        assert "start the same command again" in in_one[1]
    assert "OSError: image cannot be read; the others wait" in both[1][2][1]
