"""Verification of records, and archives that verification accepts."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_factory import metric, on_disk, png, record, sha, with_artifact

from cmbench.errors import MissingError, UserError
from cmbench.leaderboard.submit import MANIFEST, pack, unpack
from cmbench.leaderboard.verify import verify_record
from cmbench.records.record import FirstSamples, Record
from cmbench.records.reproduction import CannotReproduceError, Reproduction


def honest(folder: Path, grid: bytes | None = None, **fields: object) -> Path:
    """A record whose hashes are right, with its grid."""
    base = record(**fields)
    config = {"lr": 0.1}
    digest = hashlib.sha256(json.dumps([config, None], sort_keys=True).encode()).hexdigest()
    training = base.training.model_copy(update={"config": config, "config_sha256": digest})
    made = with_artifact(
        folder, base.model_copy(update={"training": training}), "grid", "a.png", grid or png()
    )
    return on_disk(folder, [made])[0][0]


def states(path: Path, **options: object) -> dict[str, str]:
    return {check.name: check.state for check in verify_record(path, **options)}


def first_samples(**changes: object) -> FirstSamples:
    fields: dict[str, object] = {
        "count": 256,
        "pixels_sha256": "a" * 64,
        "mean_feature": [3.0, 4.0],
        "pixel_tolerance": 2,
        "feature_tolerance": 2e-4,
    }
    return FirstSamples.model_validate(fields | changes)


def again(
    first: FirstSamples | None = None, grid: bytes | None = None, **changes: object
) -> Callable[[Record, bool], Reproduction]:
    def reproduce(item: Record, full: bool) -> Reproduction:
        metrics = {
            name: stored.model_copy(update=changes.get(name, {}))
            for name, stored in item.metrics.items()
        }
        made = first or item.first_samples or first_samples()
        return Reproduction(made, grid or png(), metrics if full else {})

    return reproduce


def test_an_honest_record_passes_and_says_what_was_not_checked(tmp_path: Path) -> None:
    checks = verify_record(honest(tmp_path))
    assert {c.name: c.state for c in checks} == {
        "record": "ok",
        "bytes": "ok",
        "recipe hash": "ok",
        "artifact grid": "ok",
        "checkpoint": "not checked",
        "NFE": "ok",
        "samples": "not checked",
    }
    assert all(c.detail for c in checks)


def test_every_tampering_is_found(tmp_path: Path) -> None:
    path = honest(tmp_path)
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.1', '"lr": 0.2'))
    assert states(path)["recipe hash"] == "failed"
    path.write_text(text + "\n")
    assert states(path)["bytes"] == "failed"
    path.write_text(text.replace('"nfe_measured": 1.0', '"nfe_measured": 2.0'))
    assert states(path)["NFE"] == "failed"
    path.write_text(text)
    (tmp_path / "a.png").write_bytes(png((0, 0, 0)))
    assert states(path)["artifact grid"] == "failed"
    path.write_text("{")
    assert states(path) == {"record": "failed"}


def test_the_checkpoint_is_found_by_its_hash(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    weights = b"weights"
    item = record(training={"checkpoint_sha256": sha(weights), "run": "digits/alpha-s0"})
    path = on_disk(tmp_path / "r", [item])[0][0]
    assert states(path, runs=runs)["checkpoint"] == "not checked"
    (runs / "digits/alpha-s0").mkdir(parents=True)
    (runs / "digits/alpha-s0/weights-final.safetensors").write_bytes(weights)
    assert states(path, runs=runs)["checkpoint"] == "ok"
    (runs / "digits/alpha-s0/weights-final.safetensors").write_bytes(b"other")
    assert states(path, runs=runs)["checkpoint"] == "failed"


def test_a_run_name_cannot_lead_out_of_the_runs(tmp_path: Path) -> None:
    item = record(training={"run": "../../elsewhere"})
    path = on_disk(tmp_path / "r", [item])[0][0]
    assert states(path, runs=tmp_path / "runs")["checkpoint"] == "not checked"


def with_checksums(folder: Path, **fields: object) -> Path:
    return honest(folder, first_samples=first_samples(), **fields)


def test_equal_checksums_verify_exactly(tmp_path: Path) -> None:
    found = verify_record(with_checksums(tmp_path), reproduce=again())[-3:]
    assert [(check.name, check.state) for check in found] == [
        ("samples", "ok"),
        ("pixels of the sample grid", "ok"),
        ("metrics", "not checked"),
    ]
    assert found[0].detail == f"the first 256 images are the same: sha256 {'a' * 64}"
    assert found[2].detail == "compared with --full only"


def test_another_grid_beside_equal_checksums_fails(tmp_path: Path) -> None:
    found = states(with_checksums(tmp_path), reproduce=again(grid=png((202, 30, 30))))
    assert (found["samples"], found["pixels of the sample grid"]) == ("ok", "failed")


def test_a_record_cannot_state_its_own_tolerance_without_limit(tmp_path: Path) -> None:
    bold = first_samples(pixel_tolerance=255, feature_tolerance=1e6)
    path = honest(tmp_path, first_samples=bold)
    made = first_samples(pixels_sha256="b" * 64, mean_feature=[300.0, 4.0])
    found = verify_record(path, reproduce=again(made, png((0, 0, 0))))[-3:-1]
    assert [check.state for check in found] == ["failed", "failed"]
    assert "allowed 0.0002" in found[0].detail
    assert "allowed 2" in found[1].detail


@pytest.mark.parametrize(
    ("feature", "grid", "expected"),
    [
        ([3.0, 4.0008], png((202, 30, 30)), ("reproduced", "reproduced")),
        ([3.0, 4.0012], png((202, 30, 30)), ("failed", "reproduced")),
        ([3.0, 4.0], png((203, 30, 30)), ("ok", "failed")),
        ([3.0], png(size=(8, 8)), ("failed", "failed")),
        ([3.0, 4.0], b"no picture", ("ok", "failed")),
    ],
)
def test_other_bits_must_lie_within_the_stated_tolerance(
    tmp_path: Path, feature: list[float], grid: bytes, expected: tuple[str, str]
) -> None:
    made = first_samples(pixels_sha256="b" * 64, mean_feature=feature)
    checks = verify_record(with_checksums(tmp_path), reproduce=again(made, grid))[-3:-1]
    names = ["mean feature of 256 samples", "pixels of the sample grid"]
    assert [check.name for check in checks] == names
    assert tuple(check.state for check in checks) == expected


def test_reproduced_says_within_what(tmp_path: Path) -> None:
    made = first_samples(pixels_sha256="b" * 64, mean_feature=[3.0, 4.0008])
    found = verify_record(with_checksums(tmp_path), reproduce=again(made, png((202, 30, 30))))
    assert [check.detail for check in found[-3:-1]] == [
        "within 0.00016 relative of 0.0002 allowed",
        "within 2 levels of 2 allowed",
    ]


def test_another_number_of_images_is_no_reproduction(tmp_path: Path) -> None:
    made = first_samples(count=255)
    found = verify_record(with_checksums(tmp_path), reproduce=again(made))[-2]
    assert found.state == "failed"
    assert found.detail == "255 images were made, the record has checksums of 256"


def test_a_scatter_plot_is_not_compared_by_pixels(tmp_path: Path) -> None:
    made = first_samples(pixels_sha256="b" * 64)
    path = honest(tmp_path, first_samples=first_samples(), grid=png(tile=False))
    found = verify_record(path, reproduce=again(made, png(tile=False)))[-2]
    assert (found.state, found.detail) == ("not checked", "it is a plot, not the images themselves")


def test_distances_are_compared_in_full_only(tmp_path: Path) -> None:
    path, off = with_checksums(tmp_path), {"fd-digits": {"value": 1.2}}
    assert "metric fd-digits" not in states(path, reproduce=again(**off))
    assert states(path, reproduce=again(), full=True)["metric fd-digits"] == "ok"
    assert states(path, reproduce=again(**off), full=True)["metric fd-digits"] == "failed"
    near = states(path, reproduce=again(**off), full=True, tolerance=0.3)
    assert near["metric fd-digits"] == "reproduced"
    other = {"fd-digits": {"key": "another"}}
    assert states(path, reproduce=again(**other), full=True)["metric fd-digits"] == "failed"


def test_a_record_without_checksums_is_verified_in_full(tmp_path: Path) -> None:
    path = honest(tmp_path)
    found = verify_record(path, reproduce=again())[-1]
    assert (found.state, found.detail) == (
        "not checked",
        "the record holds no checksums; verify it with --full",
    )
    full = states(path, reproduce=again(), full=True)
    assert (full["samples"], full["metric fd-digits"]) == ("not checked", "ok")


def test_near_zero_the_standard_error_is_the_scale(tmp_path: Path) -> None:
    metrics = {
        "fd-digits": metric(1e-6, standard_error=1e-4),
        "recall": metric(0.0, "recall", higher=True),
    }
    path = honest(tmp_path, metrics=metrics)
    near = again(**{"fd-digits": {"value": -8e-6}, "recall": {"value": 1 / 1797}})
    found = states(path, reproduce=near, full=True)
    assert {s for n, s in found.items() if "metric" in n} == {"reproduced"}
    far = again(**{"fd-digits": {"value": 2e-5}, "recall": {"value": 2 / 1797}})
    found = states(path, reproduce=far, full=True)
    assert {s for n, s in found.items() if "metric" in n} == {"failed"}


def test_one_fault_does_not_end_the_other_checks(tmp_path: Path) -> None:
    def broken(item: Record, full: bool) -> Reproduction:
        raise RuntimeError("shapes differ\nTraceback")

    found = verify_record(with_checksums(tmp_path), reproduce=broken)[-1]
    assert (found.name, found.state) == ("samples", "failed")
    assert found.detail == "sampling again failed: RuntimeError: shapes differ"


def test_why_a_record_cannot_be_sampled_again(tmp_path: Path) -> None:
    def no_weights(item: Record, full: bool) -> Reproduction:
        raise CannotReproduceError("the checkpoint is not here")

    def no_plugin(item: Record, full: bool) -> Reproduction:
        raise MissingError("method", "is not installed")

    path = with_checksums(tmp_path)
    for reproduce, reason in ((no_weights, "checkpoint is not here"), (no_plugin, "not installed")):
        found = verify_record(path, reproduce=reproduce)[-1]
        assert (found.name, found.state) == ("samples", "not checked")
        assert reason in found.detail
    failed = on_disk(tmp_path / "f", [record(status="failed", metrics={})])[0][0]
    assert verify_record(failed, reproduce=no_weights)[-1].detail == "the cell is failed"


# ---- submissions --------------------------------------------------------------------------------


def test_what_submit_packs_verify_accepts(tmp_path: Path) -> None:
    paths = [honest(tmp_path / "r"), honest(tmp_path / "s", method="beta")]
    manifest = pack(paths, tmp_path / "a.zip")
    assert len(manifest.entries) == 2
    out = unpack(tmp_path / "a.zip", tmp_path / "out")
    assert [p.read_bytes() for p in out] == [p.read_bytes() for p in paths]
    for path in out:
        assert "failed" not in states(path).values()
    pack(list(reversed(paths)), tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_only_sound_finished_records_are_packed(tmp_path: Path) -> None:
    failed = on_disk(tmp_path / "f", [record(status="failed", reason="no memory", metrics={})])
    with pytest.raises(UserError, match="is failed: no memory"):
        pack([failed[0][0]], tmp_path / "a.zip")
    path = honest(tmp_path / "r")
    with pytest.raises(UserError, match="two records are named"):
        pack([path, path], tmp_path / "a.zip")
    (tmp_path / "r" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"artifact of .*: a\.png .* its hash differs"):
        pack([path], tmp_path / "a.zip")
    (tmp_path / "r" / "a.png").unlink()
    with pytest.raises(UserError, match=r"artifact of .*: 'a\.png' cannot be read: No such file"):
        pack([path], tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match="exists"):
        pack([path], tmp_path / "a.zip")


def test_two_methods_of_one_run_are_packed(tmp_path: Path) -> None:
    run = {"run": "digits/alpha-demo-s0-abc"}
    measured = on_disk(tmp_path / "r", [record("alpha", training=run)])[0][0]
    relabelled = on_disk(tmp_path / "r", [record("named", training=run)])[0][0]
    pack([measured, relabelled], tmp_path / "a.zip")
    assert len(unpack(tmp_path / "a.zip", tmp_path / "out")) == 2


def test_two_artifacts_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [honest(tmp_path / name, method=name) for name in ("r", "s")]
    made = with_artifact(tmp_path / "t", record("beta"), "grid", "a.png", png((0, 0, 0)))
    paths.append(on_disk(tmp_path / "t", [made])[0][0])
    with pytest.raises(UserError, match=r"different artifacts named records/digits/a\.png"):
        pack(paths, tmp_path / "a.zip")
    with pytest.raises(UserError, match="no records given"):
        pack([], tmp_path / "a.zip")
    made = with_artifact(tmp_path / "u", record("beta"), "grid", "a.json", b"{}")
    with pytest.raises(UserError, match="has the name of a record"):
        pack([on_disk(tmp_path / "u", [made])[0][0]], tmp_path / "a.zip")


@pytest.fixture
def archive(tmp_path: Path) -> dict[str, bytes]:
    pack([honest(tmp_path / "r")], tmp_path / "good.zip")
    with zipfile.ZipFile(tmp_path / "good.zip") as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def zipped(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        for name, data in files:
            opened.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:x", "a\\b", "a\nb", "folder/"])
def test_names_that_leave_the_folder_are_refused(
    archive: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    path = zipped(tmp_path / "bad.zip", [*archive.items(), (name, b"x")])
    with pytest.raises(UserError, match="is not allowed"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_added_and_missing_files_are_named(
    archive: dict[str, bytes], tmp_path: Path
) -> None:
    cell = next(name for name in archive if name.startswith("records/") and name.endswith("json"))

    def refused(files: dict[str, bytes], message: str) -> None:
        with pytest.raises(UserError, match=message):
            unpack(zipped(tmp_path / "bad.zip", list(files.items())), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(archive | {cell: archive[cell] + b" "}, "another hash than its manifest says")
    refused(archive | {"more": b"x"}, "'more' is not in its manifest")
    refused({k: v for k, v in archive.items() if k != cell}, "of its manifest is missing")
    refused({k: v for k, v in archive.items() if k != MANIFEST}, "has no manifest.json")
    refused(archive | {MANIFEST: b"{}"}, "manifest.json: field")
    twice = [*archive.items(), (cell, archive[cell])]
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "bad.zip", twice)
    with pytest.raises(UserError, match="occurs twice"):
        unpack(path, tmp_path / "out")


def test_a_recipe_that_is_not_the_records_is_found(
    archive: dict[str, bytes], tmp_path: Path
) -> None:
    recipe = next(name for name in archive if name.startswith("recipes/"))
    manifest = json.loads(archive[MANIFEST])
    manifest["files"][recipe] = sha(b"{}")
    files = archive | {recipe: b"{}", MANIFEST: json.dumps(manifest).encode()}
    with pytest.raises(UserError, match="is not the recipe of"):
        unpack(zipped(tmp_path / "bad.zip", list(files.items())), tmp_path / "out")


def test_every_record_of_an_archive_is_checked(archive: dict[str, bytes], tmp_path: Path) -> None:
    manifest = json.loads(archive[MANIFEST])
    twice = manifest["entries"] * 2
    for entries, message in (([], "has no records"), (twice, "is twice among its entries")):
        files = archive | {MANIFEST: json.dumps({**manifest, "entries": entries}).encode()}
        with pytest.raises(UserError, match=message):
            unpack(zipped(tmp_path / "bad.zip", list(files.items())), tmp_path / "out")
    name = "records/digits/hidden.json"
    manifest["files"][name] = sha(b"{}")
    files = archive | {name: b"{}", MANIFEST: json.dumps(manifest).encode()}
    with pytest.raises(UserError, match=r"hidden\.json' is not among its entries"):
        unpack(zipped(tmp_path / "bad.zip", list(files.items())), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="is not a readable zip"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


@settings(deadline=None, max_examples=60)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1))
def test_damaged_archives_never_give_other_records(changes: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = honest(folder / "r")
        pack([path], folder / "a.zip")
        data = bytearray((folder / "a.zip").read_bytes())
        for position, flip in changes:
            data[position % len(data)] ^= flip
        (folder / "b.zip").write_bytes(data)
        try:
            found = unpack(folder / "b.zip", folder / "out")
        except UserError:
            return
        assert [p.read_bytes() for p in found] == [path.read_bytes()]


def test_a_bomb_is_refused_before_it_is_read(
    archive: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmbench.leaderboard.submit.MAX_BYTES", 1000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("zeros", b"0" * 100_000)
    (tmp_path / "bomb.zip").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="holds more than"):
        unpack(tmp_path / "bomb.zip", tmp_path / "out")
