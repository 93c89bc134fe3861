"""``folder:PATH`` and ``zip:PATH`` as datasets of every verb, and what is wrong with bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dataset_builders import class_folder, edm_zip, pictures
from PIL import Image

import cmbench.data.custom as custom
from cmbench.data.locations import DataLocations
from cmbench.errors import EXIT_MISSING, EXIT_USAGE, MissingError, UserError
from cmbench.sweep.context import Context
from cmbench.sweep.planning import plan_run
from cmbench.sweep.sweep import SweepRequest, plan_sweep

Command = Callable[..., Any]
RECIPES = """
[base]
batch_size = 4
duration_kimg = 0.008

[borrowed.tiny]
network = { name = "mlp", width = 8 }
ema = [{ decay = 0.5 }]
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixty pictures of 8x8 in three classes."""
    class_folder(tmp_path / "mine", pictures(60))
    return tmp_path / "mine"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own datasets are scored by their pixels here: Inception's weights need a download."""
    real = custom.spec_of

    def spec_of(*arguments: Any) -> Any:
        spec = real(*arguments)
        return spec._replace(extractor="pixels", metrics=("fd-pixels",), num_samples=20)

    monkeypatch.setattr(custom, "spec_of", spec_of)


def one_line(outcome: Any, code: int, *parts: str) -> None:
    assert outcome.code == code, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, outcome.err
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_prepare_run_eval_and_report(
    cmbench: Command, context: Context, images: Path, tmp_path: Path, quick: None, kind: str
) -> None:
    if kind == "zip":
        labels = [i % 3 for i in range(60)]
        name = f"zip:{edm_zip(tmp_path / 'mine.zip', pictures(60), labels)}"
    else:
        name = f"folder:{images}"
    (tmp_path / "own.toml").write_text(RECIPES.replace("borrowed", custom.slug(name)))
    command = (
        "run",
        "-d",
        name,
        "-m",
        "edm",
        "-r",
        f"{tmp_path / 'own.toml'}:tiny",
        "-o",
        "conditional=true",
        "--nfe",
        "1",
        "--samples",
        "20",
        "--sampler",
        "euler",
    )
    one_line(cmbench(*command), EXIT_MISSING, "is not prepared in", f"run `cmbench prepare {name}`")
    assert cmbench("prepare", name).code == 0
    done = cmbench(*command)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split()[-1] == "finished"
    slug = custom.slug(name)
    assert f"{slug}.html" in done.out
    (record,) = context.workspace.records(slug).glob("*.json")
    assert (context.workspace.reports / f"{slug}.html").is_file()
    again = cmbench("run", "-d", slug, *command[3:], "--no-report")
    assert again.code == 0, again.err
    assert [record] == list(context.workspace.records(slug).glob("*.json")), "one identity"
    scored = cmbench("eval", str(images / "ant"), "-d", name, "--metrics", "fd-pixels")
    assert scored.code == 0, scored.err
    assert len(list(context.workspace.records(slug).glob("*.json"))) == 2


def test_a_recipe_of_another_dataset_can_be_borrowed(
    cmbench: Command, context: Context, images: Path
) -> None:
    name = f"folder:{images}"
    assert cmbench("prepare", name).code == 0
    plan = plan_run(context, "edm", name, "digits.smoke", 0)
    assert (plan.dataset, plan.recipe) == (custom.slug(name), "digits.smoke")
    assert plan.config.duration_kimg == 2.56
    with pytest.raises(UserError, match=r"no recipe for dataset 'folder-mine-\w+'; .*DATASET.NAME"):
        plan_run(context, "edm", name, None, 0)
    with pytest.raises(UserError, match="unknown recipe 'nothing'"):
        plan_run(context, "edm", name, "digits.nothing", 0)


def test_unlabelled_data_refuse_a_conditional_recipe_before_any_work(
    cmbench: Command, context: Context, tmp_path: Path
) -> None:
    name = f"zip:{edm_zip(tmp_path / 'a.zip', pictures(6), None)}"
    assert "no labels" in cmbench("prepare", name).out
    with pytest.raises(UserError, match=r"has no labels; allowed: false; add -o conditional=false"):
        plan_sweep(context, SweepRequest(("edm",), name, "digits.smoke"))
    chosen = plan_run(context, "edm", name, "digits.smoke", 0, ("conditional=false",))
    assert chosen.data_info(context).num_classes == 0


def test_bad_sources_are_one_line_and_leave_nothing(
    cmbench: Command, images: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    target = tmp_path / "bad.zip"

    def refused(*parts: str, code: int = EXIT_USAGE) -> None:
        one_line(cmbench("prepare", f"zip:{target}"), code, *parts)
        assert not [p for p in data.rglob("*") if p.name == "manifest.json"]

    refused("does not exist", code=EXIT_MISSING)
    good = edm_zip(target, pictures(6), [0, 1, 2] * 2).read_bytes()
    target.write_bytes(good[: len(good) // 2])
    refused("truncated or corrupt archive")
    edm_zip(target, pictures(6), [0, 1, 2, 0, 1, -1])
    refused("label -1", "out of range")
    edm_zip(target, pictures(6), None, table={"labels": "all of them"})
    refused("dataset.json")
    Image.new("RGB", (10, 8)).save(images / "ant" / "00000.png")
    one_line(cmbench("prepare", f"folder:{images}"), EXIT_USAGE, "is 10x8", "--transform")
    Image.new("RGB", (8, 8)).save(images / "ant" / "00000.png")
    Image.new("RGB", (4, 4)).save(images / "cat" / "00005.png")
    one_line(cmbench("prepare", f"folder:{images}"), EXIT_USAGE, "4x4", "8x8")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_class_called_train_is_no_split(
    cmbench: Command, images: Path, tmp_path: Path, kind: str
) -> None:
    (images / "ant").rename(images / "train")
    archive = shutil.make_archive(str(tmp_path / "a"), "zip", images)
    source = images if kind == "folder" else archive
    done = cmbench("prepare", f"{kind}:{source}", "--name", "vehicles")
    assert done.code == 0, done.err
    assert "60 images" in done.out, done.out
    assert "3 classes" in done.out
    (images / "bee").rename(images / "test")
    (images / "cat").rename(images / "val")
    archive = shutil.make_archive(str(tmp_path / "b"), "zip", images)
    source = images if kind == "folder" else archive
    done = cmbench("prepare", f"{kind}:{source}", "--name", "splits")
    assert "20 images" in done.out, done.out + done.err


def test_another_size_is_another_preparation(cmbench: Command, images: Path) -> None:
    cut = ("prepare", f"folder:{images}", "--transform", "adm-crop", "--name", "small")
    assert cmbench(*cut, "--resolution", "4").code == 0
    assert "already prepared" in cmbench(*cut, "--resolution", "4").out
    one_line(cmbench(*cut, "--resolution", "2"), EXIT_USAGE, "was prepared from mine", "--force")


def test_a_folder_that_cannot_be_made_is_not_called_full(
    cmbench: Command, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    refused = cmbench("prepare", f"folder:{images}", "--data-dir", str(tmp_path / "file"))
    one_line(refused, EXIT_USAGE, "set CMBENCH_DATA (or --data-dir) to a folder that you can write")
    assert "make room" not in refused.err


def test_an_unknown_dataset_names_those_that_are_prepared(
    cmbench: Command, context: Context, images: Path
) -> None:
    assert cmbench("prepare", f"folder:{images}", "--name", "photos").code == 0
    with pytest.raises(UserError, match=r"unknown dataset 'photo'; .*did you mean 'photos'"):
        context.dataset_spec("photo")
    assert context.dataset("photos").class_counts == (20, 20, 20)
    with pytest.raises(MissingError):
        context.dataset_spec("folder:/nowhere")
    folder = context.locations.folder("cifar10")  # registered, and prepared here too
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    with pytest.raises(UserError, match=r"allowed: cifar10, cifar10-jpeg, .*, photos"):
        context.dataset_spec("nothing-like-it")


def test_listed_with_the_built_in_ones(cmbench: Command, images: Path, tmp_path: Path) -> None:
    before = cmbench("list", "datasets").out
    assert cmbench("prepare", f"folder:{images}", "--name", "photos").code == 0
    rows = {row["name"]: row for row in json.loads(cmbench("list", "datasets", "--json").out)}
    assert (rows["photos"]["data_shape"], rows["photos"]["num_classes"]) == ([3, 8, 8], 3)
    assert rows["photos"]["plugin"] == ""
    assert "cifar10" in rows
    after = cmbench("list", "datasets").out
    assert [line.split()[0] for line in after.splitlines()][-1] == "photos"
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    manifest = DataLocations().folder("photos") / "manifest.json"
    manifest.write_text("{")
    damaged = cmbench("list", "datasets")
    assert "photos" not in damaged.out
    (line,) = damaged.err.splitlines()
    assert line.startswith("warning: prepared dataset ")
    assert "photos, manifest.json: is not JSON" in line


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_source_that_changed_after_it_was_prepared_is_noticed(
    cmbench: Command, context: Context, images: Path, tmp_path: Path, kind: str
) -> None:
    labels = [i % 3 for i in range(60)]
    zipped = tmp_path / "mine.zip"
    source = images if kind == "folder" else edm_zip(zipped, pictures(60), labels)
    name = f"{kind}:{source}"
    assert cmbench("prepare", name).code == 0
    before = context.dataset_spec(name)
    assert before.num_classes == 3
    custom._fingerprint.cache_clear()  # as another process
    if kind == "folder":
        next(images.rglob("*.png")).unlink()
    else:
        edm_zip(zipped, pictures(59), labels[:59])
    with pytest.raises(
        UserError, match=rf"dataset '{name}': its files have changed since"
    ) as caught:
        context.dataset_spec(name)
    assert f"run `cmbench prepare {name} --force`" in str(caught.value)
    assert cmbench("prepare", name, "--force").code == 0
    custom._fingerprint.cache_clear()
    assert context.dataset_spec(name) == before
    shutil.rmtree(images) if kind == "folder" else zipped.unlink()
    custom._fingerprint.cache_clear()
    assert context.dataset_spec(name) == before, "a source that is gone is not asked for"


def test_lossy_sources_are_said(cmbench: Command, tmp_path: Path) -> None:
    for kind in ("jpg", "png"):
        (tmp_path / kind).mkdir()
        for i, array in enumerate(pictures(4)):
            Image.fromarray(array).save(tmp_path / kind / f"{i}.{kind}")
    note = "note: some images are JPEG or lossy WebP, with artefacts of compression"
    assert note in cmbench("prepare", f"folder:{tmp_path / 'jpg'}").out.splitlines()
    assert "lossy WebP" not in cmbench("prepare", f"folder:{tmp_path / 'png'}").out
