"""The work of ``cmbench tune-times``: everything that needs torch."""

from __future__ import annotations

from cmbench.cli.common import echo_table, make_context, stop_asker
from cmbench.cli.tune_times import TuneOptions
from cmbench.errors import EXIT_OK
from cmbench.plugin.manager import PluginManager
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_imported_run, plan_run
from cmbench.sweep.plans import RunPlan
from cmbench.sweep.tuned_sigmas import describe
from cmbench.sweep.tuning import TuneSettings, check, kept_levels, objective_metric, tune


def carry_out(options: TuneOptions, plugins: PluginManager) -> int:
    """Search the noise levels for every NFE and print what was found."""
    settings = TuneSettings(
        options.held_out_seeds,
        options.samples,
        options.batch_size,
        options.metric,
        options.sampler,
        options.ema,
        options.sigma_min,
        options.evaluations,
        options.rounds,
        options.search,
    )
    with stop_asker(options.time_limit_s) as should_stop:
        context = make_context(options, plugins, should_stop)
        context.workspace.require_writable()
        run = planned(context, options)
        for nfe in options.nfes:  # check all of the input before any of the work
            cells = check(context, run, nfe, settings)
            metric = objective_metric(context, context.dataset_spec(run.dataset), settings.metric)
            kept_levels(context, cells[0], settings, metric)
        found = []
        for nfe in options.nfes:
            context.reporter.note(f"tuning {run.run_id} at NFE {nfe}")
            found.append(describe(tune(context, run, nfe, settings)))
    echo_table(list(found[0]), [list(row.values()) for row in found])
    return EXIT_OK


def planned(context: Context, options: TuneOptions) -> RunPlan:
    """Return the run to tune on: a training, or an imported checkpoint."""
    asked = (options.dataset, options.recipe, options.seed, options.overrides)
    if options.checkpoint is not None:
        return plan_imported_run(context, options.checkpoint, options.method, *asked)
    return plan_run(context, options.method or context.plugins.default_method, *asked)
