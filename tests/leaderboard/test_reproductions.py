"""A cell measured on two machines: evidence where the results agree, a conflict where not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from record_factory import metric, on_disk, record, with_artifact

from cmbench.errors import UserError
from cmbench.leaderboard.merge import merge
from cmbench.leaderboard.reproduced import agreement
from cmbench.records.artifacts import read_artifact
from cmbench.records.folders import read_records, reproductions
from cmbench.records.record import FirstSamples, Record, read_record
from cmbench.records.workspace import Workspace

CELL = "digits-alpha-demo-nfe1-s0"


def measured(value: float, **fields: Any) -> Record:
    return record(metrics={"fd-digits": metric(value, standard_error=0.01)}, **fields)


def two_machines(folder: Path, first: float, second: float) -> list[Path]:
    """Workspaces with one cell each, its training curve and picture of that machine."""
    for name, value in (("one", first), ("two", second)):
        place = folder / name / "records" / "digits"
        item = measured(value, created=f"2026-01-01T00:00:0{len(name)}+00:00")
        item = with_artifact(place, item, "curve", "curves/run.csv", f"{value}".encode())
        on_disk(place, [item])
    return [folder / "one", folder / "two"]


def test_an_honest_reproduction_is_kept_as_evidence(tmp_path: Path) -> None:
    sources, target = two_machines(tmp_path, 1.845774, 1.845763), tmp_path / "all"
    result = merge(sources, target)
    assert result.added == (f"digits/{CELL}",)
    (told,) = result.reproduced
    assert told.startswith(
        f"digits/{CELL}: metric fd-digits 1.84576 again, 1.84577 stored, allowed ±0.0185 (1 %)"
    )
    main = target / "digits" / f"{CELL}.json"
    assert read_record(main).metrics["fd-digits"].value == 1.845774
    (other,) = reproductions(main)
    again = read_record(other)
    assert again.metrics["fd-digits"].value == 1.845763
    assert read_artifact(other, again.artifacts["curve"]) == b"1.845763"
    assert read_artifact(main, read_record(main).artifacts["curve"]) == b"1.845774"
    assert [path for path, _ in read_records(target / "digits")] == [main], "no row of its own"


def test_merging_on_loses_no_evidence(tmp_path: Path) -> None:
    sources, target = two_machines(tmp_path, 1.845774, 1.845763), tmp_path / "all"
    merge(sources, target)
    files = sorted(p.relative_to(target) for p in target.rglob("*"))
    assert merge([*sources, target], target).reproduced == ()
    assert sorted(p.relative_to(target) for p in target.rglob("*")) == files
    for name, start in (("next", ()), ("other way", (sources[1],))):
        merge([*start, target], tmp_path / name)
        values = {
            read_record(p).metrics["fd-digits"].value for p in (tmp_path / name).rglob("*.json")
        }
        assert values == {1.845774, 1.845763}


def test_what_does_not_agree_is_a_conflict_with_the_reason(tmp_path: Path) -> None:
    sources = two_machines(tmp_path, 1.845774, 1.90)
    with pytest.raises(UserError, match=r"1 conflicting cell.*\(metric fd-digits: 1\.9 again"):
        merge(sources, tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"training": {"config_sha256": "0" * 64}}, "training.config_sha256"),
        ({"sampling": {"sigmas": [80.0]}}, None),
        ({"sampling": {"sigmas": [70.0]}}, "sampling.sigmas"),
        ({"rank_metric": "other"}, "rank_metric"),
        ({"warnings": ["it was hot"]}, None),
    ],
)
def test_what_decides_the_numbers_must_be_equal(change: dict[str, Any], told: str | None) -> None:
    checks = agreement(measured(1.0), measured(1.0 + 1e-6, **change))
    failed = [check.detail for check in checks if check.state == "failed"]
    assert failed == ([] if told is None else [f"other {told}"])


def first_samples(feature: float, pixels: str, tolerance: float = 1e-3) -> FirstSamples:
    return FirstSamples(
        count=4,
        pixels_sha256=pixels * 64,
        mean_feature=[1.0, feature],
        pixel_tolerance=2.0,
        feature_tolerance=tolerance,
    )


@pytest.mark.parametrize(
    ("stored", "again", "state"),
    [
        (first_samples(0.0, "a"), first_samples(0.00015, "b"), "reproduced"),
        (first_samples(0.0, "a"), first_samples(0.0003, "b"), "failed"),
        (first_samples(0.0, "a", 1e-4), first_samples(0.00015, "b"), "failed"),  # the record's own
        (first_samples(0.0, "a"), first_samples(0.00015, "b", 1e-4), "reproduced"),
        (first_samples(0.0, "a"), first_samples(0.5, "a"), None),  # the same pixels
        (None, first_samples(0.5, "b"), None),
        (first_samples(0.5, "b"), None, None),
    ],
)
def test_first_samples_agree_within_what_the_stored_record_allows(
    stored: FirstSamples | None, again: FirstSamples | None, state: str | None
) -> None:
    checks = agreement(measured(1.0, first_samples=stored), measured(1.0, first_samples=again))
    found = [check.state for check in checks if check.name.startswith("mean feature")]
    assert found == ([] if state is None else [state])


def test_a_metric_of_one_record_only_is_no_agreement() -> None:
    more = record(metrics={"fd-digits": metric(1.0), "kd": metric(1.0, "kd")})
    (failed,) = [c for c in agreement(more, measured(1.0)) if c.state == "failed"]
    assert (failed.name, failed.detail) == ("metric kd", "in one of the records only")


def test_show_names_the_evidence_and_pages_do_not_count_it(
    cmbench: Callable[..., Any], tmp_path: Path, workspace: Workspace
) -> None:
    sources = two_machines(tmp_path, 1.845774, 1.845763)
    found = cmbench("merge", *map(str, sources))
    assert found.code == 0, found.err
    assert f"reproduced  digits/{CELL}: metric fd-digits 1.84576 again" in found.out
    assert "1 added, 0 replaced, 1 reproduced, 0 already there" in found.err
    shown = cmbench("show", CELL).out
    assert "reproduced   fd-digits 1.845763 on x86_64" in shown
    assert cmbench("report").code == 0
    assert cmbench("export", "json", "--cells").out.count('"cell"') == 1
