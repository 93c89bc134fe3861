"""``cmbench study``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmbench.cli.main import workspace_option
from cmbench.cli.results import echo_table
from cmbench.cli.run import make_context, stop_asker
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.plugin.manager import load_plugins

if TYPE_CHECKING:
    from cmbench.sweep.context import Context
    from cmbench.sweep.studies import ArmResult, Study


@click.command("study")
@click.argument("name", required=False)
@click.option("--list", "listing", is_flag=True, help="List the studies there are.")
@click.option(
    "--output",
    metavar="DIR",
    default=None,
    help="Folder of the page and its plots.  [default: WORKSPACE/studies]",
)
@click.option("--no-plot", is_flag=True, help="Tables only; needs no matplotlib.")
@click.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    default=None,
    help="CPU threads.  [default: the cores that are free]",
)
@click.option(
    "--time-limit",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=None,
    help="Save a checkpoint and exit 75 after this long.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@workspace_option
@click.pass_context
def study(ctx: click.Context, /, **options: Any) -> int:
    """Repeat a comparison: run its arms, then write a table and plots.

    NAME is one of `cmbench study --list`, or a .toml file of yours. Arms that are measured already
    are not run again.

    \b
    cmbench study --list
    cmbench study NAME
    """
    plugins = load_plugins()
    if options["listing"]:
        specs = plugins.studies.specs.values()
        echo_table(["study", "title"], [[s.name, s.title] for s in specs], prose=("title",))
        return EXIT_OK
    if options["name"] is None:
        raise UserError(
            "cmbench study",
            "names no study",
            allowed=", ".join(plugins.studies.specs) or "a .toml file",
            remedy="see `cmbench study --list`",
        )
    if not options["no_plot"]:
        from cmbench.report.study_plot import require_matplotlib

        require_matplotlib()
    from cmbench.sweep.studies import load_study

    found = load_study(plugins, options["name"])
    options["debug"] = bool((ctx.obj or {}).get("debug"))
    with stop_asker(options["time_limit"]) as should_stop:
        return repeat(options, found, make_context(options, plugins, should_stop))


def repeat(options: dict[str, Any], found: Study, context: Context) -> int:
    """Run a study, print its table, write its page; return the exit code."""
    from cmbench.sweep.executors import Local
    from cmbench.sweep.studies import plan_study, run_study

    results = run_study(context, plan_study(context, found), Local())
    echo_table(*plain_table(context, found, results))
    click.echo(f"page: {write_page(options, found, context, results)}")
    reasons = Counter(r.reason for a in results for r in a.records if r.status == "failed")
    for reason, count in reasons.items():
        click.echo(f"error: {count} cell(s) failed: {reason}", err=True)
    return EXIT_CELLS_FAILED if reasons else EXIT_OK


def plain_table(
    context: Context, found: Study, results: list[ArmResult]
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: one an arm and NFE, the metrics that the study plots."""
    from cmbench.report.study import mean_text, nfes_of
    from cmbench.sweep.studies import values_of

    rank = context.dataset_spec(found.table.dataset).metrics[0]
    plotted = [plot.metric or rank for plot in found.table.plots if plot.kind == "metric"]
    metrics = list(dict.fromkeys(plotted or [rank]))
    rows = [
        [result.arm.name, str(nfe), *(mean_text(values_of(result, m, nfe)) for m in metrics)]
        for result in results
        for nfe in nfes_of([result])
    ]
    return ["arm", "NFE", *metrics], rows


def write_page(
    options: dict[str, Any], found: Study, context: Context, results: list[ArmResult]
) -> Path:
    """Write ``<study>.md`` with its pictures beside it; return the page's path."""
    from cmbench.files import write_atomically
    from cmbench.report.study import summary

    folder = Path(options["output"] or context.workspace.root / "studies")
    spec = context.dataset_spec(found.table.dataset)
    records, rank = context.workspace.records(spec.name), spec.metrics[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures: list[str] = []
        if not options["no_plot"]:
            from cmbench.report.study_plot import draw

            pictures = draw(found, results, records, folder, rank)
        page = folder / f"{found.name}.md"
        write_atomically(page, summary(found, results, records, pictures, rank).encode())
    except OSError as error:
        raise UserError(
            "--output",
            f"{folder} cannot be written ({error.strerror})",
            remedy="choose another folder",
        ) from error
    return page
