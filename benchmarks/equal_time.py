"""Measure training speeds and write the lengths that give every student the same GPU time.

    python benchmarks/equal_time.py --methods ect,ict,sct,scd,cd,pd --budget-seconds 60 \
        --dataset cifar10-jpeg --recipe demo --workspace W --out budget.json

Each student's own steps are timed: its recipe's network, batch and precision, the dataset's images,
its trained teacher (trained first, as ``cmbench run`` would, if it is not there), compiled where
``cmbench run`` compiles. Compilation is not counted, and neither are sampling and the teacher.
``budget.json`` keeps the speed and ``duration_kimg`` of each student, which belongs on its command
line: ``cmbench run --method M -o duration_kimg=N``. The length is part of a run's identity, so what
stands in the file is never measured again: started again, the script measures what is missing.

Exit codes are those of ``cmbench run``: 75 asks to be started again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cmbench.cli.common import make_context, stop_asker
from cmbench.cli.options import ComputeOptions
from cmbench.errors import EXIT_OK, UserError
from cmbench.files import write_atomically
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import build_modules
from cmbench.sweep.threads import use_threads
from cmbench.sweep.training_run import obtain_teacher
from cmbench.training.augment import DatasetFeed
from cmbench.training.loop import Trainer
from cmbench.training.settings import Settings
from cmbench.training.state import TrainingState

WHO = "equal_time.py"
#: Steps before the timed ones: the compiler works in the first, the allocator in the others.
WARM_UP = 4


def length_kimg(images_per_s: float, seconds: float, batch_size: int, passes: float = 1.0) -> float:
    """Return the ``duration_kimg`` that trains for ``seconds``, in whole batches, at least one.

    Args:
        images_per_s: training images a second.
        seconds: GPU time to spend.
        batch_size: images a step.
        passes: images trained on for each image of ``duration_kimg``: the stages of a method whose
            duration is a stage's, otherwise 1.
    """
    if not (images_per_s > 0 and seconds > 0 and passes > 0):
        raise ValueError(f"no length from {images_per_s} images/s, {seconds} s, {passes} passes")
    batches = max(int(images_per_s * seconds / passes / batch_size), 1)
    return batches * batch_size / 1000


class Budget:
    """The file of lengths: seconds a student, and what was measured for each."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.table: dict[str, Any] = {"budget_seconds": seconds, "students": {}}
        if path.exists():
            self.table = read_budget(path)
        if self.table["budget_seconds"] != seconds:
            raise UserError(
                f"{WHO}, --budget-seconds {seconds:g}",
                f"{path} was measured for {self.table['budget_seconds']:g}",
                remedy="give that number, or another file and another workspace",
            )

    def missing(self, students: Sequence[str]) -> list[str]:
        """Return the students that have not been measured yet."""
        return [name for name in students if name not in self.table["students"]]

    def add(self, student: str, found: dict[str, Any]) -> None:
        """Keep what was measured, on disk too."""
        self.table["students"][student] = found
        write_atomically(self.path, (json.dumps(self.table, indent=1) + "\n").encode())


def read_budget(path: Path) -> dict[str, Any]:
    """Return the file's table.

    Raises:
        UserError: it is damaged.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        float(table["budget_seconds"])
        for found in table["students"].values():
            float(found["duration_kimg"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{WHO}, {path}",
            f"cannot be read ({type(error).__name__}: {error})",
            remedy="restore it; without it the runs of these lengths cannot be gone on with",
        ) from error
    return dict(table)


def calibrate(context: Context, plan: RunPlan, seconds: float, steps: int) -> dict[str, Any]:
    """Time steps of a run; return its speed and the length for ``seconds``."""
    teacher = obtain_teacher(context, plan)
    use_threads(context.threads)
    method, modules = build_modules(context, plan, teacher)
    state, config = TrainingState(method, modules), plan.config
    settings = Settings(
        seed=plan.seed,
        batch_size=config.batch_size,
        microbatch_size=config.microbatch_size,
        precision=config.precision,
        compile=context.compile,
        log_seconds=1e9,
    )
    feed = DatasetFeed(context.dataset(plan.dataset).to(context.device), config)
    trainer = Trainer(state, feed, settings)
    state.enter(0)
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            wait(context.device)
            began = time.perf_counter()
        trainer.train_step()
    wait(context.device)
    rate = steps * config.batch_size / (time.perf_counter() - began)
    trainer.meter.check_finite()
    images = sum(phase.images for phase in state.phases)
    passes = images / round(config.duration_kimg * 1000)
    return {
        "duration_kimg": length_kimg(rate, seconds, config.batch_size, passes),
        "images_per_s": round(rate, 1),
        "passes": round(passes, 3),
        "timed_steps": steps,
        "batch_size": config.batch_size,
        "compiled": context.compile,
        "device": context.gpu or "cpu",
        "torch": torch.__version__,
    }


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--budget-seconds", type=float, required=True, help="of each student")
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--out", type=Path, required=True, help="file to keep the lengths in")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--time-limit", type=float, help="stop training a teacher after so long")
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto")
    return parser.parse_args()


def main() -> int:
    """Measure every student that the file lacks."""
    options = parse()
    compiled = {"auto": None, "yes": True, "no": False}[options.compile]
    try:
        budget = Budget(options.out, options.budget_seconds)
        with stop_asker(options.time_limit) as should_stop:
            context = make_context(
                ComputeOptions(workspace_dir=options.workspace),
                compiled=compiled,
                should_stop=should_stop,
            )
            for name in budget.missing(options.methods.split(",")):
                context.command = (
                    f"cmbench run --method {name} --dataset {options.dataset} "
                    f"--recipe {options.recipe}"
                )  # trains the same teacher
                plan = plan_run(context, name, options.dataset, options.recipe, 0)
                found = calibrate(context, plan, options.budget_seconds, options.steps)
                budget.add(name, found)
                print(f"{name}: {json.dumps(found)}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    devices = {found["device"] for found in budget.table["students"].values()}
    if len(devices) > 1:
        print(
            f"warning: measured on several devices: {', '.join(sorted(devices))}: their times "
            "are not equal; delete the file (and the runs) to measure again",
            file=sys.stderr,
        )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
