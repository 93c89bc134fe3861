"""Each check of a record by itself: what it says where it passes, fails, or cannot be made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, on_disk, png, record, sha, with_artifact
from test_verify_and_submit import again, first_samples, honest, with_checksums

from cmbench.errors import UserError
from cmbench.leaderboard.sampled_again import Check, _same
from cmbench.leaderboard.verify import verify_record
from cmbench.records.record import Artifact, Record
from cmbench.records.reproduction import TOLERANCES, Reproduction


def check(path: Path, name: str, **options: Any) -> tuple[str, str]:
    """State and detail of one check."""
    (found,) = [c for c in verify_record(path, **options) if c.name == name]
    return found.state, found.detail


def written(folder: Path, item: Record) -> Path:
    return on_disk(folder, [item])[0][0]


def test_what_a_sound_record_says(tmp_path: Path) -> None:
    path = honest(tmp_path)
    made = json.loads(path.read_text())
    assert verify_record(path)[:4] == [
        Check("record", "ok", f"valid, schema version {made['schema_version']}"),
        Check("bytes", "ok", f"sha256 {sha(path.read_bytes())}"),
        Check("recipe hash", "ok", made["training"]["config_sha256"]),
        Check("artifact grid", "ok", sha(png())),
    ]
    path.write_text(path.read_text() + " ")
    stored, expected = sha(path.read_bytes()), sha(path.read_bytes()[:-1])
    assert check(path, "bytes") == (
        "failed",
        f"not the canonical form: {stored}, expected {expected}",
    )


# ---- the recipe ---------------------------------------------------------------------------------


def recipe_record(teacher: str | None, hashed: str | None, **fields: Any) -> Record:
    config = {"teacher": "edm:demo", "lr": 0.1}
    digest = hashlib.sha256(json.dumps([config, hashed], sort_keys=True).encode()).hexdigest()
    training = {"config": config, "config_sha256": digest, "teacher": teacher}
    return record(training=training, **fields)


FAILED: dict[str, Any] = {"status": "failed", "metrics": {}}


@pytest.mark.parametrize(
    ("teacher", "hashed", "fields", "state"),
    [
        (None, None, {}, "ok"),
        ("digits/edm-s0", "digits/edm-s0", {}, "ok"),
        ("digits/edm-s0", None, {}, "ok"),
        ("digits/edm-s0", "digits/edm-s1", {}, "failed"),
        (None, "digits/edm-s0", {}, "failed"),
        (None, "digits/edm-s0", FAILED, "not checked"),
        ("digits/edm-s0", "digits/edm-s1", FAILED, "failed"),
    ],
)
def test_the_recipes_hash_covers_the_teacher(
    tmp_path: Path, teacher: str | None, hashed: str | None, fields: dict[str, Any], state: str
) -> None:
    item = recipe_record(teacher, hashed, **fields)
    found = check(written(tmp_path, item), "recipe hash")
    digest = item.training.config_sha256
    told = {
        "ok": digest,
        "failed": f"the recipe does not give {digest}",
        "not checked": "it covers a teacher that the record omits",
    }
    assert found == (state, told[state])


def test_an_unfinished_record_without_a_teacher_has_no_excuse(tmp_path: Path) -> None:
    item = record(**FAILED, training={"config": {"lr": 0.1}, "config_sha256": "0" * 64})
    assert check(written(tmp_path, item), "recipe hash")[0] == "failed"


# ---- artifacts ----------------------------------------------------------------------------------


def test_artifacts_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    item = with_artifact(folder, record(), "curve", "curves/a.csv", b"nimg,loss\n")
    item = with_artifact(folder, item, "grid", "a.png", png())
    (folder / "a.png").write_bytes(b"other")
    outside = item.model_copy(
        update={
            "artifacts": {
                **item.artifacts,
                "away": Artifact(file="../b.png", sha256=sha(b"secret")),
                "lost": Artifact(file="lost.png", sha256="0" * 64),
                "loop": Artifact(file="loop.png", sha256="0" * 64),
            }
        }
    )
    (tmp_path / "b.png").write_bytes(b"secret")
    (folder / "loop.png").symlink_to("loop.png")
    found = {c.name: (c.state, c.detail) for c in verify_record(written(folder, outside))}
    names = [name for name in found if name.startswith("artifact")]
    assert names == [f"artifact {n}" for n in ("away", "curve", "grid", "loop", "lost")]
    assert found["artifact away"] == ("failed", "../b.png leaves the record's folder")
    assert found["artifact curve"] == ("ok", sha(b"nimg,loss\n"))
    assert found["artifact grid"] == ("failed", "a.png has another hash")
    assert found["artifact lost"] == ("not checked", "lost.png is not here")
    assert found["artifact loop"][0] == "failed"
    assert "'loop.png' cannot be read" in found["artifact loop"][1]


# ---- the run ------------------------------------------------------------------------------------

RUN = "digits/alpha-s0"


def test_the_checkpoint_is_one_of_the_runs_weights(tmp_path: Path) -> None:
    item = record(training={"checkpoint_sha256": sha(b"second"), "run": RUN})
    path, runs = written(tmp_path / "r", item), tmp_path / "runs"
    assert check(path, "checkpoint") == ("not checked", "no folder of runs")
    told = f"no weights of {RUN} here"
    assert check(path, "checkpoint", runs=runs) == ("not checked", told)
    (runs / RUN).mkdir(parents=True)
    (runs / RUN / "weights-first.safetensors").write_bytes(b"first")
    (runs / RUN / "other.safetensors").write_bytes(b"second")
    told = f"none of weights-first.safetensors has the hash {sha(b'second')}"
    assert check(path, "checkpoint", runs=runs) == ("failed", told)
    (runs / RUN / "weights-second.safetensors").write_bytes(b"second")
    assert check(path, "checkpoint", runs=runs) == ("ok", sha(b"second"))
    none = written(tmp_path / "n", record(training={"checkpoint_sha256": "", "run": RUN}))
    told = "the record holds no checkpoint hash"
    assert check(none, "checkpoint", runs=runs) == ("not checked", told)


def test_a_run_outside_of_the_runs_is_not_read(tmp_path: Path) -> None:
    item = record(training={"checkpoint_sha256": sha(b"w"), "run": "../outside"})
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights-final.safetensors").write_bytes(b"w")
    (tmp_path / "runs").mkdir()
    found = check(written(tmp_path / "r", item), "checkpoint", runs=tmp_path / "runs")
    assert found == ("not checked", "no folder of runs")


def test_snapshots_of_a_reconstructed_average(tmp_path: Path) -> None:
    names = ["1.safetensors", "2.safetensors", "3.safetensors"]
    hashes = {name: sha(name) for name in names}
    item = record(training={"run": RUN, "snapshots": hashes})
    path, runs = written(tmp_path / "r", item), tmp_path / "runs"
    folder = runs / RUN / "snapshots"
    assert check(path, "snapshots") == ("not checked", "no folder of runs")
    assert check(path, "snapshots", runs=runs) == ("not checked", "3 of 3 are not here")
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    assert check(path, "snapshots", runs=runs) == ("ok", "3 of the hashes that the record holds")
    (folder / names[0]).unlink()
    assert check(path, "snapshots", runs=runs) == ("not checked", "1 of 3 are not here")
    for name in names[:0:-1]:
        (folder / name).write_text("changed")
    told = "of another hash: 2.safetensors, 3.safetensors"
    assert check(path, "snapshots", runs=runs) == ("failed", told)
    kept = written(tmp_path / "k", record(training={"run": RUN}))
    assert not [c for c in verify_record(kept, runs=runs) if c.name == "snapshots"]
    away = record(training={"run": "../outside", "snapshots": hashes})
    (tmp_path / "outside" / "snapshots").mkdir(parents=True)
    found = check(written(tmp_path / "a", away), "snapshots", runs=runs)
    assert found == ("not checked", "no folder of runs")
    around = tmp_path / "around"
    around.symlink_to(around)
    state, detail = check(path, "snapshots", runs=around)
    assert (state, detail[:24]) == ("not checked", "the run cannot be read: ")


def test_parts_agree_to_the_rounding_of_another_machine() -> None:
    assert _same({"a": [1.0, "x"]}, {"a": [1.0 + 1e-9, "x"]})
    assert not _same({"a": 1.0}, {"a": 1.001})
    assert not _same(1.0, None)
    assert not _same(None, 1.0)
    assert not _same({"a": 1.0}, {"b": 1.0})
    assert not _same([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("counted", "adaptive", "expected"),
    [
        (None, False, ("not checked", "the record holds no counted NFE")),
        (2.0, False, ("ok", "2 declared and counted")),
        (2.5, False, ("failed", "2 declared, 2.5 counted")),
        (1.5, False, ("failed", "2 declared, 1.5 counted")),
        (2.000001, False, ("failed", "2 declared, 2.000001 counted")),
        (1.5, True, ("ok", "at most 2 declared, 1.5 counted")),
        (2.0, True, ("ok", "2 declared and counted")),
        (2.5, True, ("failed", "at most 2 declared, 2.5 counted")),
    ],
)
def test_the_counted_nfe(
    tmp_path: Path, counted: float | None, adaptive: bool, expected: tuple[str, str]
) -> None:
    found = {"nfe_measured": counted, "adaptive": adaptive}
    path = written(tmp_path, record(nfe=2, sampling=found))
    assert check(path, "NFE") == expected


# ---- sampling again -----------------------------------------------------------------------------

GRID = "pixels of the sample grid"


def test_what_stands_in_the_way_of_sampling_again(tmp_path: Path) -> None:
    path = with_checksums(tmp_path)
    assert check(path, "samples") == ("not checked", "skipped (--no-resample)")

    def refuse(item: Record, full: bool) -> Reproduction:
        raise UserError("weights", "are not here")

    told = "cannot be sampled again: weights: are not here"
    assert check(path, "samples", reproduce=refuse) == ("not checked", told)


@pytest.mark.parametrize("full", [True, False])
def test_what_is_asked_of_the_reproduction(tmp_path: Path, full: bool) -> None:
    asked: list[tuple[str, bool]] = []

    def reproduce(item: Record, full: bool) -> Reproduction:
        asked.append((item.cell, full))
        return again()(item, full)

    path = with_checksums(tmp_path)
    found = verify_record(path, reproduce=reproduce, full=full)
    assert asked == [(path.stem, full)]
    metrics = [c.name for c in found if c.name.startswith("metric")]
    if full:
        assert metrics == ["metric fd-digits", "metric precision", "metric recall"]
    else:
        assert metrics == ["metrics"]
        assert found[-1].detail == "compared with --full only"


@pytest.mark.parametrize(
    ("stated", "difference", "state"),
    [(2, 2, "reproduced"), (2, 3, "failed"), (100, 2, "reproduced"), (100, 3, "failed")],
)
def test_a_record_cannot_widen_its_own_tolerance(
    tmp_path: Path, stated: int, difference: int, state: str
) -> None:
    limit, relative = TOLERANCES["fp32"]
    assert limit == 2, "levels of 255"
    stored = first_samples(pixel_tolerance=stated, feature_tolerance=0.9)
    made = first_samples(pixels_sha256="b" * 64, mean_feature=[3.0, 4.0 + 10 * relative])
    path = honest(tmp_path, first_samples=stored)
    grid = png((200 + difference, 30, 30))
    assert check(path, GRID, reproduce=again(made, grid))[0] == state
    assert check(path, "mean feature of 256 samples", reproduce=again(made, grid))[0] == "failed"


def test_lower_precision_has_its_own_limits(tmp_path: Path) -> None:
    pixels, features = TOLERANCES["bf16"]
    assert pixels > TOLERANCES["fp32"][0]
    stored = first_samples(pixel_tolerance=200, feature_tolerance=0.9)
    made = first_samples(pixels_sha256="b" * 64, mean_feature=[3.0, 4.0 + 4.9 * features])
    path = honest(tmp_path, first_samples=stored, sampling={"dtype": "bfloat16"})
    for difference, state in ((int(pixels), "reproduced"), (int(pixels) + 1, "failed")):
        grid = png((200 - difference, 30, 30))
        assert check(path, GRID, reproduce=again(made, grid))[0] == state
    name = "mean feature of 256 samples"
    assert check(path, name, reproduce=again(made, png()))[0] == "reproduced"


def test_features_are_compared_relative_to_their_norm(tmp_path: Path) -> None:
    name = "mean feature of 256 samples"
    path = with_checksums(tmp_path)
    other = {"pixels_sha256": "b" * 64}
    same = again(first_samples(**other))
    assert check(path, name, reproduce=same) == ("ok", "the same")
    shorter = again(first_samples(**other, mean_feature=[3.0, 4.0, 5.0]))
    assert check(path, name, reproduce=shorter) == ("failed", "3 features instead of 2")
    far = again(first_samples(**other, mean_feature=[3.0, 9.0]))
    assert check(path, name, reproduce=far) == ("failed", "differs by 1 relative, allowed 0.0002")
    zero = honest(tmp_path / "z", first_samples=first_samples(mean_feature=[0.0, 0.0]))
    assert check(zero, name, reproduce=far)[0] == "failed"


def test_grids_that_cannot_be_compared(tmp_path: Path) -> None:
    made = first_samples(pixels_sha256="b" * 64)
    path = with_checksums(tmp_path / "r")
    nothing: Any = lambda item, full: Reproduction(made, None, {})  # noqa: E731
    told = "no sample grid to compare with"
    assert check(path, GRID, reproduce=nothing) == ("not checked", told)
    other_size = again(made, png(size=(8, 8)))
    told = "(8, 8, 3) instead of (16, 32, 3) pixels"
    assert check(path, GRID, reproduce=other_size) == ("failed", told)
    assert check(path, GRID, reproduce=again(made, png())) == ("ok", "the same")
    (tmp_path / "r" / "a.png").unlink()
    assert check(path, GRID, reproduce=again(made)) == ("not checked", "a.png is not here")
    (tmp_path / "outside.png").write_bytes(png())
    item = record(
        first_samples=first_samples(),
        artifacts={"grid": Artifact(file="../outside.png", sha256=sha(png()))},
    )
    away = written(tmp_path / "o", item)
    found = check(away, GRID, reproduce=again(made))
    assert found == ("not checked", "../outside.png is not here")
    none = written(tmp_path / "n", record(first_samples=first_samples()))
    assert check(none, GRID, reproduce=again(made))[1] == "no sample grid to compare with"


def test_equal_checksums_leave_no_room_for_another_grid(tmp_path: Path) -> None:
    path = with_checksums(tmp_path)
    found = check(path, GRID, reproduce=again(grid=png((201, 30, 30))))
    assert found == ("failed", "differs by 1 levels, allowed 0")


@pytest.mark.parametrize(
    ("stored", "changes", "expected"),
    [
        (
            metric(64.0),
            {"value": 64.5},
            ("reproduced", "64.5 again, 64 stored, allowed ±0.64 (1 %)"),
        ),
        (
            metric(64.0),
            {"value": 63.5},
            ("reproduced", "63.5 again, 64 stored, allowed ±0.64 (1 %)"),
        ),
        (metric(64.0), {"value": 65.0}, ("failed", "65 again, 64 stored, allowed ±0.64 (1 %)")),
        (
            metric(-64.0),
            {"value": -64.5},
            ("reproduced", "-64.5 again, -64 stored, allowed ±0.64 (1 %)"),
        ),
        (
            metric(159.115),
            {"value": 159.1150001},
            ("reproduced", "159.1150001 again, 159.115 stored, allowed ±1.59 (1 %)"),
        ),
        (metric(2.0), {"value": None}, ("failed", "None again, 2.0 stored")),
        (metric(None), {"value": 2.0}, ("failed", "2.0 again, None stored")),
        (metric(None), {}, ("ok", "None again, None stored")),
        (metric(2.0), {}, ("ok", "2, the same")),
        (metric(2.0, key="k"), {"key": "j"}, ("failed", "measured under j instead of k")),
        (
            metric(1.0),
            {"value": 1.046875, "standard_error": 0.5},
            ("reproduced", "1.04688 again, 1 stored, allowed ±0.05 (0.1 standard errors)"),
        ),
        (
            metric(1.0),
            {"value": 1.005, "standard_error": 1e-6},
            ("reproduced", "1.005 again, 1 stored, allowed ±0.01 (1 %)"),
        ),
    ],
)
def test_metrics_measured_again(
    tmp_path: Path, stored: Any, changes: dict[str, Any], expected: tuple[str, str]
) -> None:
    path = honest(tmp_path, metrics={"fd-digits": stored})
    reproduce = again(**{"fd-digits": changes})
    assert check(path, "metric fd-digits", reproduce=reproduce, full=True) == expected


def test_a_metric_that_was_not_measured_again(tmp_path: Path) -> None:
    path = with_checksums(tmp_path)
    nothing: Any = lambda item, full: Reproduction(item.first_samples, png(), {})  # noqa: E731
    found = check(path, "metric recall", reproduce=nothing, full=True)
    assert found == ("not checked", "it was not measured again")


# ---- what stands beside a value ------------------------------------------------------------------


def test_samples_from_elsewhere_have_no_recipe_and_are_not_sampled_again(tmp_path: Path) -> None:
    training = {"config": {}, "config_sha256": "", "recipe": ""}
    path = written(tmp_path, record(kind="scored samples", training=training))
    expected = ("not checked", "the samples come without a recipe")
    assert check(path, "recipe hash") == expected
    expected = ("not checked", "scored samples: they are not sampled again")
    for full in (False, True):
        assert check(path, "samples", reproduce=again(), full=full) == expected


def test_a_file_of_another_name_is_not_the_cells(tmp_path: Path) -> None:
    path = honest(tmp_path)
    copy = path.with_name("copy.json")
    copy.write_bytes(path.read_bytes())
    cell = path.stem
    assert check(copy, "name") == ("failed", f"the file is copy.json, the cell {cell}")
    assert "name" not in [c.name for c in verify_record(path)]


def test_the_number_of_samples_is_that_of_the_metrics_keys(tmp_path: Path) -> None:
    key = "fd:digits-cnn@bd87bcdb:none:round:n-1:float64:ref=42d17f68:n=300:v1"
    item = record(metrics={"fd-digits": metric(1.0, key=key)}, sampling={"num_samples": 2000})
    assert check(written(tmp_path / "a", item), "number of samples") == (
        "failed",
        "2000 samples, but the keys of its metrics say {300}",
    )
    fits = record(metrics={"fd-digits": metric(1.0, key=key)}, sampling={"num_samples": 300})
    found = verify_record(written(tmp_path / "b", fits))
    assert "number of samples" not in [c.name for c in found]


FLOOR = {"value": 0.3, "std": 0.1, "samples": 2000, "reference_samples": 1797, "splits": 20}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"standard_error": 0.2}, "standard error"),
        ({"interval": (0.1, 0.2)}, "interval"),
        ({"detail": {"floor": {**FLOOR, "value": 99.0}}}, "floor"),
        ({"detail": {"floor": FLOOR, "infinity": {"value": 0.5}}}, "infinity"),
    ],
)
def test_what_stands_beside_a_value_is_compared_too(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    stored = metric(1.0, standard_error=0.1, interval=(0.8, 1.2), detail={"floor": FLOOR})
    path = honest(tmp_path, first_samples=first_samples(), metrics={"fd-digits": stored})
    found = verify_record(path, reproduce=again(**{"fd-digits": change}), full=True)
    failed = [c for c in found if c.state == "failed"]
    assert failed == [Check("metric fd-digits", "failed", f"other {told} than measured again")]
    rounded = {"interval": (0.8 + 1e-12, 1.2), "detail": {"floor": {**FLOOR, "value": 0.3 + 1e-12}}}
    sound = verify_record(path, reproduce=again(**{"fd-digits": rounded}), full=True)
    assert "failed" not in [c.state for c in sound]


def test_a_metric_that_was_removed_is_missed(tmp_path: Path) -> None:
    path = honest(tmp_path, first_samples=first_samples(), metrics={})

    def reproduce(item: Record, full: bool) -> Reproduction:
        return Reproduction(first_samples(), png(), {"fd-digits": metric(1.0)})

    assert check(path, "metric fd-digits", reproduce=reproduce, full=True) == (
        "failed",
        "measured, but not in the record",
    )


# ---- values beside what was stored with them ----------------------------------------------------

INFINITY = {"value": 1.0, "interval": [0.8, 1.2], "half_distances": [2.5, 3.5], "reliable": True}


def metric_check(folder: Path, **fields: Any) -> tuple[str, str] | None:
    item = record(metrics={"fd-digits": metric(**fields)})
    checks = verify_record(written(folder, item))
    return next(((c.state, c.detail) for c in checks if c.name == "metric fd-digits"), None)


@pytest.mark.parametrize(
    ("value", "fields", "told"),
    [
        (159.1, {"interval": (150.0, 168.0)}, None),
        (0.0, {"interval": (1e-18, 0.1)}, None),
        (1.0, {"interval": (150.0, 168.0)}, "its value 1 is outside its 95 % interval, 150 to 168"),
        (200.0, {"interval": (150.0, 168.0)}, "its value 200 is outside its 95 % interval"),
        # An older record's interval is that of the extrapolation, which the value is not in.
        (2.0, {"interval": (0.8, 1.2), "detail": {"infinity": INFINITY}}, None),
        (2.0, {"interval": (1.9, 2.1), "detail": {"infinity": INFINITY}}, None),
        (
            1.1,
            {"interval": (0.8, 1.2), "detail": {"infinity": INFINITY}},
            "its value is 1.1, but its extrapolation is one of 2",
        ),
        (
            2.0,
            {"interval": (1.9, 2.1), "detail": {"infinity": {**INFINITY, "value": 0.1}}},
            "its extrapolation 0.1 is outside the interval of that",
        ),
        (2.0, {"detail": {"infinity": {**INFINITY, "half_distances": ["x", 1.0]}}}, None),
        (None, {"interval": (150.0, 168.0)}, None),
    ],
)
def test_an_edited_value_contradicts_what_was_stored_with_it(
    tmp_path: Path, value: float | None, fields: dict[str, Any], told: str | None
) -> None:
    found = metric_check(tmp_path, value=value, **fields)
    if told is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == "failed"
        assert found[1].startswith(told)
