"""A plugin's own metric, in a sweep and in an evaluation of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_metric
from toy import TOYS

from cmbench.metrics.catalog import all_metrics
from cmbench.metrics.extractor import PixelExtractor
from cmbench.metrics.metric import open_metrics
from cmbench.metrics.suite import MetricSuite
from cmbench.plugin import manager as manager_module
from cmbench.plugin.discovery import PluginInfo, installed_plugins
from cmbench.plugin.specs import DatasetSpec, MetricSpec
from cmbench.records.record import Record
from cmbench.sweep.context import Context
from cmbench.sweep.executors import Local
from cmbench.sweep.sweep import SweepRequest, execute, plan_sweep


@pytest.fixture
def measured(toys: Context) -> Callable[..., Record]:
    """Run the toy method under a protocol with these metrics."""
    toys.plugins.register(toy_metric.PLUGIN, PluginInfo("gaps", "toy_metric", "gap-tools", "2.0"))

    def run(*metrics: str) -> Record:
        toys.plugins.datasets.specs["toys"] = TOYS._replace(metrics=metrics)
        request = SweepRequest(("toy",), "toys", nfes=(1,))
        return execute(toys, plan_sweep(toys, request), Local())[0]

    return run


def test_it_is_measured_and_named_with_its_distribution(measured: Callable[..., Record]) -> None:
    record = measured("fd-pixels", "mean-gap", "mean-gap-sure")
    gap, sure = record.metrics["mean-gap"], record.metrics["mean-gap-sure"]
    assert gap.value is not None
    assert gap.value > 0
    assert (gap.unit, gap.higher_is_better, gap.standard_error) == ("levels", False, None)
    assert gap.key.startswith("mean-gap:pixels@")
    assert gap.key.endswith(":n=64:gap-tools-2.0")
    assert ":ref=" in gap.key
    assert gap.detail["samples"] == 64
    assert (sure.value, sure.standard_error) == (gap.value, 0.5)
    assert sure.interval == (gap.value - 1, gap.value + 1)
    assert sure.higher_is_better is False, "the direction is the spec's"
    assert sure.detail["who"] == "toy"
    assert sure.key.startswith("mean-gap-sure:")
    assert ":half-wide:" in sure.key
    assert sure.key.endswith(":n=64:2"), "a metric may state the version of its formula"


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("gap-breaks", "metric 'gap-breaks': raised RuntimeError: out of luck; fix the plugin"),
        ("gap-nonsense", "metric 'gap-nonsense': returned str; allowed: a number or an Estimate"),
        ("gap-nan", "metric 'gap-nan': returned NaN"),
        (
            "gap-elsewhere",
            "metric 'gap-elsewhere': returned 3 with the 95 % interval (4.0, 5.0); allowed: an "
            "interval that holds the value; fix the plugin, or return no interval",
        ),
        ("gap-logits", "the extractor 'pixels' gave no logits"),
        (
            "gap-secretly",
            "metric 'gap-secretly': reads 'real moments' without declaring it; allowed: features; "
            "add 'real moments' to the needs of its MetricSpec",
        ),
        ("class-spread", "metrics: no labels; allowed: samples with labels"),
    ],
)
def test_a_broken_one_fails_its_cell_only(
    measured: Callable[..., Record], metric: str, words: str
) -> None:
    record = measured("fd-pixels", metric)
    assert record.status == "failed"
    assert words in record.reason


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A file of samples, with the plugin installed."""
    gaps = PluginInfo("gaps", "toy_metric:PLUGIN", "gap-tools", "2.0")
    plugins = [*installed_plugins(), gaps]
    monkeypatch.setattr(manager_module, "installed_plugins", lambda: plugins)
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "noise.npy", images)
    return str(tmp_path / "noise.npy")


def test_samples_of_others_are_scored_with_it(cmbench: Callable[..., Any], noise: str) -> None:
    found = cmbench("eval", noise, "-d", "digits", "--metrics", "mean-gap", "--json", "-q")
    assert found.code == 0, found.err
    (metric,) = json.loads(found.out)["metrics"].values()
    assert metric["value"] > 0
    assert "mean-gap" in cmbench("list", "metrics").out
    unknown = cmbench("eval", noise, "-d", "digits", "--metrics", "mean-gup")
    assert unknown.code == 2
    assert "did you mean 'mean-gap'" in unknown.err


def test_an_extractor_of_a_plugin_has_its_distances(
    cmbench: Callable[..., Any], noise: str
) -> None:
    """They have no spec of their own, and name the extractor that computes them."""
    asked = "fd-row-means,sfd-row-means,fd-digits"
    found = cmbench("eval", noise, "-d", "digits", "--metrics", asked, "--json", "-q")
    assert found.code == 0, found.err
    metrics = json.loads(found.out)["metrics"]
    keys = {name: metric["key"].split(":")[:2] for name, metric in metrics.items()}
    assert keys["fd-row-means"][0] == "fd"
    assert keys["sfd-row-means"][0] == "sfd"
    assert keys["fd-row-means"][1] == keys["sfd-row-means"][1] != keys["fd-digits"][1]
    assert metrics["fd-row-means"]["key"].endswith(":n=40:v1")
    assert metrics["fd-row-means"]["value"] != metrics["sfd-row-means"]["value"]


def test_which_distances_follow_from_extractors(toys: Context) -> None:
    registered = set(toys.plugins.metrics.specs)
    toys.plugins.register(toy_metric.PLUGIN, PluginInfo("gaps", "toy_metric", "gap-tools", "2.0"))
    specs = all_metrics(toys.plugins)
    implied = set(specs) - set(toys.plugins.metrics.specs)
    assert {"fd-row-means", "sfd-row-means", "sfd-digits", "fd-inception-unverified"} <= implied
    assert not {"fd-fid", "sfd-fid", "fd-digits-cnn", "fd-fid-clean"} & set(specs)
    assert specs["fid"] == toys.plugins.metrics.specs["fid"]
    assert registered <= set(specs)


def test_bad_specs_are_named(toys: Context) -> None:
    class Plugin:
        @staticmethod
        def give(spec: MetricSpec) -> object:
            from cmbench.plugin import hookimpl

            class Made:
                @hookimpl
                def cmbench_register_metrics(self) -> list[MetricSpec]:
                    return [spec]

            return Made()

    bad = {
        "factory 'no colon'": toy_metric.spec("bad", "mean_gap")._replace(factory="no colon"),
        "needs 'features' (allowed: a tuple of strings)": toy_metric.spec("bad", "m", "features"),
        "FID and KID are names of the 2015 Inception network": toy_metric.spec("fid-mine", "m"),
    }
    for number, (words, spec) in enumerate(bad.items()):
        name = f"plugin-{number}"
        info = toys.plugins.register(Plugin.give(spec), PluginInfo(name, "a", "a", "1"))
        assert info.status == "failed"
        assert words in info.error


def test_labels_reach_a_metric_in_the_order_of_sample_numbers(toys: Context) -> None:
    toys.plugins.register(toy_metric.PLUGIN, PluginInfo("gaps", "toy_metric", "gap-tools", "2.0"))
    images = torch.arange(6.0)[:, None, None, None]
    found = []
    for order in (torch.arange(6), torch.tensor([4, 2, 0, 1, 5, 3])):
        suite = MetricSuite(
            open_metrics(toys.plugins, ["class-spread"]),
            extractor=PixelExtractor(),
            quantization="none",
        )
        for part in order.split(4):
            suite.update(images[part], labels=part // 3, indices=part)
        found.append(suite.finalize()["class-spread"].value)
    assert found == [5.0, 5.0], "the mean of 0, 1, 2 and that of 3, 4, 5"


class TestFailAtOnce:
    """What an evaluation needs is opened before any training."""

    @pytest.fixture
    def refused(
        self, toys: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Callable[..., str]:
        monkeypatch.setenv("CMBENCH_WEIGHTS", str(tmp_path / "none"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))

        def run(**changes: Any) -> str:
            toys.plugins.datasets.specs["toys"] = TOYS._replace(**changes)
            request = SweepRequest(("toy",), "toys", nfes=(1,))
            with pytest.raises(Exception) as raised:
                execute(toys, plan_sweep(toys, request), Local())
            assert not (toys.workspace.root / "runs").exists(), "nothing was trained"
            assert not toys.workspace.all_records.exists()
            return str(raised.value)

        return run

    def test_without_weights(self, refused: Callable[..., str]) -> None:
        said = refused(extractor="inception", metrics=("fid",))
        assert "run `cmbench prepare inception`" in said
        assert "\n" not in said

    def test_without_data(self, refused: Callable[..., str]) -> None:
        said = refused(factory="test_custom_metrics:no_data")
        assert said == "dataset 'toys': is not here; run `cmbench prepare toys`"

    def test_a_metric_that_the_extractor_cannot_serve(self, refused: Callable[..., str]) -> None:
        assert "ask for 'fd-pixels' instead" in refused(metrics=("fd-pixels", "fid"))

    def test_a_metric_whose_needs_nobody_provides(
        self, toys: Context, refused: Callable[..., str]
    ) -> None:
        toys.plugins.register(toy_metric.PLUGIN, PluginInfo("gaps", "toy_metric", "g", "2.0"))
        said = refused(metrics=("gap-of-prompts",))
        assert said.startswith(
            "metric 'gap-of-prompts': needs prompts, which no evaluation provides; allowed: "
        )
        assert said.endswith("; leave the metric out")

    def test_a_metric_of_another_extractor(
        self, toys: Context, refused: Callable[..., str]
    ) -> None:
        toys.plugins.register(toy_metric.PLUGIN, PluginInfo("gaps", "toy_metric", "g", "2.0"))
        said = refused(metrics=("gap-of-digits",))
        assert said == (
            "metric 'gap-of-digits': the extractor is 'pixels'; allowed: extractors digits; "
            "choose one of them"
        )

    def test_an_extractor_that_breaks(self, toys: Context, refused: Callable[..., str]) -> None:
        specs = toys.plugins.extractors.specs
        specs["pixels"] = specs["pixels"]._replace(factory="test_custom_metrics:broken_extractor")
        said = refused()
        assert said.startswith("extractor 'pixels': cannot be opened: KeyError: 'weights'; fix")


def no_data(spec: DatasetSpec, locations: object) -> object:
    from cmbench.errors import MissingError

    raise MissingError(f"dataset {spec.name!r}", "is not here", remedy="run `cmbench prepare toys`")


def broken_extractor(location: object) -> object:
    raise KeyError("weights")


def test_labels_that_do_not_follow_the_data_are_a_warning(
    toys: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toys.dataset("toys")
    monkeypatch.setattr(
        dataset, "labels_for", lambda count, seed, start=0: torch.zeros(count, dtype=torch.int64)
    )
    request = SweepRequest(("toy",), "toys", recipe="classes", nfes=(1,))
    record = execute(toys, plan_sweep(toys, request), Local())[0]
    assert "2 of 3 classes have no sample: draw labels from all classes" in record.warnings
