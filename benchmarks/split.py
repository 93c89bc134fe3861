"""What splitting a network over processes (``--split``, FSDP2) leaves in each: bytes, side by side.

    python benchmarks/split.py --processes 2 --json benchmarks/results/split-cpu.json

Trains EDM2 on random 64x64 images for two steps, once whole and once split, in as many gloo
processes, and counts what each process keeps between steps: weights, gradients, Adam's moments and
two averages. It says how far the two end apart. Seconds are not compared: gloo on one machine says
nothing about NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from cmbench.plugin.manager import load_plugins
from cmbench.plugin.method import Batch
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.runs import build_modules
from cmbench.training.distributed import World, joined
from cmbench.training.launch import Launch
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings
from cmbench.training.sharding import Sharding
from cmbench.training.state import TrainingState

STEPS = 2


class RandomImages:
    """Noise by position."""

    def batch(self, start: int, count: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(start)
        images = torch.randn(count, 3, 64, 64, generator=generator).clamp(-1, 1)
        return Batch(images, torch.zeros(count, dtype=torch.int64))


def trained(world: World, options: argparse.Namespace, *, split: bool) -> TrainingState:
    device = torch.device("cpu")
    context = Context(load_plugins(), Workspace(Path("nowhere")), device=device, threads=1)
    plan = plan_run(
        context,
        "edm",
        "imagenet64",
        "paper",
        0,
        {
            "network": {"name": "edm2", "channels": options.channels},
            "conditional": True,
            "batch_size": world.size,
            "precision": "fp32",
            "ema": [{"sigma_rel": 0.05}, {"sigma_rel": 0.1}],
            "optimizer": {"name": "adam", "lr": 1e-3, "eps": 1.0, "warmup_kimg": 0},
        },
    )
    method, modules = build_modules(context, plan, None)
    state = TrainingState(method, modules, Sharding.over(world, device) if split else None)
    settings = Settings(seed=0, batch_size=world.size, world=world)
    trainer = Trainer(state, RandomImages(), settings)
    state.enter(0)
    for _ in range(STEPS):
        trainer.train_step()
    return state


def kept_bytes(state: TrainingState) -> dict[str, int]:
    """Count the bytes that this process keeps between steps."""

    def total(tensors: list[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    (objective,) = state.phase.objectives
    moved = state.moved(objective)
    moments = [t for s in state.optimizers[0].state.values() for t in s.values()]
    return {
        "weights": total(list(moved)),
        "gradients": total([p.grad for p in moved if p.grad is not None]),
        "moments": total(moments),
        "averages": total([a for average in state.averages for a in average.average]),
    }


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    size = options.processes
    with joined(Launch(rank, size, rank, size), torch.device("cpu")) as world:
        whole = trained(world, options, split=False)
        expected, before = whole.tensors(), kept_bytes(whole)
        parameters = sum(p.numel() for p in whole.modules["model"].parameters())
        del whole
        state = trained(world, options, split=True)
        after = kept_bytes(state)
        with state.gathered():
            found = state.tensors()
            if not world.leads:
                return
            names = [n for n in found if n.startswith("nets.")]
            apart = max(float((found[n] - expected[n]).abs().max()) for n in names)
        report(options, parameters, before, after, apart)


def report(
    options: argparse.Namespace,
    parameters: int,
    before: dict[str, int],
    after: dict[str, int],
    apart: float,
) -> None:
    result: dict[str, Any] = {
        "network": f"edm2, {options.channels} channels",
        "parameters": parameters,
        "processes": options.processes,
        "bytes_whole": before,
        "bytes_split_rank0": after,
        "split_over_whole": round(sum(after.values()) / sum(before.values()), 4),
        "largest_difference_of_weights": apart,
        "steps": STEPS,
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--channels", type=int, default=128, help="128: XS, 192: S, 320: XL")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, options), nprocs=options.processes)


if __name__ == "__main__":
    main()
