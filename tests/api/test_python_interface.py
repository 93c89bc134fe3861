"""``import cmbench``: sweeps, results, models, scoring and data as functions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import cmbench
from cmbench.data.digits import read_digits
from cmbench.errors import MissingError, UserError
from cmbench.plugin.method import Declined
from cmbench.records.record import read_record
from cmbench.records.workspace import Workspace
from cmbench.sampling.draws import ImageDraws

SMALL = {"network.channels": 8, "duration_kimg": 0.512, "conditional": False}
#: Short trainings and few images warn of both; the tests look at values.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api") / "workspace"


@pytest.fixture(scope="module")
def results(folder: Path) -> cmbench.api.results.Results:
    return cmbench.run(
        ["ict", "edm"],
        "digits",
        recipe="smoke",
        nfe=[1, 2],
        seeds=2,
        options=SMALL,
        samples=64,
        workspace=folder,
        device="cpu",
        threads=1,
    )


def test_importing_needs_no_torch_and_names_what_there_is() -> None:
    code = (
        "import sys, cmbench; assert 'torch' not in sys.modules and 'pandas' not in sys.modules;"
        "assert {'run', 'load', 'open_run', 'evaluate'} <= set(dir(cmbench))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        _ = cmbench.rum  # type: ignore[attr-defined]


def test_every_public_name_can_be_imported() -> None:
    for name in cmbench.__all__:
        assert getattr(cmbench, name) is not None


# ---- sweeps and results -------------------------------------------------------------------------


def test_a_sweep_gives_every_cell_in_order(results: cmbench.api.results.Results) -> None:
    found = [(r.method, r.training.seed, r.sampling.nfe, r.status) for r in results]
    assert found == [(m, s, n, "finished") for m in ("ict", "edm") for s in (0, 1) for n in (1, 2)]
    assert results[0].training.config["optimizer"]["lr"] > 0
    assert results[0].training.config["network"]["channels"] == 8
    assert len(results.failed) == 0


def test_the_table_is_tidy(results: cmbench.api.results.Results) -> None:
    frame = results.dataframe()
    one = frame[(frame.metric == "fd-digits") & (frame.method == "ict")]
    assert list(zip(one.seed, one.nfe, strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert one.value.tolist() == [r.metrics["fd-digits"].value for r in results[:4]]
    assert (one.low <= one.value).all()
    assert (one.value <= one.high).all()
    assert (set(one.status), set(one.samples)) == ({"finished"}, {64})
    assert one.cell.is_unique


def test_results_are_what_the_workspace_holds(
    results: cmbench.api.results.Results, folder: Path
) -> None:
    loaded = cmbench.load(folder, "digits")
    assert {r.cell for r in loaded} == {r.cell for r in results}
    again = cmbench.run(
        "ict", recipe="smoke", nfe=1, options=SMALL, samples=64, workspace=folder, threads=1
    )
    assert again[0] == results[0], "finished cells are reused"
    with pytest.raises(MissingError, match="has no records of 'cifar10'; allowed: digits"):
        cmbench.load(folder, "cifar10")
    with pytest.raises(MissingError, match="does not exist"):
        cmbench.load(folder / "gone")


def test_results_are_shown_as_a_table(results: cmbench.api.results.Results) -> None:
    html = results._repr_html_()
    assert html.count("<tr") == 9
    assert "64 samples instead of the protocol" in html
    assert "Results of 8 cells" in repr(results)


def test_an_unreadable_record_costs_a_warning(
    results: cmbench.api.results.Results, folder: Path, tmp_path: Path
) -> None:
    records = Workspace(tmp_path).records("digits")
    records.mkdir(parents=True)
    (records / "broken.json").write_text("{")
    with pytest.warns(UserWarning, match="broken.json is left out"):
        assert len(cmbench.load(tmp_path)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nfe": 0}, "nfe: 0; allowed: whole numbers from 1"),
        ({"nfe": [1, 2.5]}, r"nfe: \[1, 2.5\]; allowed: whole numbers"),
        ({"nfe": True}, "nfe: True; allowed: whole numbers"),
        ({"seeds": -1}, "seeds: -1; allowed: a count"),
        ({"seeds": 1.5}, "seeds: 1.5; allowed: a count"),
        ({"nfe": 1.5}, "nfe: 1.5; allowed: whole numbers"),
        ({"samples": 0}, "samples: 0; allowed: whole numbers from 2"),
        ({"samples": 1}, "samples: 1; allowed: whole numbers from 2"),
        ({"samples": "x"}, "samples: 'x'; allowed: whole numbers from 2"),
        ({"samples": 2.7}, "samples: 2.7; allowed: whole numbers from 2"),
        ({"batch_size": 0}, "batch_size: 0; allowed: whole numbers from 1"),
        ({"threads": 0}, "threads: 0; allowed: whole numbers from 1 to 1,024"),
        ({"threads": "x"}, "threads: 'x'; allowed: whole numbers from 1 to 1,024"),
        ({"method": 3}, "method: 3; allowed: a name"),
        ({"method": []}, r"method: \[\]; allowed: a name"),
        ({"method": ["ict", 3]}, r"method: \['ict', 3\]; allowed: a name"),
        ({"method": ["ict", ""]}, r"method: \['ict', ''\]; allowed: a name"),
        ({"options": [1]}, r"options: \[1\]; allowed: a mapping"),
        ({"sigmas": ["a"]}, r"sigmas: \['a'\]; allowed: descending"),
        ({"device": 3}, "'3'; allowed: auto, cpu"),
        ({"seeds": 10**12}, "seeds: 1000000000000; allowed: a count"),
        ({"sigmas": [1, 2]}, r"sigmas: \[1, 2\]; allowed: descending"),
        ({"method": "itc"}, "unknown method 'itc'.*did you mean 'ict'"),
        ({"dataset": "digit"}, "unknown dataset 'digit'"),
        ({"options": {"optimizer.lrr": 1}}, "optimizer.lrr: unknown key"),
        ({"executor": "x"}, "executor: 'x'; allowed: local"),
        ({"device": "tpu"}, "'tpu'; allowed: auto, cpu"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    given = {"method": "ict", "dataset": "digits", "workspace": tmp_path} | arguments
    with pytest.raises(UserError, match=message):
        cmbench.run(**given)  # type: ignore[arg-type]


def test_an_argument_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'workspce'; .* workspace, "):
        cmbench.run("ict", workspce=tmp_path)  # type: ignore[call-arg]


# ---- models -------------------------------------------------------------------------------------


def test_samples_are_those_of_the_record(
    results: cmbench.api.results.Results, folder: Path
) -> None:
    model = cmbench.open_run(
        "ict", "digits", recipe="smoke", options=SMALL, workspace=folder, device="cpu", threads=1
    )
    assert (model.data_shape, model.num_classes) == ((1, 8, 8), 0)
    images = model.sample(64, nfe=1)
    assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.float32)
    torch.testing.assert_close(model.sample(5, nfe=1), images[:5], rtol=0, atol=1e-6)
    assert not torch.equal(model.sample(5, nfe=1, seed=1), images[:5])
    found = cmbench.evaluate(images, "digits", ["fd-digits"], value_range="-1,1", workspace=folder)
    wanted = results[0].metrics["fd-digits"].value
    assert found["fd-digits"] == pytest.approx(wanted, rel=1e-4)


def test_the_consistency_function_makes_the_samples_of_one_step(
    results: cmbench.api.results.Results, folder: Path
) -> None:
    model = cmbench.open_run(results[0].training.run, workspace=folder, device="cpu", threads=1)
    f = model.consistency_function()
    noise = ImageDraws(0, range(3)).normal("noise", torch.empty(3, 1, 8, 8))
    made = f(80.0 * noise, torch.full((3,), 80.0), None)
    torch.testing.assert_close(made, model.sample(3, nfe=1), rtol=1e-5, atol=1e-5)
    assert not made.requires_grad
    edm = next(r for r in results if r.method == "edm")
    with pytest.raises(Declined, match="has no consistency function"):
        cmbench.open_run(edm.training.run, workspace=folder, threads=1).consistency_function()


def test_a_run_is_opened_by_id_and_by_folder(
    results: cmbench.api.results.Results, folder: Path
) -> None:
    run = results[0].training.run
    by_id = cmbench.open_run(run, workspace=folder, threads=1)
    by_path = cmbench.open_run(folder / "runs" / run, workspace=folder, threads=1)
    assert by_id.run_id == by_path.run_id == run
    assert torch.equal(by_id.sample(2, nfe=2), by_path.sample(2, nfe=2))
    one = by_id.samples(3, nfe=2)
    list(one.source.batches(3))
    assert one.sampler.nfe_measured == 2


def test_models_that_are_not_there_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"is not in .*; train it: cmbench.run\('sct', 'digits'"):
        cmbench.open_run("sct", "digits", recipe="smoke", workspace=tmp_path)
    with pytest.raises(MissingError, match=r"run nothing: is not in .*name the dataset"):
        cmbench.open_run("nothing", workspace=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "sample, count: 0; allowed: whole numbers from 1"),
        ({"count": True}, "sample, count: True; allowed"),
        ({"count": 2.5}, "sample, count: 2.5; allowed"),
        ({"seed": -1}, "sample, seed: -1; allowed: whole numbers from 0"),
        ({"seed": None}, "sample, seed: None; allowed"),
        ({"batch_size": 0}, "sample, batch_size: 0; allowed"),
        ({"labels": "ab"}, "sample, labels: 'ab'; allowed"),
        ({"labels": [1.5, 2]}, "sample, labels: 1.5; allowed"),
        ({"nfe": 0}, "sample, nfe: 0; allowed"),
        ({"labels": [1, 2]}, "labels were given, but it is unconditional"),
        ({"sampler": "nope"}, "nope"),
    ],
)
def test_bad_sampling_is_one_line(
    results: cmbench.api.results.Results, folder: Path, arguments: dict[str, object], message: str
) -> None:
    model = cmbench.open_run(results[0].training.run, workspace=folder, threads=1)
    with pytest.raises(UserError, match=message):
        model.sample(**({"count": 2, "nfe": 1} | arguments))  # type: ignore[arg-type]


def test_classes_are_chosen(folder: Path) -> None:
    made = cmbench.run(
        "edm",
        recipe="smoke",
        nfe=1,
        options=SMALL | {"conditional": True},
        samples=16,
        workspace=folder,
        threads=1,
    )
    model = cmbench.open_run(made[0].training.run, workspace=folder, threads=1)
    assert model.num_classes == 10
    sevens, ones = model.sample(4, 1, labels=[7] * 4), model.sample(4, 1, labels=[1] * 4)
    assert not torch.equal(sevens, ones)
    mixed = model.sample(4, 1, labels=torch.tensor([7, 1, 7, 1]), batch_size=3)
    torch.testing.assert_close(mixed[0], sevens[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[3], ones[3], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="4 labels from 0 to 10; allowed: 4 labels from 0 to 9"):
        model.sample(4, 1, labels=[0, 1, 2, 10])


# ---- scoring ------------------------------------------------------------------------------------


def digits(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = read_digits()
    return pixels[:count], labels[:count]


def test_arrays_tensors_functions_and_files_score_alike(tmp_path: Path) -> None:
    images, labels = digits()
    np.savez(tmp_path / "s.npz", arr_0=images.transpose(0, 2, 3, 1), arr_1=labels)

    def generate(indices: torch.Tensor, seed: int) -> torch.Tensor:
        return torch.from_numpy(images)[indices]

    values = [
        cmbench.evaluate(
            given, "digits", ["fd-digits", "kd"], workspace=tmp_path, threads=1, **more
        )
        for given, more in (
            (images, {"labels": labels}),
            (torch.from_numpy(images), {}),
            (images.transpose(0, 2, 3, 1), {}),
            (generate, {"limit": 400}),
            (tmp_path / "s.npz", {}),
        )
    ]
    for value in values:
        assert dict(value) == pytest.approx(dict(values[0]), rel=1e-6)  # layouts round differently
    assert list(values[0]) == ["fd-digits", "kd"]
    assert values[0].dataframe().metric.tolist() == ["fd-digits", "kd"]
    assert [v.record.conditional for v in values] == [True, False, False, False, True]


def test_a_record_is_kept_if_asked_for(tmp_path: Path) -> None:
    images, _ = digits()
    options = {"workspace": tmp_path, "threads": 1, "label": "mine", "nfe": 3}
    with pytest.warns(UserWarning, match="400 samples instead of the protocol"):
        found = cmbench.evaluate(images, metrics=["fd-digits"], keep_record=True, **options)  # type: ignore[arg-type]
    (path,) = Workspace(tmp_path).records("digits").glob("*.json")
    kept = read_record(path)
    assert kept.metrics["fd-digits"].value == found["fd-digits"]
    assert (kept.method, kept.sampling.nfe) == ("mine", 3)
    assert len(cmbench.load(tmp_path).dataframe()) == 1


def test_real_images_serve_as_reference(tmp_path: Path) -> None:
    images, _ = digits(300)
    np.savez(tmp_path / "real.npz", images=images)
    found = cmbench.evaluate(
        images,
        tmp_path / "real.npz",
        ["fd-digits"],
        extractor="digits-cnn",
        workspace=tmp_path,
        threads=1,
    )
    assert found["fd-digits"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (3, "digits", "is a int; allowed: an array, a tensor, a path"),
        (np.zeros((4, 1, 8, 8)), "digits", "whose range is not given"),
        (np.zeros((4, 8, 8, 4), np.uint8), "digits", "four channels"),
        (np.zeros((4, 1, 8, 8), np.uint8), "nothing", "unknown dataset 'nothing'"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    samples: object, reference: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        cmbench.evaluate(samples, reference, ["fd-digits"], workspace=tmp_path, threads=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": []}, r"metrics: \[\]; allowed: a name"),
        ({"metrics": 3}, "metrics: 3; allowed: a name"),
        ({"limit": -5}, "limit: -5; allowed: whole numbers from 1"),
        ({"batch_size": 0}, "batch_size: 0; allowed: whole numbers from 1"),
        ({"seed": -1}, "seed: -1; allowed: whole numbers from 0"),
        ({"nfe": 1.5}, "nfe: 1.5; allowed: whole numbers from 0"),
    ],
)
def test_bad_arguments_of_scoring_are_one_line(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    given = {"workspace": tmp_path, "threads": 1} | arguments
    with pytest.raises(UserError, match=message):
        cmbench.evaluate(digits()[0], "digits", **given)  # type: ignore[arg-type]


def test_warnings_name_the_callers_line(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="400 samples") as caught:
        cmbench.evaluate(digits()[0], metrics="fd-digits", workspace=tmp_path, threads=1)
    assert {Path(w.filename).name for w in caught} == {Path(__file__).name}


def test_the_frechet_distance_of_gaussians_is_exact() -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(500, 6))
    assert cmbench.frechet_distance(first, first + 2) == pytest.approx(6 * 4, rel=1e-12)
    assert cmbench.frechet_distance(torch.from_numpy(first), 3 * first) == pytest.approx(
        float(((first.mean(0) * 2) ** 2).sum() + 4 * np.trace(np.cov(first.T))), rel=1e-10
    )
    for bad, message in (
        (np.zeros(3), r"shape \(3,\)"),
        (np.full((3, 2), np.nan), "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            cmbench.frechet_distance(bad, first)


# ---- data ---------------------------------------------------------------------------------------


def test_datasets_are_torch_datasets() -> None:
    train = cmbench.load_dataset("digits")["train"]
    pixels, labels = read_digits()
    assert len(train) == 1797
    image, label = train[-1]
    assert (image.shape, label) == ((1, 8, 8), int(labels[-1]))
    assert torch.equal(((image + 1) * 127.5).round(), torch.from_numpy(pixels[-1]).float())
    batch, classes = next(iter(torch.utils.data.DataLoader(train, batch_size=5)))
    assert (batch.shape, classes.tolist()) == ((5, 1, 8, 8), labels[:5].tolist())
    with pytest.raises(IndexError):
        _ = train[1797]
    with pytest.raises(UserError, match="dataset 'gmm': has no stored images"):
        cmbench.load_dataset("gmm")


def test_frames_of_nothing_are_empty() -> None:
    assert isinstance(cmbench.api.results.Results([]).dataframe(), pandas.DataFrame)


# ---- the documentation --------------------------------------------------------------------------


def test_the_page_runs_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)  # noqa: S102
    assert len(names["results"]) == 4  # type: ignore[arg-type]
    assert names["images"].shape == (16, 1, 8, 8)  # type: ignore[attr-defined]
