"""The work of ``cmbench reproduce``: everything that needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from cmbench.cli.checkpoints import CheckpointOptions
from cmbench.cli.checkpoints_work import keep, read
from cmbench.cli.common import echo_table, make_context
from cmbench.cli.eval_work import keep_first, print_warnings
from cmbench.cli.importing import DownloadLines
from cmbench.cli.output import echo
from cmbench.cli.reproduce import ReproduceOptions
from cmbench.errors import EXIT_CELLS_FAILED, EXIT_OK, MissingError, UserError
from cmbench.files import sha256_file
from cmbench.importers.public import PublicCheckpoint, fetch_listed, find_public, unproven
from cmbench.metrics.weight_files import WEIGHTS, find_weights
from cmbench.records.workspace import Workspace
from cmbench.sweep.imported import path_of
from cmbench.sweep.published_value import (
    NOT_REPRODUCED,
    PublishedComparison,
    compared,
    doubts_of,
    request_of,
    verdict_of,
    with_verdict,
)
from cmbench.sweep.scored import score

#: The weights behind the metrics of the list, as `cmbench prepare` names them.
_WEIGHTS = {"fid-legacy-tensorflow": "clean-fid", "fd-dinov2-edm2": "dinov2"}
_T = TypeVar("_T")


@dataclass
class PublishedFiles:
    """The files of one reproduction, and which of them are not known to be the published ones."""

    row: PublicCheckpoint
    workspace: Workspace
    file: Path | None = None
    reference: str = ""
    #: Whether the extractor's weights are the published ones.
    verified: bool = False
    doubts: list[str] = field(default_factory=list)
    missing: list[MissingError] = field(default_factory=list)

    def gather(self, options: ReproduceOptions) -> None:
        """Find or download every file.

        Raises:
            MissingError: files are missing; the message says which, and where to put each.
        """
        metric = self.row.metrics.split()[0]
        name = _WEIGHTS.get(metric, "inception")
        weights = self._attempt(lambda: find_weights(name, options.weights))
        self.verified = weights is not None and WEIGHTS[name].verifies(sha256_file(weights))
        listed = find_public(self.row.reference)
        assert listed is not None
        if options.reference is not None:
            self.reference = options.reference
            self._doubt("the reference", listed, Path(options.reference))
        elif (found := self._attempt(lambda: self._fetched(listed))) is not None:
            self.reference = str(found)
            self._doubt("the reference", listed, found)
        if options.file is not None and not options.file.is_file():
            raise MissingError("--file", f"{options.file} does not exist", remedy="check the path")
        self.file = options.file or self._attempt(lambda: self._fetched(self.row))
        if self.missing:
            problems = [str(error) for error in self.missing]
            raise MissingError(f"cmbench reproduce {self.row.name}", " | ".join(problems))
        assert self.file is not None
        what = "the archive" if self.row.is_archive else "the checkpoint"
        self._doubt(what, self.row, self.file)

    def _fetched(self, listed: PublicCheckpoint) -> Path:
        again = f"cmbench reproduce {self.row.name}"
        lines = DownloadLines(listed.name)
        return fetch_listed(listed, self.workspace.downloads, again, lines)

    def _attempt(self, find: Callable[[], _T]) -> _T | None:
        try:
            return find()
        except MissingError as error:
            self.missing.append(error)
            return None

    def _doubt(self, what: str, listed: PublicCheckpoint, path: Path) -> None:
        why = unproven(listed, path) if path.is_file() else f"is {path}, not the published file"
        if why:
            self.doubts.append(f"{what} {why}")


def carry_out(options: ReproduceOptions, row: PublicCheckpoint) -> int:
    """Gather the files, sample, score, compare, write the record; return the exit code."""
    context = make_context(options)
    files = PublishedFiles(row, context.workspace)
    files.gather(options)
    samples = samples_of(files)
    request = request_of(row, samples, files.reference, options.seed, verified=files.verified)
    request = replace(
        request,
        weights=options.weights,
        trust=options.trust_weights,
        batch_size=options.batch_size,
        read=replace(
            request.read, limit=options.samples or request.read.limit, device=str(context.device)
        ),
    )
    record = score(context, request)
    comparisons = compared(row, record)
    doubts = [*files.doubts, *doubts_of(row, record)]
    record = with_verdict(record, row, comparisons, doubts)
    kept = keep_first(context, record, "cmbench reproduce")
    print_warnings(record)
    print_comparison(row, comparisons)
    verdict = verdict_of(comparisons, doubts)
    echo(f"verdict: {verdict}" + (f" ({'; '.join(doubts)})" if doubts else ""))
    kept.tell()
    return EXIT_CELLS_FAILED if verdict == NOT_REPRODUCED else EXIT_OK


def samples_of(files: PublishedFiles) -> str:
    """Return what is scored: the archive, or the imported checkpoint."""
    row, path = files.row, files.file
    assert path is not None
    if row.is_archive:
        return str(path)
    silent = dict.fromkeys(("parameterization", "sigma_min", "channels_per_head", "resolution"))
    given = {**silent, **row.given}
    sigma_data = given.pop("sigma_data", None)
    options = CheckpointOptions(**given, part="ema", ignored=())
    found = read(path, options, sigma_data)
    if not found.parameterization:
        raise UserError(
            f"checkpoint {path}",
            "does not say how the output of its network is read",
            remedy="import it with --parameterization, and score it with `cmbench eval`",
        )
    name = f"{row.name[:31]}-{sha256_file(path)[:8]}"
    keep(found, path_of(files.workspace, name), force=False, ours=True)
    return f"import:{name}"


def print_comparison(row: PublicCheckpoint, comparisons: list[PublishedComparison]) -> None:
    """Print one line per metric: ours, theirs, and the difference in standard errors."""
    rows = [
        [
            one.metric,
            "-" if one.value is None else f"{one.value:.6g}",
            f"{one.published:.6g}",
            "-" if one.value is None else f"{one.value - one.published:+.3g}",
            "-" if one.in_standard_errors is None else f"{one.in_standard_errors:+.2f}",
            {True: "yes", False: "no", None: "not known"}[one.agrees],
        ]
        for one in comparisons
    ]
    header = ["metric", "ours", "published", "difference", "in standard errors", "agrees"]
    echo_table(header, rows, title=f"{row.name}: {row.published}")
