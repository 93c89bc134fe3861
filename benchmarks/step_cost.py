"""What a training step of each method costs relative to a diffusion step, measured side by side.

    python benchmarks/step_cost.py [--rounds 30]

Same network, same batch, one thread; rounds are interleaved, so that a busy moment hits all alike,
and medians are compared. Forward equivalents are counted by the engine (a backward pass is two).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmbench.networks.counted import CountedNetwork
from cmbench.plugin.manager import load_plugins
from cmbench.plugin.method import Teacher
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.runs import build_modules
from cmbench.training.augment import DatasetFeed
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState

BASE = "edm"
TARGETS = {"ct": 1.45, "ict": 1.45, "ect": 1.45, "cd": 2.2, "sct": 2.2, "scd": 2.6}


class Stepper:
    """Makes training steps of one method with a teacher of random weights."""

    def __init__(self, context: Context, method: str, batch_size: int) -> None:
        plan = plan_run(context, method, "digits", "demo", 0, [f"batch_size={batch_size}"])
        teacher = None
        self.observed = []
        if plan.teacher is not None and plan.teacher.run is not None:
            teacher_method, modules = build_modules(context, plan.teacher.run, None)
            nets = {n: CountedNetwork(m.eval().requires_grad_(False)) for n, m in modules.items()}
            model = teacher_method.diffusion_model(nets)
            teacher = Teacher("random weights", model, modules["model"])
            self.observed = list(nets.values())
        method_object, modules = build_modules(context, plan, teacher)
        self.state = TrainingState(method_object, modules)
        self.state.observed = self.observed
        self.state.enter(0)
        self.settings = Settings(seed=0, batch_size=batch_size)
        self.feed = DatasetFeed(context.dataset("digits"), plan.config)
        self.trainer = Trainer(self.state, self.feed, self.settings)

    def step(self) -> None:
        self.trainer.train_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="cmbench-step-cost-")
    cpu = torch.device("cpu")
    context = Context(load_plugins(), Workspace(Path(folder)), device=cpu, threads=1)
    names = [BASE, *(n for n in context.plugins.methods.specs if n not in (BASE, "ict-deep"))]
    steppers = {n: Stepper(context, n, arguments.batch_size) for n in names}
    flops: dict[str, int] = {}
    for name, stepper in steppers.items():
        stepper.step()
        with FlopCounterMode(display=False) as counter:
            stepper.step()
        flops[name] = counter.get_total_flops()
    times: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(arguments.rounds):
        for name, stepper in steppers.items():
            began = time.perf_counter()
            stepper.step()
            times[name].append(time.perf_counter() - began)
    medians = {n: statistics.median(t) for n, t in times.items()}
    print(f"{'method':<8}{'ms':>8}{'time':>8}{'FLOPs':>8}{'forwards':>10}{'target':>8}")
    for name, stepper in steppers.items():
        steps = stepper.state.nimg // arguments.batch_size
        forwards = stepper.state.network_evaluations / arguments.batch_size / steps
        print(
            f"{name:<8}{medians[name] * 1e3:>8.1f}{medians[name] / medians[BASE]:>8.2f}"
            f"{flops[name] / flops[BASE]:>8.2f}{forwards:>10.2f}{TARGETS.get(name, 0) or '':>8}"
        )


if __name__ == "__main__":
    main()
