"""What a training step of each method costs relative to a diffusion step, measured side by side.

    python benchmarks/step_cost.py [--rounds 30] [--methods NAME ...]

Recipe `demo` of digits, same batch, one thread. Each round is five steps, the cycle of methods
whose networks take turns; rounds are interleaved, so that a busy moment hits all alike, and medians
of processor seconds are compared. Forward equivalents are counted by the engine (a backward pass is
two). `over` is the time relative to edm over the FLOPs relative to edm: 1.10 at most is the target.
Of staged methods it is the first phase; pairs of a generator are random images here.
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
from cmbench.testing.case import RandomFeed
from cmbench.training.augment import DatasetFeed
from cmbench.training.loop import Trainer
from cmbench.training.settings import Feed, Settings
from cmbench.training.state import TrainingState

BASE = "edm"
#: Steps of a round, and the most that time may exceed the count's FLOPs.
CYCLE, MOST_OVER = 5, 1.1


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
        pairs = self.state.phase.generated
        self.feed: Feed = DatasetFeed(context.dataset("digits"), plan.config)
        if pairs is not None:
            self.feed = RandomFeed(method_object.data, pairs.states)
        self.trainer = Trainer(self.state, self.feed, self.settings)

    def step(self) -> None:
        self.trainer.train_step()

    def cycle(self) -> float:
        """Make the steps of a round and return processor seconds."""
        began = time.process_time()
        for _ in range(CYCLE):
            self.step()
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--methods", nargs="+", help="beside edm; all by default")
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="cmbench-step-cost-")
    cpu = torch.device("cpu")
    context = Context(load_plugins(), Workspace(Path(folder)), device=cpu, threads=1)
    known = [n for n in context.plugins.methods.specs if n not in (BASE, "ict-deep")]
    names = [BASE, *(arguments.methods or known)]
    steppers = {n: Stepper(context, n, arguments.batch_size) for n in names}
    flops: dict[str, int] = {}
    for name, stepper in steppers.items():
        with FlopCounterMode(display=False) as counter:
            stepper.cycle()
        flops[name] = counter.get_total_flops()
    times: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(arguments.rounds):
        for name, stepper in steppers.items():
            times[name].append(stepper.cycle())
    medians = {n: statistics.median(t) / CYCLE for n, t in times.items()}
    print(f"{'method':<24}{'ms':>8}{'time':>8}{'FLOPs':>8}{'forwards':>10}{'over':>8}")
    for name, stepper in steppers.items():
        steps = stepper.state.nimg // arguments.batch_size
        forwards = stepper.state.network_evaluations / arguments.batch_size / steps
        cost, work = medians[name] / medians[BASE], flops[name] / flops[BASE]
        mark = "" if cost / work <= MOST_OVER else " *"
        print(
            f"{name:<24}{medians[name] * 1e3:>8.1f}{cost:>8.2f}{work:>8.2f}{forwards:>10.2f}"
            f"{cost / work:>8.2f}{mark}"
        )


if __name__ == "__main__":
    main()
