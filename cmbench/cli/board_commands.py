"""The work of ``cmbench leaderboard commands``: what reproduces a published row, at what cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cmbench.cli.common import echo_table
from cmbench.cli.output import echo
from cmbench.errors import described
from cmbench.leaderboard.published import Published, PublishedRow
from cmbench.leaderboard.reproducible import (
    COMMANDS_FILE,
    CommandEntry,
    RecipeRun,
    command_line,
    entries_of,
)
from cmbench.plugin.manager import PluginManager
from cmbench.records.workspace import Workspace
from cmbench.sweep.context import Context
from cmbench.sweep.estimate import SUPPOSED_RATE, count, supposed_hours
from cmbench.sweep.planning import plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.runs import TrainingKit

_WHO = "cmbench leaderboard commands"


@dataclass(frozen=True)
class RecipeCost:
    """What training a recipe takes; hours at :data:`SUPPOSED_RATE`, None where not counted."""

    parameters: int
    images: int
    #: with the making of generated data
    gpu_hours: float | None
    #: of the teacher that the recipe trains first.
    teacher_gpu_hours: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class RowAnswer:
    """A published row with its command and cost, or the reason why there is none."""

    method: str
    nfe: str
    fid: str
    inception_score: str
    command: str = ""
    cost: RecipeCost | None = None
    reason: str = ""
    note: str = ""


class RecipeCosts:
    """Costs of recipes, each counted once, on fake tensors."""

    def __init__(self, plugins: PluginManager) -> None:
        self.context = Context(
            plugins, Workspace(Path()), device=torch.device("cpu"), threads=1, verb=_WHO
        )
        self._found: dict[tuple[RecipeRun, str], RecipeCost] = {}
        self._hours: dict[str, tuple[int, float | None, str]] = {}

    def of(self, run: RecipeRun, dataset: str) -> RecipeCost:
        """Return the cost of a training.

        Raises:
            UserError: method, dataset or recipe do not exist.
        """
        if (run, dataset) not in self._found:
            self._found[run, dataset] = self._counted(run, run.dataset or dataset)
        return self._found[run, dataset]

    def _counted(self, run: RecipeRun, dataset: str) -> RecipeCost:
        plan = plan_run(self.context, run.method, dataset, run.recipe, 0, run.options)
        images, hours, problem = self._training(plan)
        with torch.device("meta"):
            network = TrainingKit(self.context, plan, plan.data_info(self.context), None).network()
        parameters = sum(p.numel() for p in network.parameters())
        first = plan.teacher.run if plan.teacher is not None else None
        taught = self._training(first)[1] if first is not None else None
        return RecipeCost(parameters, images, hours, taught, problem)

    def _training(self, plan: RunPlan) -> tuple[int, float | None, str]:
        key = plan.config_sha256
        if key not in self._hours:
            try:
                images, flops, _, _, generated = count(self.context, plan)
                made = sum((g.flops_per_pair or 0.0) * g.pairs for g in generated)
                hours = supposed_hours(flops, images) + supposed_hours(made, 1)
                self._hours[key] = images, hours, ""
            except Exception as error:  # a failing count must not hide the command
                images = round(plan.config.duration_kimg * 1000)
                self._hours[key] = images, None, described(error, 200)
        return self._hours[key]


def answers(
    plugins: PluginManager, published: Published, entries: tuple[CommandEntry, ...]
) -> list[RowAnswer]:
    """Return every published row of a board with its command and cost, or the reason for none."""
    costs = RecipeCosts(plugins)
    return [
        _answer(costs, published.board.dataset, *pair) for pair in entries_of(published, entries)
    ]


def _answer(
    costs: RecipeCosts, dataset: str, row: PublishedRow, entry: CommandEntry | None
) -> RowAnswer:
    facts = (row.method, row.nfe, row.fid, row.is_)
    if entry is None:
        return RowAnswer(*facts, reason=f"{COMMANDS_FILE} has no entry for it")
    if entry.run is None:
        return RowAnswer(*facts, reason=entry.reason, note=entry.note)
    command = command_line(entry.run, dataset, row.nfe)
    return RowAnswer(*facts, command, costs.of(entry.run, dataset), note=entry.note)


def as_objects(found: list[RowAnswer]) -> list[dict[str, object]]:
    """Return the answers for JSON; hours with the rate that they suppose."""
    return [{**asdict(answer), "supposed_flops_per_second": SUPPOSED_RATE} for answer in found]


def print_answers(board: str, found: list[RowAnswer]) -> None:
    """Print the rows with a command, then those without one with the reason."""
    trained = [answer for answer in found if answer.command]
    others = [answer for answer in found if not answer.command]
    if not found:
        echo(f"{board}: no published rows")
    if trained:
        header = ["published", "NFE", "FID", "parameters", "images", "GPU-hours", "teacher's"]
        title = (
            f"{board}: rows that a recipe reproduces; GPU-hours are estimates at {SUPPOSED_RATE:g} "
            "FLOP/s, a third of an A100's bfloat16 peak"
        )
        rows = [_cells(answer) for answer in trained]
        echo_table([*header, "command", "note"], rows, title=title, prose=("command", "note"))
        echo()
    if others:
        lines = [[a.method, a.nfe or "-", a.fid or "-", a.reason] for a in others]
        title = f"{board}: rows without a recipe"
        echo_table(["published", "NFE", "FID", "reason"], lines, title=title, prose=("reason",))


def _cells(answer: RowAnswer) -> list[str]:
    cost = answer.cost
    assert cost is not None, "rows with a command have a cost"
    note = "; ".join(part for part in (answer.note, cost.problem) if part)
    numbers = [f"{cost.parameters:,}", f"{cost.images:,}"]
    numbers += [
        "-" if hours is None else f"{hours:,.0f}"
        for hours in (cost.gpu_hours, cost.teacher_gpu_hours)
    ]
    printed = [answer.method, answer.nfe or "-", answer.fid or "-"]
    return [*printed, *numbers, answer.command, note]
