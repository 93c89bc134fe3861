"""The work of ``cmbench run``: everything that needs torch."""

from __future__ import annotations

from contextlib import suppress
from typing import get_args

from cmbench.cli.common import make_context, stop_asker
from cmbench.cli.output import echo
from cmbench.cli.run import RunOptions
from cmbench.cli.run_finished import key_of, print_results
from cmbench.cli.run_tables import print_failed, print_skipped, print_warnings, warn_of_few
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, InterruptedRunError, UserError
from cmbench.importers.public import published_teacher
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.manager import PluginManager
from cmbench.sweep.context import Context
from cmbench.sweep.executors import open_executor
from cmbench.sweep.kept_plans import keep_plan
from cmbench.sweep.plans import SampleSettings
from cmbench.sweep.recipes import merge, parse_overrides
from cmbench.sweep.sweep import SweepPlan, SweepRequest, execute, is_trained, plan_sweep
from cmbench.training.distributed import RELAYED, joined
from cmbench.training.launch import Launch


def carry_out(options: RunOptions, plugins: PluginManager, launch: Launch) -> int:
    """Run the sweep in this process, or as one of several that a launcher started."""
    if options.split and launch.size == 1:
        raise UserError(
            "--split",
            "there is only one process",
            allowed="several processes",
            remedy="start with torchrun, see docs/clusters.md, or leave it out",
        )
    with stop_asker(options.time_limit_s, patient=launch.size > 1) as should_stop:
        context = make_context(
            options, plugins, should_stop, launch, compiled=options.compiled, split=options.split
        )
        if options.file is not None:
            context.run_file_sha256 = options.file.sha256
        if options.dry_run or launch.size == 1:
            return sweep(options, context) if launch.rank == 0 else EXIT_OK
        with joined(launch, context.device) as world:
            context.world = world
            context.threads = world.lead(lambda: context.threads)
            return together(options, context)


def together(options: RunOptions, context: Context) -> int:
    """Run a sweep in one of several processes; only the leader prints an error that all meet."""
    if context.world.leads:
        return sweep(options, context)
    try:
        return sweep(options, context)
    except UserError as error:
        relayed = RELAYED in getattr(error, "__notes__", ())
        if relayed or isinstance(error, InterruptedRunError):
            return error.exit_code
        raise


def sweep(options: RunOptions, context: Context) -> int:
    """Plan, execute, print; return the exit code."""
    request = make_request(options)
    if context.world.size > 1:
        context.world.lead(lambda: bool(plan_sweep(context, request)))  # bad input is reported once
    plan = plan_sweep(context, request)
    for line in plan.refused if context.world.leads else ():
        echo(f"error: {line}", err=True)
    dataset = context.dataset_spec(request.dataset)
    for line in published_teachers(context, plan):
        context.reporter.note(line)
    if options.dry_run:
        from cmbench.cli.run_plan import print_plan

        warn_of_few(context.reporter, options.samples, dataset.num_samples)
        print_plan(context, plan)
        if all(cell.declined or cell.cell in plan.done for cell in plan.cells):
            keep(options, context, plan)
        return EXIT_CELLS_FAILED if plan.refused else EXIT_OK
    warn_of_unsaved(context, request, plan)
    records = execute(context, plan, open_executor(context.plugins, options.executor))
    if not context.world.leads:
        return EXIT_OK
    if all(record.status in ("finished", "skipped") for record in records):
        keep(options, context, plan)
    pages = () if options.no_report else [dataset.name]
    print_results(records, context.workspace, dataset, context.plugins, pages)
    print_warnings(records)
    print_skipped(records)
    return EXIT_CELLS_FAILED if print_failed(records) or plan.refused else EXIT_OK


def make_request(options: RunOptions) -> SweepRequest:
    """Return the sweep that the resolved options ask for."""
    sigmas = options.sigmas if isinstance(options.sigmas, tuple) else None
    overrides = parse_overrides(options.overrides, several=True)
    if options.file is not None:
        overrides = merge(options.file.options, overrides)
    return SweepRequest(
        options.methods or (),
        options.dataset,
        options.recipe,
        options.nfes,
        options.seeds,
        overrides,
        SampleSettings(
            options.samples,
            options.batch_size,
            sigmas,
            ema=options.ema,
            precision=options.precision,
            metrics=options.metrics or (),
            labels=options.labels,
        ),
        options.save_samples,
        options.checkpoint,
        options.tuned,
        options.samplers or (),
    )


def keep(options: RunOptions, context: Context, plan: SweepPlan) -> None:
    """Keep the plan of a finished sweep; a workspace that cannot be written stays as it is."""
    if key := key_of(options, context.plugins):
        with suppress(UserError):
            keep_plan(context.workspace, key, plan, context.plugins)


def published_teachers(context: Context, plan: SweepPlan) -> list[str]:
    """Return a line for each teacher that would be trained although a published one is listed."""
    lines = []
    for student in plan.runs:
        teacher = student.teacher.run if student.teacher is not None else None
        if teacher is None or is_trained(context, teacher):
            continue
        method, config = teacher.spec.name, teacher.config
        found = published_teacher(method, teacher.dataset, conditional=config.conditional)
        added = parameterization_option(student.config)
        if found is None or added is None:
            continue
        lines.append(
            f"{method} on {teacher.dataset} would be trained on {config.duration_kimg * 1000:,.0f} "
            f"images, and is published: run `cmbench import {found.name}`, then add "
            f"`-o teacher=import:{found.name}{added}`"
        )
    return list(dict.fromkeys(lines))


def parameterization_option(config: MethodConfig) -> str | None:
    """Return the option that makes a student read a network as EDM's; None if it cannot."""
    name = "parameterization"
    field = type(config).model_fields.get(name)
    if field is None or getattr(config, name) == "edm":
        return ""
    return " -o parameterization=edm" if "edm" in get_args(field.annotation) else None


def warn_of_unsaved(context: Context, request: SweepRequest, plan: SweepPlan) -> None:
    """Warn that finished cells are not sampled again, so their images cannot be saved."""
    samples = context.workspace.samples
    bare = sum(not samples(cell).is_dir() for cell in plan.done) if request.save_samples else 0
    if bare:
        context.reporter.warn(
            f"--save-samples: {bare} finished cell(s) have no saved images and are not sampled "
            "again; choose another --workspace, or delete their records"
        )
