"""Every hook of cmbench, with its parameters and its return value.

A plugin implements the hooks it needs with ``cmbench.plugin.hookimpl`` in the module (or object)
that its ``cmbench`` entry point names. Arguments are passed by keyword and a plugin takes only
those it uses, so a new argument never breaks one. Registration hooks are called once, at start-up,
and must be cheap: no torch, no files, no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from cmbench.plugin.specs import (
    DatasetSpec,
    ExecutorSpec,
    ExtractorSpec,
    MethodSpec,
    MetricSpec,
    NetworkSpec,
    StudySpec,
)

if TYPE_CHECKING:  # pragma: no cover
    from cmbench.records.record import Record

hookspec = pluggy.HookspecMarker("cmbench")


class CmbenchHooks:
    """The hook specifications."""

    @hookspec
    def cmbench_register_methods(self) -> Sequence[MethodSpec]:
        """Return the methods of this plugin.

        Returns:
            One :class:`~cmbench.plugin.specs.MethodSpec` per method. The name is what users type;
            two plugins that claim one name is an error that names both.
        """
        raise NotImplementedError

    @hookspec
    def cmbench_register_datasets(self) -> Sequence[DatasetSpec]:
        """Return the datasets, each with its protocol (reference, samples, NFE list, metrics).

        Returns:
            One :class:`~cmbench.plugin.specs.DatasetSpec` per dataset.
        """
        raise NotImplementedError

    @hookspec
    def cmbench_register_networks(self) -> Sequence[NetworkSpec]:
        """Return the network architectures.

        Returns:
            One :class:`~cmbench.plugin.specs.NetworkSpec` per architecture.
        """
        raise NotImplementedError

    @hookspec
    def cmbench_register_extractors(self) -> Sequence[ExtractorSpec]:
        """Return the feature extractors.

        Returns:
            One :class:`~cmbench.plugin.specs.ExtractorSpec` per extractor. Its Fréchet distances
            need no metric of their own.
        """
        raise NotImplementedError

    @hookspec
    def cmbench_register_metrics(self) -> Sequence[MetricSpec]:
        """Return the metrics; the built-in ones are registered here too.

        Returns:
            One :class:`~cmbench.plugin.specs.MetricSpec` per metric. Its ``factory`` points at the
            function that computes it.
        """
        raise NotImplementedError

    @hookspec
    def cmbench_register_executors(self) -> Sequence[ExecutorSpec]:
        """Return the executors (ways to run the cells of a sweep).

        Returns:
            One :class:`~cmbench.plugin.specs.ExecutorSpec` per executor.
        """
        raise NotImplementedError

    @hookspec
    def cmbench_register_studies(self) -> Sequence[StudySpec]:
        """Return the studies (comparisons of named arms) that ``cmbench study`` repeats.

        Returns:
            One :class:`~cmbench.plugin.specs.StudySpec` per study, with the path of its TOML file.
        """
        raise NotImplementedError

    @hookspec
    def cmbench_run_started(self, run_id: str, plan: Mapping[str, Any]) -> None:
        """Observe that the training of a run starts or resumes.

        Args:
            run_id: the run's identity, ``<dataset>/<method>-<recipe>-s<seed>-<hash>``.
            plan: ``config``, the resolved recipe, and ``folder``, the path of the run's folder.
        """

    @hookspec
    def cmbench_step_finished(self, run_id: str, nimg: int, scalars: Mapping[str, float]) -> None:
        """Observe a logging interval of the training loop.

        Args:
            run_id: the run's identity.
            nimg: images seen so far.
            scalars: means over the interval: ``loss``, ``grad_norm``, ``images_per_s`` and what
                the method logs itself.
        """

    @hookspec
    def cmbench_cell_finished(self, record: Record) -> None:
        """Observe that a record was written: of a cell of a sweep, or of samples that were scored.

        Args:
            record: the immutable record: finished, failed or skipped.
        """

    @hookspec
    def cmbench_report_columns(self) -> Mapping[str, str]:
        """Return extra columns for report tables.

        Returns:
            Column title to a dotted path into the record (``"metrics.fid.value"``).
        """
        raise NotImplementedError

    @hookspec
    def cmbench_report_charts(
        self, dataset: str, rows: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, str]]:
        """Return extra charts for a dataset's page.

        Args:
            dataset: the dataset's name.
            rows: the page's table rows.

        Returns:
            Mappings with ``title`` and ``svg``. Pages show the SVG as an image, in which browsers
            run no script and load nothing.
        """
        raise NotImplementedError
