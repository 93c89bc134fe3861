"""The work of ``cmbench study``: everything that needs torch."""

from __future__ import annotations

from pathlib import Path

from cmbench.cli.common import echo_table, make_context, stop_asker
from cmbench.cli.output import echo
from cmbench.cli.run_tables import print_failed, print_warnings
from cmbench.cli.study import StudyOptions
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, UserError
from cmbench.files import write_atomically
from cmbench.plugin.manager import PluginManager
from cmbench.records.studies import StudyResult
from cmbench.report.study import mean_text, summary
from cmbench.report.study_plot import draw, require_matplotlib
from cmbench.sweep.executors import Local
from cmbench.sweep.studies import load_study, plan_study, run_study


def carry_out(options: StudyOptions, name: str, plugins: PluginManager) -> int:
    """Run what the study lacks, then print its table and write its page."""
    if not options.no_plot:
        require_matplotlib()
    found = load_study(plugins, name)
    with stop_asker(options.time_limit_s) as should_stop:
        context = make_context(options, plugins, should_stop)
        result = run_study(context, found, plan_study(context, found), Local())
    return show(result, options.output or context.workspace.root / "studies", not options.no_plot)


def show(result: StudyResult, folder: Path, plots: bool) -> int:
    """Write the page of a study into ``folder``, print its table; return the exit code."""
    rows = [
        [arm.arm.name, str(nfe), *(mean_text(arm.values(m, nfe)) for m in result.metrics)]
        for arm in result.arms
        for nfe in arm.nfes
    ]
    page = folder / f"{result.name}.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw(result, folder) if plots else []
        write_atomically(page, summary(result, pictures).encode())
    except OSError as error:
        raise UserError(
            "--out",
            f"{folder} cannot be written ({error.strerror})",
            remedy="choose another folder",
        ) from error
    echo_table(["arm", "NFE", *result.metrics], rows)
    echo(f"page: {page}")
    records = [record for arm in result.arms for record in arm.records]
    print_warnings(records)
    return EXIT_CELLS_FAILED if print_failed(records) else EXIT_OK
